"""Learned quantization."""
