"""Curation of captioned shards: downloads, filters, deduplication, and a report of what was kept and dropped."""
