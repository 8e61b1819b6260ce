"""Build the vocabulary matrices of a model for the output vocabulary."""
