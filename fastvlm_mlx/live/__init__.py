"""Answers about the newest frame of a source, again and again."""
