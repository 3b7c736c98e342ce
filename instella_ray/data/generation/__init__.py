"""New captions and new images, made by pretrained models."""
