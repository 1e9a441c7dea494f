"""Captions for many images: read ahead, answered together, written exactly once."""

from .job import Job
from .run import Summary, caption_images

__all__ = ["Job", "Summary", "caption_images"]
