"""How an op meets PyTorch: its declaration, its registration with the dispatcher, its derivative, its backends."""
