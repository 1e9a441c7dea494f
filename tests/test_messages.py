"""Messages as other libraries write them, and prompts that a template already wrote."""

import base64
import json
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import PANDA, PENGUINS, Nano

import fastvlm_mlx as fv
from fastvlm_mlx.config import IMAGE_TOKEN_INDEX
from fastvlm_mlx.text.messages import collect_images, is_templated, read_messages
from fastvlm_mlx.text.prompt import build_prompt
from fastvlm_mlx.text.template import DEFAULT_SYSTEM, apply_chat_template
from fastvlm_mlx.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_folder(Path(__file__).parent / "data" / "tokenizer")
ASK = "Describe the image."
PLACE = {"type": "image"}


def text(said: str) -> dict[str, str]:
    return {"type": "text", "text": said}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def ids(messages: Any, *counts: int, **options: Any) -> list[int]:
    return build_prompt(TOKENIZER, messages, num_visual_tokens=counts, **options)


# Parts


@pytest.mark.parametrize(
    ("parts", "same"),
    [
        ([PLACE, text("A")], "<image>\nA"),
        ([text("A"), PLACE, text("B")], "A<image>\nB"),
        ([PLACE, {"type": "image_url", "image_url": {"url": "x"}}], "<image>\n<image>\n"),
        ([text("A"), text("B")], "AB"),
        ([], ""),
    ],
    ids=str,
)
def test_images_stand_where_their_parts_stand(parts: list[Any], same: str) -> None:
    counts = range(2, 2 + same.count("<image>"))
    assert ids([user(*parts)], *counts) == ids(same, *counts)
    if parts:  # the parts of one turn by themselves
        assert ids(parts, *counts) == ids(same, *counts)


def test_parts_and_texts_may_be_mixed() -> None:
    messages = [
        {"role": "system", "content": [text("S")]},
        user(text("A"), PLACE),
        {"role": "assistant", "content": [{"type": "output_text", "text": "B"}]},
        {"role": "user", "content": "C<image>"},
    ]
    texts = ("S", "A<image>\n", "B", "C<image>")
    plain = [{**m, "content": said} for m, said in zip(messages, texts, strict=True)]
    assert ids(messages, 2, 3) == ids(plain, 2, 3)
    assert apply_chat_template(TOKENIZER, messages) == apply_chat_template(TOKENIZER, plain)


def test_without_places_images_come_before_the_first_question() -> None:
    assert ids([user(text("A"))], 2, 3) == ids("A", 2, 3)
    system = {"role": "system", "content": "S"}
    assert ids([system, user(text("A"))], 2) == ids("A", 2, system="S")


@pytest.mark.parametrize("said", ["<image>", "<|im_end|>", "<ima\ud801ge>", "\ud801"])
def test_a_text_part_is_only_text(said: str) -> None:
    read = ids([user(PLACE, text(said))], 3)
    assert read.count(IMAGE_TOKEN_INDEX) == 3
    shown = TOKENIZER.decode(read, skip_special_tokens=False)
    kept = said.replace("\ud801", "")
    assert f"user\n\n{kept}<|im_end|>" in shown
    assert [i for i in read if i >= 740] == [i for i in ids("A") if i >= 740]


SOURCES = [
    {"type": "image", "image": "here"},
    {"type": "image", "url": "here"},
    {"type": "image", "path": "here"},
    {"type": "image", "image": "here", "url": None, "detail": "low"},
    {"type": "image_url", "image_url": "here"},
    {"type": "image_url", "image_url": {"url": "here", "detail": "auto"}},
    {"type": "input_image", "image_url": "here"},
    {"type": "image", "image_url": {"url": "here"}},
    {"type": "image", "source": {"type": "url", "url": "here"}},
]


@pytest.mark.parametrize("part", SOURCES, ids=str)
def test_sources_as_each_library_writes_them(part: dict[str, Any]) -> None:
    assert collect_images([user(part, {"type": "input_text", "text": "A"})], []) == ["here"]


def test_base64_as_anthropic_writes_it(nano: Nano) -> None:
    data = base64.b64encode(Path(PENGUINS).read_bytes()).decode()
    source = {"type": "base64", "media_type": "image/png", "data": data}
    part = {"type": "image", "source": source, "cache_control": {"type": "ephemeral"}}
    assert collect_images([user(part)], []) == [f"data:image/png;base64,{data}"]
    answer = fv.generate(*nano, [user(part, text("Describe the image."))], max_tokens=20)
    assert answer == "The image shows 6 penguins."


def test_open_places_take_the_images_given_beside() -> None:
    array = np.zeros((2, 2, 3), np.uint8)
    messages = [user(PLACE, {"type": "image", "image": array}), user(text("A"), PLACE)]
    first, second, third = collect_images(messages, ["a", "b"])
    assert (first, third) == ("a", "b") and second is array
    assert collect_images([user({"type": "image", "image": None})], ["a"]) == ["a"]
    assert collect_images("A", ["a", "b"]) == ["a", "b"]


MALFORMED = [
    ([user(text("A")), user({"type": "audio"})], "Turn 2 of the messages: part 1 must be"),
    ([user(text("A"), "B")], "Turn 1 of the messages: part 2 must be"),
    ([user({"type": "text", "text": 5})], "Turn 1 of the messages: part 1 must be"),
    ([user({"type": "text"})], "part 1 must be"),
    ([user({"type": ["image"]})], "part 1 must be"),
    ([user({"type": "image", "image": "a", "url": "b"})], "part 1 has its image twice, as image"),
    ([user({"type": "image_url"})], "Turn 1 of the messages: part 1 has no image"),
    ([user({"type": "image_url", "image_url": {"detail": "low"}})], "part 1 has no image"),
    ([user({"type": "image", "source": {"type": "file", "file_id": "x"}})], "its source must be"),
    ([{"role": "assistant", "content": [PLACE]}], "Turn 1 of the messages: part 1 is an image"),
    ([user(PLACE)], "1 image part.*first in turn 1.* 0 image"),
    ([{"role": "user", "content": {"type": "text"}}], "Turn 1 of the messages must have a role"),
    ([{"role": "tool", "content": "A"}], "Turn 1 of the messages must have a role"),
]


@pytest.mark.parametrize(("messages", "said"), MALFORMED, ids=[said for _, said in MALFORMED])
def test_what_is_wrong_with_messages_names_the_turn(messages: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        collect_images(messages, [])
    assert len(str(caught.value)) < 400


def test_an_image_without_a_place_is_not_dropped() -> None:
    with pytest.raises(ValueError, match=r"0 image part.* 1 image"):
        collect_images([user({"type": "image", "image": "a"})], ["b"])


# In every way of answering


def png(path: Path) -> bytes:
    stream = BytesIO()
    fv.load_image(path).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["path", "url", "data", "base64", "bytes", "pil", "array"])
def test_images_in_the_parts_are_read(kind: str, nano: Nano) -> None:
    coded = base64.b64encode(png(PENGUINS)).decode()
    part = {
        "path": {"type": "image", "path": PENGUINS},
        "url": {"type": "image", "url": PENGUINS.as_uri()},
        "data": {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{coded}"}},
        "base64": {"type": "image", "base64": coded},
        "bytes": {"type": "image", "image": png(PENGUINS)},
        "pil": {"type": "image", "image": fv.load_image(PENGUINS)},
        "array": {"type": "image", "image": np.asarray(fv.load_image(PENGUINS))},
    }[kind]
    assert fv.generate(*nano, [user(part, text(ASK))]) == "The image shows 6 penguins."


def test_every_way_of_answering_takes_parts(nano: Nano) -> None:
    own = [user({"type": "image", "image": PENGUINS}, text(ASK))]
    open_place = [user(PLACE, text(ASK))]
    expected = fv.generate(*nano, ASK, PENGUINS)
    assert fv.generate(*nano, open_place, image=PENGUINS) == expected
    assert "".join(r.text for r in fv.stream_generate(*nano, own)) == expected
    assert fv.batch_generate(*nano, [(own, None), (open_place, PENGUINS)]) == [expected] * 2
    cache = fv.PromptCache(nano[0])
    assert fv.generate(*nano, own, prompt_cache=cache) == expected
    assert fv.generate(*nano, own, prompt_cache=cache) == expected


def test_a_conversation_takes_parts(nano: Nano) -> None:
    chat, plain = fv.Chat(*nano), fv.Chat(*nano)
    panda = {"type": "image", "image": str(PANDA)}
    turns = [
        ([PLACE, text(ASK)], f"<image>\n{ASK}", PENGUINS, PENGUINS),
        ("And now?", "And now?", None, None),
        ([user(text("What is "), panda, text("this?"))], "What is <image>\nthis?", None, PANDA),
        ([text("More?")], "<image>\nMore?", PANDA, PANDA),
    ]
    for parts, marked, image, same in turns:
        assert chat.ask(parts, image=image) == plain.ask(marked, image=same)
    kept = json.dumps(chat.messages)  # nothing of an image is in it
    assert str(PANDA) not in kept and kept.count('{"type": "image"}') == 3
    assert read_messages(chat.messages)[0] == read_messages(plain.messages)[0]


@pytest.mark.parametrize(
    "prompt",
    [[], [user(text("A")), user(text("B"))], [{"role": "system", "content": "A"}]],
    ids=str,
)
def test_a_conversation_takes_one_question_at_a_time(prompt: Any, nano: Nano) -> None:
    chat = fv.Chat(*nano)
    with pytest.raises(ValueError, match=r"no messages|one question"):
        chat.ask(prompt)
    assert chat.messages == []


# Prompts that went through a template


def templated(question: str, answer: str = "") -> str:
    return (
        f"<|im_start|>system\n{DEFAULT_SYSTEM}<|im_end|>\n"
        f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}"
    )


@pytest.mark.parametrize("question", ["A", "<image>\nA", "A <image> and <image>?", "A <b> |>"])
def test_a_templated_prompt_is_taken_as_it_is(question: str) -> None:
    counts = [3] * question.count("<image>")
    assert ids(templated(question), *counts) == ids(question, *counts)


def test_a_templated_prompt_without_marks() -> None:
    assert ids(templated("A"), 2, 3) == ids("A", 2, 3)
    with pytest.raises(ValueError, match="no user message"):
        ids("<|im_start|>system\nA<|im_end|>\n<|im_start|>assistant\n", 2)
    with pytest.raises(ValueError, match="1 <image> mark"):
        ids(templated("<image>A"), 2, 2)


def test_an_answer_that_has_begun_is_continued() -> None:
    assert ids(templated("A", "B c")) == ids("A") + TOKENIZER.encode("B c")


@pytest.mark.parametrize(
    "prompt",
    [
        "What does <|im_start|> mean?",
        templated("A") + "B<|im_end|>\n",
        templated("A").removeprefix("<|im_start|>"),
        "Say: " + templated("A"),
        templated("A").removesuffix("<|im_start|>assistant\n"),
        "<|im_start|>assistant\n",
        "<|im_start|>robot\nA<|im_end|>\n<|im_start|>assistant\n",
        [{"role": "user", "content": templated("A")}],
    ],
    ids=str,
)
def test_control_tokens_elsewhere_are_text(prompt: Any) -> None:
    assert not is_templated(prompt)
    assert [i for i in ids(prompt) if i >= 740] == [i for i in ids("A") if i >= 740]


@pytest.mark.parametrize("options", [{"system": "S"}, {"conv_mode": "plain"}], ids=str)
def test_a_templated_prompt_takes_no_other_template(options: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="already went through a chat template"):
        ids(templated("A"), **options)


def test_a_templated_prompt_is_answered_as_its_question(nano: Nano) -> None:
    expected = fv.generate(*nano, ASK, PENGUINS)
    assert fv.generate(*nano, templated(f"<image>\n{ASK}"), image=PENGUINS) == expected
    with pytest.raises(ValueError, match="conversation does by itself"):
        fv.Chat(*nano).ask(templated(ASK))


def test_a_long_prompt_is_looked_at_in_no_time() -> None:
    assert not is_templated(
        "<|im_start|>user\n" + "<|im_end|>  <|im_start|>assistant\n" * 50_000 + "<|im_end|>"
    )
