"""Networks and samplers: binary tokenizer (BIT), diffusion and AR generators, text encoder. Independent of Ray."""
