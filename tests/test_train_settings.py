"""Training options: unknown ones fail by name, values out of range by what they must be."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from fastvlm_mlx.train.settings import TrainOptions, changes, help_of, read_settings

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "a mode": ({"decoder": "qlora"}, "decoder must be one of frozen, lora, dora, full, found"),
    "a rank": ({"rank": 0}, "rank must be a whole number from 1"),
    "dropout": ({"dropout": 1.0}, "dropout must be a number from 0 and below 1, found 1.0."),
    "a rate": ({"learning_rate": -1}, "learning_rate must be a number above 0, found -1."),
    "no number": ({"clip": "1"}, "clip must be a number from 0, found '1'."),
    "a flag": ({"pack": 1}, "pack must be true or false"),
    "a stage": ({"stage": "4"}, "stage must be one of 1, 1.5, 2, 3, found '4'."),
    "nothing": ({"decoder": "frozen", "projector": "frozen"}, "nothing would change"),
    "quantized": ({"quantize": 4, "decoder": "full"}, "Quantized weights can't be trained"),
    "layers": ({"decoder": "full", "projector": "full", "layers": ["*"]}, "no part has either"),
    "patience": ({"patience": 2}, "patience needs validation"),
    "from scratch": ({"from_scratch": True, "vision": "lora"}, "from_scratch trains everything"),
    "stage 1 from scratch": ({"from_scratch": True, "stage": "1"}, "from_scratch trains everyth"),
    "from scratch, again": (
        {"from_scratch": True, "gradient_checkpointing": True},
        "BatchNorms of the training form would count each batch twice",
    ),
    "from scratch, packed": ({"from_scratch": True, "quantize": 4}, "Quantized weights can't be"),
    "None": ({"batch_size": None}, "batch_size must be a whole number from 1, found None."),
}


@pytest.mark.parametrize("case", BAD)
def test_a_value_out_of_range_is_named(case: str) -> None:
    given, message = BAD[case]
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        TrainOptions.of(given)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("lr", "learning_rate"), ("lora_r", "rank"), ("batchsize", "batch_size"), ("xyz", "")],
)
def test_an_unknown_option_fails_by_name(name: str, hint: str) -> None:
    with pytest.raises(TypeError, match=f"no training option '{name}'") as error:
        TrainOptions.of({name: 1})
    assert hint in str(error.value)


def test_a_stage_is_a_preset_that_other_options_overrule() -> None:
    first = TrainOptions.of({"stage": 1})
    assert (first.vision, first.projector, first.decoder) == ("frozen", "full", "frozen")
    assert first.rate("projector") == 1e-3
    second = TrainOptions.of({"stage": "2", "vision": "frozen", "projector_learning_rate": 1e-4})
    assert (second.vision, second.projector, second.decoder) == ("frozen", "full", "full")
    assert [second.rate(part) for part in ("projector", "decoder")] == [1e-4, 2e-5]


def test_a_new_model_is_trained_whole_at_a_high_rate_and_many_images_at_a_time() -> None:
    new = TrainOptions.of({"from_scratch": True})
    assert {new.vision, new.projector, new.decoder} == {"full"}
    assert (new.rate("decoder"), new.batch_size) == (1e-3, 16)
    changed = TrainOptions.of({"from_scratch": True, "batch_size": 2, "stage": "2"})
    assert (changed.rate("decoder"), changed.batch_size) == (2e-5, 2)


def test_adapters_learn_ten_times_as_fast_as_full_weights_by_default() -> None:
    assert TrainOptions().rate("decoder") == 2e-4
    assert TrainOptions(decoder="full").rate("decoder") == 2e-5
    assert TrainOptions(learning_rate=1e-3).rate("vision") == 1e-3


def test_options_come_back_from_json_as_they_were(tmp_path: Path) -> None:
    options = TrainOptions(layers=("a.*",), stage="1", validation="0.1")
    file = tmp_path / "settings.json"
    file.write_text(json.dumps(options.as_dict()), encoding="utf-8")
    assert TrainOptions.of(read_settings(file)) == options


def test_every_option_says_what_it_is_for() -> None:
    assert all(help_of(each) for each in fields(TrainOptions))


def test_changed_options_are_told_by_name() -> None:
    before, after = TrainOptions().as_dict(), TrainOptions(rank=8).as_dict()
    assert changes(before, after) == ["rank 16 → 8"]
    assert changes(before, before) == []
