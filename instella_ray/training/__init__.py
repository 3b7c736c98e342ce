"""Training of the tokenizer and both generators on Ray Train or in one process, with bit-exact resumption."""
