"""What a result says of where and how it was taken, in general terms."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any


def describe_machine() -> dict[str, Any]:
    """Processor, cores, system, preloaded libraries and NVIDIA GPUs with their driver."""
    return {
        "cpu": processor_name(),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "preloaded": Path(os.environ.get("LD_PRELOAD", "")).name,
        "gpus": nvidia_gpus(),
    }


def processor_name() -> str:
    """The processor's name as its maker gives it."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [x.split(":", 1)[1] for x in cpuinfo.read_text().splitlines() if "model name" in x]
        return names[0].strip() if names else model
    if sys.platform == "darwin":
        return output_of("sysctl", "-n", "machdep.cpu.brand_string") or model
    return model


def nvidia_gpus() -> list[dict[str, str]]:
    """Name, driver and memory of each GPU that nvidia-smi lists."""
    fields = ("name", "driver_version", "memory.total")
    listed = output_of("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader")
    rows = [[value.strip() for value in line.split(",")] for line in listed.splitlines()]
    return [dict(zip(fields, row, strict=False)) for row in rows]


def output_of(*command: str) -> str:
    """What a command prints; empty if there is no such command or it fails."""
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def command_line(parser: argparse.ArgumentParser, args: argparse.Namespace) -> str:
    """The command that gives a result, with names in capitals for paths."""
    words = ["python", f"benchmarks/{parser.prog}"]
    for action in parser._actions:
        value = getattr(args, action.dest, None)
        if value == action.default or action.dest in ("help", "json"):
            continue
        is_path = action.type is Path or action.dest.endswith("python")
        words += action.option_strings[:1]
        if isinstance(value, tuple):
            words.append(",".join(map(str, value)))
        elif value is not True:
            words.append(str(action.metavar or action.dest).upper() if is_path else str(value))
    return " ".join(words)


def write_result(file: Path | None, result: dict[str, Any]) -> None:
    """Write a result as JSON where `--json` says, or print it."""
    text = json.dumps(result, indent=1) + "\n"
    if file is None:
        print(text, end="")
    else:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def note(text: str) -> None:
    """Say on stderr how far things are."""
    print(text, file=sys.stderr, flush=True)
