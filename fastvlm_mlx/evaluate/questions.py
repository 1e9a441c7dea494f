"""Questions about images without answers, read from a file."""

from __future__ import annotations

import json
from pathlib import Path

DEFAULT_QUESTION = "Describe the image."


def read_questions(file: Path) -> list[tuple[Path, str]]:
    """The (image, question) pairs of a .jsonl file, in which images' paths are relative to the
    file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not UTF-8, or a line is not an object with these texts.
    """
    try:
        lines = file.read_text(encoding="utf-8").rstrip().split("\n")
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not a JSONL file in UTF-8.") from None
    pairs = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            image, question = row["image"], row["question"]
            if not isinstance(question, str):
                raise TypeError
            pairs.append((file.parent / image, question))
        except (ValueError, TypeError, KeyError):
            raise ValueError(
                f"{file}, line {number} is not an object with the texts image, question."
            ) from None
    return pairs
