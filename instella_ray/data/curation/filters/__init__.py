"""Curation filters: each a small class that is its own typed configuration, with scores, limits and ledger reasons."""
