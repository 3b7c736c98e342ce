"""Bulk sampling: prompts in, codes and images out, on any number of machines."""
