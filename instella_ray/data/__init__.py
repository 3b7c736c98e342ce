"""From captioned images to packed codes: sources, filters, encoding, deterministic loading, demo scenes."""
