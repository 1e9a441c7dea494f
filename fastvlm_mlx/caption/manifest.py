"""What is known of every image of a run, kept in SQLite so that a run that ends anyhow can go on.

Answers are stored as they come, by what was asked of which pixels; then the caption is written to
the output, and only then is the image marked as done. Whatever a run leaves behind between two of
these steps, the next one finds the answer, looks whether the output has it, and goes on.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from ..checks import reason, shown

ANSWERED, FAILED, WRITTEN = "answered", "failed", "written"
VERSION = 1
WAIT = 60  # seconds for another process of the run to finish what it writes
TABLES = """
CREATE TABLE answers (
    pixels TEXT, question TEXT, text TEXT NOT NULL, finish_reason TEXT NOT NULL,
    PRIMARY KEY (pixels, question)
) WITHOUT ROWID;
CREATE TABLE images (
    key TEXT PRIMARY KEY, recipe TEXT NOT NULL, stamp TEXT NOT NULL, state TEXT NOT NULL,
    pixels TEXT, planned TEXT, flags TEXT, error TEXT
) WITHOUT ROWID;
CREATE TABLE facts (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
"""


class Answer(NamedTuple):
    """What the model said, and why it ended."""

    text: str
    finish_reason: str


class Entry(NamedTuple):
    """What is known of an image.

    Attributes:
        recipe: of the job, model and options; another one makes the rest void.
        stamp: of the file.
        state: ANSWERED (to be written), WRITTEN, or FAILED.
        pixels: a hash of what the model sees.
        planned: what the output is to hold once it is written, where that depends on what it held.
        error: why it failed.
    """

    recipe: str
    stamp: str
    state: str
    pixels: str | None = None
    planned: str | None = None
    flags: str | None = None
    error: str | None = None


class Manifest:
    """The file; changes are kept by `commit`.

    Args:
        file: made if there is none.
        shared: several processes use it, perhaps from several machines.

    Raises:
        ValueError: it is another kind of file, or of another version.
        OSError: it can't be read or written.
    """

    def __init__(self, file: Path, *, shared: bool = False):
        self.file = file
        try:
            self._open(shared)
        except sqlite3.Error as error:
            raise _refusal(file, error) from None

    def _open(self, shared: bool) -> None:
        self._connection = sqlite3.connect(self.file, timeout=WAIT, isolation_level=None)
        # A write-ahead log needs shared memory, which machines don't have in common.
        self._connection.execute(f"PRAGMA journal_mode={'DELETE' if shared else 'WAL'}")
        self._connection.execute("PRAGMA synchronous=NORMAL")
        self._connection.execute("BEGIN IMMEDIATE")
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        if version == 0:
            for statement in filter(str.strip, TABLES.split(";")):
                self._connection.execute(statement)
            self._connection.execute(f"PRAGMA user_version={VERSION}")
        self._connection.execute("COMMIT")
        if version not in (0, VERSION):
            raise ValueError(
                f"{shown(str(self.file))} was written by another version of this command; finish "
                "with that version, or remove the file to go by the captions alone."
            )

    # Reading

    def entry(self, key: str) -> Entry | None:
        """What is known of an image."""
        found = self._execute(
            "SELECT recipe, stamp, state, pixels, planned, flags, error FROM images WHERE key = ?",
            (key,),
        ).fetchone()
        return Entry(*found) if found else None

    def answer(self, pixels: str, question: str) -> Answer | None:
        """What was answered to a question about these pixels."""
        found = self._execute(
            "SELECT text, finish_reason FROM answers WHERE pixels = ? AND question = ?",
            (pixels, question),
        ).fetchone()
        return Answer(*found) if found else None

    def fact(self, name: str) -> str | None:
        """A value that `set_fact` stored."""
        found = self._execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return found[0] if found else None

    def failed(self) -> set[str]:
        """The images that have failed."""
        found = self._execute("SELECT key FROM images WHERE state = ?", (FAILED,))
        return {key for (key,) in found}

    def is_empty(self) -> bool:
        """Whether nothing is known of any image."""
        return self._execute("SELECT 1 FROM images LIMIT 1").fetchone() is None

    # Writing

    def add_answer(self, pixels: str, question: str, answer: Answer) -> None:
        """Keep an answer; another process may have had the same one."""
        self._change(
            "INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?)", pixels, question, *answer
        )

    def forget(self, pixels: str, questions: Iterable[str]) -> None:
        """Drop answers that were not fit to be written."""
        for question in questions:
            self._change("DELETE FROM answers WHERE pixels = ? AND question = ?", pixels, question)

    def set_entry(self, key: str, entry: Entry) -> None:
        """Keep what is known of an image."""
        self._change("INSERT OR REPLACE INTO images VALUES (?, ?, ?, ?, ?, ?, ?, ?)", key, *entry)

    def set_fact(self, name: str, value: str) -> None:
        """Keep a value by name."""
        self._change("INSERT OR REPLACE INTO facts VALUES (?, ?)", name, value)

    def commit(self) -> None:
        """Keep the changes, whatever happens to this process from now on."""
        if self._connection.in_transaction:
            self._execute("COMMIT")

    def close(self) -> None:
        """Commit, and release the file."""
        self.commit()
        self._connection.close()

    def _change(self, statement: str, *values: str | None) -> None:
        if not self._connection.in_transaction:
            self._execute("BEGIN IMMEDIATE")
        self._execute(statement, values)

    def _execute(self, statement: str, values: Iterable[str | None] = ()) -> sqlite3.Cursor:
        try:
            return self._connection.execute(statement, tuple(values))
        except sqlite3.Error as error:
            raise _refusal(self.file, error) from None


def _refusal(file: Path, error: sqlite3.Error) -> OSError:
    return OSError(
        f"The manifest {shown(str(file))} can't be used ({reason(error)}); give another with "
        "--manifest, or remove it to go by the captions alone."
    )
