"""What compiled kernels are made of, what their launches will cost, and the search for better configurations."""
