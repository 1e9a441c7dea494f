"""One line of JSON per request, without contents unless they are asked for."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from starlette.types import Scope

from ..checks import brief

logger = logging.getLogger("fastvlm_mlx.serve")


class JsonLines(logging.Formatter):
    """Writes a record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {"time": f"{when}.{int(record.msecs):03d}Z"}
        line["level"] = record.levelname.lower()
        line |= {"event": record.getMessage()} | getattr(record, "fields", {})
        return json.dumps(line)


def log_to_stderr() -> None:
    """Write the server's log, and the web server's warnings, as lines on standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name, level in (("fastvlm_mlx.serve", logging.INFO), ("uvicorn.error", logging.WARNING)):
        found = logging.getLogger(name)
        found.handlers, found.propagate = [handler], False
        found.setLevel(level)


def log_request(scope: Scope, status: int, seconds: float, notes: Mapping[str, Any]) -> None:
    """Log a request; queries of its URL, which may hold anything, are left out."""
    client = scope.get("client")
    fields = {
        "method": scope["method"],
        "path": brief(scope["path"]),
        "status": status,
        "seconds": round(seconds, 4),
        "client": client[0] if client else None,
        **notes,
    }
    level = logging.ERROR if status == 500 else logging.INFO
    logger.log(level, "request", extra={"fields": fields})


def log_failure(error: BaseException) -> None:
    """Log what failed by its kind and place, since its text may hold contents."""
    said = f"{type(error).__name__} at {where(error)}"
    logger.error("failure", extra={"fields": {"error": said}})


def where(error: BaseException) -> str:
    """The file and line at which an exception was raised."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return "an unknown place"
    return f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"
