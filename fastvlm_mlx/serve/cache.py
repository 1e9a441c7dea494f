"""What is kept across requests."""

from __future__ import annotations

from ..generation.prompt_cache import PromptCache


class RequestCache(PromptCache):
    """Images and beginnings of prompts that earlier requests brought, within one byte budget."""
