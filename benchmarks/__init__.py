"""Measurements of this library, alone and beside others: `python -m benchmarks`."""
