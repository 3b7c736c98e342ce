"""What plans are made of: the inputs of a training run."""

from ..kit.training_inputs import codes, shards, tokenizer

__all__ = ["codes", "shards", "tokenizer"]
