"""Metrics, confidence intervals and reports for generated samples and tokenizers."""
