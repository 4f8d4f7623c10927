"""The launchers: a file per op, with its `forward` and `backward`."""
