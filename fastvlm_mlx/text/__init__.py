"""A question or chat → token ids with the places of images."""

from .prompt import build_prompt
from .tokenizer import Detokenizer, Tokenizer

__all__ = ["Detokenizer", "Tokenizer", "build_prompt"]
