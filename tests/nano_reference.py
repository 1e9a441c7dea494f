"""Write what PyTorch says of pictures with the bundled model's weights, for tests/test_nano.py.

    FASTVLM_TRANSFORMERS_PYTHON=~/torch/bin/python python tests/nano_reference.py FOLDER

FOLDER holds the weights as they were before they were quantized. The pictures and questions of
tests/data/nano_eval stay; the answers, token ids and logits beside them are replaced.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import fastvlm_mlx as fv
from fastvlm_mlx.convert import convert
from fastvlm_mlx.text.prompt import build_prompt

DATA = Path(__file__).parent / "data" / "nano_eval"
WORKER = Path(__file__).with_name("peer_worker.py")
IMAGE = -200
TOKENS = 40


def main() -> None:
    source = Path(sys.argv[1])
    reference = json.loads((DATA / "reference.json").read_text())
    predictions = json.loads((DATA / "predictions.json").read_text())
    cases = [*reference, *predictions]
    processor = fv.load(source)[1]
    prompts = [prompt_of(processor, case["question"]) for case in cases]
    with tempfile.TemporaryDirectory() as scratch:
        found = run(source, Path(scratch), processor, cases, prompts)
    answers = [said(processor, found[f"{n}.tokens"]) for n in range(len(cases))]
    for n, case in enumerate(reference):
        mark = prompts[n].index(IMAGE)
        case["input_ids"] = prompts[n][: mark + 1]
        case["input_ids"] += [i for i in prompts[n][mark:] if i != IMAGE]
        case["output_ids"], case["output_text"] = answers[n]
        case["first_logits"] = np.round(found[f"{n}.logits"][-1].astype(float), 2).tolist()
    for n, case in enumerate(predictions, len(reference)):
        case["prediction"] = answers[n][1]
    for name, rows in (("reference", reference), ("predictions", predictions)):
        lines = ",\n  ".join(json.dumps(row, ensure_ascii=False) for row in rows)
        (DATA / f"{name}.json").write_text(f"[\n  {lines}\n]\n", encoding="utf-8")


def prompt_of(processor: fv.Processor, question: str) -> list[int]:
    return build_prompt(processor.tokenizer, question, num_visual_tokens=[16])


def run(
    source: Path, scratch: Path, processor: fv.Processor, cases: list[Any], prompts: list[list[int]]
) -> dict[str, Any]:
    """The outputs of transformers, by number and name."""
    folder = convert(source, scratch / "folder", layout="transformers", dtype="float32")
    token = json.loads((folder / "config.json").read_text())["image_token_index"]
    inputs: dict[str, Any] = {"number": len(cases)}
    for n, (case, ids) in enumerate(zip(cases, prompts, strict=True)):
        inputs[f"{n}.pixel_values"] = np.array(processor.preprocess(DATA / case["image"]))
        inputs[f"{n}.input_ids"] = np.array([token if i == IMAGE else i for i in ids])
        inputs[f"{n}.tokens"] = TOKENS
    given, found = scratch / "inputs.npz", scratch / "outputs.npz"
    np.savez(given, **inputs)
    python = os.environ["FASTVLM_TRANSFORMERS_PYTHON"]
    command = [python, WORKER, "transformers-each", folder, given, found]
    subprocess.run([str(part) for part in command], check=True)
    with np.load(found) as outputs:
        return dict(outputs)


def said(processor: fv.Processor, tokens: Any) -> tuple[list[int], str]:
    """Token ids up to the end, and the text before it."""
    ids = [int(token) for token in tokens]
    end = processor.tokenizer.encode("<|im_end|>", allow_special=True)[0]
    if end not in ids:
        raise ValueError(f"An answer is longer than {TOKENS} tokens.")
    ids = ids[: ids.index(end) + 1]
    return ids, processor.tokenizer.decode(ids[:-1])


if __name__ == "__main__":
    main()
