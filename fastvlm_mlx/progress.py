"""The progress bar of all long work."""

from __future__ import annotations

from typing import Any


def progress_bar(
    total: int | None, description: str, *, unit: str = "it", shown: bool = True
) -> Any:
    """A `tqdm` bar on stderr; there is none off a terminal, or if `HF_HUB_DISABLE_PROGRESS_BARS`
    (or huggingface_hub's switch) asks for none.

    Args:
        total: steps or bytes of the whole; None if not known yet.
        description: what stands before the bar.
        unit: "B" for bytes, or what a step is.
        shown: False for none anywhere.
    """
    from huggingface_hub.utils import are_progress_bars_disabled
    from tqdm import tqdm

    hidden = None if shown and not are_progress_bars_disabled() else True  # None: off a terminal
    return tqdm(total=total, desc=description, unit=unit, unit_scale=unit == "B", disable=hidden)
