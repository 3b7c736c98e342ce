"""Reproducible benchmark suites, one per file; every ratio is against a baseline of the same run."""
