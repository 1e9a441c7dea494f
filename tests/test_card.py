from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from fastvlm_mlx.checkpoint.card import license_of, model_card
from fastvlm_mlx.checkpoint.names import quantized_linears
from fastvlm_mlx.checkpoint.quantize import plan
from fastvlm_mlx.checkpoint.read import read_checkpoint
from fastvlm_mlx.config import load_config
from fastvlm_mlx.hub import registry
from fastvlm_mlx.hub.resolve import NANO

APPLES = "This Apple Machine Learning Research Model is specifically developed …"


def data_of(card: str) -> dict:
    return ModelCard(card).data.to_dict()


def table_of(card: str) -> list[list[str]]:
    rows = [line for line in card.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def test_a_card_of_a_published_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    license = license_of(tmp_path, "apple/FastVLM-0.5B")
    card = model_card("mine", "apple/FastVLM-0.5B", "float16", license=license)
    assert data_of(card) == {
        "library_name": "mlx",
        "pipeline_tag": "image-text-to-text",
        "base_model": "apple/FastVLM-0.5B",
        "license": "other",
        "license_name": "apple-amlr",
        "license_link": "https://github.com/apple/ml-fastvlm/blob/main/LICENSE_MODEL",
        "tags": ["mlx", "fastvlm"],
    }
    assert card.startswith("---\nlibrary_name: mlx\npipeline_tag: image-text-to-text\n")
    assert "\n# mine\n" in card and "- Precision: float16\n" in card
    assert "[apple/FastVLM-0.5B](https://huggingface.co/apple/FastVLM-0.5B)" in card
    assert registry.ATTRIBUTION in card and "derivative" in card  # which the licence asks for
    assert "fastvlm generate --model" in card and "fv.load(" in card
    assert table_of(card) == []
    same = model_card("mine", "0.5b", "float16", license=license_of(tmp_path, "0.5b"))
    assert same == card


def test_a_card_of_an_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = "llava-fastvithd_7b_stage2"
    card = model_card("mine", name, "float16", license=license_of(tmp_path, name))
    assert "base_model" not in data_of(card)
    assert f"[{name}]({registry.CDN}/{name}.zip)" in card and registry.ATTRIBUTION in card


def test_a_card_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for source in (NANO, f"{NANO}/"):
        card = model_card("mine", source, "float32")
        assert "Converted from: `nano`" in card
        assert data_of(card).keys() == {"library_name", "pipeline_tag", "tags"}
        assert "Licence: that of the weights" in card and registry.ATTRIBUTION not in card
    monkeypatch.chdir(NANO)
    assert "Converted from: `nano`" in model_card("mine", ".", "float32")


def test_a_table_of_what_is_quantized(small_folder: Path) -> None:
    config, weights = read_checkpoint(small_folder)
    layers = plan(weights, config, {"bits": 4, "group_size": 32, "embeddings": {"mode": "mxfp8"}})
    rows = table_of(card := model_card("mine", small_folder, "bfloat16", layers=layers))
    counted = {row[0]: row[1:] for row in rows}
    assert counted["vision encoder"] == ["bfloat16", "", "", ""]
    assert counted["decoder"][:3] == ["4", "32", "affine"]
    assert counted["projector"][:3] == ["4", "32", "affine"]
    assert counted["embeddings"][:3] == ["8", "32", "mxfp8"]
    assert sum(int(row[-1] or 0) for row in rows) == len(layers)
    assert "4 and 8 bits where quantized, as below, and bfloat16 elsewhere" in card
    assert "Only fastvlm-mlx" not in card


def test_two_settings_in_one_part_are_two_rows() -> None:
    settings = {"group_size": 64, "mode": "affine"}
    layers = {
        f"language_model.model.layers.{i}.mlp.down_proj": settings | {"bits": bits}
        for i, bits in enumerate((6, 4, 4))
    }
    rows = [row for row in table_of(model_card("m", NANO, "float16", layers=layers)) if row[1:][1]]
    assert rows == [
        ["decoder", "4", "64", "affine", "2"],
        ["decoder", "6", "64", "affine", "1"],
    ]


def test_a_quantized_encoder_is_read_here_alone() -> None:
    layers = {"vision_tower.stages.0.0.ffn.fc1": {"bits": 8, "group_size": 64, "mode": "affine"}}
    card = model_card("m", NANO, "float16", layers=layers)
    assert "Only fastvlm-mlx reads this folder" in card


def test_a_card_of_the_bundled_model() -> None:
    config = load_config(NANO)
    layers = dict(quantized_linears(read_checkpoint(NANO)[1], config))
    card = model_card("nano", NANO, "float16", layers=layers)
    assert {row[1] for row in table_of(card)} == {"8", "float16"}


@pytest.mark.parametrize("name", ['a: "b"', "- x", "name # no", "ünïcode"])
def test_names_that_yaml_would_misread(name: str, tmp_path: Path) -> None:
    license = {"license": "other", "license_name": name, "license_link": "LICENSE"}
    assert data_of(model_card(name, tmp_path, "float16", license=license))["license_name"] == name


# Licences


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({}, {}),
        ({"README.md": "# No metadata"}, {}),
        ({"README.md": "---\nlicense: mit\nbase_model: a/b\n---\n"}, {"license": "mit"}),
        ({"README.md": "---\nlicense: apple-amlr\n---\n"}, registry.LICENSE),
        ({"README.md": "---\nlicense: [a, b]\n---\n"}, {}),
        ({"README.md": "---\nlicense: {\n---\n"}, {}),
        ({"README.md": "---\n- a\n---\n"}, {}),
        ({"README.md": "---\nlicense_name: x\n---\n"}, {}),
        ({"LICENSE": APPLES}, registry.LICENSE),
        ({"LICENSE_MODEL": APPLES, "README.md": "# No metadata"}, registry.LICENSE),
        ({"LICENSE": "MIT License"}, {}),
        (
            {"README.md": "---\nlicense: other\nlicense_name: x\nlicense_link: LICENSE\n---\n"},
            {"license": "other", "license_name": "x", "license_link": "LICENSE"},
        ),
    ],
)
def test_the_licence_of_a_folder(files: dict[str, str], found: dict, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert license_of(tmp_path) == license_of(tmp_path, "someone/model") == found


def test_a_folder_is_not_mistaken_for_a_published_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "0.5b").mkdir()
    monkeypatch.chdir(tmp_path)
    assert license_of("0.5b", "0.5b") == {}
