"""Vocabularies by the bytes that their tokens stand for; knows tokenizers, and neither weights nor mergekit."""
