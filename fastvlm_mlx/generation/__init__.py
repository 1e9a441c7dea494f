"""Prompt and images → text."""
