"""The output folder: it appears when it is whole, and its files agree with each other."""
