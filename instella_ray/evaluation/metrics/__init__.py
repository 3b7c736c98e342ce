"""Metrics, one per file; all merge over shards and report confidence intervals (see :mod:`.base`)."""
