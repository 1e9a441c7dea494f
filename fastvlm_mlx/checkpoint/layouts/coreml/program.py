"""Core ML programs: opening them and following their values."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from ....checks import is_litter, reason
from ....config import CheckpointError

PACKAGE = "fastvithd.mlpackage"
NORM_EPS = 1e-5
CASTS = ("cast", "identity")


def load_program(package: Path) -> Any:
    """The main function of a Core ML package, constants included.

    Returns:
        A `coremltools` MIL `Function`.

    Raises:
        CheckpointError: coremltools is missing, or the package is broken or no ML Program.
    """
    import_coremltools(f"read {package}")
    from coremltools.converters.mil.frontend.milproto.load import load
    from coremltools.proto.Model_pb2 import Model

    files = [path for path in package.rglob("*") if not (is_litter(path.name) or path.is_dir())]
    file = next((path for path in files if path.match("Data/*/*.mlmodel")), None)
    if file is None or not all(path.is_file() for path in files):  # a pipe would never end
        raise CheckpointError(f"{package} is not a whole Core ML package; download it again.")
    try:
        spec = Model.FromString(file.read_bytes())
        program = load(spec, spec.specificationVersion, str(file.parent / "weights"))
        return program.functions["main"]
    except Exception as error:  # coremltools and protobuf raise many types
        raise CheckpointError(
            f"{package} is not a readable ML Program ({reason(error)})."
        ) from None


def import_coremltools(purpose: str) -> None:
    """Import coremltools without the warnings that it gives off a Mac.

    Raises:
        CheckpointError: it is missing; the message says what for.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it imports transformers
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    try:
        import coremltools  # noqa: F401
    except ImportError:
        raise CheckpointError(
            f"coremltools is needed to {purpose}: pip install 'fastvlm-mlx[coreml]'."
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
    """A value as a number or a numpy array, expanded if compressed; None if it is computed."""
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
