"""Write the output folder: publish it when it is complete, with consistent files."""
