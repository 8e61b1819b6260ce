"""Train a transplanted model for a few minutes against its base, the exact teacher of its new tokenizer."""
