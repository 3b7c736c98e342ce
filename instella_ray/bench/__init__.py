"""Measurements that any reader can repeat: one file a suite, every ratio against a baseline of the same run."""
