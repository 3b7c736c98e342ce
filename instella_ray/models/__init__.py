"""The networks: the binary tokenizer (BIT), both generators and the frozen text encoder. Torch only, no Ray."""
