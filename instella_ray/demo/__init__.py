"""End-to-end demo on one machine: shards, curation, tokenizer, codes, two generators, endpoint and report."""
