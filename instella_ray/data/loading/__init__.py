"""Deterministic data loading: batches in an order that depends only on the seed, for any number of workers."""
