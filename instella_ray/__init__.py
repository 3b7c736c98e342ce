"""Instella-T2I on Ray: data curation, training, sampling, evaluation and serving of text-to-image over binary tokens."""

__version__ = "0.1.0"
