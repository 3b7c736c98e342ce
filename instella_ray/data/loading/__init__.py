"""Batches in an order that only the seed decides, for any number of workers."""
