"""Evaluate language models on texts, including the built-in ones."""
