"""Give a matrix of a model the rows of the output vocabulary."""
