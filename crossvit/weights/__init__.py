"""Weights in files: reading whatever wrote them, fitting them to a model, and writing them."""
