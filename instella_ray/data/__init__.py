"""From captioned pictures to packed codes: sources, filters, encoding, deterministic loading, demo scenes."""
