import re
from pathlib import Path

import pytest

from fastvlm_mlx.checkpoint import layouts
from fastvlm_mlx.hub import registry
from fastvlm_mlx.hub import resolve as hub
from fastvlm_mlx.hub.registry import CDN, ENTRIES, SIZES, VARIANTS, find, knows
from fastvlm_mlx.hub.resolve import HUB_ID, download_model, resolve

# The archives that the original repository names, in its README.md and its two scripts.
ARCHIVES = {
    *(f"llava-fastvithd_{size}_stage{stage}.zip" for size in SIZES for stage in (2, 3)),
    "llava-fastvithd_0.5b_stage3_llm.fp16.zip",
    "llava-fastvithd_1.5b_stage3_llm.int8.zip",
    "llava-fastvithd_7b_stage3_llm.int4.zip",
}


def test_every_published_model_is_there_once():
    urls = [entry.url for entry in ENTRIES]
    assert len(set(urls)) == len(urls)
    assert {url.removeprefix(f"{CDN}/") for url in urls if url.startswith(CDN)} == ARCHIVES
    on_hub = {entry.name for entry in ENTRIES if entry.on_hub}
    assert on_hub >= {"apple/FastVLM-0.5B", "apple/FastVLM-1.5B", "apple/FastVLM-7B"}


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_an_entry_agrees_with_itself(entry):
    assert entry.size in SIZES and entry.variant in VARIANTS and entry.stage in (2, 3)
    assert entry.size in entry.name.lower()
    assert (Path(layouts.__file__).parent / f"{entry.layout}.py").is_file()
    if entry.on_hub:
        assert HUB_ID.fullmatch(entry.name)
        assert entry.url == f"https://huggingface.co/{entry.name}"
    else:
        assert f"_stage{entry.stage}" in entry.name
        assert (entry.variant == "apple-silicon") == ("_llm." in entry.name)
    if entry.sha256 is not None:
        assert re.fullmatch("[0-9a-f]{64}", entry.sha256)


@pytest.mark.parametrize(
    ("name", "choice", "found"),
    [
        ("0.5b", {}, "apple/FastVLM-0.5B"),
        ("1.5B", {}, "apple/FastVLM-1.5B"),
        ("7b", {"stage": 3}, "apple/FastVLM-7B"),
        ("0.5b", {"stage": 2}, "llava-fastvithd_0.5b_stage2"),
        ("0.5b", {"variant": "pytorch"}, "llava-fastvithd_0.5b_stage3"),
        ("7B", {"stage": 2, "variant": "pytorch"}, "llava-fastvithd_7b_stage2"),
        ("1.5b", {"variant": "apple-silicon"}, "llava-fastvithd_1.5b_stage3_llm.int8"),
        ("0.5b", {"variant": "mlx"}, "mlx-community/FastVLM-0.5B-bf16"),
        ("LLaVA-FastViTHD_7b_stage2", {}, "llava-fastvithd_7b_stage2"),
        ("apple/fastvlm-7b", {}, "apple/FastVLM-7B"),
    ],
)
def test_find(name, choice, found):
    assert find(name, **choice).name == found


@pytest.mark.parametrize(
    ("name", "choice", "said"),
    [
        ("3b", {}, "no published model '3b'; choose 0.5b, 1.5b, 7b"),
        ("", {}, "no published model ''"),
        ("0.5b", {"stage": 1}, "not published as stage 1"),
        ("0.5b", {"stage": 2, "variant": "hub"}, "as stage 2 and variant hub; there is hub"),
        ("7b", {"variant": "mlx"}, r"as variant mlx; .* apple-silicon \(stage 3\)"),
        ("apple/FastVLM-7B", {"stage": 2}, "as stage 2; there is hub"),
    ],
)
def test_what_is_not_published(name, choice, said):
    with pytest.raises(ValueError, match=said) as caught:
        find(name, **choice)
    assert "\n" not in str(caught.value)


def test_knows():
    assert knows("0.5B") and knows("llava-fastvithd_7b_stage3") and knows("apple/FastVLM-0.5B")
    assert not knows("nano") and not knows("") and not knows("someone/FastVLM-0.5B")


def test_resolve_takes_published_names(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "download", lambda repo, revision, **options: (repo, revision))
    monkeypatch.setattr(hub, "download_archive", lambda entry, **options: entry.url)
    assert resolve("0.5b") == ("apple/FastVLM-0.5B", None)
    assert resolve("7B", revision="v1") == ("apple/FastVLM-7B", "v1")
    name = "llava-fastvithd_1.5b_stage2"
    assert resolve(name) == f"{registry.CDN}/{name}.zip"
    with pytest.raises(ValueError, match="without revisions"):
        resolve(name, revision="v1")
    (tmp_path / "0.5b").mkdir()
    assert resolve("0.5b") == Path("0.5b")  # a folder comes first


def test_stage_and_variant_are_of_published_models(tmp_path):
    with pytest.raises(ValueError, match="someone/model is a Hub id"):
        download_model("someone/model", stage=2)
