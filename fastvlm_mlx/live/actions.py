"""What is done about an answer: a command is run, or a URL is told."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable
from queue import Full, Queue
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

from .. import http
from ..checks import brief, reason, shown
from .records import as_record
from .watch import Answer

WAITING = 16  # answers at most that wait for a slow command or URL; later ones are dropped
TIMEOUT = 30.0  # seconds for a command, and for a URL
END_WAIT = 5.0  # seconds at the end for what still waits
MOST_IN_ENVIRONMENT = 2**16  # bytes: the system refuses longer values


class Actions:
    """Runs a command or posts to a URL for answers, in a thread, so that the watch goes on.

    Args:
        command: a program and its arguments; no shell reads them. It gets the answer as standard
            input, and in its environment FASTVLM_TEXT, FASTVLM_TIME, FASTVLM_AT and, of a
            condition, FASTVLM_PROBABILITY.
        webhook: an http or https URL, which gets the answer as a JSON object.
        note: is told what fails; the watch goes on.

    Raises:
        ValueError: the command can't be split into words, or the URL is none.
        FileNotFoundError: there is no such program.
    """

    def __init__(
        self,
        command: str | None = None,
        webhook: str | None = None,
        note: Callable[[str], None] = print,
    ):
        self._command = None if command is None else split_command(command)
        self._webhook = None if webhook is None else checked_url(webhook)
        self._note = note
        self._waiting: Queue[Answer | None] = Queue(WAITING)
        self._thread = Thread(target=self._work, name="actions", daemon=True)
        self._thread.start()

    def act(self, answer: Answer) -> None:
        """Do it, as soon as what came before is done."""
        try:
            self._waiting.put_nowait(answer)
        except Full:
            self._note(f"{WAITING} answers wait for --do or --webhook: one is dropped.")

    def close(self) -> None:
        """Wait a little for what is still to be done."""
        try:
            self._waiting.put(None, timeout=END_WAIT)
        except Full:
            return
        self._thread.join(END_WAIT)

    def _work(self) -> None:
        while (answer := self._waiting.get()) is not None:
            try:
                if self._command is not None:
                    for line in run_command(self._command, answer).splitlines():
                        self._note(line)
                if self._webhook is not None:
                    post(self._webhook, answer)
            except Exception as error:
                self._note(f"{reason(error)}.")


def split_command(command: str) -> list[str]:
    """The words of a command whose program exists."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ValueError(f"--do {shown(command)} can't be read: {reason(error)}.") from None
    if not words:
        raise ValueError("--do is empty: give a program, and arguments if it needs some.")
    if (program := shutil.which(os.path.expanduser(words[0]))) is None:
        raise FileNotFoundError(f"--do {shown(words[0])}: there is no such program.")
    return [program, *words[1:]]


def checked_url(url: str) -> str:
    """A URL that can be posted to."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"--webhook must be an http or https URL, found {shown(url)}.")
    return url


def run_command(command: list[str], answer: Answer) -> str:
    """Run it; what it wrote, of both streams. OSError with a sentence if it fails."""
    record = as_record(answer)
    variables = {
        f"FASTVLM_{name.upper()}": _variable(record[name])
        for name in ("text", "time", "at", "probability")
        if name in record
    }
    try:
        done = subprocess.run(
            command,
            input=answer.text.encode(),
            env=os.environ | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        raise OSError(f"--do: {brief(command[0])} ran longer than {TIMEOUT:g} seconds") from None
    except OSError as error:
        raise OSError(f"--do: {brief(command[0])} can't be run: {reason(error)}") from None
    if done.returncode:
        said = brief(done.stdout.decode(errors="replace"))
        code = f"failed with exit code {done.returncode}"
        raise OSError(f"--do: {brief(command[0])} {code}" + (f": {said}" if said else ""))
    return done.stdout.decode(errors="replace")


def _variable(value: Any) -> str:
    """As the environment takes it: without zero bytes, and not too long."""
    text = str(value).replace("\0", "").encode()[:MOST_IN_ENVIRONMENT]
    return text.decode(errors="ignore")


def post(url: str, answer: Answer) -> None:
    """Post it, and raise OSError with a sentence, of the host only, if that fails."""
    host = urlsplit(url).hostname  # paths and queries hold tokens, as Slack's do
    body = json.dumps(as_record(answer, thumbnail=True), ensure_ascii=False).encode()
    headers = {"Content-Type": "application/json"}
    try:
        with http.plain_client() as client:
            response = client.post(url, content=body, headers=headers, timeout=TIMEOUT)
    except Exception as error:  # the client's own types, which may quote the URL
        raise OSError(f"--webhook: {host} can't be reached: {type(error).__name__}") from None
    if not 200 <= response.status_code < 300:
        raise OSError(f"--webhook: {host} answered {response.status_code}")
