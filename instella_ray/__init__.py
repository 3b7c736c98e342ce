"""Instella-T2I on Ray: binary image tokens, from captioned shards to a served image."""

__version__ = "0.1.0"
