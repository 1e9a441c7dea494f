"""Short wordings of sources and errors."""

from __future__ import annotations


def _reason(error: BaseException) -> str:
    """What an exception says, in brief and without its full stop."""
    cause = getattr(error, "reason", None)
    cause = cause if isinstance(cause, BaseException) else error
    said = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
    return _brief(str(said)).rstrip(".")


def _brief(text: str, limit: int = 160) -> str:
    """`text` on one line of at most `limit` characters."""
    line = " ".join(text[: 4 * limit].split())
    return line if len(line) <= limit else line[: limit - 1] + "…"
