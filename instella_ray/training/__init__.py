"""Training on Ray Train: one loop for the tokenizer and both generators, resumable to the last digit."""
