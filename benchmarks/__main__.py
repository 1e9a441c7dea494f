"""Take a measurement: python -m benchmarks MEASUREMENT [MODEL] [options]."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from fastvlm_mlx.bench.machine import describe_machine

from . import random_checkpoint, report, run_all
from .registry import MEASUREMENTS, add_options, command_line
from .turns import note

# What takes no measurement itself: its options, what runs, and the help.
OTHERS = {
    "all": (run_all.OPTIONS, run_all.run, run_all.__doc__),
    "checkpoint": (random_checkpoint.OPTIONS, random_checkpoint.write, random_checkpoint.__doc__),
    "report": (report.OPTIONS, report.write_report, report.__doc__),
}


def main(arguments: list[str] | None = None) -> int:
    """Run a command; 0 if all went well, 1 if a result failed, 2 for bad input."""
    parsers = make_parsers()
    args = parsers["benchmarks"].parse_args(arguments)
    try:
        if args.command in OTHERS:
            return OTHERS[args.command][1](args) or 0
        result = {
            "command": command_line(parsers[args.command], args),
            "machine": describe_machine(),
            **MEASUREMENTS[args.command].measure(args),
        }
    except (OSError, ValueError, RuntimeError) as error:
        note(f"benchmarks {args.command}: {error}")
        return 2
    if args.json:
        write_result(args.json, result)
    title, body, goals = report.section(result)
    print("\n\n".join((title, body, *([report.goals_table(goals)] if goals else []))))
    if result.get("failure"):
        note(result["failure"])
        return 1
    return 0


def make_parsers() -> dict[str, argparse.ArgumentParser]:
    """The whole command's parser under "benchmarks", and that of each command."""
    parsers = {"benchmarks": argparse.ArgumentParser("benchmarks", description=__doc__)}
    commands = parsers["benchmarks"].add_subparsers(dest="command", required=True)

    def add(name: str, options: dict[str, Any], text: str | None) -> None:
        first, _, more = (text or "").partition("\n\n")
        parsers[name] = commands.add_parser(name, help=first, description=first, epilog=more)
        add_options(parsers[name], options)

    for name, module in MEASUREMENTS.items():
        add(name, module.OPTIONS | {"--json": {}}, module.__doc__)
    for name, (options, _, text) in OTHERS.items():
        add(name, options, text)
    return parsers


def write_result(file: Path, result: dict[str, Any]) -> None:
    """Write a result as JSON."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
