"""The README.md of a model: its source, its precision, how to use it, its licence."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..hub import registry
from ..hub.resolve import HUB_ID
from .quantize import part_of
from .record import Record
from .record import paragraphs as record_paragraphs

PART_NAMES = {
    "vision": "vision encoder",
    "projector": "projector",
    "decoder": "decoder",
    "embeddings": "embeddings",
}
APPLE = "Apple Machine Learning Research Model"
DERIVATIVE = (
    "This folder is a derivative of it: tensors were renamed, transposed, folded and rounded to "
    "the precision above; {trained}."
)
TRAINED = {
    False: "nothing was trained",
    True: "the scales of quantized layers were tuned to give the original's answers",
}
FINE_TUNED = "it was trained further"
USAGE = """\
```bash
pip install fastvlm-mlx
fastvlm generate --model <this folder or repo> --image photo.jpg --prompt "Describe the image."
```

```python
import fastvlm_mlx as fv

model, processor = fv.load("<this folder or repo>")
print(fv.generate(model, processor, "Describe the image.", image="photo.jpg"))
```"""


def model_card(
    name: str,
    source: str | os.PathLike[str],
    dtype: str,
    *,
    layers: Mapping[str, Mapping[str, Any]] | None = None,
    license: Mapping[str, str] | None = None,
    calibrated: bool = False,
    is_trained: bool = False,
    record: Record | None = None,
) -> str:
    """The README.md of a converted folder.

    Args:
        name: the title.
        source: what the folder was converted from: a folder, a Hub id, or the name of a published
            model.
        dtype: of what is not quantized.
        layers: the settings (`bits`, `group_size`, `mode`) of each quantized layer, in the names of
            the mlx-vlm layout, as `quantize.plan` and `names.quantized_linears` give them.
        license: as `license_of` gives it.
        calibrated: whether scales were tuned (`train.calibrate`).
        is_trained: whether the source was trained further, as an adapter says.
        record: of that training, if it is known.
    """
    from huggingface_hub.utils import yaml_dump

    license = license or {}
    base_model, origin = _origin(source)
    derivative = DERIVATIVE.format(trained=FINE_TUNED if is_trained else TRAINED[calibrated])
    kind = "FastVLM, fine-tuned with" if is_trained else "FastVLM converted to MLX with"
    metadata = {
        "library_name": "mlx",
        "pipeline_tag": "image-text-to-text",
        **({"base_model": base_model} if base_model else {}),
        **({"base_model_relation": "finetune"} if base_model and is_trained else {}),
        **license,
        "tags": ["mlx", "fastvlm"],
    }
    paragraphs = [
        f"---\n{yaml_dump(metadata, sort_keys=False)}---",
        f"# {name}",
        f"{kind} [fastvlm-mlx](https://pypi.org/project/fastvlm-mlx/).",
        f"- {'Base' if is_trained else 'Converted from'}: {origin}\n"
        f"- Precision: {_precision(layers or {}, dtype)}\n"
        f"- Licence: {_license_line(license)}",
        *_quantization(layers or {}, dtype),
        *(record_paragraphs(record) if record is not None else ()),
        USAGE,
        *([f"{registry.ATTRIBUTION} {derivative}"] if license == registry.LICENSE else []),
    ]
    return "\n\n".join(paragraphs) + "\n"


ADAPTER_USAGE = """\
```bash
pip install fastvlm-mlx
fastvlm generate --model {base} --adapter <this folder or repo> --image photo.jpg
```

```python
import fastvlm_mlx as fv

model, processor = fv.load("{base}", adapter="<this folder or repo>")
```

`fastvlm fuse` writes it and its base as one model, in any layout."""
OTHERS = "PEFT loads it, too, and LLaVA's own loader."


def adapter_card(
    name: str,
    base: str,
    record: Record | None = None,
    *,
    has_lora: bool = True,
    license: Mapping[str, str] | None = None,
) -> str:
    """The README.md of an adapter's folder.

    Args:
        name: the title.
        base: the folder or Hub id of the model that it is for.
        record: of its training.
        has_lora: whether it is PEFT's.
        license: of the base, as `license_of` gives it.
    """
    from huggingface_hub.utils import yaml_dump

    license = license or {}
    base_model, origin = _origin(base)
    metadata = {
        "library_name": "peft" if has_lora else "mlx",
        "pipeline_tag": "image-text-to-text",
        **({"base_model": base_model, "base_model_relation": "adapter"} if base_model else {}),
        **license,
        "tags": ["mlx", "fastvlm", *(["lora"] if has_lora else [])],
    }
    paragraphs = [
        f"---\n{yaml_dump(metadata, sort_keys=False)}---",
        f"# {name}",
        "An adapter of FastVLM, trained with [fastvlm-mlx](https://pypi.org/project/fastvlm-mlx/).",
        f"- Base: {origin}\n- Licence: {_license_line(license)}",
        *(record_paragraphs(record) if record is not None else ()),
        ADAPTER_USAGE.format(base=base_model or Path(base).name),
        *([OTHERS] if has_lora else []),
    ]
    return "\n\n".join(paragraphs) + "\n"


def _origin(source: str | os.PathLike[str]) -> tuple[str | None, str]:
    """(`base_model` of the metadata, if the source is on the Hub; the source in Markdown)."""
    path, name = Path(source).expanduser(), os.fspath(source)
    if path.exists():
        stated = read_metadata(path).get("base_model")  # of what was converted or fused before
        if not isinstance(stated, str) or not HUB_ID.fullmatch(stated):
            return None, f"`{path.resolve().name}`"
        name = stated
    if registry.knows(name):
        entry = registry.find(name)
        return entry.name if entry.on_hub else None, f"[{entry.name}]({entry.url})"
    if HUB_ID.fullmatch(name):
        return name, f"[{name}](https://huggingface.co/{name})"
    return None, f"`{name}`"


def _precision(layers: Mapping[str, Mapping[str, Any]], dtype: str) -> str:
    if not layers:
        return dtype
    bits = sorted({settings["bits"] for settings in layers.values()})
    return f"{' and '.join(map(str, bits))} bits where quantized, as below, and {dtype} elsewhere"


def _quantization(layers: Mapping[str, Mapping[str, Any]], dtype: str) -> Iterator[str]:
    """The table of the precision of each part, if anything is quantized."""
    if not layers:
        return
    counts = Counter(
        (part_of(f"{layer}.weight"), each["bits"], each["group_size"], each.get("mode", "affine"))
        for layer, each in layers.items()
    )
    rows = ["| part | bits | group size | mode | layers |", "|---|---|---|---|---|"]
    for part, label in PART_NAMES.items():
        own = sorted(key for key in counts if key[0] == part)
        for _, bits, group_size, mode in own:
            count = counts[part, bits, group_size, mode]
            rows.append(f"| {label} | {bits} | {group_size} | {mode} | {count} |")
        if not own:
            rows.append(f"| {label} | {dtype} | | | |")
    yield "\n".join(rows)
    if any(part == "vision" for part, *_ in counts):
        yield "Only fastvlm-mlx reads this folder, since its vision encoder is quantized."


def _license_line(license: Mapping[str, str]) -> str:
    name = license.get("license_name") or license.get("license")
    if name is None:
        return "that of the weights it was converted from"
    return f"[{name}]({license['license_link']})" if "license_link" in license else name


def license_of(folder: str | Path, source: str | os.PathLike[str] = "") -> dict[str, str]:
    """The licence of a model, as the metadata of a model card states it; empty if unknown.

    Args:
        folder: of the model.
        source: what it was loaded by, which may be the name of a published model.
    """
    if registry.knows(os.fspath(source)) and not Path(source).expanduser().exists():
        return dict(registry.LICENSE)
    metadata = read_metadata(Path(folder))
    stated = {key: metadata[key] for key in registry.LICENSE if isinstance(metadata.get(key), str)}
    if stated.get("license") == registry.LICENSE["license_name"] or APPLE in license_text(
        Path(folder)
    ):
        return dict(registry.LICENSE)
    return stated if "license" in stated else {}


def read_metadata(folder: Path) -> dict[str, Any]:
    """The metadata of a folder's README.md; empty if there is none that can be read."""
    from huggingface_hub import metadata_load

    try:
        return metadata_load(folder / "README.md") or {}
    except Exception:  # YAML raises types of its own
        return {}


def license_text(folder: Path) -> str:
    """What a folder's licence files say; empty if there are none."""
    files = sorted(file for file in folder.glob("LICENSE*") if file.is_file())
    return "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)
