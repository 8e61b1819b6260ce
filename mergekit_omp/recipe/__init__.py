"""From what the user wrote to a resolved recipe: every mistake gets a sentence."""
