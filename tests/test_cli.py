import importlib.metadata
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from inspect import signature
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import typer
from command import Result, Run
from models import DEPTH, interrupt
from PIL import Image

import fastvlm_mlx as fv
from fastvlm_mlx.cli.chat import CHAT_HELP
from fastvlm_mlx.cli.main import app
from fastvlm_mlx.cli.printing import sentence
from fastvlm_mlx.generation.chat import Chat
from fastvlm_mlx.generation.options import Options
from fastvlm_mlx.hub.resolve import NANO
from fastvlm_mlx.model.qwen2 import Block, Qwen2
from fastvlm_mlx.model.vision import FastViTHD
from fastvlm_mlx.version import __version__

PENGUINS = str(NANO / "images" / "penguins.png")
PANDA = str(NANO / "images" / "panda.png")
ASK = "Describe the image."
ANSWER = "The image shows 6 penguins."
CLI = "fastvlm_mlx.cli"
MAIN = [sys.executable, "-m", "fastvlm_mlx"]


@pytest.fixture
def run(run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """On a terminal wide enough that no line is broken."""
    monkeypatch.setenv("COLUMNS", "200")
    return run


def assert_one_error(result: Result, *said: str) -> None:
    """Exit code 2, nothing on stdout, one line on stderr that says what is wrong."""
    assert result.code == 2
    assert result.out == ""
    line, end, rest = result.err.partition("\n")
    assert line.startswith("Error: ") and end and not rest, result.err
    for text in said:
        assert text in line


# In a process of its own


def command(*arguments: str, stdin: str | None = None) -> Result:
    done = subprocess.run(
        [*MAIN, *arguments], input=stdin, capture_output=True, text=True, timeout=60
    )
    return Result(done.returncode, done.stdout, done.stderr)


def test_generate_without_arguments_describes_a_bundled_image() -> None:
    result = command("generate")
    assert result.code == 0
    assert result.out == f"{ANSWER}\n"
    assert result.err == f"No --image and no --prompt: describing {PENGUINS}.\n"


def test_errors_of_a_process() -> None:
    assert_one_error(command("generate", "--image", "nothing.png"), "nothing.png", "no such file")
    assert_one_error(command("generate", "--image", PENGUINS, "--max-tokens", "0"), "max_tokens")
    assert_one_error(command("convert", "nothing", "target"), "no model folder nothing")


def test_chat_over_a_pipe() -> None:
    result = command(
        "chat", "--image", PENGUINS, stdin="Describe the image.\nHow many penguins are there?\n"
    )
    first, second, *_ = result.out.removeprefix("> ").split("\n")
    assert (result.code, first) == (0, ANSWER)
    assert "6" in second
    assert "Traceback" not in result.err


CLOSED = {
    "output": ("generate >&-", 2, "Standard output is closed"),
    "output of the help": ("--help >&-", 2, "Standard output is closed"),
    "all of them": ("generate <&- >&- 2>&-", 2, ""),
    "input of the chat": ("chat <&-", 2, "Standard input is closed"),
    "full disk": ("generate >/dev/full", 2, "No space left on device"),
    "nobody reads": ("models | exit 0", 1, ""),
}


@pytest.mark.parametrize("case", CLOSED)
def test_closed_streams(case: str) -> None:
    line, code, said = CLOSED[case]
    if "/dev/full" in line and not Path("/dev/full").exists():
        pytest.skip("needs /dev/full, which only Linux has")
    shell = f'set -o pipefail; "{sys.executable}" -m fastvlm_mlx {line}'
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (code, "")
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr
    assert said in done.stderr and done.stderr.count("Error: ") == (1 if said else 0)


@pytest.mark.parametrize("closed", ["<&-", "2>&-"])
def test_answering_needs_only_standard_output(closed: str) -> None:
    shell = f'"{sys.executable}" -m fastvlm_mlx generate --image {PENGUINS} {closed}'
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"{ANSWER}\n"), done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "--temperature", "1e400"],
        ["generate", "--max-tokens", "9" * 30],
        ["generate", "--seed", "9" * 5000],
        ["bench", "--tokens", "1" + "0" * 11],
        ["bench", "--prompt-tokens", "1" + "0" * 11],
        ["bench", "--runs", "9" * 30],
    ],
    ids=lambda arguments: arguments[1],
)
def test_huge_numbers(arguments: list[str], run: Run) -> None:
    result = run(*arguments)
    assert (result.code, result.out) == (2, "") and "Traceback" not in result.err
    assert len(result.err) < 1000


def test_entry_point() -> None:
    scripts = importlib.metadata.entry_points(group="console_scripts", name="fastvlm")
    assert [script.value for script in scripts] == ["fastvlm_mlx.cli.main:main"]


HEAVY = (
    "mlx_lm",
    "transformers",
    "huggingface_hub",
    "torch",
    "PIL",
    "typer",
    "tokenizers",
    "jinja2",
)


def test_import_is_instant_and_light() -> None:
    code = (
        "import time, sys, mlx.core; start = time.perf_counter(); import fastvlm_mlx; "
        "print(time.perf_counter() - start); "
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    times = []
    for _ in range(3):  # of several, the one that other processes disturbed least
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        seconds, heavy = done.stdout.splitlines()
        assert heavy == "[]"
        times.append(float(seconds))
    assert min(times) < 0.25


def test_generating_needs_neither_mlx_lm_nor_transformers() -> None:
    code = (
        "import sys\nfrom fastvlm_mlx.cli.main import main\n"
        f"sys.argv = ['fastvlm', 'generate', '--image', {PENGUINS!r}, '--temperature', '0.5', "
        "'--top-p', '0.9', '--seed', '1', '--max-tokens', '3']\n"
        "try:\n    main()\nfinally:\n"
        "    print([n for n in ('mlx_lm', 'transformers', 'torch', 'huggingface_hub') "
        "if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["The image shows", "[]"]


def read_until(terminal: int, text: str, seconds: float = 30) -> str:
    """What a terminal shows, up to some text."""
    shown, deadline = "", time.monotonic() + seconds
    while text not in shown:
        ready, _, _ = select.select([terminal], [], [], max(deadline - time.monotonic(), 0))
        assert ready, f"no {text!r} within {seconds} s after {shown!r}"
        shown += os.read(terminal, 1024).decode()
    return shown


# A child with the terminal as its own, which after a token gives time for a Ctrl-C; who starts
# the tests in the background of a script has it ignored.
WAITING_CHAT = """
import fcntl, signal, sys, termios, time
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGINT, signal.default_int_handler)
from fastvlm_mlx.model.qwen2 import Qwen2
steps, quick = [], Qwen2.hidden_states
def waiting(*arguments):
    steps.append(1)
    time.sleep(10 if len(steps) == 3 else 0)
    return quick(*arguments)
Qwen2.hidden_states = waiting
from fastvlm_mlx.cli.main import main
main()
"""


def test_ctrl_c_in_a_terminal_stops_the_answer() -> None:
    terminal, theirs = pty.openpty()
    arguments = [sys.executable, "-c", WAITING_CHAT, "chat", "--image", PENGUINS]
    streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    process = subprocess.Popen(arguments, start_new_session=True, **streams)
    try:
        os.close(theirs)
        read_until(terminal, "> ")
        os.write(terminal, b"Describe the image.\n")
        read_until(terminal, "The")
        time.sleep(0.3)  # until it waits
        os.write(terminal, b"\x03")
        shown = read_until(terminal, "> ")
        assert "[stopped]" in shown and "penguins" not in shown
        time.sleep(0.5)  # it shows the prompt a moment before it waits for a line
        os.write(terminal, b"\x03")
        assert "Ctrl-D or /quit leaves." in read_until(terminal, "> ")
        os.write(terminal, b"How many penguins are there?\n")
        shown = read_until(terminal, "> ")
        assert "6 penguins" in shown and "Traceback" not in shown
        os.write(terminal, b"\x04")
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(terminal)


# generate


def test_only_answers_go_to_stdout(run: Run) -> None:
    result = run("generate", "--image", PENGUINS)
    assert result == (0, f"{ANSWER}\n", "")
    asked = run("generate", "--image", PANDA, "--prompt", "What is this?", "--model", NANO)
    assert asked == (0, "A panda.\n", "")


def test_nano_says_what_it_is_when_it_answers_by_default(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = shutil.copyfile(PENGUINS, tmp_path / "own.png")
    for asked in (["--image", own], ["--image", PENGUINS, "--prompt", "Who?"], ["--prompt", "A"]):
        (note,) = run("generate", *asked).err.splitlines()
        assert note.startswith("Note: this is nano") and "--model apple/FastVLM-0.5B" in note
        assert run("generate", *asked, "--model", NANO).err == ""
    assert run("chat").err.startswith("Note: this is nano")
    assert "Note" not in run("chat", "--model", NANO).err
    monkeypatch.setenv("FASTVLM_MODEL", str(NANO))
    assert run("generate", "--image", own).err == ""
    monkeypatch.setenv("FASTVLM_MODEL", "not-there")
    assert_one_error(run("generate"), "not-there")
    assert run("generate", "--image", PENGUINS, "--model", NANO).out == f"{ANSWER}\n"


def test_json(run: Run) -> None:
    result = run("generate", "--image", PENGUINS, "--json")
    assert (result.code, result.err) == (0, "")
    answer = json.loads(result.out)
    assert result.out.count("\n") == 1
    assert answer["text"] == ANSWER and answer["finish_reason"] == "stop"
    assert answer["generation_tokens"] == 8 and answer["ttft"] > 0
    expected = {field.name for field in fields(fv.Response)} - {"token"}
    assert answer.keys() == expected


def test_verbose(run: Run) -> None:
    result = run("generate", "--image", PENGUINS, "--verbose")
    assert (result.code, result.out) == (0, f"{ANSWER}\n")
    for text in ("Time to first token", "Encode image", "8 tokens", "Peak memory", "stop"):
        assert text in result.err


def test_without_image_but_with_prompt(run: Run, nano: tuple) -> None:
    result = run("generate", "--prompt", "How are you?", "--model", NANO)
    assert result == (0, fv.generate(*nano, "How are you?") + "\n", "")


def test_messages_from_a_file(run: Run, tmp_path: Path) -> None:
    parts = [{"type": "image_url", "image_url": {"url": PENGUINS}}, {"type": "text", "text": ASK}]
    path, messages = tmp_path / "messages.json", [{"role": "user", "content": parts}]
    for content in (messages, {"model": "any", "messages": messages}):
        path.write_text(json.dumps(content))
        assert run("generate", "--messages", path).out == f"{ANSWER}\n"
    path.write_text(json.dumps([{"role": "user", "content": [{"type": "image"}, parts[1]]}]))
    assert run("generate", "--messages", path, "--image", PENGUINS).out == f"{ANSWER}\n"
    assert_one_error(run("generate", "--messages", path), "first in turn 1", "0 image")
    assert_one_error(run("generate", "--messages", path, "--prompt", "A"), "--prompt or --messages")


@pytest.mark.parametrize(
    ("content", "said"),
    [("[", "not valid JSON"), ("[" * 100_000, "not valid JSON"), ("5", "found int")],
    ids=("half", "deep", "number"),
)
def test_malformed_files_of_messages(content: str, said: str, run: Run, tmp_path: Path) -> None:
    path = tmp_path / "messages.json"
    path.write_text(content)
    assert_one_error(run("generate", "--messages", path), str(path), said)
    path.unlink()
    assert_one_error(run("generate", "--messages", path), str(path))


LOAD = {"revision": "v2", "dtype": "float16", "quantize": 4, "adapter": "run/adapter"}
SHARED = {
    "system": "Hi.",
    "max_tokens": 5,
    "temperature": 0.5,
    "top_p": 0.9,
    "seed": 3,
    "image_size": 64,
}
MORE = {
    "top_k": 7,
    "min_p": 0.25,
    "repetition_penalty": 1.5,
    "frequency_penalty": 0.5,
    "presence_penalty": -0.5,
    "stop": ("x", "y"),
    "prefill_step_size": 9,
    "conv_mode": "plain",
}


def as_flags(options: dict[str, Any]) -> list[str]:
    flags = []
    for name, value in options.items():
        for one in value if isinstance(value, tuple) else (value,):
            flags += [f"--{name.replace('_', '-')}", str(one)]
    return flags


def recorder(calls: list, result: Any) -> Callable[..., Any]:
    def record(*arguments: Any, **options: Any) -> Any:
        calls.append((arguments, options))
        return result

    return record


@pytest.mark.parametrize("cache", [{"kv_bits": 4}, {"max_kv_size": 64}], ids=str)
def test_options_reach_generate(cache: dict, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    part = fv.Response("Well.", 1, 1, 1, 0.1, 0.1, 0.1, 0.3, 0.0, 0.1, "stop")
    loads: list[Any] = []
    calls: list[Any] = []
    monkeypatch.setattr(f"{CLI}.generate.load", recorder(loads, ("model", "processor")))
    monkeypatch.setattr(f"{CLI}.generate.stream_generate", recorder(calls, iter([part])))
    options = {**SHARED, **MORE, **cache}
    images = ["--image", "a.png", "--image", "b.png", "--prompt", "What?"]
    flags = as_flags({"model": "user/name", **LOAD, **options})
    assert run("generate", *images, *flags) == (0, "Well.\n", "")
    assert loads == [(("user/name",), LOAD)]
    ((arguments, given),) = calls
    assert arguments == ("model", "processor", "What?")
    assert given["image"] == ["a.png", "b.png"]
    own = signature(fv.stream_generate).parameters.values()
    defaults = vars(Options()) | {p.name: p.default for p in own if p.kind is p.KEYWORD_ONLY}
    assert {"prompt_cache": None, **given} == {**defaults, **options, "image": given["image"]}


@pytest.mark.parametrize("cache", [{"kv_bits": 4}, {"max_kv_size": 64}], ids=str)
def test_options_reach_chat(cache: dict, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[Any] = []
    chats: list[Any] = []
    monkeypatch.setattr(f"{CLI}.chat.load", recorder(loads, ("model", "processor")))
    monkeypatch.setattr(f"{CLI}.chat.Chat", recorder(chats, None))
    assert run("chat", *as_flags({"model": "user/name", **LOAD, **SHARED, **cache})).code == 0
    assert loads == [(("user/name",), LOAD)]
    ((arguments, given),) = chats
    assert arguments == ("model", "processor")
    unset = {"kv_bits": None, "max_kv_size": None, "fast": False}
    assert {**unset, **SHARED, **cache} == given


def test_options_have_an_effect(run: Run, nano: tuple) -> None:
    options = {"temperature": 1.2, "top_p": 0.9, "seed": 3, "max_tokens": 5, "image_size": 64}
    images = [PENGUINS, PANDA]
    prompt = "<image> or <image>?"
    flags = ["--prompt", prompt, "--image", images[0], "--image", images[1], *as_flags(options)]
    expected = fv.generate(*nano, prompt, image=images, **options)
    assert run("generate", *flags)[:2] == (0, f"{expected}\n")


@pytest.fixture(scope="session")
def float_folder(nano: tuple, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model with nothing in it quantized."""
    folder = tmp_path_factory.mktemp("models") / "float"
    shutil.copytree(NANO, folder, ignore=shutil.ignore_patterns("images"))
    weights = mx.load(str(NANO / "model.safetensors"))
    for name in [name for name in weights if name.endswith(".scales")]:
        linear = name.removesuffix(".scales")
        scales, biases = weights.pop(name), weights.pop(f"{linear}.biases")
        weights[f"{linear}.weight"] = mx.dequantize(
            weights[f"{linear}.weight"], scales, biases, 64, 8
        )
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization"], config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_model_dtype_and_quantize(run: Run, float_folder: Path) -> None:
    base = ("generate", "--image", PENGUINS, "--model", str(float_folder))
    assert (
        run(*base).out == run(*base, "--quantize", "8", "--dtype", "float32").out == f"{ANSWER}\n"
    )
    assert run(*base, "--quantize", "2").code == 0


# Bad input


def png_header(width: int, height: int) -> bytes:
    """A PNG that says it is large and has next to no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99))


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of what is no image, or not a whole one."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "folder.png").mkdir()
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("These are words.\n" * 20)
    (folder / "bomb.png").write_bytes(png_header(60_000, 60_000))
    whole = io.BytesIO()
    Image.open(PENGUINS).convert("RGB").save(whole, "JPEG")
    (folder / "truncated.jpg").write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    return folder


@pytest.mark.parametrize(
    "name, said",
    [
        ("nothing.png", "there is no such file"),
        ("folder.png", "it is a folder"),
        ("empty.png", "it is empty"),
        ("text.png", "it is not an image"),
        ("truncated.jpg", "truncated"),
        ("bomb.png", "pixels"),
    ],
)
def test_bad_images(name: str, said: str, run: Run, images: Path) -> None:
    path = str(images / name)
    assert_one_error(run("generate", "--image", path), path, said)
    assert_one_error(run("generate", "--image", PENGUINS, "--image", path), path, said)
    assert_one_error(run("chat", "--image", path), path, said)


class Server(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/never":
            time.sleep(3)
            return
        self.send_response(200 if self.path == "/penguins" else 404)
        self.end_headers()
        if self.path == "/penguins":
            self.wfile.write(Path(PENGUINS).read_bytes())

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    http = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    http.daemon_threads = True
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}"
    http.shutdown()
    http.server_close()


def test_urls(run: Run, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastvlm_mlx.image.load.TIMEOUT", 0.5)
    assert run("generate", "--image", f"{server}/penguins").out == f"{ANSWER}\n"
    assert_one_error(run("generate", "--image", f"{server}/nothing"), f"{server}/nothing", "404")
    assert_one_error(run("generate", "--image", f"{server}/never"), "/never", "within 0.5 seconds")
    assert_one_error(run("generate", "--image", "ftp://host/image.png"), "ftp://host/image.png")


def broken(kind: str, folder: Path) -> str:
    """A copy of the bundled model with one thing wrong; also what the error must say."""
    shutil.copytree(NANO, folder, ignore=shutil.ignore_patterns("images"))
    config, weights = folder / "config.json", folder / "model.safetensors"
    settings = json.loads(config.read_text())
    norm = "language_model.model.norm.weight"
    if kind == "no config":
        config.unlink()
        return "it has no config.json"
    if kind == "broken config":
        config.write_text("{")
        return "config.json is not valid JSON"
    if kind == "unknown type":
        config.write_text(json.dumps({**settings, "model_type": "llama"}))
        return "found 'llama'"
    if kind == "no type":
        config.write_text("{}")
        return "model_type"
    if kind == "no weights":
        weights.unlink()
        return "holds no weights"
    if kind == "cut weights":
        weights.write_bytes(weights.read_bytes()[:-5000])
        return "model.safetensors is not a whole safetensors file"
    if kind == "no tokenizer":
        (folder / "tokenizer.json").unlink()
        return "no tokenizer"
    if kind == "broken tokenizer":
        (folder / "tokenizer.json").write_text("[]")
        return "tokenizer.json is not a valid tokenizer"
    tensors = mx.load(str(weights))
    if kind == "missing tensor":
        del tensors[norm]
    else:
        tensors[norm] = mx.zeros((7,))
    mx.save_safetensors(str(weights), tensors)
    return f"{norm} (256,) is missing" if kind == "missing tensor" else f"{norm} is (7,)"


KINDS = ["no config", "broken config", "unknown type", "no type", "no weights", "cut weights"]
KINDS += ["missing tensor", "wrong shape", "no tokenizer", "broken tokenizer"]


@pytest.mark.parametrize("kind", KINDS)
def test_broken_models(kind: str, run: Run, tmp_path: Path) -> None:
    folder, target = tmp_path / "model", tmp_path / "target"
    said = broken(kind, folder)
    where = [str(folder)] if kind not in ("unknown type", "no type") else []
    assert_one_error(run("generate", "--model", str(folder), "--image", PENGUINS), said, *where)
    assert_one_error(run("chat", "--model", str(folder)), said)
    if "tokenizer" not in kind:
        assert_one_error(run("convert", str(folder), str(target)), said)
        assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--prompt", "<image> <image>"], ["2 <image> mark(s)", "1 image(s)"]),
        (["--prompt", "<image>", "--image", PANDA], ["1 <image> mark(s)", "2 image(s)"]),
        (["--prompt", "word " * 5000], ["tokens", "limit is 4096"]),
        (["--max-tokens", "0"], ["max_tokens", "found 0"]),
        (["--max-tokens", "-3"], ["max_tokens", "found -3"]),
        (["--temperature", "-1"], ["temperature", "found -1"]),
        (["--temperature", "nan"], ["temperature", "found nan"]),
        (["--top-p", "2"], ["top_p", "found 2"]),
        (["--top-p", "0"], ["top_p", "found 0"]),
        (["--top-k", "-1"], ["top_k", "found -1"]),
        (["--min-p", "1.5"], ["min_p", "found 1.5"]),
        (["--repetition-penalty", "0"], ["repetition_penalty", "found 0"]),
        (["--seed", "-1"], ["seed", "found -1"]),
        (["--stop", ""], ["stop", "not empty"]),
        (["--max-kv-size", "2"], ["max_kv_size", "found 2"]),
        (["--kv-bits", "5"], ["kv_bits", "found 5"]),
        (["--kv-bits", "4", "--max-kv-size", "64"], ["kv_bits or max_kv_size"]),
        (["--prefill-step-size", "0"], ["prefill_step_size", "found 0"]),
        (["--image-size", "100"], ["image_size", "100"]),
        (["--conv-mode", "spam"], ["'spam'", "qwen_2"]),
        (["--dtype", "int8"], ["dtype", "'int8'", "bfloat16"]),
        (["--quantize", "7"], ["quantize", "7"]),
        (["--model", "not-there"], ["not-there"]),
        (["--model", PANDA], [PANDA, "is a file"]),
        (["--model", "a b/c d"], ["a b/c d"]),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else str(value),
)
def test_bad_arguments(arguments: list[str], said: list[str], run: Run) -> None:
    assert_one_error(run("generate", "--image", PENGUINS, *arguments), *said)


def test_marks_without_images(run: Run) -> None:
    assert_one_error(run("generate", "--prompt", "<image> what?"), "1 <image> mark(s)")


@pytest.mark.parametrize(
    "arguments", [["generate", "--spam"], ["spam"], ["generate", "--max-tokens", "x"], ["convert"]]
)
def test_malformed_commands(arguments: list[str], run: Run) -> None:
    result = run(*arguments)
    assert (result.code, result.out) == (2, "")
    assert "Traceback" not in result.err and "Usage" in result.err


def test_ctrl_c_ends_generate_quietly(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(Block, "__call__", 0, monkeypatch)
    result = run("generate", "--image", PENGUINS)
    assert result.code == 130
    assert "Traceback" not in result.err


# convert


def test_convert(run: Run, float_folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    result = run("convert", str(float_folder), str(target), "--quantize", "8", "--group-size", "32")
    assert (result.code, result.out) == (0, f"Wrote {target}.\n")
    config = json.loads((target / "config.json").read_text())
    assert (config["quantization"]["bits"], config["quantization"]["group_size"]) == (8, 32)
    assert run("generate", "--model", str(target), "--image", PENGUINS).out == f"{ANSWER}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_convert_onto_what_is_there(run: Run, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "mine.txt").write_text("mine")
    for overwrite in ([], ["--overwrite"]):
        result = run("convert", str(NANO), str(target), *overwrite)
        assert_one_error(result, str(target), "holds mine.txt", "choose another target")
        assert [path.name for path in target.iterdir()] == ["mine.txt"]
    assert_one_error(run("convert", str(NANO), PENGUINS, "--overwrite"), PENGUINS, "is a file")
    (target / "mine.txt").unlink()
    assert run("convert", str(NANO), str(target)).code == 0
    assert_one_error(run("convert", str(NANO), str(target)), "exists", "--overwrite")
    assert run("convert", str(NANO), str(target), "--overwrite").code == 0
    assert (target / "config.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_convert_into_the_folder_one_is_in(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "thesis.tex").write_text("mine")
    result = run("convert", str(NANO), ".", "--overwrite")
    assert_one_error(result, "holds thesis.tex", "choose another target")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    (tmp_path / "thesis.tex").unlink()
    for overwrite in ([], ["--overwrite"]):
        result = run("convert", str(NANO), ".", *overwrite)
        assert (result.code, result.out) == (0, "Wrote ..\n") and "`cd .`" in result.err
    assert run("generate", "--model", ".", "--image", PENGUINS).out == f"{ANSWER}\n"


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--dtype", "int8"], ["int8"]),
        (["--quantize", "7"], ["7"]),
        (["--quantize", "4", "--group-size", "5"], ["group_size"]),
    ],
)
def test_bad_arguments_of_convert(
    arguments: list[str], said: list[str], run: Run, float_folder: Path, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    assert_one_error(run("convert", str(float_folder), str(target), *arguments), *said)
    assert list(tmp_path.iterdir()) == []


def test_convert_of_nothing(run: Run, tmp_path: Path) -> None:
    assert_one_error(run("convert", str(tmp_path / "no where"), str(tmp_path / "t")), "no where")
    assert_one_error(run("convert", str(NANO), str(NANO)), str(NANO))


# chat


def test_commands_of_the_chat(run: Run, nano: tuple) -> None:
    lines = [
        f"/image {PENGUINS}",
        "Describe the image.",
        "How many penguins are there?",
        "/help",
        "",
        "/reset",
        "Describe the image.",
        f"  /image   {PANDA}  ",
        "What is this?",
        "/quit",
        "never read",
    ]
    result = run("chat", stdin="\n".join(lines))
    chat = Chat(*nano)
    expected = [
        chat.ask("Describe the image.", image=PENGUINS),
        chat.ask("How many penguins are there?"),
        *CHAT_HELP.splitlines(),
    ]
    chat.reset()
    expected += [chat.ask("Describe the image."), chat.ask("What is this?", image=PANDA)]
    assert expected[-2] != expected[0]
    assert result.code == 0
    assert result.out.replace("> ", "").split("\n") == [*expected, ""]
    assert "Error" not in result.err


def test_several_images_before_a_question(run: Run, nano: tuple) -> None:
    stdin = f"/image {PANDA}\nWhich?\nAgain?\n"
    options = {"max_tokens": 6, "image_size": 64}
    result = run("chat", "--image", PENGUINS, *as_flags(options), stdin=stdin)
    chat = Chat(*nano, **options)
    expected = [chat.ask("Which?", image=[PENGUINS, PANDA]), chat.ask("Again?")]
    assert result.out.replace("> ", "").split("\n")[:2] == expected


def test_errors_in_the_chat_do_not_end_it(run: Run, images: Path) -> None:
    lines = [
        "/image",
        f"/image {images / 'nothing.png'}",
        f"/image {images / 'text.png'}",
        "/pictures",
        "<image> without one",
        "word " * 5000,
        f"/image {PENGUINS}",
        "<image> and <image>",
        "Describe the image.",
    ]
    result = run("chat", stdin="\n".join(lines))
    assert result.code == 0
    assert result.out.replace("> ", "").split("\n")[0] == ANSWER  # the image is still there
    said = [
        "Name an image: /image PATH.",
        "no such file",
        "not an image",
        "There is no command /pictures",
        "1 <image> mark(s)",
        "limit is 4096",
        "2 <image> mark(s)",
    ]
    errors = result.err.splitlines()[2:]
    assert len(errors) == len(said)
    assert all(text in error for text, error in zip(said, errors, strict=True))


DRAGGED = {
    "escaped": lambda path: re.sub(r"([ ()'&])", r"\\\1", path),
    "double quotes": '"{}"'.format,
    "single quotes": "'{}'".format,
    "trailing space": "{} ".format,
    "plain": str,
    "url": lambda path: Path(path).as_uri(),
}


@pytest.mark.parametrize("way", DRAGGED)
def test_paths_dragged_into_the_terminal(way: str, run: Run, tmp_path: Path) -> None:
    name = "my (best) photo.png" if way == "single quotes" else "Ann's (best) photo & more.png"
    path = shutil.copyfile(PENGUINS, tmp_path / name)
    dragged = DRAGGED[way](str(path))
    assert run("generate", "--image", dragged).out == f"{ANSWER}\n"
    result = run("chat", stdin=f"/image {dragged}\n{ASK}\n")
    assert result.out.replace("> ", "").split("\n")[0] == ANSWER, result.err
    assert run("chat", "--image", dragged, stdin="/images\n").out.count("1. ") == 1


@pytest.mark.parametrize("way", ["escaped", "double quotes", "single quotes", "url"])
def test_several_files_dragged_in_at_once(way: str, run: Run, tmp_path: Path) -> None:
    paths = [tmp_path / f"my photo {n}.png" for n in (1, 2, 3)]
    for path in paths:
        shutil.copyfile(PENGUINS, path)
    dragged = " ".join(DRAGGED[way](str(path)) for path in paths) + " "
    listed = run("chat", stdin=f"/image {dragged}\n/images\n").out
    assert all(f"{n}. {path} (" in listed for n, path in enumerate(paths, 1)), listed
    assert run("chat", "--image", dragged, stdin="/images\n").out.count(". /") == 3
    result = run("chat", stdin=f"/image {dragged} nothing.png\n/images\n")
    assert "nothing.png" in result.err and "No image yet" in result.out


def test_several_images_after_one_flag(run: Run) -> None:
    asked = run("chat", "--image", PENGUINS, PANDA, "--seed", "1", stdin="/images\n").out
    assert "1. " in asked and f"2. {PANDA}" in asked and "3. " not in asked
    parts = run("generate", f"--image={PENGUINS}", PANDA, "--prompt", "<image> A", "--model", NANO)
    assert_one_error(parts, "1 <image> mark(s) for 2 image(s)")
    for arguments in (["--prompt", "A", "B"], ["B", "--image", PANDA], ["--image"]):
        assert run("generate", *arguments).code == 2


def test_a_backslash_may_be_part_of_a_name(run: Run, tmp_path: Path) -> None:
    odd = shutil.copyfile(PENGUINS, tmp_path / "a\\ b'.png")
    assert run("generate", "--image", odd).out == f"{ANSWER}\n"


def test_images_that_the_conversation_knows(run: Run) -> None:
    lines = ["/images", ASK, f"/image {PANDA}", "/images", "What?", "/reset", "/images"]
    result = run("chat", "--image", PENGUINS, "--max-tokens", "1", stdin="\n".join(lines))
    listed = [line for line in result.out.replace("> ", "").split("\n") if "mage" in line]
    assert listed == [
        f"1. {PENGUINS} (256 × 256 pixels), shown with the next question",
        f"1. {PENGUINS} (256 × 256 pixels)",
        f"2. {PANDA} (256 × 256 pixels), shown with the next question",
        "No image yet: /image PATH shows one.",
    ]


@pytest.mark.skipif(sys.platform == "darwin", reason="a Mac's files have names in UTF-8 only")
def test_bytes_of_another_encoding_do_not_end_the_chat(tmp_path: Path) -> None:
    path = os.fsencode(shutil.copyfile(PENGUINS, os.fsencode(tmp_path) + b"/caf\xe9.png"))
    lines = b"/image " + path + b"\nWas ist das f\xfcr ein Bild?\n/image \xff\n" + ASK.encode()
    done = subprocess.run([*MAIN, "chat"], input=lines, capture_output=True, timeout=60)
    assert done.returncode == 0 and b"Traceback" not in done.stderr
    assert done.stderr.count(b"Error: ") == 1 and b"no such file" in done.stderr
    assert done.stdout.count(b"\n") == 3 and b"penguins" in done.stdout


def test_options_of_the_chat(run: Run) -> None:
    assert_one_error(run("chat", "--temperature", "-1"), "temperature")
    assert_one_error(run("chat", "--max-tokens", "0"), "max_tokens")
    assert_one_error(run("chat", "--model", "not-there"), "not-there")
    result = run("chat", "--max-tokens", "2", "--image", PENGUINS, stdin="Describe the image.\n")
    assert result.out.replace("> ", "").startswith("The image\n")


@pytest.mark.parametrize("call", [0, 2, 2 * DEPTH + 1])
def test_ctrl_c_stops_an_answer(call: int, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it comes while the prompt is read or later, the chat and its images go on."""
    interrupt(Block, "__call__", call, monkeypatch)
    stdin = "Describe the image.\nHow many penguins are there?\n"
    result = run("chat", "--image", PENGUINS, stdin=stdin)
    first, second, *_ = result.out.replace("> ", "").split("\n")
    assert result.code == 0
    assert first.endswith("[stopped]") and first.startswith("The" if call > DEPTH else " [")
    assert second == "There are 6 penguins."


class Callback:
    """As those of weak references and of C++: an exception that is raised in it gets lost."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


def test_ctrl_c_is_not_lost_in_a_callback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    compute, calls = Qwen2.hidden_states, iter(range(100))

    def hidden_states(*arguments: Any) -> mx.array:
        if next(calls) == 3:
            Callback()
        return compute(*arguments)

    monkeypatch.setattr(Qwen2, "hidden_states", hidden_states)
    monkeypatch.setattr(signal, "getsignal", lambda _: signal.default_int_handler)
    result = run("chat", "--image", PENGUINS, stdin=f"{ASK}\n{ASK}\n")
    first, second, *_ = result.out.replace("> ", "").split("\n")
    assert first.startswith("The image") and first.endswith("[stopped]")
    assert (result.code, second) == (0, ANSWER) and "ignored" not in result.err
    calls = iter(range(100))
    result = run("generate", "--image", PENGUINS)
    assert result.code == 130 and ANSWER not in result.out and "ignored" not in result.err


def test_ctrl_c_while_the_image_is_read(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """No turn has begun, so the image waits for the next question."""
    interrupt(FastViTHD, "__call__", 0, monkeypatch)
    result = run("chat", "--image", PENGUINS, stdin="Read this.\nDescribe the image.\n")
    first, second, *_ = result.out.replace("> ", "").split("\n")
    assert "[stopped]" in first and second == ANSWER


def test_ctrl_c_at_the_prompt(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: Iterator[Any] = iter([KeyboardInterrupt, "Describe the image.", EOFError])

    def read(prompt: str = "") -> str:
        line = next(lines)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", read)
    result = run("chat", "--image", PENGUINS)
    assert result.code == 0 and ANSWER in result.out
    assert "Ctrl-D or /quit leaves." in result.err


# Help


def test_version_and_bare_command(run: Run) -> None:
    assert run("--version") == (0, f"fastvlm-mlx {__version__}\n", "")
    bare = run()
    assert "generate" in bare.out + bare.err and "Traceback" not in bare.err


COMMANDS = typer.main.get_command(app).commands


@pytest.mark.parametrize("name", COMMANDS)
def test_help_names_and_explains_every_option(name: str, run: Run) -> None:
    for flag in ("--help", "-h"):
        result = run(name, flag)
        assert (result.code, result.err) == (0, "")
        words = set(re.findall(r"[\w-]+", result.out))
        for parameter in COMMANDS[name].params:
            if parameter.param_type_name == "option":
                assert {*parameter.opts} <= words
            assert parameter.help, f"{name} {parameter.name}"
    assert name in run("--help").out


def test_flags_are_the_python_names() -> None:
    flags = {option for p in COMMANDS["generate"].params for option in p.opts}
    python_only = {"logits_processor", "prompt_cache", "logprobs"}
    names = [field.name for field in fields(Options)]
    names += [
        name
        for function in (fv.load, fv.stream_generate)
        for name, parameter in signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    ]
    assert {f"--{name.replace('_', '-')}" for name in {*names} - python_only} <= flags
    assert {"--model", "--image", "--prompt", "--json", "--verbose"} <= flags
    chat = {option for p in COMMANDS["chat"].params for option in p.opts}
    assert chat <= flags | {"--help", "-h"}


@pytest.mark.parametrize("name", ["generate", "chat"])
def test_flags_have_the_defaults_of_options(name: str) -> None:
    defaults = {field.name: field.default for field in fields(Options)}
    shared = [p for p in COMMANDS[name].params if p.name in defaults]
    assert len(shared) == (24 if name == "generate" else 9)
    context = typer.Context(COMMANDS[name])
    for parameter in shared:
        assert parameter.get_default(context) == defaults[parameter.name], parameter.name


def test_errors_are_one_sentence() -> None:
    assert sentence(ValueError("What is wrong.")) == "What is wrong."
    assert sentence(MemoryError()) == "MemoryError"
    error = PermissionError(13, "Permission denied", "/folder/file")
    assert sentence(error) == "/folder/file: Permission denied."


def test_errors_of_the_system(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise PermissionError(13, "Permission denied", "/folder/file")

    monkeypatch.setattr(f"{CLI}.generate.load", fail)
    result = run("generate", "--image", PENGUINS)
    assert_one_error(result, "/folder/file: Permission denied.")
