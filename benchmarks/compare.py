"""Measure this library and mlx-vlm side by side, on the same weights.

Each library runs in a process of its own, with its own Python where needed, and the two take
turns (A B, B A, A B, …), so that whatever else the machine does falls on both alike. What is
compared is what a user waits for: the encoder, the time to the first token, the tokens per second
after it, loading, and memory; and first of all whether both say the same.

    python benchmarks/random_checkpoint.py 0.5b /tmp/fastvlm-0.5b
    python benchmarks/compare.py /tmp/fastvlm-0.5b --peer-python ~/mlx-vlm/bin/python

benchmarks/README.md says how to read the table and how to get steady figures.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any, NamedTuple

# A worker may run in an environment that has mlx-vlm and nothing of this project: what only one
# side or only the driver needs is imported where it is used.
import mlx.core as mx
import numpy as np

OURS, PEER = "fastvlm-mlx", "mlx-vlm"
SIDES = (OURS, PEER)
IMAGE = -200
DTYPES = ("float32", "float16", "bfloat16")
FEATURES_TOLERANCE = 1e-3


class Ours:
    """This library, driven as its `generate` drives it."""

    def __init__(self) -> None:
        self.library = importlib.import_module("fastvlm_mlx.generate")
        self.weights = importlib.import_module("fastvlm_mlx.weights")

    def load(self, folder: Path, dtype: str) -> None:
        self.model = self.weights.load_model(folder, dtype=dtype)

    def features(self, pixel_values: mx.array) -> mx.array:
        """The encoder's output, before the projector: [1, n, C]."""
        return self.model.vision_tower(pixel_values)

    def encode(self, pixel_values: mx.array) -> mx.array:
        """Visual tokens: [1, n, hidden_size]."""
        return self.model.encode_image(pixel_values)

    def generate(
        self, pixel_values: mx.array, prompt: Sequence[int], max_tokens: int
    ) -> Iterator[int]:
        """Greedy tokens; `prompt` has one `IMAGE`."""
        features, input_ids = self._read(pixel_values, prompt)
        embeddings = self.model.embed_inputs(mx.array([input_ids]), image_features=features)
        cache = self.model.make_kv_cache()
        options = self.library.Options()
        yield from self.library.generate_tokens(
            self.model, input_ids, embeddings, cache, options, max_tokens
        )

    def logits(self, pixel_values: mx.array, prompt: Sequence[int]) -> mx.array:
        """Logits of the token after the prompt: [vocab_size]."""
        features, input_ids = self._read(pixel_values, prompt)
        embeddings = self.model.embed_inputs(mx.array([input_ids]), image_features=features)
        hidden_states = self.model.language_model.hidden_states(None, None, embeddings)
        return self.model.language_model.logits(hidden_states[0, -1])

    def _read(
        self, pixel_values: mx.array, prompt: Sequence[int]
    ) -> tuple[list[mx.array], list[int]]:
        features = self.model.encode_images(pixel_values)
        mx.eval(features)
        at = list(prompt).index(IMAGE)
        return features, [*prompt[:at], *[IMAGE] * len(features[0]), *prompt[at + 1 :]]


class Peer:
    """mlx-vlm, driven as its `stream_generate` drives it."""

    def __init__(self) -> None:
        self.library = importlib.import_module("mlx_vlm.generate")
        self.weights = importlib.import_module("mlx_vlm.utils")

    def load(self, folder: Path, dtype: str) -> None:
        self.model = self.weights.load_model(folder)  # in the folder's dtype, which is `dtype`

    def features(self, pixel_values: mx.array) -> mx.array:
        _, features, _ = self.model.vision_tower(pixel_values)
        return features.flatten(1, 2)

    def encode(self, pixel_values: mx.array) -> mx.array:
        return self.model.mm_projector(self.features(pixel_values))

    def generate(
        self, pixel_values: mx.array, prompt: Sequence[int], max_tokens: int
    ) -> Iterator[int]:
        input_ids, channels_first, mask = self._read(pixel_values, prompt)
        for token, _ in self.library.generate_step(
            input_ids, self.model, channels_first, mask, max_tokens=max_tokens, temperature=0.0
        ):
            yield token

    def logits(self, pixel_values: mx.array, prompt: Sequence[int]) -> mx.array:
        input_ids, channels_first, mask = self._read(pixel_values, prompt)
        embeddings = self.model.get_input_embeddings(input_ids, channels_first, mask=mask)
        output = self.model.language_model(None, inputs_embeds=embeddings.inputs_embeds)
        return output.logits[0, -1]

    def _read(
        self, pixel_values: mx.array, prompt: Sequence[int]
    ) -> tuple[mx.array, mx.array, mx.array]:
        input_ids = mx.array([list(prompt)])
        return input_ids, pixel_values.transpose(0, 3, 1, 2), mx.ones_like(input_ids)


# --- a worker: one process, one library ---------------------------------------------------------


def serve(side: str, folder: Path, dtype: str) -> None:
    """Answer requests, one JSON object a line on stdin, with one a line on stdout."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not get between the replies
    library: Ours | Peer = Ours() if side == OURS else Peer()
    for line in sys.stdin:
        request = json.loads(line)
        reply = answer(library, side, folder, dtype, **request)
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def answer(
    library: Ours | Peer, side: str, folder: Path, dtype: str, do: str, **request: Any
) -> dict[str, Any]:
    """Do what one request asks."""
    if do == "about":
        return {"mlx": version("mlx"), "library": version(side), "device": device_name()}
    if do == "memory":
        return {"resident": peak_resident_bytes(), "arrays": mx.get_peak_memory()}
    if do == "load":
        vars(library).pop("model", None)  # not two models at once
        mx.clear_cache()
        start = time.perf_counter()
        library.load(folder, dtype)
        return {"seconds": time.perf_counter() - start}
    pixel_values = noise_image(request.pop("image_size"))
    if do == "encode":
        start = time.perf_counter()
        mx.eval(library.encode(pixel_values))
        return {"seconds": time.perf_counter() - start}
    if do == "generate":
        return timed_generation(library, pixel_values, **request)
    if do == "features":
        features = library.features(pixel_values).astype(mx.float32)
        np.save(request["file"], np.array(features))
        return {}
    if do == "margin":
        logits = library.logits(pixel_values, request["prompt"]).astype(mx.float32)
        first, second = request["tokens"]
        return {"margin": (logits[first] - logits[second]).item(), "std": logits.std().item()}
    raise ValueError(f"No such request: {do}.")


def timed_generation(
    library: Ours | Peer, pixel_values: mx.array, prompt: Sequence[int], max_tokens: int
) -> dict[str, Any]:
    """Greedy tokens, the time to the first and the rate of those after it."""
    start = time.perf_counter()
    tokens, times = [], []
    for token in library.generate(pixel_values, prompt, max_tokens):
        tokens.append(token)
        times.append(time.perf_counter())
    return {
        "tokens": tokens,
        "ttft": times[0] - start,
        "tokens_per_second": (len(times) - 1) / (times[-1] - times[0]),
    }


def noise_image(image_size: int) -> mx.array:
    """Pixels [1, S, S, 3] in [0, 1], the same in every process."""
    noise = np.random.default_rng(0).random((1, image_size, image_size, 3), dtype=np.float32)
    pixel_values = mx.array(noise)
    mx.eval(pixel_values)
    return pixel_values


def peak_resident_bytes() -> int:
    """Most physical memory that this process has had."""
    status = Path("/proc/self/status")
    if status.is_file():  # ru_maxrss counts there what the parent had when it started this process
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def device_name() -> str:
    if mx.default_device().type == mx.DeviceType.cpu:
        return "CPU"
    return str(mx.device_info().get("device_name", "GPU"))


# --- the driver ---------------------------------------------------------------------------------


class Worker:
    """The other end of `serve`."""

    def __init__(self, side: str, python: str, folder: Path, dtype: str):
        self.side = side
        command = [python, __file__, "--serve", side, str(folder), "--dtype", dtype]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """Send a request and wait for its reply; RuntimeError if the process is gone."""
        requests, replies = self._pipes()
        try:
            requests.write(json.dumps({"do": do, **request}) + "\n")
            requests.flush()
        except BrokenPipeError:
            pass
        line = replies.readline()
        if not line:
            raise RuntimeError(f"{self.side} ended while asked to {do}; its error stands above.")
        return json.loads(line)

    def close(self) -> None:
        requests, _ = self._pipes()
        requests.close()
        self.process.wait()

    def _pipes(self) -> tuple[IO[str], IO[str]]:
        assert self.process.stdin and self.process.stdout
        return self.process.stdin, self.process.stdout


class Figure(NamedTuple):
    """One thing that is measured; `more` says whether more of it is better."""

    title: str
    unit: str
    more: bool = False


FIGURES = {
    "encode": Figure("encoder and projector", "s"),
    "ttft": Figure("time to first token", "s"),
    "decode": Figure("decoding", "tokens/s", more=True),
    "load": Figure("loading", "s"),
    "resident": Figure("peak memory of the process", "GB"),
    "arrays": Figure("peak memory of arrays", "GB"),
}

Samples = dict[str, dict[str, list[float]]]


def compare(folder: Path, peer_python: str, args: argparse.Namespace) -> dict[str, Any]:
    """All figures and the comparison of outputs; `folder` is in the layout that both read."""
    config = json.loads((folder / "config.json").read_text())
    image_size = args.image_size or config["vision_config"]["image_size"]
    prompt = random_prompt(args.text_tokens, config["vocab_size"])
    generate = {"image_size": image_size, "prompt": prompt, "max_tokens": args.tokens}
    pythons = {OURS: sys.executable, PEER: peer_python}
    samples: Samples = {key: {side: [] for side in SIDES} for key in FIGURES}

    def start() -> dict[str, Worker]:
        return {side: Worker(side, pythons[side], folder, args.dtype) for side in SIDES}

    for side, worker in start().items():
        note(f"memory of {side}")
        worker.ask("load")
        worker.ask("generate", **generate)
        for key, peak in worker.ask("memory").items():
            samples[key][side].append(peak / 1e9)
        worker.close()
    workers = start()
    for side, worker in in_turns(workers, args.rounds, "loading"):
        samples["load"][side].append(worker.ask("load")["seconds"])
    note("comparing outputs")
    outputs = compare_outputs(workers, generate)
    for side, worker in in_turns(workers, args.rounds, "encoding and generating"):
        encoded = worker.ask("encode", image_size=image_size)
        samples["encode"][side].append(encoded["seconds"])
        generated = worker.ask("generate", **generate)
        samples["ttft"][side].append(generated["ttft"])
        samples["decode"][side].append(generated["tokens_per_second"])
    about = {side: worker.ask("about") for side, worker in workers.items()}
    for worker in workers.values():
        worker.close()
    return {
        "model": {key: config[key] for key in ("hidden_size", "num_hidden_layers", "vocab_size")},
        "settings": {
            "dtype": args.dtype,
            "quantization": config.get("quantization"),
            "image_size": image_size,
            "text_tokens": args.text_tokens,
            "tokens": args.tokens,
            "rounds": args.rounds,
        },
        "machine": describe_machine(),
        "versions": about,
        "outputs": outputs,
        "samples": samples,
    }


def in_turns(workers: dict[str, Worker], rounds: int, what: str) -> Iterator[tuple[str, Worker]]:
    """Each worker once a round; who went second goes first in the next."""
    order = list(workers.items())
    for i in range(rounds):
        note(f"{what}: round {i + 1} of {rounds}")
        yield from order
        order.reverse()


def random_prompt(text_tokens: int, vocab_size: int) -> list[int]:
    """Token ids with one image among them."""
    ids: list[int] = np.random.default_rng(1).integers(0, vocab_size, text_tokens).tolist()
    half = text_tokens // 2
    return [*ids[:half], IMAGE, *ids[half:]]


def compare_outputs(workers: dict[str, Worker], generate: dict[str, Any]) -> dict[str, Any]:
    """How far the features differ, and where the greedy tokens first do."""
    with tempfile.TemporaryDirectory() as scratch:
        files = {side: f"{scratch}/{side}.npy" for side in SIDES}
        for side, worker in workers.items():
            worker.ask("features", image_size=generate["image_size"], file=files[side])
        ours, peers = (np.load(files[side]) for side in SIDES)
    difference = float(np.abs(ours - peers).max() / peers.std())
    tokens = {
        side: worker.ask("generate", **generate)["tokens"] for side, worker in workers.items()
    }
    pairs = list(zip(tokens[OURS], tokens[PEER], strict=True))
    step = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    outputs: dict[str, Any] = {
        "features_difference": difference,
        "tokens": len(pairs),
        "distinct_tokens": len(set(tokens[OURS])),
        "first_difference": step,
    }
    if step is not None:
        prompt = generate["prompt"] + tokens[OURS][:step]
        outputs["margin"] = {
            side: worker.ask(
                "margin", image_size=generate["image_size"], prompt=prompt, tokens=pairs[step]
            )
            for side, worker in workers.items()
        }
    return outputs


def describe_machine() -> dict[str, Any]:
    """The machine in general terms."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [x.split(":", 1)[1] for x in cpuinfo.read_text().splitlines() if "model name" in x]
        model = names[0].strip() if names else model
    elif sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        model = subprocess.run(command, capture_output=True, text=True).stdout.strip() or model
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "system": platform.system(),
        "preloaded": Path(os.environ.get("LD_PRELOAD", "")).name,
    }


def advantage(key: str, samples: Samples) -> float:
    """How many times better this library is: the median over the rounds, each a pair."""
    pairs = zip(samples[key][OURS], samples[key][PEER], strict=True)
    more = FIGURES[key].more
    return statistics.median(a / b if more else b / a for a, b in pairs)


# --- reporting ----------------------------------------------------------------------------------

HEADER = ("", "unit", OURS, PEER, "times better")


def rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """The table without its header: medians, with the least and the most in brackets."""
    samples = result["samples"]
    return [
        (
            figure.title,
            figure.unit,
            *(spread(samples[key][side]) for side in SIDES),
            f"{advantage(key, samples):.2f}",
        )
        for key, figure in FIGURES.items()
    ]


def spread(values: Sequence[float]) -> str:
    middle = f"{statistics.median(values):.3g}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.3g}–{max(values):.3g})"


def describe_setting(result: dict[str, Any]) -> list[str]:
    """What was measured, where and with what, a sentence a line."""
    model, settings, machine = result["model"], result["settings"], result["machine"]
    versions = result["versions"]
    preloaded = f", {machine['preloaded']} preloaded" if machine["preloaded"] else ""
    return [
        f"Decoder of {model['num_hidden_layers']} layers, {model['hidden_size']} wide, "
        f"{settings['dtype']}; images of {settings['image_size']} pixels square; a prompt of one "
        f"image and {settings['text_tokens']} text tokens; {settings['tokens']} greedy tokens.",
        f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}{preloaded}; computed on "
        f"{' and '.join(dict.fromkeys(versions[side]['device'] for side in SIDES))}.",
        f"{OURS} {versions[OURS]['library']} with mlx {versions[OURS]['mlx']}, "
        f"{PEER} {versions[PEER]['library']} with mlx {versions[PEER]['mlx']}.",
        f"Median of {settings['rounds']} rounds, least and most in brackets; memory from one run. "
        "Above 1, this library is ahead.",
    ]


def describe_outputs(outputs: dict[str, Any]) -> list[str]:
    """How the outputs compare, a sentence a line."""
    lines = [
        "Vision features differ by at most "
        f"{outputs['features_difference']:.1e} of their standard deviation."
    ]
    step = outputs["first_difference"]
    if step is None:
        return [*lines, f"All {outputs['tokens']} greedy tokens are the same."]
    margins = outputs["margin"]
    found = " and ".join(f"{margins[side]['margin']:+.1e} ({side})" for side in SIDES)
    return [
        *lines,
        f"Greedy tokens differ first at step {step}, where the logits of the two tokens lie "
        f"{found} apart, and all logits have a standard deviation of {margins[OURS]['std']:.1e}.",
    ]


def print_table(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*HEADER[:2])
    for name in HEADER[2:]:
        table.add_column(name, justify="right")
    for row in rows(result):
        table.add_row(*row)
    console = Console()
    console.print(*describe_setting(result), sep="\n")
    console.print(table)
    console.print(*describe_outputs(result["outputs"]), sep="\n")


def markdown(result: dict[str, Any]) -> str:
    """The same as a page."""
    lines = [HEADER, ("---", "---", "---:", "---:", "---:"), *rows(result)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    setting = "\n".join(f"- {line}" for line in describe_setting(result))
    outputs = "\n".join(f"- {line}" for line in describe_outputs(result["outputs"]))
    return f"# Results\n\nWritten by `compare.py`.\n\n{setting}\n\n{table}\n\n{outputs}\n"


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=f"Measure {OURS} and {PEER} side by side on the same weights.",
        epilog="The model is first converted into a temporary folder (choose another place for it "
        "with TMPDIR), in the layout and the dtype that both read. Both libraries inherit the "
        "environment: set LD_PRELOAD or thread counts there. Exits with 1 if the vision features "
        f"differ by more than {FEATURES_TOLERANCE} of their standard deviation in float32.",
    )
    parser.add_argument("model", type=Path, help="a FastVLM folder, in any layout that is known")
    parser.add_argument(
        "--peer-python",
        default=sys.executable,
        metavar="PATH",
        help=f"Python of an environment with {PEER}; default: the one that runs this",
    )
    parser.add_argument("--rounds", type=int, default=5, help="of each measurement; default: 5")
    parser.add_argument("--tokens", type=int, default=64, help="to generate; default: 64")
    parser.add_argument(
        "--text-tokens", type=int, default=32, help="in the prompt beside the image; default: 32"
    )
    parser.add_argument("--image-size", type=int, help="in pixels; default: the model's own")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of the weights; default: float32"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample there")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there")
    parser.add_argument("--serve", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rounds < 1 or args.tokens < 2 or args.text_tokens < 1:
        parser.error("--rounds and --text-tokens must be at least 1, and --tokens at least 2.")
    return args


def main() -> int:
    args = parse_arguments()
    if args.serve:
        serve(args.serve, args.model, args.dtype)
        return 0
    from fastvlm_mlx.convert import convert

    try:
        with tempfile.TemporaryDirectory() as scratch:
            note("converting")
            folder = convert(args.model, f"{scratch}/model", dtype=args.dtype, progress=False)
            result = compare(folder, args.peer_python, args)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 2
    print_table(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    if args.markdown:
        args.markdown.write_text(markdown(result))
    agree = result["outputs"]["features_difference"] <= FEATURES_TOLERANCE
    return 0 if agree or args.dtype != "float32" else 1


if __name__ == "__main__":
    sys.exit(main())
