"""Curation filters: each class is also the filter's configuration, with its scores, limits and ledger reasons."""
