"""The answers of an evaluation on disk, so that a run that ends anyhow goes on where it was.

One JSON object per line. The first says what the answers depend on besides the questions; each
other one is an answer, written out before the next is awaited. A line that a crash tore is cut off
when the file is opened.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

from ..checks import brief, reason, shown

VERSION = 1
START = b'{"fastvlm_eval": '  # of a log, of which a crash may have left less


@dataclass(frozen=True)
class Answer:
    """What the model said.

    Attributes:
        id: of the item.
        key: of the prompt and images; an item that has changed is asked again.
        finish_reason: "stop", or "length" where it was cut off.
        tokens: of the answer.
        ttft: seconds from beginning to read the images to the first token, without waiting for
            others in the batch.
        encoded: whether it has images and all were encoded for it, none known from another
            question.
    """

    id: str
    key: str
    text: str
    finish_reason: str
    tokens: int
    ttft: float
    encoded: bool


class Log:
    """The file, open for one run.

    Args:
        file: made, with its folder, if there is none.
        recipe: what the answers depend on, by name: weights, options.

    Attributes:
        answers: by the item's id; the last one counts.

    Raises:
        ValueError: the file is no such log, was written with another recipe, or is in use.
        OSError: it can't be read or written.
    """

    def __init__(self, file: Path, recipe: Mapping[str, Any]):
        self.file, self.answers = file, dict[str, Answer]()
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.exists() and not file.is_file():
            self._refuse()  # a device or a pipe may never end
        self._file = open(file, "a+b")  # noqa: SIM115
        try:
            self._lock()
            self._read(dict(recipe))
        except BaseException:
            self._file.close()
            raise

    def add(self, answers: Iterable[Answer]) -> None:
        """Keep answers, whatever happens to this process from now on."""
        found = list(answers)
        if found:
            self._write(*map(asdict, found))
            self.answers.update((answer.id, answer) for answer in found)

    def close(self) -> None:
        """Let another run have the file."""
        self._file.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{self.file} is being written by another evaluation.") from None

    def _read(self, recipe: dict[str, Any]) -> None:
        self._file.seek(0)
        *lines, torn = self._file.read().split(b"\n")
        if lines:
            self._check(lines[0], json.loads(json.dumps(recipe)))
        elif not START.startswith(torn[: len(START)]):
            self._refuse()  # a file of someone else's, of which nothing may be cut off
        for number, line in enumerate(lines[1:], 2):
            answer = self._answer(line, number)
            self.answers[answer.id] = answer
        if torn:
            self._file.truncate(sum(len(line) + 1 for line in lines))
        if not lines:
            self._write({"fastvlm_eval": VERSION, "recipe": recipe})

    def _check(self, line: bytes, recipe: dict[str, Any]) -> None:
        """Refuse answers that were given under other conditions."""
        try:
            header = json.loads(line)
            version, written = header["fastvlm_eval"], dict(header["recipe"])
        except (ValueError, KeyError, TypeError):
            self._refuse()
        changed = [k for k in {**recipe, **written} if recipe.get(k) != written.get(k)]
        if version != VERSION or changed:
            what = ", ".join(brief(name) for name in changed) or "the version"
            raise ValueError(
                f"{self.file} has answers for other conditions ({what} changed); name another log, "
                "or remove it to start anew."
            )

    def _refuse(self) -> NoReturn:
        raise ValueError(f"{self.file} is not the log of an evaluation; name another file.")

    def _answer(self, line: bytes, number: int) -> Answer:
        try:
            row = json.loads(line)
            if any(type(row[field.name]).__name__ != field.type for field in fields(Answer)):
                raise TypeError
            return Answer(**{field.name: row[field.name] for field in fields(Answer)})
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{self.file}, line {number} is damaged: {shown(line.decode(errors='replace'))}; "
                "remove that line, and its question is asked again."
            ) from None

    def _write(self, *rows: Mapping[str, Any]) -> None:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        try:
            self._file.write(text.encode())
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            with suppress(OSError):  # closing tries to write what is left
                self._file.close()
            raise OSError(
                f"Cannot write {self.file}: {reason(error)}; the answers before are kept, and the "
                "same command goes on from them."
            ) from None


def digest(*parts: str | bytes) -> str:
    """A hash of texts and bytes in their order."""
    found = hashlib.blake2b(digest_size=12)
    for part in parts:
        data = part.encode(errors="surrogatepass") if isinstance(part, str) else part
        found.update(len(data).to_bytes(8, "little") + data)
    return found.hexdigest()
