"""What `python -m crossvit train` is made of: recipes, data in a reproducible order, processes, checkpoints, loop."""
