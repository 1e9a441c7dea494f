"""A path, URL, bytes, PIL image or array → pixels."""
