"""Measurements that any reader can repeat: one file a subject, every ratio against a baseline of the same run."""
