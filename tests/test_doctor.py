"""`fastvlm doctor`: it finds what is wrong, and says nothing where all is right."""

import json
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import command
import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from fastvlm_mlx import ops
from fastvlm_mlx.bench import bench, doctor, machine
from fastvlm_mlx.bench.doctor import (
    LOGIT_FACTOR,
    ROUNDOFF,
    VISUAL_FACTOR,
    Outputs,
    check,
    compare,
    compute_outputs,
    known_faults,
    lowest_versions,
    product_kind,
    rounded,
)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short measurements of a machine."""
    monkeypatch.setattr(machine, "RATE_SECONDS", 0.02)
    monkeypatch.setattr(machine, "COPY_BYTES", 1 << 22)
    monkeypatch.setattr(bench, "PHOTO", (640, 480))
    monkeypatch.setattr(doctor, "CPU_IMAGE_SIZE", 128)


@pytest.fixture(scope="module")
def exact(small_folder: Path) -> Outputs:
    with ops.assume("cpu"):
        return compute_outputs(small_folder, "float32", None)


def spoil(monkeypatch: pytest.MonkeyPatch, path: str, by: float) -> None:
    """Only on the GPU's side, a parameter is off by a share of itself."""
    load = doctor.load_with_processor

    def load_spoiled(folder: Path, **options: Any) -> Any:
        model, processor = load(folder, **options)
        if not ops.on_cpu():
            parameters = dict(tree_flatten(model.parameters()))
            model.load_weights([(path, parameters[path] * (1 + by))], strict=False)
        return model, processor

    monkeypatch.setattr(doctor, "load_with_processor", load_spoiled)


# What is compared


def test_a_right_model_is_healthy(quick: None, run: command.Run) -> None:
    code, out, err = run("doctor", "--json")
    result = json.loads(out)
    assert code == 0, result
    assert result["healthy"] and all(check["holds"] for check in result["checks"])
    assert [check["name"] for check in result["checks"]] == [
        "visual tokens",
        "logits",
        "greedy tokens",
    ]
    assert result["checks"][0]["error"] > 0  # the forms differ, if only in rounding
    assert result["model"] == "nano"
    assert set(result["bench"]["stages"]) == set(bench.STAGES)
    assert {"mlx", "mlx-lm", "numpy", "python", "fastvlm-mlx"} <= set(result["system"]["versions"])
    assert "computing on the CPU in float32" in err


def test_a_report_fits_a_terminal_and_says_what_was_there(quick: None, run: command.Run) -> None:
    code, out, _ = run("doctor")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    for said in ("mlx 0.", "Chip", "Memory", "Device", "visual tokens", "Times floor", "Encode"):
        assert said in out
    assert out.splitlines()[-1].startswith("All is right.")
    if mx.default_device().type == mx.DeviceType.cpu:
        assert "No GPU was there" in out


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        ("vision_tower.stem.conv.weight", {"visual tokens", "logits"}),
        ("mm_projector.layers.1.scales", {"visual tokens", "logits"}),
        ("language_model.layers.3.self_attn.o_proj.scales", {"logits"}),
        ("language_model.norm.weight", {"logits"}),
    ],
)
def test_a_wrong_model_is_found(
    path: str, wrong: set[str], quick: None, run: command.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A parameter that is off by one part in a hundred on one of the two sides."""
    spoil(monkeypatch, path, 0.01)
    code, out, _ = run("doctor", "--json")
    result = json.loads(out)
    assert (code, result["healthy"]) == (1, False)
    assert wrong <= {check["name"] for check in result["checks"] if not check["holds"]}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("device", ["metal", "cuda"])
def test_rounding_is_within_bounds(
    dtype: str, device: str, exact: Outputs, small_folder: Path
) -> None:
    with ops.assume(device):
        found = compute_outputs(small_folder, dtype, None, exact.tokens)
    assert found.dtype == dtype
    checks = compare(found, exact, ROUNDOFF[dtype])
    assert all(check.holds for check in checks), checks
    unit = {"float32": 2**-24}.get(dtype, ROUNDOFF[dtype])
    assert checks[0].error > unit / 64  # the bound is one of this dtype's own order


@pytest.mark.parametrize("rounding", ["float16", "bfloat16"])
def test_coarser_rounding_than_that_of_the_dtype_is_found(
    rounding: str, exact: Outputs, small_folder: Path
) -> None:
    with ops.assume("metal"):
        found = compute_outputs(small_folder, rounding, None, exact.tokens)
    checks = compare(found, exact, ROUNDOFF["float32"])
    assert [check.holds for check in checks[:2]] == [False, False]


DEEP = 24


@pytest.fixture(scope="module")
def deep(
    request: pytest.FixtureRequest, small_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Outputs, bool]:
    """A deep random decoder, its exact outputs, and whether it amplifies much."""
    folder = tmp_path_factory.mktemp("deep")
    mx.random.seed(0)
    tensors: dict[str, mx.array] = {}
    for name, tensor in mx.load(str(small_folder / "model.safetensors")).items():
        if name.startswith("model.layers.0."):
            for i in range(DEEP):
                noise = request.param * mx.std(tensor) * mx.random.normal(tensor.shape)
                own = name.replace("layers.0.", f"layers.{i}.")
                tensors[own] = tensor if "norm" in name else noise
        elif not name.startswith("model.layers."):
            tensors[name] = tensor
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    config = json.loads((small_folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": DEEP}))
    with ops.assume("cpu"):
        return folder, compute_outputs(folder, "float32", None), request.param > 1


USUAL, LARGE = 1, 4  # weights; in bfloat16, the large ones leave no digit right
DEEP_CASES = [(USUAL, "float32"), (USUAL, "float16"), (USUAL, "bfloat16")]
DEEP_CASES += [(LARGE, "float32"), (LARGE, "float16")]


@pytest.mark.parametrize(("deep", "dtype"), DEEP_CASES, indirect=["deep"])
@pytest.mark.parametrize("device", ["metal", "cuda"])
def test_rounding_of_a_deep_model_is_within_bounds(
    dtype: str, device: str, deep: tuple[Path, Outputs, bool]
) -> None:
    folder, exact, amplifies = deep
    with ops.assume(device):
        found = compute_outputs(folder, dtype, None, exact.tokens)
    checks = compare(found, exact, ROUNDOFF[dtype])
    assert all(check.holds for check in checks), checks
    if amplifies and dtype == "float16":  # more than a bound for all models would allow
        assert checks[1].error > LOGIT_FACTOR * ROUNDOFF[dtype]
    assert checks[1].bound <= 0.5


@pytest.mark.parametrize("deep", [USUAL], indirect=True)
def test_a_wrong_layer_of_a_deep_model_is_found(
    deep: tuple[Path, Outputs, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, exact, _ = deep
    spoil(monkeypatch, "language_model.layers.11.self_attn.o_proj.weight", 1.0)
    with ops.assume("metal"):
        found = compute_outputs(folder, "float16", None, exact.tokens)
    visual, logits, _ = compare(found, exact, ROUNDOFF["float16"])
    assert visual.holds and not logits.holds


def test_a_rounded_number_has_the_digits_of_float16() -> None:
    x = mx.random.normal((1000,), key=mx.random.key(0))
    assert mx.array_equal(rounded(x), x.astype(mx.float16).astype(mx.float32))
    assert mx.isfinite(rounded(x * 1e6)).all()  # beyond float16's range


def outputs(**changed: Any) -> Outputs:
    logits = np.array([[0.0, 1.0, 2.0, 3.0], [3.0, 2.0, 1.0, 0.0]])
    fields = {"visual_tokens": np.ones((2, 4)), "tokens": [3, 0], "logits": logits}
    return Outputs(**(fields | {"text": None, "dtype": "float32"} | changed))


def test_one_wrong_visual_token_among_many_is_found() -> None:
    exact = outputs(visual_tokens=np.ones((1000, 4)))
    wrong = np.ones((1000, 4))
    wrong[500] *= 1.5
    visual, *rest = compare(outputs(visual_tokens=wrong), exact, 2**-11)
    assert (visual.error, visual.holds) == (0.5, False)
    assert all(check.holds for check in rest)


def test_tokens_may_part_only_where_logits_are_as_close_as_they_are_off() -> None:
    exact = outputs(logits=np.array([[0.0, 0.0, 2.999, 3.0], [3.0, 0.0, 0.0, 0.0]]))
    off = exact.logits + np.array([[0, 0, 0.001, -0.001], [0, 0, 0, 0]])
    *_, tokens = compare(outputs(tokens=[2, 1], logits=off), exact, 2**-11)
    assert tokens.holds and tokens.error > 0  # what follows was asked about another beginning
    *_, tokens = compare(outputs(tokens=[1, 0], logits=off), exact, 2**-11)
    assert not tokens.holds


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_no_number_is_wrong_and_json(value: float) -> None:
    broken = outputs().logits.copy()
    broken[1, 2] = value
    _, logits, _ = compare(outputs(logits=broken), outputs(), 2**-11)
    assert (logits.error, logits.holds) == (None, False)
    visual, *_ = compare(outputs(visual_tokens=np.full((2, 4), value)), outputs(), 2**-11)
    assert (visual.error, visual.holds) == (None, False)
    assert json.loads(json.dumps(visual._asdict()))["error"] is None


def test_bounds_tell_a_dtype_from_a_fault() -> None:
    """Uncorrelated outputs are about 1.4 off: what any bound must be well below."""
    assert max(VISUAL_FACTOR, LOGIT_FACTOR) * max(ROUNDOFF.values()) <= 0.5
    assert check("x", 0.25, 0.25).holds and not check("x", 0.26, 0.25).holds


def test_a_folder_without_tokenizer_is_examined(
    quick: None, run: command.Run, small_folder: Path
) -> None:
    code, out, _ = run("doctor", "--model", small_folder, "--json")
    result = json.loads(out)
    assert (code, result["answer"]) == (0, None)


def test_no_such_model(run: command.Run) -> None:
    code, out, err = run("doctor", "--model", "nothing")
    assert (code, out) == (2, "")
    assert err == "Error: There is no model folder nothing, nor is it a Hub id (user/name).\n"


# What is known


RESULT: dict[str, Any] = {
    "system": {
        "versions": {"mlx": "0.32.4", "numpy": "2.0.0"},
        "chip": "Apple M3 Max",
        "compiler": True,
        "system": "macOS 26.2",
        "device_info": {"max_recommended_working_set_size": 10 * 10**9},
    },
    "compared": {"gpu": True, "products": "float16"},
    "bench": {
        "settings": {"dtype": "float16"},
        "stages": {"memory": {"median": 2.0}},
        "rates": {"products": {"float16": 1e12}},
    },
}


def changed(*path: str, to: Any) -> dict[str, Any]:
    """`RESULT` with another value at a path."""
    if not path:
        return to
    result: dict[str, Any] = json.loads(json.dumps(RESULT))
    place = result
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = to
    return result


def test_nothing_is_said_of_a_machine_without_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "requires", lambda _: ["mlx>=0.32.4", "numpy>=1.26"])
    assert list(known_faults(RESULT)) == []


def bfloat16_on(chip: str) -> dict[str, Any]:
    result = changed("system", "chip", to=chip)
    result["bench"]["settings"]["dtype"] = "bfloat16"
    return result


SLOW_BLAS = {"float32": 1e9, "numpy float32": 5e10}


@pytest.mark.parametrize(
    ("result", "said"),
    [
        (bfloat16_on("Apple M1"), "no native bfloat16"),
        (bfloat16_on("Apple M2 Ultra"), "no native bfloat16"),
        (changed("compared", "products", to="tf32"), "MLX_ENABLE_TF32=0"),
        (changed("compared", "gpu", to=False), "does not see this Mac's GPU"),
        (changed("system", "compiler", to=False), "no C++ compiler"),
        (changed("bench", "stages", "memory", "median", to=15.8), "quantize it"),
        (changed("bench", "rates", "products", to=SLOW_BLAS), "Preload OpenBLAS"),
    ],
)
def test_each_known_fault_is_said(
    result: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "requires", lambda _: [])
    (sentence,) = known_faults(result)
    assert said in sentence


def test_the_compiler_is_looked_for_as_mlx_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler = tmp_path / "g++"
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    for script, found in (("echo clang", True), ("exit 1", False)):  # as a Mac's without Xcode
        compiler.write_text(f"#!/bin/sh\n{script}\n")
        compiler.chmod(0o755)
        assert machine.has_compiler() is found
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert not machine.has_compiler()


def test_bfloat16_is_fine_on_later_chips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "requires", lambda _: [])
    for chip in ("Apple M3", "Apple M10", "Intel(R) Xeon(R) Processor"):
        assert list(known_faults(bfloat16_on(chip))) == []


def test_libraries_that_are_too_old_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    declared = ["mlx>=0.32.4", "numpy>=2.0.1", "huggingface-hub>=1.5", 'torch>=2; extra == "torch"']
    monkeypatch.setattr(doctor, "requires", lambda _: declared)
    result = changed("system", "versions", to={"mlx": "0.30.1", "numpy": "2.0.0", "torch": "1"})
    mlx, numpy = known_faults(result)
    assert mlx.startswith("mlx 0.30.1 is older than 0.32.4") and "truncated files" in mlx
    assert numpy == "numpy 2.0.0 is older than 2.0.1, the lowest version that works."


def test_a_clone_that_is_not_installed_declares_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> list[str]:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "requires", missing)
    assert lowest_versions() == {}


@pytest.mark.parametrize(
    ("architecture", "metal", "tf32", "kind"),
    [
        ("applegpu_g13g", True, None, "float32"),
        ("applegpu_g16s", True, None, "float32"),
        ("applegpu_g17s", True, None, "tf32"),
        ("applegpu_g17p", True, None, "float32"),
        ("applegpu_g18p", True, None, "tf32"),
        ("applegpu_g17s", True, "0", "float32"),
        ("sm_90", False, None, "tf32"),
    ],
)
def test_how_exactly_a_gpu_multiplies(
    architecture: str,
    metal: bool,
    tf32: str | None,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.DeviceType.gpu))
    monkeypatch.setattr(mx, "device_info", lambda: {"architecture": architecture})
    monkeypatch.setattr(mx.metal, "is_available", lambda: metal)
    monkeypatch.delenv("MLX_ENABLE_TF32", raising=False)
    if tf32 is not None:
        monkeypatch.setenv("MLX_ENABLE_TF32", tf32)
    assert product_kind("float32") == kind
    assert product_kind("float16") == "float16"


def test_the_cpu_multiplies_float32_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.DeviceType.cpu))
    assert product_kind("float32") == "float32"
