"""Questions about images, read from a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

DEFAULT_QUESTION = "Describe the image."
FIELDS = ("image", "question", "answer")


def read_questions(file: Path, fields: Sequence[str] = FIELDS) -> list[dict[str, str]]:
    """The lines of a .jsonl file, in which images' paths are relative to the file.

    Args:
        file: a JSON object per line; `task` is optional, and "all" by default.
        fields: the names that each object must have, `image` among them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not an object with texts in these fields.
    """
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            image = file.parent / row["image"]
            rows.append({"task": "all", **row, "image": str(image)})
            if not all(isinstance(rows[-1][name], str) for name in fields):
                raise TypeError
        except (ValueError, TypeError, KeyError):
            raise ValueError(
                f"{file}, line {number} is not an object with the texts {', '.join(fields)}."
            ) from None
    return rows
