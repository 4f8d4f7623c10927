"""The kernels and models beside what a user would pick instead: `throughput` times models, `ops` one op at a time."""
