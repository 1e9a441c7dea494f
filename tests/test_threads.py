"""Streams that one thread makes and another reads, and what threads may share."""

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from models import PANDA, PENGUINS

import fastvlm_mlx as fv
from fastvlm_mlx.generation.batch import stream_batch

Nano = tuple[fv.FastVLM, fv.Processor]
ASK = "Describe the image."
SMALL = {"image": PENGUINS, "image_size": 64, "max_tokens": 12}


def in_a_thread(work: Callable[[], Any]) -> Any:
    """What work gives, or raises, on a thread of its own."""
    found: list[Any] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            found.append(work())
        except BaseException as error:
            raised.append(error)
        mx.clear_streams()  # as the README asks of threads that end

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    assert not thread.is_alive(), "the thread hangs"
    if raised:
        raise raised[0]
    return found[0]


def read_by_turns(responses: Iterator[Any]) -> list[Any]:
    """All that an iterator gives, each piece taken by another thread."""
    end = object()
    pieces = []
    while (piece := in_a_thread(lambda: next(responses, end))) is not end:
        pieces.append(piece)
    return pieces


def keep(tokens: mx.array, logits: mx.array) -> mx.array:
    return logits + 0.0


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "text only": {"image": None},
    "sampled": {"temperature": 3.0, "seed": 7},
    "top_k": {"temperature": 3.0, "top_k": 5, "seed": 7},
    "penalty": {"repetition_penalty": 1.3},
    "processor": {"logits_processor": keep},
    "look-up": {"prompt_lookup": 3},
    "sampled look-up": {"prompt_lookup": 3, "temperature": 3.0, "seed": 7},
    "quantized cache": {"kv_bits": 8},
    "rotating cache": {"max_kv_size": 64},
    "beams": {"num_beams": 2},
    "steps": {"prefill_step_size": 7},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_any_thread_reads_the_next_piece(variant: str, nano: Nano) -> None:
    options = {**SMALL, **VARIANTS[variant]}
    expected = [r.token for r in fv.stream_generate(*nano, ASK, **options)]
    stream = in_a_thread(lambda: fv.stream_generate(*nano, ASK, **options))
    assert [r.token for r in read_by_turns(stream)] == expected


def test_any_thread_draws_on(nano: Nano) -> None:
    stream = in_a_thread(lambda: fv.stream_generate(*nano, ASK, temperature=1e-3, **SMALL))
    expected = [r.token for r in fv.stream_generate(*nano, ASK, **SMALL)]
    assert [r.token for r in read_by_turns(stream)] == expected


def test_any_thread_reads_what_a_draft_model_proposed(nano: Nano) -> None:
    options = {**SMALL, "draft_model": nano}
    expected = [r.token for r in fv.stream_generate(*nano, ASK, **SMALL)]
    stream = in_a_thread(lambda: fv.stream_generate(*nano, ASK, **options))
    assert [r.token for r in read_by_turns(stream)] == expected


def test_any_thread_reads_what_a_prompt_cache_began(nano: Nano) -> None:
    cache = fv.PromptCache(nano[0])
    expected = in_a_thread(lambda: fv.generate(*nano, ASK, prompt_cache=cache, **SMALL))
    stream = in_a_thread(lambda: fv.stream_generate(*nano, ASK, prompt_cache=cache, **SMALL))
    assert "".join(r.text for r in read_by_turns(stream)) == expected


def test_any_thread_reads_a_conversation(nano: Nano) -> None:
    questions = [(ASK, PENGUINS), (ASK, None), ("And this?", PANDA)]
    alone = fv.Chat(*nano, image_size=64, max_tokens=8)
    expected = [alone.ask(text, image=image) for text, image in questions]
    chat = in_a_thread(lambda: fv.Chat(*nano, image_size=64, max_tokens=8))
    for (text, image), answer in zip(questions, expected, strict=True):
        stream = in_a_thread(lambda t=text, i=image: chat.ask(t, image=i, stream=True))
        assert "".join(r.text for r in read_by_turns(stream)) == answer
    assert chat.messages == alone.messages


def test_any_thread_reads_a_batch(nano: Nano) -> None:
    requests = [(ASK, PENGUINS), ("Hello!", None), (ASK, PANDA)] * 2
    options = {"image_size": 64, "max_tokens": 6, "max_batch": 3}
    expected = fv.batch_generate(*nano, requests, **options)
    texts = [""] * len(requests)
    for i, response in read_by_turns(stream_batch(*nano, requests, **options)):
        texts[i] += response.text
    assert texts == expected


def at_once(works: list[Callable[[], Any]]) -> list[Any]:
    """What functions give that are called at the same time."""
    gate = threading.Barrier(len(works))
    found: list[Any] = [None] * len(works)

    def run(i: int) -> None:
        gate.wait()
        try:
            found[i] = works[i]()
        except Exception as error:
            found[i] = error
        mx.clear_streams()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a thread hangs"
    return found


def test_threads_share_a_model(nano: Nano) -> None:
    images = [PENGUINS, PANDA] * 2
    expected = [fv.generate(*nano, ASK, image=image) for image in images]
    works = [lambda image=image: fv.generate(*nano, ASK, image=image) for image in images]
    assert at_once(works) == expected


def test_threads_share_a_prompt_cache(nano: Nano) -> None:
    cache = fv.PromptCache(nano[0])
    images = [PENGUINS, PANDA] * 3
    expected = [fv.generate(*nano, ASK, image=image) for image in images]
    for _ in range(3):
        works = [
            lambda image=image: fv.generate(*nano, ASK, image=image, prompt_cache=cache)
            for image in images
        ]
        assert at_once(works) == expected


def test_threads_share_a_conversation_in_turns(nano: Nano) -> None:
    chat = fv.Chat(*nano, image_size=64, max_tokens=8)
    answers = at_once([lambda i=i: chat.ask(f"{ASK} {i}", image=PENGUINS) for i in range(4)])
    assert all(isinstance(answer, str) for answer in answers)
    asked = [m["content"][-1] for m in chat.messages if m["role"] == "user"]
    said = [m["content"] for m in chat.messages if m["role"] == "assistant"]
    assert sorted(asked) == ["0", "1", "2", "3"]
    assert [answers[int(i)] for i in asked] == said


def test_a_question_amid_another_threads_stream_is_refused(nano: Nano) -> None:
    chat = fv.Chat(*nano, image_size=64, max_tokens=8)
    stream = chat.ask(ASK, image=PENGUINS, stream=True)
    first = next(stream)
    with pytest.raises(RuntimeError, match="answering in another thread"):
        in_a_thread(lambda: chat.ask("And?"))
    text = first.text + "".join(r.text for r in stream)
    assert chat.messages[-1] == {"role": "assistant", "content": text}
    assert isinstance(in_a_thread(lambda: chat.ask("And?")), str)


def test_a_stream_of_a_thread_that_is_gone_gives_way(nano: Nano) -> None:
    chat = fv.Chat(*nano, image_size=64, max_tokens=8)

    def begin() -> str:
        stream = chat.ask(ASK, image=PENGUINS, stream=True)
        return next(stream).text + next(stream).text

    begun = in_a_thread(begin)
    chat.ask("And?")
    assert chat.messages[1] == {"role": "assistant", "content": begun}


def test_a_stream_that_nobody_reads_keeps_the_question(nano: Nano) -> None:
    chat = fv.Chat(*nano, image_size=64, max_tokens=8)
    chat.ask(ASK, image=PENGUINS, stream=True)
    chat.ask("What is this?")
    assert [m["role"] for m in chat.messages] == ["user", "assistant"] * 2
    assert chat.messages[0]["content"] == f"<image>\n{ASK}"
    assert chat.messages[1]["content"] == ""
    expected = fv.generate(*nano, chat.messages[:3], image=PENGUINS, image_size=64, max_tokens=8)
    assert chat.messages[3]["content"] == expected


def test_two_threads_in_one_batch_are_told(nano: Nano) -> None:
    batch = fv.generation.scheduler.Batch(*nano)
    entered, leave = threading.Event(), threading.Event()

    def wait(tokens: mx.array, logits: mx.array) -> mx.array:
        entered.set()
        leave.wait(30)
        return logits

    batch.insert("Hello!", max_tokens=1, logits_processor=wait)
    thread = threading.Thread(target=batch.step)
    thread.start()
    assert entered.wait(30)
    with pytest.raises(RuntimeError, match="Another thread is in this batch's step"):
        batch.step()
    leave.set()
    thread.join(30)


WORKER = """
import sys, threading
import mlx.core as mx
import fastvlm_mlx as fv
model, processor = fv.load()
def work():
    print(fv.generate(model, processor, "Describe the image.", image=sys.argv[1]))
    mx.clear_streams()
for _ in range(3):
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
"""

FORK = """
import os, sys
import fastvlm_mlx as fv
model, processor = fv.load()
pid = os.fork()
if pid == 0:
    try:
        fv.generate(model, processor, "Hello!", max_tokens=1)
    except RuntimeError as error:
        print(error, flush=True)
        os._exit(7)
    os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def run_script(script: str, *arguments: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    root = Path(__file__).parents[1]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=root)


def test_a_process_with_worker_threads_ends_well() -> None:
    for _ in range(3):
        done = run_script(WORKER, PENGUINS)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines() == ["The image shows 6 penguins."] * 3


@pytest.mark.skipif(
    not hasattr(sys, "getandroidapilevel") and sys.platform == "win32", reason="fork"
)
def test_a_forked_process_is_told_to_spawn() -> None:
    done = run_script(FORK)
    said, code = done.stdout.splitlines()
    assert "spawn" in said and code == "7", done.stderr
