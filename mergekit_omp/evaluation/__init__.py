"""How well a model reads a text, and the texts that come with the package."""
