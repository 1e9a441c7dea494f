import gc
from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import PANDA, PENGUINS, Nano, interrupt, random_model

from fastvlm_mlx.checkpoint.load import load_processor
from fastvlm_mlx.generation.chat import Chat
from fastvlm_mlx.generation.generate import generate, stream_generate
from fastvlm_mlx.hub.resolve import NANO
from fastvlm_mlx.model.fastvlm import FastVLM
from fastvlm_mlx.model.kv_cache import KVCache
from fastvlm_mlx.model.qwen2 import Block, Qwen2
from fastvlm_mlx.model.vision import FastViTHD
from fastvlm_mlx.processor import Processor

ASK = "Describe the image."
QUESTIONS = ["How many penguins are there?", "What is in the image?", "Read the text.", ASK]

tokenizer = load_processor(NANO).tokenizer


# Two layers that answer nonsense, half characters included: quick, and hard to repeat.
noise = (
    random_model(
        1,
        hidden_size=64,
        num_hidden_layers=2,
        intermediate_size=96,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=768,
        tie_word_embeddings=False,
    ),
    Processor(tokenizer, image_size=64, max_length=2048),
)
pixels = [mx.random.uniform(shape=(64, 64, 3)) for _ in range(3)]


class Stateless:
    """What a `Chat` must answer: each turn is generated from the whole conversation."""

    def __init__(self, model: FastVLM, processor: Processor, **options: Any):
        self.model, self.processor, self.options = model, processor, options
        self.turns: list[dict[str, str]] = []
        self.images: list[Any] = []

    def ask(self, prompt: str, image: Any = None, read: int | None = None) -> str:
        """The answer, or as much of it as `read` responses hold."""
        images = [] if image is None else image if isinstance(image, list) else [image]
        marks = "" if "<image>" in prompt else "<image>\n" * len(images)
        self.turns.append({"role": "user", "content": marks + prompt})
        self.images += images
        responses = stream_generate(
            self.model, self.processor, self.turns, image=self.images, **self.options
        )
        answer = "".join(
            response.text for n, response in enumerate(responses) if read is None or n < read
        )
        self.turns.append({"role": "assistant", "content": answer})
        return answer


# Turns


@pytest.mark.parametrize(
    "options",
    [{}, {"kv_bits": 8}, {"max_kv_size": 512}, {"repetition_penalty": 1.3, "stop": ["a", "6"]}],
    ids=str,
)
def test_turns_equal_stateless_answers(options: dict, nano: Nano) -> None:
    options = {"image_size": 64, "max_tokens": 8, **options}
    chat, stateless = Chat(*nano, **options), Stateless(*nano, **options)
    for i, question in enumerate(QUESTIONS[:3]):
        image = PENGUINS if i == 0 else None
        assert chat.ask(question, image=image) == stateless.ask(question, image)
        assert chat.messages == stateless.turns


def test_an_image_of_full_size(nano: Nano) -> None:
    chat, stateless = Chat(*nano), Stateless(*nano)
    assert chat.ask(ASK, image=PENGUINS) == stateless.ask(ASK, PENGUINS)
    assert chat.messages[-1]["content"] == "The image shows 6 penguins."
    answer = chat.ask("How many penguins are there?")
    assert answer == stateless.ask("How many penguins are there?") and "6" in answer


def test_images_in_later_turns() -> None:
    chat, stateless = Chat(*noise, max_tokens=8), Stateless(*noise, max_tokens=8)
    for prompt, image in (
        ("Hi", None),
        ("See", pixels[0]),
        ("And", None),
        ("Both", [pixels[1], pixels[2]]),
        ("Between <image> words", pixels[0]),
        ("Which?", None),
    ):
        assert chat.ask(prompt, image=image) == stateless.ask(prompt, image)
        assert chat.messages == stateless.turns


def test_options_of_one_turn(nano: Nano) -> None:
    chat = Chat(*nano, max_tokens=3)
    first, second = (
        list(chat.ask("Hi", stream=True, **options)) for options in ({}, {"max_tokens": 1})
    )
    assert (len(first), len(second)) == (3, 1)
    assert len(list(chat.ask("Hi", stream=True))) == 3


def test_changing_the_kind_of_cache() -> None:
    chat, stateless = Chat(*noise, max_tokens=6), Stateless(*noise, max_tokens=6)
    for options in ({}, {"kv_bits": 8}, {"kv_bits": 8}, {"max_kv_size": 1000}, {}, {"kv_bits": 4}):
        stateless.options = {"max_tokens": 6, **options}
        assert chat.ask("Go on", **options) == stateless.ask("Go on")


def test_system_prompt(nano: Nano) -> None:
    options = {"system": "Hi.", "max_tokens": 5}
    chat, stateless = Chat(*nano, **options), Stateless(*nano, **options)
    for question in QUESTIONS[:2]:
        (response, *_) = chat.ask(question, stream=True)
        stateless.ask(question)
        plain = next(stream_generate(*nano, stateless.turns[:-1], max_tokens=1)).prompt_tokens
        assert response.prompt_tokens < plain
        assert chat.messages == stateless.turns


def test_sampling_repeats_with_a_seed() -> None:
    def talk(seed: int) -> list[str]:
        chat = Chat(*noise, temperature=1.0, seed=seed, max_tokens=5)
        return [chat.ask("Hi"), chat.ask("Go on")]

    assert talk(1) == talk(1) != talk(2)


def test_stream(nano: Nano) -> None:
    chat = Chat(*nano, image_size=64)
    expected = generate(*nano, ASK, image=PENGUINS, image_size=64)
    responses = list(chat.ask(ASK, image=PENGUINS, stream=True))
    assert (
        "".join(response.text for response in responses) == expected == chat.messages[-1]["content"]
    )
    assert responses[-1].finish_reason == "stop"
    (second, *_) = chat.ask(ASK, stream=True)
    assert second.prompt_tokens > responses[-1].prompt_tokens + responses[-1].generation_tokens
    assert second.ttft == pytest.approx(
        second.preprocess_time + second.encode_time + second.prefill_time
    )


def test_reset() -> None:
    chat = Chat(*noise, max_tokens=6)
    first = chat.ask("Hi", image=pixels[0])
    chat.ask("Go on")
    chat.reset()
    assert chat.messages == []
    assert chat.ask("Hi", image=pixels[0]) == first
    chat.reset()
    assert chat.ask("Hi") == generate(*noise, "Hi", max_tokens=6)


def test_a_question_taken_back_and_asked_again() -> None:
    chat = Chat(*noise, max_tokens=6)
    chat.ask("See", image=pixels[0])
    answer = chat.ask("Go on")
    for _ in range(2):
        del chat.messages[-2:]
        assert chat.ask("Go on") == answer


# What is computed


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """Positions of each run of the decoder, and images of each run of the encoder."""
    counts: dict[str, list[int]] = {"positions": [], "images": []}
    hidden_states, encode = Qwen2.hidden_states, FastViTHD.__call__

    def count_positions(self: Qwen2, ids: Any, cache: Any = None, embeddings: Any = None) -> Any:
        counts["positions"].append((ids if embeddings is None else embeddings).shape[1])
        return hidden_states(self, ids, cache, embeddings)

    def count_images(self: FastViTHD, pixel_values: mx.array) -> mx.array:
        counts["images"].append(len(pixel_values))
        return encode(self, pixel_values)

    monkeypatch.setattr(Qwen2, "hidden_states", count_positions)
    monkeypatch.setattr(FastViTHD, "__call__", count_images)
    return counts


@pytest.mark.parametrize("options", [{}, {"kv_bits": 8}, {"max_kv_size": 512}], ids=str)
def test_only_what_is_new_is_computed(options: dict, nano: Nano, counts: dict) -> None:
    chat = Chat(*nano, image_size=64, **options)
    first = list(chat.ask(ASK, image=PENGUINS, stream=True))[-1]
    assert first.finish_reason == "stop"
    assert counts["positions"][0] == first.prompt_tokens
    assert counts["images"] == [1]
    for question in QUESTIONS[:2]:
        counts["positions"].clear()
        last = list(chat.ask(question, stream=True))[-1]
        # The prompt and the answer, with the token that ended it, are known.
        known = first.prompt_tokens + first.generation_tokens
        prefill, *steps = counts["positions"]
        assert prefill == last.prompt_tokens - known
        assert set(steps) == {1} and abs(len(steps) - last.generation_tokens) <= 1
        first = last
    assert counts["images"] == [1]
    chat.ask(ASK, image=[PANDA, PENGUINS])
    assert counts["images"] == [1, 1, 1]


def test_an_answer_cut_short_is_computed_again_only_from_there(nano: Nano, counts: dict) -> None:
    chat = Chat(*nano, image_size=64)
    responses = list(chat.ask(ASK, image=PENGUINS, stream=True, max_tokens=4))
    counts["positions"].clear()
    (last, *_) = chat.ask("Go on", stream=True, max_tokens=1)
    # The last token was given, but not run through the decoder.
    assert counts["positions"] == [last.prompt_tokens - responses[-1].prompt_tokens - 3]


def test_stop_texts_leave_the_cache_useful(nano: Nano, counts: dict) -> None:
    chat = Chat(*nano, image_size=64)
    answer = chat.ask(ASK, image=PENGUINS, stop=["shows"])
    assert answer == "The image "
    counts["positions"].clear()
    chat.ask("Go on", max_tokens=1)
    assert sum(counts["positions"]) < 25


def test_prefill_steps_of_a_long_turn(counts: dict) -> None:
    chat = Chat(*noise, max_tokens=1, prefill_step_size=7)
    (first,) = chat.ask("Hello " * 10, stream=True)
    assert set(counts["positions"][:-1]) == {7} and sum(counts["positions"]) == first.prompt_tokens


# Answers that are not read to their end


@pytest.mark.parametrize("read", [1, 2, 5])
def test_closed_streams(read: int) -> None:
    chat, stateless = Chat(*noise, max_tokens=8), Stateless(*noise, max_tokens=8)
    for prompt, image in (("See", pixels[0]), ("Go on", None), ("And", pixels[1])):
        stream = chat.ask(prompt, image=image, stream=True)
        answer = "".join(next(stream).text for _ in range(read))
        stream.close()
        assert answer == stateless.ask(prompt, image, read)
        assert chat.messages == stateless.turns
        assert chat.ask("Then") == stateless.ask("Then")


def test_a_stream_closed_unread_was_asked() -> None:
    chat, stateless = Chat(*noise, max_tokens=8), Stateless(*noise, max_tokens=8)
    chat.ask("See", image=pixels[0])
    stateless.ask("See", pixels[0])
    for options in ({}, {"kv_bits": 8}, {"max_kv_size": 16}, {"max_kv_size": 16}):
        stateless.options = {"max_tokens": 8, **options}
        chat.ask("Unread", image=pixels[1], stream=True, **options).close()
        chat.stop()
        assert stateless.ask("Unread", pixels[1], read=0) == ""
        assert chat.messages == stateless.turns
        assert chat.ask("Then", **options) == stateless.ask("Then")


def test_a_stream_left_open_ends_with_the_next_question() -> None:
    chat, stateless = Chat(*noise, max_tokens=8), Stateless(*noise, max_tokens=8)
    left = chat.ask("See", image=pixels[0], stream=True)
    first = next(left).text + next(left).text
    assert stateless.ask("See", pixels[0], read=2) == first
    assert chat.ask("Then") == stateless.ask("Then")
    assert list(left) == []
    del left
    gc.collect()
    assert chat.messages == stateless.turns
    assert chat.ask("And") == stateless.ask("And")


def test_a_stream_left_open_ends_with_reset() -> None:
    chat = Chat(*noise, max_tokens=8)
    left = chat.ask("See", image=pixels[0], stream=True)
    next(left)
    chat.reset()
    assert list(left) == [] and chat.messages == []
    assert chat.ask("Hi") == generate(*noise, "Hi", max_tokens=8)


actions = st.lists(
    st.tuples(st.just("ask"), st.sampled_from(["Hi", "Go on <", "é漢 "]), st.integers(0, 2))
    | st.tuples(st.just("leave"), st.integers(0, 4), st.booleans())
    | st.just(("reset",)),
    min_size=1,
    max_size=4,
)


@settings(max_examples=15, deadline=None)
@given(actions=actions)
def test_any_conversation_equals_stateless_answers(actions: list[tuple]) -> None:
    chat, stateless = Chat(*noise, max_tokens=4), Stateless(*noise, max_tokens=4)
    for kind, *arguments in actions:
        if kind == "ask":
            prompt, count = arguments
            images = pixels[:count]
            assert chat.ask(prompt, image=images) == stateless.ask(prompt, images)
        elif kind == "leave":
            read, closed = arguments
            stream = chat.ask("Leave", image=pixels[2], stream=True)
            for _ in range(read):
                next(stream)
            stateless.ask("Leave", pixels[2], read)
            if closed:
                stream.close()
        else:
            chat.reset()
            stateless = Stateless(*noise, max_tokens=4)
    assert chat.ask("Last") == stateless.ask("Last")
    assert chat.messages == stateless.turns


# Errors and interrupts


@pytest.mark.parametrize(
    "kind, prompt, image, options",
    [
        (FileNotFoundError, "See", "nothing.png", {}),
        (ValueError, "See", b"no image", {}),
        (ValueError, "See", [pixels[1], b"no image"], {}),
        (ValueError, "<image> and <image>", pixels[1], {}),
        (ValueError, "<image>", None, {}),
        (ValueError, "long " * 3000, pixels[1], {}),
        (ValueError, "See", pixels[1], {"max_tokens": 0}),
        (ValueError, 5, None, {}),
        (ValueError, None, pixels[1], {}),
    ],
    ids=["file", "bytes", "second", "marks", "mark", "long", "option", "number", "none"],
)
def test_an_error_leaves_the_conversation(
    kind: type, prompt: Any, image: Any, options: dict
) -> None:
    chat, stateless = Chat(*noise, max_tokens=6), Stateless(*noise, max_tokens=6)
    for question, shown in (("Hi", None), ("See", pixels[0]), ("Go on", None)):
        for stream in (False, True):
            with pytest.raises(kind):
                chat.ask(prompt, image=image, stream=stream, **options)
            assert chat.messages == stateless.turns
        assert chat.ask(question, image=shown) == stateless.ask(question, shown)


def test_a_conversation_that_is_full() -> None:
    model, processor = noise
    tight = replace(processor, max_length=60)
    chat, stateless = Chat(model, tight, max_tokens=8), Stateless(model, tight, max_tokens=8)
    with pytest.raises(ValueError, match="limit is 60"):
        for _ in range(9):
            assert chat.ask("Hi") == stateless.ask("Hi")
    turns = list(chat.messages)
    with pytest.raises(ValueError, match="limit is 60"):
        chat.ask("Hi")
    assert chat.messages == turns
    chat.reset()
    assert chat.ask("Hi") == generate(model, tight, "Hi", max_tokens=8)


@pytest.mark.parametrize("options", [{"max_tokens": 0}, {"top_p": 2}, {"kv_bits": 5}], ids=str)
def test_bad_options_of_the_chat(options: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Chat(*noise, **options)


@pytest.mark.parametrize(
    "target, name, calls", [(Block, "__call__", 2), (KVCache, "_make_room", 2)]
)
@pytest.mark.parametrize("stream", [False, True])
def test_an_interrupt_amid_the_layers(target: type, name: str, calls: int, stream: bool) -> None:
    """Wherever Ctrl-C comes, the next answer fits what the conversation then holds."""
    answers = set()
    for call in range(3 * calls):  # while it reads the prompt, and two tokens after it
        chat = Chat(*noise, max_tokens=3)
        chat.ask("See", image=pixels[0])
        with pytest.MonkeyPatch.context() as patch:
            interrupt(target, name, call, patch)
            with pytest.raises(KeyboardInterrupt):
                "".join(
                    response.text for response in chat.ask("Go on", stream=True)
                ) if stream else (chat.ask("Go on"))
        assert [turn["content"] for turn in chat.messages[2::2]] == ["Go on"]
        answers.add(chat.messages[3]["content"])
        turns = [*chat.messages, {"role": "user", "content": "Then"}]
        expected = generate(*noise, turns, image=[pixels[0]], max_tokens=3)
        assert chat.ask("Then") == expected, call
    assert len(answers) > 1  # some interrupts came after the first token


def test_an_interrupt_in_the_first_turn(nano: Nano, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = Chat(*nano, image_size=64)
    with monkeypatch.context() as patch:
        interrupt(Block, "__call__", 2, patch)
        with pytest.raises(KeyboardInterrupt):
            chat.ask(ASK, image=PENGUINS)
    turns = [*chat.messages, {"role": "user", "content": ASK}]
    assert chat.ask(ASK) == generate(*nano, turns, image=PENGUINS, image_size=64)


def test_a_wrapped_cache_keeps_answering() -> None:
    options = {"max_kv_size": 40, "max_tokens": 8}
    chat = Chat(*noise, **options)
    for turn in range(6):
        answer = chat.ask("Go on", image=pixels[0] if turn == 1 else None)
        assert chat.messages[-1]["content"] == answer
        stream = chat.ask("And", stream=True)
        next(stream)
        stream.close()
    assert len(chat.messages) == 24
    # What was closed can't be trimmed from a cache that wrapped, so all is computed anew.
    turns = [*chat.messages, {"role": "user", "content": "Then"}]
    assert chat.ask("Then") == generate(*noise, turns, image=[pixels[0]], **options)


@pytest.mark.parametrize("options", [{"prompt_lookup": 2}, {"num_beams": 2}], ids=str)
def test_a_conversation_refuses_by_name_what_it_can_not_take(options: dict, nano: Nano) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=f"{name} does not go with a conversation; leave it out"):
        Chat(*nano, **options)
    with pytest.raises(ValueError, match=f"{name} does not go with a conversation; leave it out"):
        Chat(*nano).ask("Hi", **options)
