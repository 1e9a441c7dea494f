"""Commands of the recipe; README.md has them in order.

python -m examples.train_nano draw --recipe ship --work ~/nano
"""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import fastvlm_mlx as fv

from . import fonts
from .evaluate import evaluate, read_set, report, table
from .models import fresh, grow
from .sets import TASKS, write_set
from .show import one_of_each, sheet
from .stages import RECIPES, Stage, scaled, store_name
from .store import fill_whole, open_store
from .train import train

COLUMNS = 4  # of a sheet


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.train_nano")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("fonts", help="say what is missing to draw, and how to install it")
    for name, said in (
        ("draw", "draw the pictures of all stages"),
        ("start", "write the model to begin with"),
        ("train", "train, or go on"),
    ):
        command = commands.add_parser(name, help=said)
        command.add_argument("--recipe", choices=RECIPES, required=True)
        command.add_argument("--share", type=float, default=1.0, help="of steps and pictures")
        command.add_argument("--work", type=Path, required=True, help="folder of all that is made")
        if name == "draw":
            command.add_argument("--processes", type=int, default=1, help="that draw")
        if name == "start":
            command.add_argument("--base", type=Path, help="the model to grow, in training form")
        if name == "train":
            command.add_argument("--every", type=int, default=250, help="steps between evaluations")
    command = commands.add_parser("sets", help="draw the held-out sets")
    command.add_argument("folder", type=Path)
    command.add_argument("--number", type=int, default=200, help="pictures of each task")
    command.add_argument("--size", type=int, default=256)
    command = commands.add_parser("evaluate", help="measure a model on a set")
    command.add_argument("set", type=Path, help="folder, or a JSONL file")
    command.add_argument("--model", help="folder or Hub id; the bundled model by default")
    command.add_argument("--image-size", type=int)
    command.add_argument("--output", type=Path, help="JSON for `report`")
    command = commands.add_parser("report", help="write report.md from results")
    command.add_argument("results", type=Path, nargs="+")
    command.add_argument("--curve", type=Path)
    command.add_argument("--output", type=Path, default=Path("report.md"))
    command = commands.add_parser("show", help="draw a sheet of pictures, questions and answers")
    command.add_argument("set", type=Path, help="folder of a set")
    command.add_argument("--model", help="folder or Hub id; the bundled model by default")
    command.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS, metavar="TASK")
    command.add_argument("--output", type=Path, default=Path("sheet.png"))
    return parser.parse_args()


def run(args: argparse.Namespace) -> None:
    if args.command == "fonts":
        fonts.check()
        print("All fonts, emoji and words are here.")
    elif args.command in ("draw", "start", "train"):
        stages = scaled(RECIPES[args.recipe], args.share)
        {"draw": draw_all, "start": start, "train": go_on}[args.command](args, stages)
    elif args.command == "sets":
        for task in TASKS:
            write_set(args.folder, task, args.number, args.size)
            print(f"{task}: {args.number}", flush=True)
    elif args.command == "evaluate":
        measure(args)
    elif args.command == "show":
        rows = one_of_each(read_set(args.set), args.tasks)
        sheet(*fv.load(args.model), rows, COLUMNS).save(args.output)
    else:
        args.output.write_text(report(args.results, args.curve), encoding="utf-8")


def draw_all(args: argparse.Namespace, stages: list[Stage]) -> None:
    stores = {store_name(each): each for stage in stages for each in stage.pictures}
    folders = [args.work / name for name in stores]
    for folder, settings in zip(folders, stores.values(), strict=True):
        open_store(folder, settings)  # so that training can begin with any
    with ProcessPoolExecutor(args.processes, get_context("spawn")) as pool:
        drawn = zip(stores, pool.map(fill_whole, folders, stores.values()), strict=True)
        for name, scenes in drawn:
            print(f"{name}: {scenes} scenes", flush=True)


def start(args: argparse.Namespace, stages: list[Stage]) -> None:
    folder = args.work / args.recipe / "start"
    if args.recipe == "ship":
        if args.base is None:
            raise ValueError("The recipe ship needs --base, the folder of the model to grow.")
        grow(args.base, folder)
    else:
        fresh(folder)
    print(f"{folder} is there.")


def go_on(args: argparse.Namespace, stages: list[Stage]) -> None:
    last = train(args.work, args.recipe, stages, every=args.every)
    print(f"The last model is {last}.")


def measure(args: argparse.Namespace) -> None:
    options = {"image_size": args.image_size} if args.image_size else {}
    name = args.output.stem if args.output else str(args.model or "bundled")
    found = evaluate(*fv.load(args.model), read_set(args.set), **options)
    if args.output is not None:
        args.output.write_text(json.dumps(found, ensure_ascii=False), encoding="utf-8")
    print(table({name: found["tasks"]}), end="")


if __name__ == "__main__":
    try:
        run(parse())
    except KeyboardInterrupt:
        sys.exit("Stopped; the same command goes on from here.")
    except (ValueError, OSError) as error:
        sys.exit(f"Error: {error}")
