"""A folder → a model and the processor of its images and prompts."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .. import ops
from ..checks import brief, shown
from ..config import FastVLMConfig, load_config, read_json
from ..fields import CheckpointError, token_ids
from ..hub.resolve import resolve
from ..model.fastvlm import FastVLM
from ..processor import Processor
from ..text.tokenizer import Tokenizer
from .adapt import attach
from .files import NAN_SCALE, Weights
from .layouts import adapters
from .layouts.mlx_vlm import dtype_of
from .names import fuse, fused_rows, quantized_linears, stored_name, unfuse, unfused_layers
from .quantize import Quantize, quantize_checkpoint
from .read import read_adapted

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
THOUGHT = "<think>"  # in the chat template of a language model that reasons aloud
READ_AT_ONCE = 10**8  # bytes; enough to read in parallel


def load(
    source: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    dtype: mx.Dtype | str | None = None,
    quantize: Quantize | None = None,
    adapter: str | os.PathLike[str] | None = None,
) -> tuple[FastVLM, Processor]:
    """Load a model and the processor of its images and prompts.

    Args:
        source: a folder or a Hub id (`apple/FastVLM-0.5B`), in any known layout, converted on the
            fly; by default the bundled nano model.
        revision: branch, tag or commit on the Hub.
        dtype, quantize: as for `load_model`.
        adapter: a folder or a Hub id of LoRA, DoRA or other parts that were trained on top of
            `source`, here or with PEFT or LLaVA.

    Raises:
        FileNotFoundError: there is no such folder or repository.
        CheckpointError: it is not a whole FastVLM, or the adapter is another model's.
        OSError: the download failed.
        ValueError: as for `load_model`.
    """
    folder, processor, trained = _found(source, revision, adapter)
    return load_model(folder, dtype=dtype, quantize=quantize, adapter=trained), processor


def check_loading(
    source: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    dtype: mx.Dtype | str | None = None,
    quantize: Quantize | None = None,
    adapter: str | os.PathLike[str] | None = None,
) -> None:
    """Raise what `load` would, once the files are here but before any weight is read."""
    folder, _, trained = _found(source, revision, adapter)
    _load_model(folder, dtype, quantize, trained, for_training=False, computed=False)


def _found(
    source: str | os.PathLike[str] | None,
    revision: str | None,
    adapter: str | os.PathLike[str] | None,
) -> tuple[Path, Processor, Path | None]:
    folder = resolve(source, revision=revision)
    processor = load_processor(folder)
    return folder, processor, None if adapter is None else resolve(adapter)


def processor_folder(folder: Path) -> Path:
    """Where a model's tokenizer is: in its folder, or for an adapter without one in its base's."""
    if (folder / "tokenizer_config.json").is_file() or not adapters.is_adapter(folder):
        return folder
    name, revision = adapters.base_of(folder)
    base = resolve(name, revision=revision)
    return base if base == folder else processor_folder(base)


def load_processor(folder: str | Path) -> Processor:
    """Read the tokenizer and the image settings of a folder, or of an adapter's base; errors as
    `load`.

    Every id that a prompt can hold must have a row in the embedding table, since MLX reads whatever
    lies beyond it: a tokenizer or an end token of another model is a `CheckpointError`. The place
    of a visual token, `image_token_index`, is no row and may be any id but that of a piece of text.
    """
    folder = processor_folder(Path(folder))
    config = load_config(folder)
    generation = folder / "generation_config.json"
    eos = read_json(generation).get("eos_token_id") if generation.is_file() else None
    eos_token_ids = [*config.eos_token_ids, *token_ids(eos, str(generation))]
    tokenizer = Tokenizer.from_folder(folder, eos_token_ids)
    if config.text.model_type == "qwen3" and THOUGHT in (tokenizer.chat_template or ""):
        tokenizer.chat_template = None  # Qwen3's own, which LLaVA's training leaves and never uses
    _check_token_ids(folder, tokenizer, config)
    return Processor(
        tokenizer=tokenizer,
        image_size=config.vision.image_size,
        mode=config.image_aspect_ratio,
        grid_pinpoints=config.image_grid_pinpoints,
        patch_size=config.vision.patch_size,
        max_length=min(config.max_length, config.text.max_position_embeddings),
    )


def _check_token_ids(folder: Path, tokenizer: Tokenizer, config: FastVLMConfig) -> None:
    """Raise a CheckpointError if an id has no row, or a piece of text the id of a visual token."""
    rows, index = config.text.vocab_size, config.image_token_index
    ids = {i: text for text, i in tokenizer.bpe.get_vocab().items() if i != index}
    if (last := max(ids, default=0)) >= rows:
        raise CheckpointError(
            f"{folder}: the tokenizer is not this model's: its token {brief(ids[last])!r} has the "
            f"id {last}, and config.json has a vocab_size of {rows}."
        )
    ends = sorted(i for i in tokenizer.eos_token_ids if not 0 <= i < rows)
    if ends:
        raise CheckpointError(
            f"{folder}: eos_token_id {brief(str(ends[0]))} in config.json or "
            f"generation_config.json is no id of the {rows} in the vocabulary."
        )
    place = tokenizer.bpe.id_to_token(index) if 0 <= index < 2**32 else None
    if place is not None and place not in tokenizer.controls:
        raise CheckpointError(
            f"{folder}: config.json has the image_token_index {index}, which is the text "
            f"{brief(place)!r}; it must be -200 or the id of a control token such as <image>."
        )


def load_model(
    folder: str | Path,
    *,
    dtype: mx.Dtype | str | None = None,
    quantize: Quantize | None = None,
    adapter: str | Path | None = None,
) -> FastVLM:
    """Read a model from a folder in any known layout; the folder needs no tokenizer.

    Tensors are read once their place in the model is known, the largest first.

    Args:
        folder: holds config.json and the weights.
        dtype: of the weights that are not quantized; by default float32 on the CPU, which is slow
            at half precision, and otherwise the checkpoint's own, but float16 for bfloat16 on M1
            and M2, whose GPUs lack it (unless a weight is beyond float16's range).
        quantize: bits per weight, a mode or preset by name, or a mapping; see
            `quantize.parse_quantize`.
        adapter: a folder of what was trained on top of it. It is merged into weights in float, and
            its LoRA is kept beside those that are quantized.

    Raises:
        FileNotFoundError: there is no such folder.
        CheckpointError: a file, a field or a tensor is missing, surplus or wrong, or the adapter is
            another model's.
        ValueError: `dtype` or `quantize` is unknown, `dtype` can't hold a weight, or the checkpoint
            is already quantized.
    """
    return _load_model(folder, dtype, quantize, adapter, for_training=False)


def load_for_training(
    folder: str | Path,
    *,
    dtype: mx.Dtype | str | None = None,
    quantize: Quantize | None = None,
    computed: bool = True,
) -> FastVLM:
    """As `load_model`, but with the same modules on every device, and in training mode.

    Each projection of the decoder stands apart under its published name (`q_proj`, `gate_proj`),
    and each bias beside its own layer. Quantized layers stay quantized. After `eval()` it answers
    as what `load_model` gives, up to rounding; `inference_weights` is the way back.

    Args:
        folder: as for `load_model`; parallel branches are folded, see `model.vision_training`.
        dtype: of the weights that are not quantized; by default float32 on the CPU and otherwise
            the checkpoint's own.
        quantize: as for `load_model`.
        computed: read the weights now; otherwise when they are needed, as for a model of which only
            the shapes are.

    Raises:
        the errors of `load_model`.
    """
    ops.keep_freed_memory()
    model = _load_model(folder, dtype, quantize, for_training=True, computed=computed)
    model.train()
    return model


def inference_weights(model: FastVLM) -> Weights:
    """The weights of a trained model in the mlx-vlm layout, as `files.save_checkpoint` writes them
    and `convert` turns them into other layouts.

    Raises:
        ValueError: an adapter is not fused yet.
    """
    weights = unfuse(model, folded=_has_quantized_encoder(model))
    adapter = next((name for name in weights if re.search(r"\.(lora_[ab]|m)$", name)), None)
    if adapter is not None:
        raise ValueError(f"{adapter} belongs to an adapter; fuse the adapters first.")
    return weights


def _has_quantized_encoder(model: FastVLM) -> bool:
    names = dict(tree_flatten(model.vision_tower.parameters()))
    return any(name.endswith(".scales") for name in names)


def _load_model(
    folder: str | Path,
    dtype: mx.Dtype | str | None,
    quantize: Quantize | None,
    adapter: str | Path | None = None,
    *,
    for_training: bool,
    computed: bool = True,
) -> FastVLM:
    ops.check_process()
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no model folder {folder}.")
    trained = None if adapter is None else Path(adapter).expanduser()
    if trained is not None and not trained.is_dir():
        raise FileNotFoundError(f"There is no folder {trained} of an adapter.")
    stored = target = mx.float32

    def prepared(config: FastVLMConfig, weights: Weights) -> tuple[FastVLMConfig, Weights]:
        nonlocal stored, target
        stored = dtype_of(weights)
        target = ops.fast_dtype(stored, for_training) if dtype is None else resolve_dtype(dtype)
        if quantize is not None or target == mx.float32:
            weights = {name: cast(tensor, target) for name, tensor in weights.items()}
        if quantize is None:
            return config, weights
        weights, quantization, _ = quantize_checkpoint(weights, config, quantize)
        return replace(config, quantization=quantization), weights

    config, weights, beside = read_adapted(folder, trained, prepared)
    if beside and for_training:
        raise CheckpointError(
            f"{folder} is an adapter of a quantized model: write both as one (`fastvlm fuse`), and "
            "train that."
        )
    model = FastVLM(config)
    if for_training:
        model.unfuse()
    quantize_like(model, weights)
    packed = {name: weights[name] for name in weights if name.rpartition(".")[0] in beside}
    parameters = fuse(weights, config, apart=for_training)
    model.load_weights([(k, _row_by_row(cast(v, target))) for k, v in parameters.items()])
    parameters.clear()
    if not for_training:
        model.vision_tower.fold_biases()
    attach(model, beside, packed, target)
    if not computed:
        return model
    _evaluate(model)
    ops.note_computation()
    if target == mx.float16 != stored and (name := _infinite(model)):
        if dtype is None:
            return _load_model(folder, stored, quantize, adapter, for_training=for_training)
        raise ValueError(
            f"{name} has numbers beyond float16's largest, 65504: use dtype bfloat16 or float32."
        )
    model.eval()
    return model


def _row_by_row(kernel: mx.array) -> mx.array:
    """The kernel of a convolution with its last axis closest in memory.

    PyTorch's, transposed, is a view with strides of its own, which MLX's GPU backends copy at every
    call, and for which cuDNN takes slow kernels. Other parameters stay as they are.
    """
    return kernel.reshape(-1).reshape(kernel.shape) if kernel.ndim == 4 else kernel


def _infinite(model: FastVLM) -> str | None:
    """The name of a weight that is infinite or was when it was packed, if there is one."""
    parameters = dict(tree_flatten(model.parameters()))
    found = {name: _has_infinity(name, value) for name, value in parameters.items()}
    mx.eval(found)
    infinite = (name for name, is_infinite in found.items() if is_infinite)
    return next((re.sub("scales$", "weight", name) for name in infinite), None)


def _has_infinity(name: str, value: mx.array) -> mx.array:
    """Whether a tensor holds infinity; the scales of what does are no numbers."""
    if not name.endswith(".scales"):
        return mx.isinf(value).any()
    return ((value == NAN_SCALE) if value.dtype == mx.uint8 else ~mx.isfinite(value)).any()


def quantize_like(model: FastVLM, weights: Weights) -> None:
    """Give a model the quantized and the unfused layers of a checkpoint, in place of its own."""
    config = model.config
    settings = dict(quantized_linears(weights, config))
    for path in unfused_layers(weights, config):
        _, i, block, whole = path.split(".")
        module = model.language_model.layers[int(i)][block]
        if whole not in module:  # unfused already, as for training
            continue
        fused = module[whole]
        width = fused.weight.shape[1]
        rows = fused_rows(config)[f"{block}.{whole}"]
        module[whole] = ops.UnfusedLinear([nn.Linear(width, n, bias="bias" in fused) for n in rows])
    if settings:
        ops.quantize(model, lambda path: settings.get(stored_name(path, config)))


def _evaluate(model: FastVLM) -> None:
    """Read and compute the parameters, the largest layers first, so that what a layer is made from
    uses memory that later layers will fill."""
    modules = dict(tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module))
    layers = [list(dict(tree_flatten(m.parameters())).values()) for m in modules.values()]
    layers.sort(key=lambda tensors: sum(t.nbytes for t in tensors), reverse=True)
    waiting: list[mx.array] = []
    for tensors in layers:
        waiting += tensors
        if sum(t.nbytes for t in waiting) > READ_AT_ONCE:
            mx.eval(waiting)
            waiting.clear()
    mx.eval(model.parameters())


def resolve_dtype(dtype: mx.Dtype | str) -> mx.Dtype:
    """A floating dtype by its name or itself.

    Raises:
        ValueError: it is neither float32, float16 nor bfloat16.
    """
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in DTYPES.values():
        raise ValueError(f"dtype must be {', '.join(DTYPES)}, found {shown(dtype)}.")
    return found


def cast(value: mx.array, dtype: mx.Dtype) -> mx.array:
    """A tensor in a dtype; integers (packed weights) stay as they are."""
    return value.astype(dtype) if mx.issubdtype(value.dtype, mx.floating) else value
