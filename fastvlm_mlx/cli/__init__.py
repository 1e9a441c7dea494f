"""The `fastvlm` command."""
