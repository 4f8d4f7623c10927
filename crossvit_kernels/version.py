"""The version of the distribution crossvit-kernels, of both packages: pyproject.toml reads it from here."""

VERSION = "0.1.0"
