"""Weight files, whole and broken."""

import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import MIB, logits_of, one_sentence, peak_memory, rewrite

from fastvlm_mlx.checkpoint.files import read_tensors, save_checkpoint, weight_files
from fastvlm_mlx.checkpoint.load import load_model
from fastvlm_mlx.config import CheckpointError

# --- safetensors ---


def test_there_is_no_such_folder(tmp_path):
    for path in (tmp_path / "nothing", tmp_path / "file"):
        (tmp_path / "file").touch()
        with pytest.raises(FileNotFoundError) as error:
            load_model(path)
        assert str(path) in str(error.value)


def test_a_folder_without_weights(small_copy):
    (small_copy / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds no weights") as error:
        load_model(small_copy)
    assert str(small_copy) in one_sentence(error)


def test_weights_without_tensors(small_copy):
    mx.save_safetensors(str(small_copy / "model.safetensors"), {})
    with pytest.raises(CheckpointError, match="without tensors"):
        load_model(small_copy)


def test_tensors_of_an_unknown_layout(small_copy):
    mx.save_safetensors(str(small_copy / "model.safetensors"), {"model.resnet.weight": mx.zeros(3)})
    with pytest.raises(CheckpointError, match="unknown layout") as error:
        load_model(small_copy)
    assert "model.resnet.weight" in one_sentence(error)


def test_another_kind_of_model(small_copy, small_tensors):
    with pytest.raises(CheckpointError, match=r"model_type must be llava_qwen2 .* found 'llava'"):
        load_model(rewrite(small_copy, small_tensors, model_type="llava"))


def broken_files(whole: bytes) -> dict[str, bytes]:
    header = int.from_bytes(whole[:8], "little")
    return {
        "empty": b"",
        "cut in its length": whole[:4],
        "cut in its header": whole[:100],
        "cut after its header": whole[: 8 + header],
        "cut in its tensors": whole[: len(whole) // 2],
        "cut by four bytes": whole[:-4],
        "of an endless header": (2**62).to_bytes(8, "little") + whole[8:],
        "of no header": b"A web page that says: not found.",
        "of another header": (2).to_bytes(8, "little") + b"[]",
    }


@pytest.mark.parametrize("kind", broken_files(bytes(9)))
def test_a_broken_file(small_copy, kind):
    file = small_copy / "model.safetensors"
    file.write_bytes(broken_files(file.read_bytes())[kind])
    with pytest.raises(CheckpointError) as error:
        load_model(small_copy)
    assert str(file) in one_sentence(error)


def test_shards_load_as_one_file(small_copy, small_tensors, small):
    (small_copy / "model.safetensors").unlink()
    save_checkpoint(small_tensors, small_copy, shard_bytes=500_000)
    assert len(list(small_copy.glob("model-*-of-*.safetensors"))) >= 4
    assert mx.array_equal(logits_of(load_model(small_copy)), logits_of(small))


def test_a_shard_that_is_missing(small_copy, small_tensors):
    (small_copy / "model.safetensors").unlink()
    save_checkpoint(small_tensors, small_copy, shard_bytes=500_000)
    shard = sorted(small_copy.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json") as error:
        load_model(small_copy)
    assert shard.name in one_sentence(error)


@pytest.mark.parametrize("index", ["{}", '{"weight_map": {}}', '{"weight_map": []}', "[]", "{"])
def test_an_index_without_map(small_copy, index):
    (small_copy / "model.safetensors").unlink()
    (small_copy / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json") as error:
        load_model(small_copy)
    one_sentence(error)


def test_other_safetensors_beside_the_index_are_not_read(small_copy, small_tensors, small):
    save_checkpoint(small_tensors, small_copy)
    mx.save_safetensors(str(small_copy / "adapters.safetensors"), {"model.extra": mx.zeros(3)})
    assert mx.array_equal(logits_of(load_model(small_copy)), logits_of(small))


def write_index(folder: Path, *shards: str) -> None:
    index = {"weight_map": {f"tensor{i}": shard for i, shard in enumerate(shards)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_a_whole_file_wins_over_older_shards(small_copy, small_tensors, small):
    older = {name: mx.zeros_like(tensor) for name, tensor in small_tensors.items()}
    whole = (small_copy / "model.safetensors").rename(small_copy / "kept")
    save_checkpoint(older, small_copy, shard_bytes=500_000)
    whole.rename(small_copy / "model.safetensors")
    assert len(weight_files(small_copy)) == 1
    assert mx.array_equal(logits_of(load_model(small_copy)), logits_of(small))


def test_shards_without_an_index(small_copy, small_tensors, small):
    (small_copy / "model.safetensors").unlink()
    save_checkpoint(small_tensors, small_copy, shard_bytes=500_000)
    (small_copy / "model.safetensors.index.json").unlink()
    (small_copy / "._model-00001-of-00002.safetensors").write_bytes(b"litter")
    assert mx.array_equal(logits_of(load_model(small_copy)), logits_of(small))
    sorted(small_copy.glob("model-*"))[1].unlink()
    with pytest.raises(CheckpointError, match=r"holds \d of the \d shards of model") as error:
        load_model(small_copy)
    assert str(small_copy) in one_sentence(error)


@pytest.mark.parametrize(
    "first, second",
    [
        ("model_a.safetensors", "model_b.safetensors"),
        ("model-00001-of-00002.safetensors", "model-00002-of-00003.safetensors"),
        ("model-00001-of-00002.safetensors", "model-ema-00002-of-00002.safetensors"),
        ("model-00001-of-00001.safetensors", "model-old.safetensors"),
        ("epoch1.safetensors", "epoch2.safetensors"),
        ("pytorch_model-1.bin", "pytorch_model-2.bin"),
        ("model.pth", "optimizer.pth"),
    ],
)
def test_two_models_are_not_merged(small_copy, first, second):
    for name in (first, second):
        shutil.copy(small_copy / "model.safetensors", small_copy / f"_{name}")
    (small_copy / "model.safetensors").unlink()
    for name in (first, second):
        (small_copy / f"_{name}").rename(small_copy / name)
    with pytest.raises(CheckpointError, match="not shards of one model") as error:
        load_model(small_copy)
    sentence = one_sentence(error)
    assert first in sentence and second in sentence and str(small_copy) in sentence


@pytest.mark.parametrize("name", ["../model.safetensors", "a/../../model.safetensors", "/{}"])
def test_an_index_that_leads_out_of_its_folder(small_copy, name):
    outside = (small_copy / "model.safetensors").rename(small_copy.parent / "model.safetensors")
    name = name.format(str(outside)[1:])
    write_index(small_copy, name)
    with pytest.raises(CheckpointError, match="which is not in its folder") as error:
        load_model(small_copy)
    assert name[:150] in one_sentence(error)


def test_shards_that_are_links_or_lie_deeper_are_read(small_copy, small_tensors, small):
    """As in the Hub's cache, whose folders hold links to files elsewhere."""
    elsewhere = (small_copy / "model.safetensors").rename(small_copy.parent / "blob")
    (small_copy / "weights").mkdir()
    (small_copy / "weights" / "whole.safetensors").symlink_to(elsewhere)
    write_index(small_copy, "weights/whole.safetensors")
    assert mx.array_equal(logits_of(load_model(small_copy)), logits_of(small))


@pytest.mark.parametrize("name", ["model.safetensors", "model-1.safetensors", "other.safetensors"])
@pytest.mark.parametrize("what", ["pipe", "folder", "link"])
def test_weights_that_are_no_file(small_copy, name, what):
    (small_copy / "model.safetensors").unlink()
    file = small_copy / name
    {
        "pipe": lambda: os.mkfifo(file),
        "folder": file.mkdir,
        "link": lambda: file.symlink_to("nowhere"),
    }[what]()
    with pytest.raises(CheckpointError, match="holds no weights; download it again") as error:
        load_model(small_copy)
    assert str(file) in one_sentence(error)


def test_a_shard_that_is_a_pipe(small_copy):
    (small_copy / "model.safetensors").unlink()
    os.mkfifo(small_copy / "shard.safetensors")
    write_index(small_copy, "shard.safetensors")
    with pytest.raises(CheckpointError, match="a pipe or a device"):
        load_model(small_copy)


@pytest.mark.parametrize("pattern", ["{}.safetensors", "{}.pth"])
def test_what_macos_adds_is_no_weights(tmp_path, pattern):
    for name in ("._weights", "weights"):
        (tmp_path / pattern.format(name)).touch()
    assert weight_files(tmp_path) == [tmp_path / pattern.format("weights")]


# --- PyTorch's own files ---


def test_without_torch_its_files_ask_for_it(small_copy, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (small_copy / "model.safetensors").rename(small_copy / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="torch is not installed") as error:
        load_model(small_copy)
    assert "pytorch_model.bin" in one_sentence(error) and "safetensors" in str(error.value)


@pytest.mark.interop
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("nested", [False, True])
def test_files_of_torch(small_copy, small_tensors, small, dtype, nested):
    torch = pytest.importorskip("torch")
    state = {name: torch.tensor(np.array(tensor)) for name, tensor in small_tensors.items()}
    state = {
        k: v.to(getattr(torch, dtype)) if v.is_floating_point() else v for k, v in state.items()
    }
    (small_copy / "model.safetensors").unlink()
    torch.save({"state_dict": state, "epoch": 3} if nested else state, small_copy / "model.pth")
    found, wanted = logits_of(load_model(small_copy, dtype="float32")), logits_of(small)
    if dtype == "float32":
        assert mx.array_equal(found, wanted)
    assert mx.abs(found - wanted).max() < {"float32": 1e-9, "float16": 0.05, "bfloat16": 0.5}[dtype]


def parameter(torch, tensor):
    return torch.nn.Parameter(tensor, requires_grad=tensor.is_floating_point())


def every_other(torch, tensor):
    return torch.stack([tensor, tensor + 1], dim=-1)[..., 0]


def transposed(torch, tensor):
    return tensor.mT.contiguous().mT if tensor.ndim > 1 else tensor


def negative_bit(torch, tensor):
    return torch.complex(torch.zeros_like(tensor), -tensor).conj().imag


def real_part(torch, tensor):
    return torch.complex(tensor, tensor).conj().real


KINDS = [parameter, every_other, transposed, negative_bit, real_part]


@pytest.mark.needs("torch")
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=lambda f: f.__name__)
def test_tensors_of_every_kind(small_copy, small_tensors, kind, legacy):
    import torch

    state = {k: torch.tensor(np.array(v)) for k, v in small_tensors.items()}
    state = {k: kind(torch, v) if v.is_floating_point() else v for k, v in state.items()}
    (small_copy / "model.safetensors").unlink()
    file = small_copy / "pytorch_model.bin"
    torch.save(state, file, _use_new_zipfile_serialization=not legacy)
    found = read_tensors(small_copy)
    assert found.keys() == small_tensors.keys()
    assert all(mx.array_equal(found[name], tensor) for name, tensor in small_tensors.items())


@pytest.mark.needs("torch")
def test_expanded_tensors_have_a_bound(tmp_path):
    import torch

    row, file = torch.arange(3.0), tmp_path / "model.pth"
    torch.save({"a": row.expand(4, 3)}, file)
    assert read_tensors(tmp_path)["a"].tolist() == [[0, 1, 2]] * 4
    torch.save({"a": row[:1].expand(10**12)}, file)
    with pytest.raises(CheckpointError, match=r"a is no tensor .* 4,000,000,000,000 bytes"):
        read_tensors(tmp_path)


@pytest.mark.needs("torch")
@pytest.mark.parametrize("names", [["model"], ["module"], ["model", "state_dict"], ["state_dict"]])
def test_tensors_below_the_top(tmp_path, names):
    import torch

    state = {"a": torch.ones(2)}
    for name in reversed(names):
        state = {"epoch": 3, name: state, "optimizer": {"lr": 1.0}}
    torch.save(state, tmp_path / "model.pth")
    assert read_tensors(tmp_path)["a"].tolist() == [1, 1]


@pytest.mark.needs("torch")
def test_a_dictionary_that_holds_itself(tmp_path):
    import torch

    state = {}
    state["model"] = state
    torch.save(state, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match="without tensors"):
        read_tensors(tmp_path)


@pytest.mark.interop
def test_shards_of_torch(small_copy, small_tensors, small):
    torch = pytest.importorskip("torch")
    (small_copy / "model.safetensors").unlink()
    state = {name: torch.tensor(np.array(tensor)) for name, tensor in small_tensors.items()}
    shards = {f"pytorch_model-0000{i}-of-00002.bin": list(state)[i - 1 :: 2] for i in (1, 2)}
    for file, names in shards.items():
        torch.save({name: state[name] for name in names}, small_copy / file)
    weight_map = {name: file for file, names in shards.items() for name in names}
    index = {"metadata": {}, "weight_map": weight_map}
    (small_copy / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert mx.array_equal(logits_of(load_model(small_copy)), logits_of(small))


class Executed:
    """Makes a file where it is unpickled."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.interop
@pytest.mark.parametrize("by_torch", [True, False])
def test_code_in_a_pickle_is_not_run(small_copy, tmp_path, by_torch):
    torch = pytest.importorskip("torch")
    (small_copy / "model.safetensors").unlink()
    file, trace = small_copy / "pytorch_model.bin", tmp_path / "trace"
    state = {"model.embed_tokens.weight": Executed(trace)}
    torch.save(state, file) if by_torch else file.write_bytes(pickle.dumps(state))
    with pytest.raises(CheckpointError) as error:
        load_model(small_copy)
    assert str(file) in one_sentence(error)
    assert not trace.exists()


BROKEN_IDS = ["empty", "text", "list", "nothing", "number", "unnamed", "float8", "sparse"]
BROKEN_IDS += ["meta", "quantized", "module"]


@pytest.mark.interop
@pytest.mark.parametrize(
    "make",
    [
        lambda torch: b"",
        lambda torch: b"no pickle",
        lambda torch: [1, 2],
        lambda torch: {},
        lambda torch: {"state_dict": 5},
        lambda torch: {5: torch.zeros(3)},
        lambda torch: {"model.norm.weight": torch.zeros(3, dtype=torch.float8_e4m3fn)},
        lambda torch: {"model.norm.weight": torch.zeros(3, 3).to_sparse()},
        lambda torch: {"model.norm.weight": torch.zeros(3, device="meta")},
        lambda torch: {
            "model.norm.weight": torch.quantize_per_tensor(torch.ones(3), 1, 0, torch.qint8)
        },
        lambda torch: torch.nn.Linear(3, 3),
    ],
    ids=BROKEN_IDS,
)
def test_broken_files_of_torch(small_copy, make):
    torch = pytest.importorskip("torch")
    (small_copy / "model.safetensors").unlink()
    content, file = make(torch), small_copy / "pytorch_model.bin"
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    with pytest.raises(CheckpointError) as error:
        load_model(small_copy)
    assert str(small_copy) in one_sentence(error)


# --- saving ---


@pytest.mark.parametrize("shard_bytes", [1, 100, 250, 10**9])
def test_saved_tensors_come_back(tmp_path, shard_bytes):
    tensors = {f"t{i}": mx.arange(10 * i, (10 * i) + i + 1) for i in range(12)}
    tensors["half"] = mx.ones((3, 2), mx.bfloat16)
    sizes, total = [], sum(tensor.nbytes for tensor in tensors.values())
    left = dict(tensors)
    save_checkpoint(left, tmp_path, shard_bytes=shard_bytes, progress=sizes.append)
    assert not left and sum(sizes) == total
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == 1 or all(
        f.name.endswith(f"of-{len(files):05d}.safetensors") for f in files
    )
    found = {}
    for file in files:
        shard = mx.load(str(file))
        assert len(shard) == 1 or sum(tensor.nbytes for tensor in shard.values()) <= shard_bytes
        found |= shard
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and mx.array_equal(found[name], tensor)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == total
    assert index["weight_map"].keys() == tensors.keys()
    assert {*index["weight_map"].values()} == {file.name for file in files}


def test_saving_holds_one_shard_at_most(tmp_path):
    tensors = {f"t{i}": mx.full((MIB // 4,), i, mx.float32) + 1 for i in range(16)}
    with peak_memory() as used:
        save_checkpoint(tensors, tmp_path, shard_bytes=2 * MIB)
    assert used[0] < 5 * MIB
