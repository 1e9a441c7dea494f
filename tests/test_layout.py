"""The rules that keep the package in order, read from its sources."""

import ast
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = "fastvlm_mlx"
# A room, which is a folder or file at the top of the package, imports from its own level and from
# those before.
ORDER = (
    "version checks fields progress http start",
    "ops config",
    "image text",
    "video",
    "processor model",
    "checkpoint hub",
    "generation",
    "bench evaluate train serve live caption",
    "convert",
    "fuse",
    "finetuning",
    "__init__",
    "cli __main__",
)
LEVELS = {room: level for level, rooms in enumerate(ORDER) for room in rooms.split()}

# Imported only where they are needed: what is slow to import, and what need not be installed.
SLOW = {"mlx_lm", "transformers", "huggingface_hub", "tokenizers", "jinja2", "PIL", "numpy"}
OPTIONAL = {"torch", "coremltools", "matplotlib", "pillow_heif", "llguidance"}
OPTIONAL |= {"fastapi", "pydantic", "starlette", "uvicorn", "prometheus_client"}  # of the server
OPTIONAL |= {"av", "mss", "pyarrow", "datasets", "wandb", "tensorboardX"}
OPTIONAL |= {"sacrebleu", "lmms_eval", "vlmeval"}
HEAVY = SLOW | OPTIONAL | {"rich", "tqdm", "typer"}
# The command imports the server only when it is to serve; a plug-in, only what has asked for it.
HEAVY_ALLOWED = {
    "cli/": {"typer"},
    "serve/": {"fastapi", "pydantic", "starlette"},
    "evaluate/lmms_eval.py": {"lmms_eval"},
    "evaluate/vlmevalkit.py": {"vlmeval"},
}

DEVICE_QUESTIONS = {"on_cpu", "on_metal"}
DEVICE_ASKED = {
    "ops/": "the one place where forms are chosen",
    "bench/": "floors and rates are those of the device that is measured",
    "serve/facts.py": "clients are told how much of the model a GPU reads",
    "generation/scheduler.py": "on the CPU a KV cache is written in place once a step is over",
}

MOST_LINES_OF_A_FILE = 420
MOST_LINES_OF_A_FUNCTION = 60  # without its docstring
MOST_LINES_ON_AVERAGE = 10.0


class Import(NamedTuple):
    name: str
    line: int
    in_function: bool
    for_types: bool


@dataclass(frozen=True)
class Module:
    """One file of the package."""

    file: str
    """Below the package's folder, as in `image/load.py`."""
    text: str
    modules: frozenset[str]
    """The dotted names of the whole package."""

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, self.file)

    @cached_property
    def imports(self) -> list[Import]:
        return list(self._imports(self.tree, False, False))

    @cached_property
    def name(self) -> str:
        return dotted(self.file)

    @property
    def room(self) -> str:
        return room_of(self.name)

    @property
    def own_imports(self) -> list[Import]:
        return [found for found in self.imports if found.name in self.modules]

    def _imports(self, node: ast.AST, in_function: bool, for_types: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import | ast.ImportFrom):
            for name in self._names(node):
                yield Import(name, node.lineno, in_function, for_types)
        in_function |= isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        guarded = node.body if isinstance(node, ast.If) and asks_for_types(node) else []
        for child in ast.iter_child_nodes(node):
            yield from self._imports(child, in_function, for_types or child in guarded)

    def _names(self, node: ast.Import | ast.ImportFrom) -> Iterable[str]:
        if isinstance(node, ast.Import):
            return [alias.name for alias in node.names]
        here = self.name.split(".")
        above = node.level - self.file.endswith("__init__.py")
        base = here[: len(here) - above] if node.level else []
        source = ".".join([*base, *filter(None, [node.module])])
        names = (f"{source}.{alias.name}" for alias in node.names)
        return dict.fromkeys(name if name in self.modules else source for name in names)

    def at(self, line: int, said: str) -> str:
        return f"{PACKAGE}/{self.file}:{line}: {said}"


Package = list[Module]


def dotted(file: str) -> str:
    return f"{PACKAGE}/{file}".removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def room_of(name: str) -> str:
    return f"{name}.__init__".split(".")[1]


def asks_for_types(node: ast.If) -> bool:
    return ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def package_of(texts: dict[str, str]) -> Package:
    names = frozenset(map(dotted, texts))
    return [Module(file, text, names) for file, text in sorted(texts.items())]


@pytest.fixture(scope="module")
def package() -> Package:
    root = Path(__file__).parents[1] / PACKAGE
    files = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    assert len(files) > 20
    return package_of({file: path.read_text(encoding="utf-8") for file, path in files.items()})


# The rules: each gives a sentence for every place that breaks it


def unplaced(package: Package) -> list[str]:
    return [m.at(1, "has no place in ORDER") for m in package if m.room not in LEVELS]


def upward_imports(package: Package) -> list[str]:
    return [
        m.at(found.line, f"{m.room} stands before {room_of(found.name)} and can't import from it")
        for m in package
        for found in m.own_imports
        if LEVELS.get(room_of(found.name), 0) > LEVELS.get(m.room, 0)
    ]


def circles(package: Package, place: Callable[[str], str] = str) -> list[str]:
    """Imports that lead back to the module that they stand in, or to its `place`."""
    edges: dict[str, set[str]] = {}
    for m in package:
        edges.setdefault(place(m.name), set()).update(place(x.name) for x in m.own_imports)
    return [
        m.at(found.line, " → ".join([place(m.name), *way]))
        for m in package
        for found in m.own_imports
        if place(found.name) != place(m.name)
        and (way := shortest_way(edges, place(found.name), place(m.name)))
    ]


def shortest_way(edges: dict[str, set[str]], start: str, end: str) -> list[str]:
    ways, seen = deque([[start]]), {start}
    while ways:
        way = ways.popleft()
        if way[-1] == end:
            return way
        for following in sorted(edges.get(way[-1], set()) - seen):
            seen.add(following)
            ways.append([*way, following])
    return []


def circles_of_rooms(package: Package) -> list[str]:
    return circles(package, room_of)


def own_imports_in_functions(package: Package) -> list[str]:
    return [
        m.at(found.line, f"imports {found.name} in a function; do it at the top of the file")
        for m in package
        for found in m.own_imports
        if found.in_function and m.room != "cli"
    ]


def heavy_imports(package: Package) -> list[str]:
    return [
        m.at(found.line, f"imports {found.name} with the file; do it in the function that needs it")
        for m in package
        for found in m.imports
        if not (found.in_function or found.for_types)
        and found.name.split(".")[0] in HEAVY - allowed_at(m.file)
    ]


def allowed_at(file: str) -> set[str]:
    return {
        name for place, names in HEAVY_ALLOWED.items() if file.startswith(place) for name in names
    }


def device_questions(package: Package) -> list[str]:
    return [
        m.at(line, f"asks {name}, which is for ops/ and the files in DEVICE_ASKED")
        for m in package
        for line, name in questions(m)
        if not m.file.startswith(tuple(DEVICE_ASKED))
    ]


def needless_exceptions(package: Package) -> list[str]:
    asking = [m.file for m in package if any(questions(m))]
    return [
        f"{PACKAGE}/{place}:1: asks no device any more; take it from DEVICE_ASKED"
        for place in DEVICE_ASKED
        if not any(file.startswith(place) for file in asking)
    ]


def questions(module: Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(module.tree):
        name = {ast.Name: "id", ast.Attribute: "attr", ast.alias: "name"}.get(type(node), "")
        if (asked := getattr(node, name, "")) in DEVICE_QUESTIONS:
            yield node.lineno, asked


def unittest_imports(package: Package) -> list[str]:
    return [
        m.at(found.line, "imports unittest, which is for tests")
        for m in package
        for found in m.imports
        if found.name.split(".")[0] == "unittest"
    ]


def unnamed_encodings(package: Package) -> list[str]:
    return [
        m.at(node.lineno, "names no encoding; without one it depends on the system")
        for m in package
        for node in ast.walk(m.tree)
        if isinstance(node, ast.Call)
        and getattr(node.func, "attr", "") in ("read_text", "write_text")
        and len(node.args) == (node.func.attr == "write_text")
        and all(keyword.arg != "encoding" for keyword in node.keywords)
    ]


def long_files(package: Package) -> list[str]:
    most = MOST_LINES_OF_A_FILE
    lines = ((m, len(m.text.splitlines())) for m in package)
    return [m.at(most + 1, f"is {n} lines long; {most} are the most") for m, n in lines if n > most]


def functions(module: Module) -> Iterator[tuple[int, str, int]]:
    """Line, name and number of lines of each, docstrings apart: they may explain at length."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0]
            said = first.end_lineno - first.lineno + 1 if ast.get_docstring(node) is not None else 0
            yield node.lineno, node.name, node.end_lineno - node.lineno + 1 - said


def long_functions(package: Package) -> list[str]:
    most = MOST_LINES_OF_A_FUNCTION
    return [
        m.at(line, f"{name} is {n} lines long; {most} are the most")
        for m in package
        for line, name, n in functions(m)
        if n > most
    ]


def long_functions_on_average(package: Package) -> list[str]:
    found = [(n, m.at(line, name)) for m in package for line, name, n in functions(m)]
    average = sum(n for n, _ in found) / max(1, len(found))
    if average <= MOST_LINES_ON_AVERAGE:
        return []
    return [
        f"{where} is {n} lines long, the average {average:.1f}" for n, where in sorted(found)[-5:]
    ]


def missing_docstrings(package: Package) -> list[str]:
    return [m.at(1, "has no docstring") for m in package if not ast.get_docstring(m.tree)]


# The package keeps them


def assert_none(offences: list[str]) -> None:
    assert not offences, "\n" + "\n".join(offences)


def test_every_file_and_folder_has_its_place_in_the_order(package: Package) -> None:
    assert_none(unplaced(package))


def test_imports_run_one_way(package: Package) -> None:
    assert_none(upward_imports(package))


def test_no_modules_import_one_another_in_a_circle(package: Package) -> None:
    assert_none(circles(package))


def test_no_rooms_import_one_another_in_a_circle(package: Package) -> None:
    assert_none(circles_of_rooms(package))


def test_own_modules_are_imported_at_the_top_of_a_file(package: Package) -> None:
    assert_none(own_imports_in_functions(package))


def test_heavy_libraries_are_imported_where_they_are_needed(package: Package) -> None:
    assert_none(heavy_imports(package))


def test_only_ops_and_named_exceptions_ask_for_the_device(package: Package) -> None:
    assert_none(device_questions(package))


def test_every_exception_is_still_needed(package: Package) -> None:
    assert_none(needless_exceptions(package))


def test_the_package_patches_nothing(package: Package) -> None:
    assert_none(unittest_imports(package))


def test_text_files_are_read_and_written_in_a_named_encoding(package: Package) -> None:
    assert_none(unnamed_encodings(package))


def test_no_file_is_long(package: Package) -> None:
    assert_none(long_files(package))


def test_no_function_is_long(package: Package) -> None:
    assert_none(long_functions(package))


def test_functions_are_short_on_average(package: Package) -> None:
    assert_none(long_functions_on_average(package))


def test_every_module_says_what_it_does(package: Package) -> None:
    assert_none(missing_docstrings(package))


# Each of them can fail

DEVICE_ASKERS = {place + "x.py" * place.endswith("/"): "on_cpu()" for place in DEVICE_ASKED}
LONG = "def f():\n" + "    pass\n" * MOST_LINES_OF_A_FUNCTION
BROKEN = {
    "a room without a place": (unplaced, {"attic/boxes.py": ""}, "attic/boxes.py:1"),
    "a file without a place": (unplaced, {"attic.py": ""}, "attic.py:1"),
    "upwards": (
        upward_imports,
        {"text/a.py": "import os\nfrom ..model import vision", "model/vision.py": ""},
        "text/a.py:2",
    ),
    "upwards, a name": (
        upward_imports,
        {"config.py": "from .image.load import load_image", "image/load.py": ""},
        "config.py:1",
    ),
    "upwards, absolutely": (
        upward_imports,
        {"ops/a.py": "import fastvlm_mlx.hub.fetch as f", "hub/fetch.py": ""},
        "ops/a.py:1",
    ),
    "upwards, deep": (
        upward_imports,
        {"checkpoint/layouts/coreml/a.py": "from ....convert import x", "convert.py": ""},
        "checkpoint/layouts/coreml/a.py:1",
    ),
    "upwards, from a folder's own file": (
        upward_imports,
        {"ops/__init__.py": "from ..text import prompt", "text/prompt.py": ""},
        "ops/__init__.py:1",
    ),
    "upwards, to the public interface": (
        upward_imports,
        {"hub/a.py": "from .. import load", "__init__.py": ""},
        "hub/a.py:1",
    ),
    "upwards, in a function": (
        upward_imports,
        {"hub/a.py": "def f():\n    from ..cli import main", "cli/main.py": ""},
        "hub/a.py:2",
    ),
    "a circle of two": (
        circles,
        {"text/a.py": "from .b import x", "text/b.py": "from . import a"},
        "text/a.py:1",
    ),
    "a circle of three, by a type": (
        circles,
        {
            "text/a.py": "from .b import x",
            "text/b.py": "from .c import x",
            "text/c.py": "if TYPE_CHECKING:\n    from .a import X",
        },
        "text/c.py:2",
    ),
    "a circle of a folder and its file": (
        circles,
        {"ops/__init__.py": "from .a import x", "ops/a.py": "from . import x"},
        "ops/a.py:1",
    ),
    "a circle of rooms": (
        circles_of_rooms,
        {
            "hub/a.py": "from ..checkpoint import b",
            "hub/d.py": "",
            "checkpoint/b.py": "",
            "checkpoint/c.py": "\nfrom ..hub.d import x",
        },
        "checkpoint/c.py:2",
    ),
    "a late import": (
        own_imports_in_functions,
        {"hub/a.py": "class A:\n    def f(self):\n        from . import b", "hub/b.py": ""},
        "hub/a.py:3",
    ),
    "a heavy import": (heavy_imports, {"text/a.py": "import torch.nn as nn"}, "text/a.py:1"),
    "a heavy name": (heavy_imports, {"text/a.py": "from PIL import Image"}, "text/a.py:1"),
    "a heavy import that may fail": (
        heavy_imports,
        {"bench/a.py": "try:\n    import av\nexcept ImportError:\n    av = None"},
        "bench/a.py:2",
    ),
    "a heavy import unless for types": (
        heavy_imports,
        {"bench/a.py": "if TYPE_CHECKING:\n    import av\nelse:\n    import numpy"},
        "bench/a.py:4",
    ),
    "typer outside cli": (heavy_imports, {"bench/a.py": "import typer"}, "bench/a.py:1"),
    "rich in cli": (heavy_imports, {"cli/a.py": "import typer\nimport rich"}, "cli/a.py:2"),
    "a question by name": (device_questions, {"hub/a.py": "\nif on_cpu(): pass"}, "hub/a.py:2"),
    "a question of a module": (device_questions, {"hub/a.py": "x = ops.on_metal()"}, "hub/a.py:1"),
    "a question renamed": (
        device_questions,
        {"hub/a.py": "from ..ops import on_cpu as c"},
        "hub/a.py:1",
    ),
    "an exception for nothing": (
        needless_exceptions,
        DEVICE_ASKERS | {"generation/scheduler.py": ""},
        "generation/scheduler.py:1",
    ),
    "unittest": (
        unittest_imports,
        {"hub/a.py": "def f():\n    import unittest.mock"},
        "hub/a.py:2",
    ),
    "text as the system has it": (
        unnamed_encodings,
        {"hub/a.py": "x = file.read_text(errors='replace')"},
        "hub/a.py:1",
    ),
    "text written as the system has it": (
        unnamed_encodings,
        {"hub/a.py": "(folder / 'a.txt').write_text(text)"},
        "hub/a.py:1",
    ),
    "a long file": (long_files, {"hub/a.py": "\n" * (MOST_LINES_OF_A_FILE + 1)}, "hub/a.py:421"),
    "a long function": (long_functions, {"hub/a.py": f"\nasync {LONG}"}, "hub/a.py:2"),
    "a long method": (
        long_functions,
        {"hub/a.py": "class A:\n" + "".join(f"  {line}\n" for line in LONG.splitlines())},
        "hub/a.py:2",
    ),
    "an average": (long_functions_on_average, {"hub/a.py": LONG}, "hub/a.py:1"),
    "no docstring": (missing_docstrings, {"hub/a.py": "# A comment.\nx = 'a text'"}, "hub/a.py:1"),
    "an empty file": (missing_docstrings, {"hub/__init__.py": ""}, "hub/__init__.py:1"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_rule_is_found_where_it_is_broken(case: str) -> None:
    rule, texts, place = BROKEN[case]
    offences = rule(package_of(texts))
    assert any(offence.startswith(f"{PACKAGE}/{place}: ") for offence in offences), offences


def test_what_keeps_the_rules_breaks_none() -> None:
    texts = {
        "__init__.py": "from .hub.fetch import fetch",
        "config.py": "import os\nfrom .checks import check",
        "checks.py": LONG.removesuffix("    pass\n") + "import torch_like",
        "hub/__init__.py": "file.write_text(file.read_text('utf-8'), encoding='utf-8')",
        "hub/fetch.py": "from ..config import x\nif TYPE_CHECKING:\n    import numpy",
        "hub/read.py": "def f():\n    import torch\n" + "def g(): pass\n" * 9,
        "cli/main.py": "import typer\ndef f():\n    from ..hub import fetch",
    }
    package = package_of(
        {f: f'"""Does this."""\n{text}' for f, text in (DEVICE_ASKERS | texts).items()}
    )
    rules = {rule for rule, *_ in BROKEN.values()}
    assert [offence for rule in rules for offence in rule(package)] == []
