"""Training of the tokenizer and both generators on Ray Train, with bit-exact resumption."""
