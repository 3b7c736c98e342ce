"""Bulk sampling: generates codes and images from prompts on any number of machines."""
