"""Read models: configuration files, tensors with a vocabulary axis, tokenizers."""
