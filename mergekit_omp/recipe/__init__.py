"""Check a recipe and resolve it to a Transplant; every mistake raises an OmpError."""
