"""Weight files, whole and broken."""

import json
import pickle
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import MIB, logits_of, one_sentence, peak_memory, rewrite

from fastvlm_mlx.checkpoint.files import save_checkpoint
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
    (small_copy / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json") as error:
        load_model(small_copy)
    one_sentence(error)


def test_other_safetensors_beside_the_index_are_not_read(small_copy, small_tensors, small):
    save_checkpoint(small_tensors, small_copy)
    mx.save_safetensors(str(small_copy / "adapters.safetensors"), {"model.extra": mx.zeros(3)})
    assert mx.array_equal(logits_of(load_model(small_copy)), logits_of(small))


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
    ],
    ids=["empty", "text", "list", "nothing", "number", "unnamed", "8 bits", "sparse"],
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
