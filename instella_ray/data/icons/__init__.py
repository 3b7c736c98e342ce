"""Icon and emoji sets as captioned images: packages of drawings, rendered, captioned and split by name."""
