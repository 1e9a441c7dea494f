"""Captions for many images: read ahead, answered together, written exactly once."""
