"""The step engine: rows of any requests, at any step, in one batch; its models, its buckets and its draws. No Ray here."""
