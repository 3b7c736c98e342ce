"""Benchmark of one GPU in parts, each in a process of its own; see ``docs/benchmarks.md``."""
