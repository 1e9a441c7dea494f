"""Captions for many images: read ahead, answered together, written exactly once."""

from .job import CaptionJob
from .run import Summary, caption_images

__all__ = ["CaptionJob", "Summary", "caption_images"]
