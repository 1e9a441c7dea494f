"""Rows → token ids: the prompt is `generate`'s, and what is supervised is the answers."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unicodedata import normalize

import mlx.core as mx
import pytest
from checkpoints import one_sentence
from hypothesis import given, settings
from hypothesis import strategies as st
from models import PANDA, PENGUINS, random_model

import fastvlm_mlx as fv
from fastvlm_mlx.checkpoint.load import load_processor
from fastvlm_mlx.config import load_config
from fastvlm_mlx.generation.inputs import read_inputs
from fastvlm_mlx.generation.options import Options
from fastvlm_mlx.hub.resolve import NANO
from fastvlm_mlx.text.messages import read_messages
from fastvlm_mlx.text.prompt import build_prompt
from fastvlm_mlx.text.template import CONV_MODES
from fastvlm_mlx.train.examples import (
    Example,
    build_example,
    build_examples,
    collect_examples,
    cut_example,
)
from fastvlm_mlx.train.rows import BadRows, Row

Build = Callable[..., Example]
PROCESSOR, CONFIG = load_processor(NANO), load_config(NANO)
TOKENIZER = PROCESSOR.tokenizer
IM_END = TOKENIZER.controls["<|im_end|>"]
PLACES = 16  # visual tokens of an image


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def row_of(*messages: dict[str, Any], images: int = 0) -> Row:
    return Row("id", list(messages), [PANDA] * images, "data.json, row 3")


def build(row: Row, **options: Any) -> Example:
    return build_example(row, PROCESSOR, CONFIG, **options)


def answers_of(example: Example, tokenizer: Any = TOKENIZER) -> list[str]:
    """The text of each supervised span."""
    ids = list(example.input_ids)
    spans = [ids[start:stop] for start, stop in example.answers]
    return [tokenizer.decode(span, skip_special_tokens=False) for span in spans]


def said(row: Row) -> list[str]:
    turns, _ = read_messages(row.messages)
    texts = [turn["content"] for turn in turns if turn["role"] == "assistant"]
    return [normalize("NFC", text) + "<|im_end|>" for text in texts]


def prompts(row: Row, **options: Any) -> list[list[int]]:
    """What `generate` builds before each answer."""
    return [
        build_prompt(
            TOKENIZER,
            question.messages,
            num_visual_tokens=[PLACES] * len(question.images),
            image_token_index=CONFIG.image_token_index,
            **options,
        )
        for question in row.questions()
    ]


def test_supervised_are_the_answers_and_their_ends_in_every_turn() -> None:
    row = row_of(
        user("<image>\nWhat is <|im_end|>?"),
        assistant("  A 🐼, <|im_start|>user\nno <image>!"),
        user([{"type": "image"}, {"type": "text", "text": "And <image>?"}]),
        assistant("Yes."),
        images=2,
    )
    example = build(row)
    assert answers_of(example) == said(row)
    assert [list(example.input_ids[:start]) for start, _ in example.answers] == prompts(row)
    assert all(example.input_ids[stop - 1] == IM_END for _, stop in example.answers)
    assert example.input_ids.count(IM_END) == 5  # the system's, two questions and two answers
    assert len(example) == example.answers[-1].stop
    places = [n for n, i in enumerate(example.input_ids) if i == CONFIG.image_token_index]
    spans = [range(i.start, i.start + i.tokens) for i in example.images]
    assert places == [n for span in spans for n in span] and len(places) == 2 * PLACES
    assert sum(example.supervised) == example.num_supervised
    assert not any(example.supervised[n] for n in places)


def test_the_prompt_is_what_read_inputs_gives_the_decoder(nano: Any) -> None:
    model, processor = nano
    row = row_of(user("<image>\nWho?"), assistant("Pandas."), user("Sure?"), assistant("Yes."))
    row = replace(row, images=[PANDA])
    for options in (Options(), Options(image_size=128, system="Be brief.")):
        named = {"image_size": options.image_size, "system": options.system}
        example = build_example(row, processor, model.config, **named)
        for question, (start, _) in zip(row.questions(), example.answers, strict=True):
            inputs = read_inputs(model, processor, question.messages, question.images, options)
            assert inputs.input_ids == list(example.input_ids[:start])


SAMPLES = [" ", "\n", "\t", "é", "e\u0301", "🐼", "👩\u200d👧", "<", ">", "|", "中", "\u200b"]
TEXTS = st.lists(
    st.one_of(st.sampled_from(SAMPLES), st.characters(codec="utf-8")), max_size=12
).map("".join)
CONTROLS = st.sampled_from(
    ["<|im_end|>", "<|im_start|>assistant\n", "<image>", "<|endoftext|>", "</s>", "\n\n", "  "]
)
SPOKEN = st.lists(st.one_of(TEXTS, CONTROLS), max_size=4).map("".join)
ANSWERS = SPOKEN.filter(str.strip)
QUESTIONS = st.lists(
    st.one_of(SPOKEN.map(lambda text: {"type": "text", "text": text}), st.just({"type": "image"})),
    max_size=4,
)
CONVERSATIONS = st.tuples(
    st.one_of(st.none(), SPOKEN), st.lists(st.tuples(QUESTIONS, ANSWERS), min_size=1, max_size=4)
)


def conversation(system: str | None, pairs: list[tuple[list[dict[str, Any]], str]]) -> Row:
    messages = [] if system is None else [{"role": "system", "content": system}]
    for question, answer in pairs:
        messages += [user(question), assistant(answer)]
    parts = [part for question, _ in pairs for part in question]
    return row_of(*messages, images=sum(part["type"] == "image" for part in parts))


@settings(max_examples=150, deadline=None)
@given(CONVERSATIONS)
def test_random_conversations_supervise_exactly_their_answers(drawn: Any) -> None:
    row = conversation(*drawn)
    example = build(row)
    assert answers_of(example) == said(row)
    exact = True
    for (start, _), prompt, answer in zip(example.answers, prompts(row), said(row), strict=True):
        prefix = list(example.input_ids[:start])
        # Before an answer that begins with space, a prompt for the turns after it merges that
        # space with the newline before; a conversation that goes on, as `Chat`, does not.
        assert prefix == prompt if exact else decode(prefix) == decode(prompt)
        exact = exact and not answer[0].isspace()
    places = [n for n, i in enumerate(example.input_ids) if i == CONFIG.image_token_index]
    assert len(places) == PLACES * len(row.images) == example.num_visual


def decode(ids: list[int]) -> str:
    return TOKENIZER.decode(ids, skip_special_tokens=False)


TRIMMING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def with_template(template: str | None) -> Any:
    processor = load_processor(NANO)
    processor.tokenizer.chat_template = template
    return processor


@pytest.mark.parametrize("template", [TRIMMING, None])
def test_other_templates_supervise_the_same(template: str | None) -> None:
    processor = with_template(template)
    row = row_of(user("<image>\nWho? "), assistant("  Pandas. "), user("Sure?"), assistant("Yes."))
    example = build_example(replace(row, images=[PANDA]), processor, CONFIG)
    assert answers_of(example, processor.tokenizer) == said(row)


@pytest.mark.parametrize("mode", CONV_MODES)
def test_every_conversation_mode_ends_its_answers(mode: str) -> None:
    row = row_of(user("<image>\nWho?"), assistant("Pandas."), user("Sure?"), assistant("Yes."))
    row = replace(row, images=[PANDA])
    example = build(row, conv_mode=mode)
    end = CONV_MODES[mode].assistant[1]
    end = "<|im_end|>" if end.startswith("<|im_end|>") else end
    space = " " * mode.endswith("v1")
    assert answers_of(example) == [f"{space}Pandas.{end}", f"{space}Yes.{end}"]
    assert list(example.input_ids[: example.answers[0].start]) == prompts(row, conv_mode=mode)[0]


def test_a_template_that_leaves_answers_out_is_refused() -> None:
    hiding = "{% for m in messages %}{{ m.content if loop.first }}{% endfor %}"
    row = row_of(user("Who?"), assistant("Pandas."))
    # `render_turns` takes ChatML instead where a template shows nothing.
    example = build_example(row, with_template(hiding), CONFIG)
    assert answers_of(example) == ["Pandas.<|im_end|>"]
    endless = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match="row 3: the chat template does not end") as error:
        build_example(row, with_template(endless), CONFIG)
    one_sentence(error)


def test_what_follows_the_last_answer_is_left_out() -> None:
    row = row_of(user("Who?"), assistant("Pandas."))
    longer = row_of(*row.messages, user("<image>\nAnd now?"), images=1)
    assert build(longer).input_ids == build(row).input_ids
    assert build(longer).images == ()


def test_rows_without_an_answer_are_counted_and_left_out() -> None:
    silent, good = row_of(user("Who?")), row_of(user("Who?"), assistant("Me."))
    found = collect_examples([silent, good], PROCESSOR, CONFIG)
    assert [str(row) for row in found.silent] == ["data.json, row 3: no token of it is supervised."]
    assert len(found.kept) == 1 and not found.bad
    with pytest.raises(ValueError, match=r"None of the 1 row\(s\) has a token to learn") as error:
        build_examples([silent], PROCESSOR, CONFIG)
    one_sentence(error)


# Lengths


def long_row(images: int) -> Row:
    messages = []
    for n in range(images):
        messages += [user(f"<image>\nQuestion {n}?"), assistant(f"Answer {n}.")]
    return row_of(*messages, images=images)


def test_rows_that_are_too_long_are_named() -> None:
    rows = [long_row(1), long_row(4)]
    length = len(build(rows[1]))
    with pytest.raises(BadRows, match=f"row 3: it has {length} tokens, more than 100") as error:
        build_examples(rows, PROCESSOR, CONFIG, max_length=100)
    one_sentence(error)
    found = build_examples(rows, PROCESSOR, CONFIG, max_length=100, too_long="skip")
    assert len(found.kept) == len(found.skipped) == 1
    assert not build_examples(rows, PROCESSOR, CONFIG, max_length=length).skipped
    for wrong, said in (
        ({"too_long": "drop"}, "too_long must be error, skip, truncate, found 'drop'"),
        ({"max_length": 10**6}, "at most 4096"),
        ({"max_length": 1}, "from 2"),
    ):
        with pytest.raises(ValueError, match=said):
            build_examples(rows, PROCESSOR, CONFIG, **wrong)


def test_no_cut_goes_through_an_image() -> None:
    whole = build(long_row(4))
    for limit in range(2, len(whole) + 2):
        cut = cut_example(whole, limit)
        assert len(cut) <= limit
        assert cut.input_ids == whole.input_ids[: len(cut)]
        assert cut.input_ids.count(CONFIG.image_token_index) == PLACES * len(cut.images)
        assert cut.images == whole.images[: len(cut.images)]
        assert cut.supervised == [*whole.supervised[: len(cut)]]
        if cut.answers:  # nothing behind the last supervised token costs anything
            assert cut.answers[-1].stop == len(cut)
            lost = whole.supervised[len(cut) : limit]
            inside = any(i.start < limit < i.start + i.tokens for i in whole.images)
            assert inside or not any(lost)
    found = build_examples([long_row(4)], PROCESSOR, CONFIG, max_length=100, too_long="truncate")
    assert len(found.cut) == 1 and len(found.kept[0]) <= 100


# Geometry


def test_no_weights_are_needed(tmp_path: Path) -> None:
    for file in NANO.iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            shutil.copy(file, tmp_path)
    found = build_example(long_row(2), load_processor(tmp_path), load_config(tmp_path))
    assert found.input_ids == build(long_row(2)).input_ids


PINPOINTS = [[128, 64], [64, 128], [128, 128], [192, 64]]
TILED = {"image_aspect_ratio": "anyres", "image_grid_pinpoints": PINPOINTS, "mm_hidden_size": 64}
TILED |= {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TILED |= {"num_key_value_heads": 2, "intermediate_size": 32, "vocab_size": 100}


@pytest.mark.parametrize("merge", ["flat", "spatial", "spatial_unpad"])
def test_tiles_are_counted_as_the_model_makes_them(merge: str) -> None:
    model = random_model(0, **TILED, mm_patch_merge_type=merge)
    processor = fv.Processor(TOKENIZER, 64, "anyres", PINPOINTS)
    wide = mx.zeros((70, 300, 3), mx.uint8)
    for source in (PANDA, PENGUINS, wide):
        row = Row("id", [user("<image>\nWho?"), assistant("Me.")], [source], "row 1")
        example = build_example(row, processor, model.config)
        ((pixels, size),) = processor.preprocess_each([source])
        (tokens,) = model.encode_images([pixels], [size])
        assert example.num_visual == len(tokens)


def test_an_image_size_that_does_not_fit_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"data.json, row 3: image_size must be a multiple"
    ) as error:
        build(long_row(1), image_size=100)
    one_sentence(error)


def test_an_image_that_can_not_be_read_is_named_with_its_row(tmp_path: Path) -> None:
    processor = fv.Processor(TOKENIZER, 64, "anyres", PINPOINTS)
    config = random_model(0, **TILED).config
    row = replace(row_of(user("<image>"), assistant("x")), images=[tmp_path / "none.png"])
    found = collect_examples([row], processor, config)
    assert "no such file" in found.bad[0].problem and found.bad[0].where == row.where
