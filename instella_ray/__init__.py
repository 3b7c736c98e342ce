"""Instella-T2I on Ray: binary image tokens, from captioned shards to a served picture."""

__version__ = "0.1.0"
