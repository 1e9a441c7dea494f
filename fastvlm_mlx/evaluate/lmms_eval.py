"""FastVLM in lmms-eval: `lmms_eval --model fastvlm_mlx --model_args pretrained=0.5b --tasks …`.

lmms-eval finds it by the entry point `lmms_eval.models`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import count
from typing import Any

import mlx.core as mx
from lmms_eval.api.model import lmms

from ..checkpoint.load import load
from ..checks import shown
from ..generation.batch import batch_generate
from ..generation.generate import generate
from ..generation.inputs import read_inputs
from ..generation.options import Options

# lmms-eval's names of what it may ask for, and ours.
OPTIONS = {"max_new_tokens": "max_tokens", "temperature": "temperature", "top_p": "top_p"}


class FastVLMEval(lmms):
    """A model for lmms-eval's tasks about images; its arguments come as texts.

    Args:
        pretrained: as `load` takes it; by default the bundled nano model.
        batch_size: answers decoded together.
        quantize, dtype, revision: as `load` takes them.
        image_size: side in pixels.
        device: ignored; MLX has one.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str | None = None,
        batch_size: int | str = 1,
        *,
        quantize: int | str | None = None,
        dtype: str | None = None,
        revision: str | None = None,
        image_size: int | str | None = None,
        device: str | None = None,
        max_batch_size: Any = None,
    ):
        super().__init__()
        bits = None if quantize is None else int(quantize)
        self.model, self.processor = load(pretrained, revision=revision, dtype=dtype, quantize=bits)
        self.max_batch = int(batch_size) if str(batch_size).isdigit() else 1
        self.reading: dict[str, Any] = {} if image_size is None else {"image_size": int(image_size)}

    def generate_until(self, requests: Iterable[Any]) -> list[str]:
        """The answer to each request, those with the same options together."""
        asked = [request.args for request in requests]
        groups: dict[str, list[int]] = {}
        for place, (_, wanted, *_) in enumerate(asked):
            groups.setdefault(json.dumps(wanted, sort_keys=True, default=str), []).append(place)
        answers = [""] * len(asked)
        for places in groups.values():
            options = self.reading | options_of(asked[places[0]][1])
            texts = self._answer([asked[place] for place in places], options)
            for place, text in zip(places, texts, strict=True):
                answers[place] = text
        return answers

    def _answer(self, asked: Sequence[tuple[Any, ...]], options: dict[str, Any]) -> list[str]:
        prompts = ((args[0], self._images(*args[2:6])) for args in asked)  # read as needed
        if "num_beams" in options:
            return [
                generate(self.model, self.processor, prompt, images, **options)
                for prompt, images in prompts
            ]
        return batch_generate(
            self.model, self.processor, prompts, max_batch=self.max_batch, **options
        )

    def loglikelihood(self, requests: Iterable[Any]) -> list[tuple[float, bool]]:
        """Of each continuation: its log probability, and whether greedy decoding would give it."""
        return [self._likelihood(*request.args) for request in requests]

    def _likelihood(
        self, prompt: str, target: Any, to_visual: Any, id: Any, task: str, split: str
    ) -> tuple[float, bool]:
        text = target if isinstance(target, str) else target(self.task_dict[task][split][id])
        images = self._images(to_visual, id, task, split)
        options = Options(**self.reading)
        inputs = read_inputs(self.model, self.processor, prompt, images, options)
        ids = mx.array([self.processor.tokenizer.encode(text)])
        known = mx.concatenate([inputs.embeddings, self.model.embed_inputs(ids)], axis=1)
        logits = self.model.language_model(None, None, known)[0, -ids.shape[1] - 1 : -1]
        logits = logits.astype(mx.float32)
        chosen = mx.take_along_axis(logits, ids.T, axis=-1)[:, 0]
        total = (chosen - mx.logsumexp(logits, axis=-1)).sum()
        return float(total), bool((logits.argmax(axis=-1) == ids[0]).all())

    def generate_until_multi_round(self, requests: Iterable[Any]) -> list[list[str]]:
        """To each request what its task makes of the answers of all rounds."""
        return [self._rounds(*request.args) for request in requests]

    def _rounds(
        self,
        prompt: str,
        wanted: dict[str, Any],
        to_visual: Any,
        to_text: Any,
        id: Any,
        task: str,
        split: str,
    ) -> list[str]:
        options = self.reading | options_of(wanted)
        images = self._images(to_visual, id, task, split)
        said: list[str] = []
        known = None
        for number in count(1):
            said.append(generate(self.model, self.processor, prompt, images, **options))
            found, prompt, ended, answers, known = to_text(
                self.task_dict[task][split][id],
                previous_output=said,
                round_idx=number,
                previous_round_info=known,
            )
            said = list(answers)
            if ended:
                break
            images = images_of(found, task)
        return said

    def _images(self, to_visual: Any, id: Any, task: str, split: str) -> list[Any]:
        return images_of(to_visual(self.task_dict[task][split][id]), task)


def images_of(found: Any, task: str) -> list[Any]:
    """The images that a task shows; ValueError if it shows something else."""
    images = [] if found is None else list(found) if isinstance(found, list) else [found]
    for image in images:
        if not hasattr(image, "convert"):
            raise ValueError(f"fastvlm_mlx answers about images; {task} has {shown(image)}.")
    return images


def options_of(wanted: dict[str, Any]) -> dict[str, Any]:
    """lmms-eval's generation settings as options; sampling happens only where it is asked for."""
    options = {OPTIONS[name]: wanted[name] for name in OPTIONS if wanted.get(name) is not None}
    if wanted.get("do_sample") is False:
        options["temperature"] = 0.0
    if not options.get("temperature"):
        options.pop("top_p", None)
    until = wanted.get("until") or []
    options["stop"] = tuple([until] if isinstance(until, str) else until)
    if (wanted.get("num_beams") or 1) > 1:
        options["num_beams"] = wanted["num_beams"]
    return options
