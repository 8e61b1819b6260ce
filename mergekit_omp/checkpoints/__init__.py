"""Read models: configurations, tensors with a vocabulary axis and tokenizers."""
