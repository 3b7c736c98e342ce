"""Metrics, intervals and reports of samples and of tokenizers."""
