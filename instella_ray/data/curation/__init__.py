"""Curation: what stays of a set of captioned shards, and why the rest went."""
