"""An adapter → a folder that this library, PEFT and LLaVA load."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import mlx.core as mx

from ..config import FastVLMConfig
from .adapt import marks_of
from .card import adapter_card
from .files import Weights, check_finite, write_json
from .layouts import adapters, llava, transformers
from .layouts.adapters import Adapter, LowRank
from .layouts.mlx_vlm import DECODER, PROJECTOR, VISION_TOWER
from .processor_files import config_json
from .record import read_run, write_record
from .target import atomic_folder

PEFT = "base_model.model."
NAMES: dict[str, ModuleType] = {"llava": llava, "transformers": transformers}


def write_adapter(
    adapter: Adapter,
    target: Path,
    base: str,
    weights: Weights,
    config: FastVLMConfig,
    *,
    layout: str = "llava",
    license: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write an adapter's folder, which appears only when it is whole.

    LoRA and DoRA go into PEFT's `adapter_model.safetensors`, and with them the modules that were
    trained in full, as `modules_to_save`. What PEFT can't hold, and everything where there is no
    LoRA, goes into `non_lora_trainables`, or `mm_projector` if it is only that.

    Args:
        adapter: in the names of the mlx-vlm layout; with DoRA of all layers or of none.
        target: the folder.
        base: a folder or Hub id, which the folder names.
        weights, config: of the base, in the mlx-vlm layout.
        layout: whose names the modules get, "llava" or "transformers": the base's in PyTorch.
        license: of the base, as `card.license_of` gives it.
        overwrite: replace a folder with an adapter or a model.

    Raises:
        CheckpointError: a tensor holds NaN or infinity.
        FileExistsError, OSError: as `target.check_target`, or a file can't be written.
        ValueError: the layout is unknown.
    """
    if layout not in NAMES:
        raise ValueError(f"layout must be one of {', '.join(NAMES)}, found {layout!r}.")
    about = marks_of(weights, config) | adapter.about | {"base": base, "format": "pt"}
    in_peft, beside = _divided(adapter)
    is_projector = not adapter.low_rank and all(map(_is_projectors, adapter.whole))
    stem = adapters.PROJECTOR if is_projector else adapters.WHOLE
    with atomic_folder(target, overwrite=overwrite) as folder:
        if adapter.low_rank:
            tensors, settings = peft_files(adapter, in_peft, weights, NAMES[layout])
            settings["base_model_name_or_path"] = base
            if f"{DECODER}embed_tokens.weight" in in_peft and config.text.tie_word_embeddings:
                settings["ensure_weight_tying"] = True  # or PEFT leaves the output layer behind
            write_json(folder / adapters.SETTINGS, settings)
            _save(folder / adapters.ADAPTER[0], tensors, about)
        # What LLaVA's loader reads, and would otherwise look for on the Hub
        has_twin = layout == "llava" and (bool(adapter.low_rank) or is_projector)
        if beside or has_twin:  # even empty, or reading the twin would need PyTorch
            _save(folder / f"{stem}.safetensors", NAMES[layout].from_mlx(beside), about)
        if layout == "llava":
            write_json(folder / "config.json", _llava_config(adapter, base, config))
        if has_twin:
            write_torch(folder / f"{stem}.bin", llava.from_mlx(beside))
        record = read_run(target.parent)
        write_record(record, folder)
        card = adapter_card(
            target.name, base, record, has_lora=bool(adapter.low_rank), license=license
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
    return target


def _llava_config(adapter: Adapter, base: str, config: FastVLMConfig) -> dict[str, Any]:
    """config.json as LLaVA's loader wants it: the base's, with its name."""
    trained = any(map(_is_projectors, (*adapter.low_rank, *adapter.whole)))
    written = config_json(config, config.dtype or "float32", {})
    return written | {"_name_or_path": base, "tune_mm_mlp_adapter": trained}


def _is_projectors(name: str) -> bool:
    return name.startswith(PROJECTOR.rstrip("."))


def _divided(adapter: Adapter) -> tuple[Weights, Weights]:
    """The tensors trained in full that PEFT can hold, as modules, and the others."""
    if not adapter.low_rank:
        return {}, adapter.whole
    others = {
        name: tensor
        for name, tensor in adapter.whole.items()
        if name.startswith(VISION_TOWER) or "." not in name
    }
    return {name: t for name, t in adapter.whole.items() if name not in others}, others


def peft_files(
    adapter: Adapter, whole: Weights, weights: Weights, layout: ModuleType
) -> tuple[Weights, dict[str, Any]]:
    """The tensors of adapter_model.safetensors and the fields of adapter_config.json.

    Args:
        adapter: with LoRA, or with DoRA of all layers.
        whole: of its other tensors, those of `modules_to_save`.
        weights: of the base.
        layout: has the names.
    """
    names = _module_names(adapter.low_rank, layout)
    tensors: Weights = {}
    for layer, each in adapter.low_rank.items():
        is_kernel = f"{layer}.weight" in weights and weights[f"{layer}.weight"].ndim == 4
        matrices = {"lora_A.weight": each.down, "lora_B.weight": each.up}
        if is_kernel:
            matrices = {key: matrix[:, :, None, None] for key, matrix in matrices.items()}
        if each.magnitude is not None:
            shape = (1, -1, 1, 1) if is_kernel else (-1,)
            matrices[adapters.MAGNITUDE] = each.magnitude.reshape(shape)
        tensors |= {f"{PEFT}{names[layer]}.{key}": value for key, value in matrices.items()}
    saved = layout.from_mlx(whole)
    tensors |= {PEFT + name: tensor for name, tensor in saved.items()}
    return tensors, _settings(adapter.low_rank, names, saved, weights, layout)


def _module_names(layers: Iterable[str], layout: ModuleType) -> dict[str, str]:
    """What a layout calls each layer."""
    found = {}
    for layer in layers:
        (name,) = layout.from_mlx({f"{layer}.weight": mx.zeros(1)})
        found[layer] = str(name).removesuffix(".weight")
    return found


def _settings(
    low_rank: Mapping[str, LowRank],
    names: Mapping[str, str],
    saved: Weights,
    weights: Weights,
    layout: ModuleType,
) -> dict[str, Any]:
    """adapter_config.json but the base's name."""
    kinds = {names[layer]: _rank_and_alpha(each) for layer, each in low_rank.items()}
    (rank, alpha), _ = Counter(kinds.values()).most_common(1)[0]
    modules = {str(path) for name in layout.from_mlx(dict(weights)) for path in _around(name)}
    module = "mm_projector" if layout is llava else "multi_modal_projector"
    projector = {module} if any(f".{module}." in name for name in saved) else set()
    others = {name.rpartition(".")[0] for name in saved if f".{module}." not in name}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": any(each.magnitude is not None for each in low_rank.values()),
        "rank_pattern": {name: r for name, (r, _) in kinds.items() if r != rank},
        "alpha_pattern": {name: a for name, (_, a) in kinds.items() if a != alpha},
        "target_modules": shortened(set(kinds), modules),
        "modules_to_save": sorted(projector | others) or None,
    }


def _around(name: str) -> Iterator[str]:
    """The modules that a tensor is in, such as a, a.0 and a.0.b for a.0.b.weight."""
    parts = name.split(".")
    return (".".join(parts[:i]) for i in range(1, len(parts)))


def _rank_and_alpha(low_rank: LowRank) -> tuple[int, float]:
    rank = len(low_rank.down)
    alpha = low_rank.scale * rank
    return rank, int(alpha) if alpha.is_integer() else alpha


def shortened(wanted: set[str], modules: set[str]) -> list[str]:
    """Module names for PEFT's `target_modules`, which match the ends of names: a last part such as
    `q_proj` where all modules of that name are wanted, and whole names otherwise."""
    found = set()
    for name in wanted:
        last = name.rpartition(".")[2]
        same = {module for module in modules if module.rpartition(".")[2] == last}
        found.add(last if same <= wanted else name)
    return sorted(found)


def _save(file: Path, tensors: Weights, about: Mapping[str, str]) -> None:
    mx.eval(tensors)
    for name, tensor in tensors.items():
        check_finite(name, tensor)
    try:
        mx.save_safetensors(str(file), tensors, metadata=dict(about))
    except RuntimeError as error:  # as MLX reports a full disk
        raise OSError(f"{file} can't be written: {error}") from None


STORAGES = {mx.float32: "FloatStorage", mx.float16: "HalfStorage", mx.bfloat16: "BFloat16Storage"}
STORAGES |= {mx.int64: "LongStorage"}


def write_torch(file: Path, tensors: Weights) -> None:
    """Write tensors as `torch.save` would, without torch.

    The file is a zip archive of a pickle, which names the functions that rebuild each tensor, and
    of each tensor's bytes.
    """
    pickled = io.BytesIO()
    pickled.write(pickle.PROTO + b"\x02" + pickle.EMPTY_DICT + pickle.MARK)
    for key, (name, tensor) in enumerate(tensors.items()):
        pickled.write(_text(name) + _rebuilt(str(key), tensor))
    pickled.write(pickle.SETITEMS + pickle.STOP)
    try:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            _add(archive, "data.pkl", pickled.getvalue())
            _add(archive, "byteorder", b"little")
            for key, tensor in enumerate(tensors.values()):
                _add(archive, f"data/{key}", _as_bytes(tensor))
            _add(archive, "version", b"3\n")
    except OSError as error:
        raise OSError(f"{file} can't be written: {error.strerror or error}") from None


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    archive.writestr(zipfile.ZipInfo(f"archive/{name}"), content)  # of 1980, so always the same


def _as_bytes(tensor: mx.array) -> bytes:
    return bytes(cast(Any, mx.contiguous(tensor).flatten().view(mx.uint8)))


def _rebuilt(key: str, tensor: mx.array) -> bytes:
    """The call of `torch._utils._rebuild_tensor_v2` that makes a tensor of a storage."""
    storage = pickle.GLOBAL + f"torch\n{STORAGES[tensor.dtype]}\n".encode()
    place = _tuple(_text("storage"), storage, _text(key), _text("cpu"), _number(tensor.size))
    strides: list[int] = []
    step = 1
    for side in reversed(tensor.shape):
        strides, step = [step, *strides], step * side
    hooks = pickle.GLOBAL + b"collections\nOrderedDict\n" + pickle.EMPTY_TUPLE + pickle.REDUCE
    arguments = _tuple(
        place + pickle.BINPERSID,
        _number(0),
        _tuple(*map(_number, tensor.shape)),
        _tuple(*map(_number, strides)),
        pickle.NEWFALSE,
        hooks,
    )
    return pickle.GLOBAL + b"torch._utils\n_rebuild_tensor_v2\n" + arguments + pickle.REDUCE


def _tuple(*items: bytes) -> bytes:
    return pickle.MARK + b"".join(items) + pickle.TUPLE


def _text(text: str) -> bytes:
    encoded = text.encode()
    return pickle.BINUNICODE + len(encoded).to_bytes(4, "little") + encoded


def _number(number: int) -> bytes:
    encoded = number.to_bytes(8, "little", signed=True)
    return pickle.LONG1 + b"\x08" + encoded
