"""Connect this package to mergekit."""
