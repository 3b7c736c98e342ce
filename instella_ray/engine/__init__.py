"""Step engine, in which requests at different steps share one batch; its weights, buckets and draws. No Ray."""
