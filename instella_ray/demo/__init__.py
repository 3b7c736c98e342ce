"""The whole loop on one machine: shards, curation, tokenizer, codes, two generators, an endpoint, a report."""
