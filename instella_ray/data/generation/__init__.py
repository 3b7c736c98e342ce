"""Synthetic data by pretrained models: new captions of images, and new images of prompts."""
