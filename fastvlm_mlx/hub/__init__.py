"""A name → a folder: the Hub, downloads, and the registry of published models."""
