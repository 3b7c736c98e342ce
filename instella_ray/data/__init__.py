"""Data pipeline from captioned images to packed codes: sources, curation, encoding, deterministic loading, scenes."""
