"""A question or chat → token ids, with places for its images."""

from .prompt import build_prompt
from .tokenizer import Detokenizer, Tokenizer

__all__ = ["Detokenizer", "Tokenizer", "build_prompt"]
