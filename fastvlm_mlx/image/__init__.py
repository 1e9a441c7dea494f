"""A path, URL, bytes, PIL image or array → pixel values."""
