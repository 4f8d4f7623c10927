"""Images and their labels: reading, data sets, and transforms."""
