"""The published models: what they are, where they are, and under which licence.

The archives are those that the original repository names (README.md, get_models.sh and
app/get_pretrained_mlx_model.sh); sizes are those that the Hub states.
"""

from __future__ import annotations

from dataclasses import dataclass

CDN = "https://ml-site.cdn-apple.com/datasets/fastvlm"
LICENSE = {
    "license": "other",
    "license_name": "apple-amlr",
    "license_link": "https://github.com/apple/ml-fastvlm/blob/main/LICENSE_MODEL",
}
"""The Apple Machine Learning Research Model licence, as a model card states it."""
ATTRIBUTION = (
    "Apple Machine Learning Research Model is licensed under the "
    "Apple Machine Learning Research Model License Agreement."
)
"""The notice that the licence requires with every copy of the weights."""
SIZES = ("0.5b", "1.5b", "7b")
VARIANTS = ("hub", "pytorch", "apple-silicon", "mlx")


@dataclass(frozen=True)
class Entry:
    """A published model; all have the licence `LICENSE`."""

    name: str
    """The Hub id, or the name of the archive without `.zip`."""
    size: str
    stage: int
    """Of training; stage 3 is stage 2 after another round of instruction tuning."""
    variant: str
    layout: str
    """The module of `checkpoint.layouts` that reads it."""
    precision: str
    """Of the decoder."""
    gigabytes: float | None = None
    """Of the download, in 10⁹ bytes, if known."""
    sha256: str | None = None
    """Of the archive, if known."""

    @property
    def on_hub(self) -> bool:
        return "/" in self.name

    @property
    def url(self) -> str:
        """The repository's page, or the archive."""
        return f"https://huggingface.co/{self.name}" if self.on_hub else f"{CDN}/{self.name}.zip"


def _archive(size: str, stage: int) -> Entry:
    name = f"llava-fastvithd_{size}_stage{stage}"
    return Entry(name, size, stage, "pytorch", "llava", "bfloat16")


def _export(size: str, precision: str) -> Entry:
    name = f"llava-fastvithd_{size}_stage3_llm.{precision}"
    return Entry(name, size, 3, "apple-silicon", "apple_export", precision)


# `find` takes the first of several that fit.
ENTRIES = (
    Entry("apple/FastVLM-0.5B", "0.5b", 3, "hub", "llava", "bfloat16", 1.53),
    Entry("apple/FastVLM-1.5B", "1.5b", 3, "hub", "llava", "bfloat16"),
    Entry("apple/FastVLM-7B", "7b", 3, "hub", "llava", "bfloat16", 15.5),
    *(_archive(size, stage) for stage in (3, 2) for size in SIZES),
    _export("0.5b", "fp16"),
    _export("1.5b", "int8"),
    _export("7b", "int4"),
    Entry("mlx-community/FastVLM-0.5B-bf16", "0.5b", 3, "mlx", "mlx_vlm", "bfloat16", 1.27),
)


def knows(name: str) -> bool:
    """Whether this is a size (`0.5b`) or the name of a published model, in upper or lower case."""
    return name.lower() in {*SIZES, *(entry.name.lower() for entry in ENTRIES)}


def find(name: str, *, stage: int | None = None, variant: str | None = None) -> Entry:
    """A published model.

    Args:
        name: 0.5b, 1.5b, 7b, or the model's own name; case does not matter.
        stage: 2 or 3; by default 3.
        variant: `hub` (Apple's repository), `pytorch` (the original archive), `apple-silicon` (the
            archive exported for the demo app) or `mlx` (the MLX community's conversion); by default
            the first of these that has the stage.

    Raises:
        ValueError: there is no such model, stage or variant.
    """
    named = [entry for entry in ENTRIES if name.lower() in (entry.size, entry.name.lower())]
    if not named:
        raise ValueError(
            f"There is no published model {name!r}; choose {', '.join(SIZES)} or a Hub id."
        )
    for entry in named:
        if stage in (None, entry.stage) and variant in (None, entry.variant):
            return entry
    wanted = " and ".join(
        f"{key} {value}" for key, value in (("stage", stage), ("variant", variant)) if value
    )
    there = ", ".join(f"{entry.variant} (stage {entry.stage})" for entry in named)
    raise ValueError(f"{name} is not published as {wanted}; there is {there}.")
