"""Serving: a step engine that batches anything with anything, and the Ray Serve graph around it."""
