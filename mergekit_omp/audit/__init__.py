"""What a donor's tokenizer and rows put into a model, and whether a folder still is what its record says."""
