"""The commands of `python -m crossvit`, a module each, and what they share."""
