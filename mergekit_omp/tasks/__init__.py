"""Define the mergekit tasks between loading the vocabulary tensors of the inputs and merging them."""
