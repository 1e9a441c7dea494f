"""Learned quantization: tune scales until the quantized model answers as its source does.

This is mlx_lm's distilled weight quantization (DWQ), on questions about images. It tunes the scales
and biases of the decoder's affine layers below 8 bits, embeddings included; the packed weights, and
so the size, stay the same.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from io import StringIO
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from ..checkpoint.files import Weights
from ..checkpoint.load import load_model, load_processor
from ..checkpoint.names import quantized_linears, unfuse
from ..checkpoint.quantize import Quantize, part_of
from ..evaluate.questions import DEFAULT_QUESTION, read_questions
from ..generation.decode import generate_tokens
from ..generation.inputs import Sizes, read_inputs
from ..generation.options import Options
from ..image.load import image_files
from ..model.fastvlm import FastVLM
from ..processor import Processor
from ..progress import progress_bar

LEARNING_RATE = 2e-5
EPOCHS = 5
TEMPERATURE = 4.0  # divides both models' logits, so that unlikely tokens count too
ANSWER_TOKENS = 64
HELD_OUT = 8  # every eighth question tells which epoch was best
Sequences = list[tuple[list[int], int]]


@dataclass
class Prompt:
    """A question about an image.

    Attributes:
        input_ids: with `image_token_index` at each visual token.
        features: visual features [tiles, n, C], before the projector, which may be quantized.
        image_size: (width, height) of the image in pixels.
    """

    input_ids: list[int]
    features: mx.array
    image_size: tuple[int, int]


class Answering(nn.Module):
    """A decoder as mlx_lm trains one: ids [1, T] → logits [1, T, vocab_size].

    The first id is the number of a prompt, and the others are its answer: so only tokens of the
    answer are compared.
    """

    def __init__(self, model: FastVLM, prompts: Sequence[Prompt]):
        super().__init__()
        self.language_model = model.language_model
        # Functions, since mlx_lm trains whatever it finds among a module's fields.
        self.prompt_of = prompts.__getitem__
        self.embed = partial(embed, model)

    def __call__(self, ids: mx.array) -> mx.array:
        prompt = self.prompt_of(int(ids[0, 0]))
        input_ids = mx.concatenate([mx.array(prompt.input_ids), ids[0, 1:]])[None]
        states = self.language_model.hidden_states(None, None, self.embed(prompt, input_ids))
        logits = self.language_model.logits(states[:, len(prompt.input_ids) - 1 :])
        return logits.astype(mx.float32)


def calibrate(
    folder: Path,
    quantize: Quantize,
    images: Path,
    *,
    epochs: int = EPOCHS,
    learning_rate: float = LEARNING_RATE,
    progress: bool = True,
) -> Weights:
    """Quantize a model and tune its decoder on a folder of images.

    The source answers a question about each image: those of the folder's `.jsonl` files of
    {"image", "question"}, or "Describe the image." if there are none. The quantized model learns to
    give each token of these answers the probability that the source gives it. The result is that
    of the epoch, or of plain rounding, which is nearest to the source on held-out answers.

    Args:
        folder: a full-precision model.
        quantize: as `quantize.parse_quantize` takes.
        images: a folder of images.
        epochs: passes over the questions.
        learning_rate: of Adam, for scales and biases.
        progress: show a progress bar.

    Returns:
        The tensors of the tuned layers in the mlx-vlm layout: float32, except for packed weights.

    Raises:
        FileNotFoundError: there is no such folder, or it holds no images.
        ValueError: nothing can be tuned, or a line or an image can't be read.
    """
    questions = list_questions(images)
    student = load_model(folder, dtype="float32", quantize=quantize)
    layers = tunable_layers(student)
    if not layers:
        raise ValueError(
            "Calibration tunes affine layers of less than 8 bits, and the decoder would have none; "
            "quantize to 6 bits or fewer."
        )
    processor = load_processor(folder)
    teacher = load_model(folder)
    prompts: list[Prompt] = []
    sequences: Sequences = []
    with progress_bar(len(questions), "Asking the source", shown=progress) as bar:
        for number, (image, question) in enumerate(questions):
            prompts.append(read_prompt(teacher, processor, image, question))
            sequences.append(([number, *greedy_answer(teacher, processor, prompts[-1])], 0))
            bar.update()
    learner, target = Answering(student, prompts), Answering(teacher, prompts)
    tune(learner, target, sequences, epochs, learning_rate, progress=progress)
    tensors = unfuse(student, folded=True)
    return {name: tensors[name] for name in tensors if name.rpartition(".")[0] in layers}


def list_questions(folder: Path) -> list[tuple[Path, str]]:
    """(image, question) pairs of a folder; errors as `calibrate`."""
    folder = Path(os.path.expanduser(folder))
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder} of images to calibrate on.")
    files = sorted(folder.glob("[!.]*.jsonl"))
    questions = [pair for file in files for pair in read_questions(file)]
    if not questions:
        questions = [(image, DEFAULT_QUESTION) for image in image_files(folder)]
    if not questions:
        raise FileNotFoundError(f"{folder} holds no images to calibrate on.")
    return questions


def tunable_layers(model: FastVLM) -> set[str]:
    """Names in a checkpoint of the layers to tune: the decoder's affine ones below 8 bits."""
    quantized = quantized_linears(unfuse(model, folded=True), model.config)
    return {
        name
        for name, settings in quantized
        if settings["mode"] == "affine" and settings["bits"] < 8
        if part_of(f"{name}.weight") in ("decoder", "embeddings")
    }


def read_prompt(model: FastVLM, processor: Processor, image: Path, question: str) -> Prompt:
    """Encode an image, and give its visual tokens their places in a question."""
    features = []

    def encode(
        model: FastVLM, pixel_values: Sequence[mx.array], image_sizes: Sizes
    ) -> tuple[list[mx.array], list[bytes]]:
        features.append(model.vision_tower(pixel_values[0]))
        mx.eval(features)
        return [project(model, features[0], image_sizes[0])], []

    inputs = read_inputs(model, processor, question, image, Options(), encode=encode)
    return Prompt(inputs.input_ids, features[0], inputs.image_sizes[0])


def greedy_answer(model: FastVLM, processor: Processor, prompt: Prompt) -> list[int]:
    """The first tokens of the model's answer, an end-of-sequence token included."""
    input_ids = prompt.input_ids
    embeddings = embed(model, prompt, mx.array([input_ids]))
    limit = min(ANSWER_TOKENS, processor.max_length - len(input_ids))
    answer = []
    cache = model.make_kv_cache()
    for token in generate_tokens(model, input_ids, embeddings, cache, Options(), limit):
        answer.append(token)
        if token in processor.tokenizer.eos_token_ids:
            break
    return answer


def embed(model: FastVLM, prompt: Prompt, input_ids: mx.array) -> mx.array:
    """[1, T] ids that begin with the prompt → [1, T, hidden_size], visual tokens in place."""
    visual = project(model, prompt.features, prompt.image_size)
    return model.embed_inputs(input_ids, visual_tokens=[visual])


def project(model: FastVLM, features: mx.array, image_size: tuple[int, int]) -> mx.array:
    """Visual features [tiles, n, C] of an image → its visual tokens [tokens, hidden_size]."""
    return model.merge_tiles(model.mm_projector(features), image_size)


def tune(
    learner: Answering,
    target: Answering,
    sequences: Sequences,
    epochs: int,
    learning_rate: float,
    *,
    progress: bool = True,
) -> None:
    """Train the learner's scales and biases, and leave them as they were at their best.

    Args:
        learner: quantized.
        target: what it learns from.
        sequences: a prompt's number followed by its answer; and mlx_lm's offset, which is 0.
        epochs, learning_rate: as `calibrate` takes.
        progress: show a progress bar.
    """
    from mlx.optimizers import Adam
    from mlx_lm.quant.dwq import dwq_quantize

    held_out = sequences[::HELD_OUT]
    trained = [sequence for i, sequence in enumerate(sequences) if i % HELD_OUT] or held_out
    longest = max(len(ids) for ids, _ in sequences)

    def targets(ids: mx.array, _: int, split: str) -> mx.array:
        if split == "train":
            bar.update()
        return target(ids)

    learner.freeze()
    optimizer = Adam(learning_rate=learning_rate, bias_correction=True)
    best, nearest = learner.parameters(), divergence(learner, target, held_out)
    with progress_bar(epochs * len(trained), "Calibrating", shown=progress) as bar:
        for epoch in range(epochs):
            # mlx_lm prints while it trains, and offers neither a switch for that nor epochs.
            with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
                dwq_quantize(
                    learner,
                    targets,
                    optimizer,
                    trained,
                    held_out[:1],
                    batch_size=1,
                    max_seq_length=longest + 1,
                    seed=epoch,
                    dtype=mx.float32,
                    temperature=TEMPERATURE,
                )
            found = divergence(learner, target, held_out)
            if found < nearest:
                best, nearest = learner.parameters(), found
    learner.update(best)
    learner.eval()


def divergence(learner: Answering, target: Answering, sequences: Sequences) -> float:
    """Kullback-Leibler divergence of the learner's answers from the target's, in nats per token."""
    from mlx_lm.tuner.losses import kl_div_loss

    total, count = 0.0, 0
    for ids, _ in sequences:
        row = mx.array([ids[:-1]])
        losses = kl_div_loss(learner(row), target(row))
        total, count = total + losses.sum().item(), count + losses.size
    return total / count
