"""Read, match and segment vocabularies by the bytes of their tokens; independent of weights and of mergekit."""
