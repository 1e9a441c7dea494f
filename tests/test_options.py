"""Options as people give them: under other libraries' names, as numpy numbers, far too large."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from models import PENGUINS, Nano

import fastvlm_mlx as fv
from fastvlm_mlx.generation.options import OTHER_NAMES, Options

ASK = "Describe the image."
ANSWER = "The image shows 6 penguins."


def test_the_image_may_be_the_fourth_argument(nano: Nano) -> None:
    assert fv.generate(*nano, ASK, str(PENGUINS)) == ANSWER
    assert "".join(r.text for r in fv.stream_generate(*nano, ASK, [PENGUINS])) == ANSWER


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("temp", "did you mean temperature?"),
        ("max_new_tokens", "did you mean max_tokens?"),
        ("images", "did you mean image?"),
        ("verbose", "stream_generate has its timings."),
        ("num_return_sequences", "or with batch_generate."),
        ("top-p", "did you mean top_p"),
        ("tempreature", "did you mean temperature?"),
        ("xyz", "There is no option 'xyz' here."),
    ],
)
def test_an_unknown_option_is_told_its_name_here(name: str, said: str, nano: Nano) -> None:
    calls: list[Callable[..., Any]] = [
        lambda **options: fv.generate(*nano, ASK, PENGUINS, **options),
        lambda **options: fv.stream_generate(*nano, ASK, PENGUINS, **options),
        lambda **options: fv.batch_generate(*nano, [(ASK, PENGUINS)], **options),
        lambda **options: fv.Chat(*nano, **options),
        lambda **options: fv.Chat(*nano).ask(ASK, image=PENGUINS, **options),
    ]
    for call in calls:
        with pytest.raises(TypeError) as caught:
            call(**{name: 1})
        message = str(caught.value)
        assert message.startswith(f"There is no option '{name}' here") and said in message


def test_an_image_is_no_option_of_a_conversation(nano: Nano) -> None:
    with pytest.raises(TypeError, match="'image' here; it goes with the question"):
        fv.Chat(*nano, image=PENGUINS)


def test_other_names_lead_to_options() -> None:
    names = {field.name for field in fields(Options)}
    assert set(OTHER_NAMES.values()) <= {*names, "image"}
    assert not OTHER_NAMES.keys() & names


@pytest.mark.parametrize(
    ("name", "value", "same"),
    [
        ("max_tokens", np.int64(3), 3),
        ("temperature", np.float32(0.5), 0.5),
        ("top_k", np.uint8(4), 4),
        ("seed", np.array(7), 7),
        ("image_size", np.int32(128), 128),
        ("kv_bits", np.int16(4), 4),
        ("fast", np.bool_(True), True),
    ],
)
def test_numpy_numbers_are_numbers(name: str, value: Any, same: Any) -> None:
    found = getattr(Options(**{name: value}), name)
    assert found == same and type(found) is type(same)


def test_numpy_numbers_are_checked_like_others() -> None:
    for value in (np.float32("nan"), np.array([1.0]), np.int64(-1)):
        with pytest.raises(ValueError, match="temperature must be a number from 0"):
            Options(temperature=value)


def test_numpy_options_answer_as_python_ones(nano: Nano) -> None:
    options = {"max_tokens": np.int64(4), "temperature": np.float64(0.5), "seed": np.int64(1)}
    plain = {name: value.item() for name, value in options.items()}
    assert fv.generate(*nano, ASK, PENGUINS, **options) == fv.generate(
        *nano, ASK, PENGUINS, **plain
    )


@pytest.mark.parametrize(
    "value", [10**400, -(10**400), 10**5000], ids=["1e400", "-1e400", "1e5000"]
)
@pytest.mark.parametrize("name", ["temperature", "min_p", "repetition_penalty", "presence_penalty"])
def test_a_number_too_large_for_a_float(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be a number") as caught:
        Options(**{name: value})
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize("name", ["max_tokens", "top_k", "seed", "max_kv_size", "prompt_lookup"])
def test_a_whole_number_beyond_64_bits(name: str) -> None:
    for value in (2**64, 10**5000):
        with pytest.raises(ValueError, match=f"^{name} must be a whole number below 2⁶⁴") as caught:
            Options(**{name: value})
        assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    "name", ["max_tokens", "max_kv_size", "prefill_step_size", "prompt_lookup"]
)
def test_large_numbers_mean_no_limit(name: str, nano: Nano) -> None:
    assert fv.generate(*nano, ASK, PENGUINS, **{name: 2**64 - 1}) == ANSWER


@pytest.mark.parametrize("name", ["system", "conv_mode"])
def test_texts_must_be_texts(name: str) -> None:
    for value in (5, b"text", ["text"]):
        with pytest.raises(ValueError, match=f"^{name} must be a text, found"):
            Options(**{name: value})
