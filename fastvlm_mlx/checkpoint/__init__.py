"""A folder ↔ a model."""
