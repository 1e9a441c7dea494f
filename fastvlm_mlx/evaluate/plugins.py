"""What other evaluation libraries find by entry points; it imports them only when they ask."""

from __future__ import annotations

from typing import Any


def lmms_eval_models() -> Any:
    """The model that lmms-eval knows as `fastvlm_mlx`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        "fastvlm_mlx", f"{__package__}.lmms_eval.FastVLMEval", None, ("fastvlm-mlx",)
    )
