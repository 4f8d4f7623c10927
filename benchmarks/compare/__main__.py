"""`python -m benchmarks.compare`: see job.py."""

import sys

from .job import main

if __name__ == "__main__":
    sys.exit(main())
