"""Benchmarks of the kernels and models beside what a user would pick instead: `throughput` (models), `ops` (one op at a time)."""
