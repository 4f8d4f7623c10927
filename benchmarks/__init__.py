"""The kernels and models beside what a user would pick instead: `throughput` times models, `ops` one op at a time."""

import time

STARTED = time.monotonic()  # before torch, whose import takes seconds
