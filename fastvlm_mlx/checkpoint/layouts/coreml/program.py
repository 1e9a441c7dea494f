"""Core ML programs: opening them, and finding one's way in them."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

from ....checks import reason
from ....config import CheckpointError

VISION = "vision_tower.vision_model."
PACKAGE = "fastvithd.mlpackage"
NORM_EPS = 1e-5
CASTS = ("cast", "identity")


def load_program(package: Path) -> Any:
    """The main function of a Core ML package, with its constants.

    Returns:
        A `coremltools` MIL `Function`.

    Raises:
        CheckpointError: coremltools is missing, or the package is broken or no ML Program.
    """
    import_coremltools(f"read {package}")
    from coremltools.converters.mil.frontend.milproto.load import load
    from coremltools.proto.Model_pb2 import Model

    file = next(package.glob("Data/*/*.mlmodel"), None)
    if file is None:
        raise CheckpointError(f"{package} is not a whole Core ML package; download it again.")
    try:
        spec = Model.FromString(file.read_bytes())
        program = load(spec, spec.specificationVersion, str(file.parent / "weights"))
        return program.functions["main"]
    except Exception as error:  # coremltools and protobuf raise many types
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{package} is not a readable ML Program ({reason}).") from None


def import_coremltools(purpose: str) -> None:
    """Import coremltools, without its warnings off a Mac; CheckpointError if it is missing."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it imports transformers
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    try:
        import coremltools  # noqa: F401
    except ImportError:
        raise CheckpointError(
            f"To {purpose}, coremltools is needed: pip install 'fastvlm-mlx[coreml]'."
        ) from None


def consumers(value: Any) -> list[Any]:
    """The operations that take a value, casts passed over."""
    takers: list[Any] = []
    for op in value.child_ops:
        is_cast = op.op_type in CASTS
        takers += consumers(op.outputs[0]) if is_cast else [op]
    return list(dict.fromkeys(takers))


def uncast(value: Any) -> Any:
    """A value before its casts."""
    while value.op is not None and value.op.op_type in CASTS:
        value = value.op.x
    return value


def constant(value: Any) -> Any:
    """A value as a number or numpy array, expanded if it is compressed; None if it is computed."""
    if value is None:
        return None
    op = uncast(value).op
    if op is not None and op.op_type.startswith("constexpr_"):
        return op.materialized_val_inference()
    return value.val


def constant_operand(op: Any) -> Any:
    """The constant that an operation adds or multiplies by, or None."""
    if op.op_type not in ("add", "mul"):
        return None
    return constant(op.y) if constant(op.x) is None else constant(op.x)


def _identifier(name: str) -> str:
    return name.replace(".", "_")


def _reason(error: Exception) -> str:
    """Why a package could not be written, in a few words."""
    if isinstance(error, shutil.Error):  # a list of (source, target, reason)
        return str(error.args[0][0][2]).partition(": '")[0]
    return reason(error)
