"""What depends on where arrays are computed."""

import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import pytest

import fastvlm_mlx as fv
from fastvlm_mlx import ops
from fastvlm_mlx.generation.scheduler import Batch
from fastvlm_mlx.hub.resolve import NANO

WORKING_SET = 2**34
SHORT: dict[str, Any] = {"max_tokens": 4, "image_size": 64}


class Wired:
    """The wired limit, as MLX would set it."""

    def __init__(self) -> None:
        self.limit, self.history = 7, [7]

    def set(self, limit: int) -> int:
        before, self.limit = self.limit, limit
        self.history.append(limit)
        return before


@pytest.fixture
def wired(monkeypatch: pytest.MonkeyPatch, assume: Callable[[str], None]) -> Wired:
    wired = Wired()
    assume("metal")
    monkeypatch.setattr(mx, "set_wired_limit", wired.set)
    monkeypatch.setattr(
        mx, "device_info", lambda: {"max_recommended_working_set_size": WORKING_SET}
    )
    return wired


def test_memory_is_wired_only_while_an_answer_is_generated(nano: Any, wired: Wired) -> None:
    responses = fv.stream_generate(*nano, "Hello!", **SHORT)
    assert wired.limit == 7
    next(responses)
    assert wired.limit == WORKING_SET
    assert list(responses)
    assert wired.history == [7, WORKING_SET, 7]


@pytest.mark.parametrize("options", [{"prompt_lookup": 3}, {"num_beams": 2}], ids=str)
def test_every_way_of_decoding_wires_once(nano: Any, wired: Wired, options: dict[str, Any]) -> None:
    fv.generate(*nano, "Hello!", **SHORT, **options)
    assert wired.history == [7, WORKING_SET, 7]


def test_a_dropped_answer_wires_no_longer(nano: Any, wired: Wired) -> None:
    responses = fv.stream_generate(*nano, "Hello!", **SHORT)
    next(responses)
    del responses
    gc.collect()
    assert wired.history == [7, WORKING_SET, 7]


def test_an_answer_dropped_by_another_thread_wires_no_longer(nano: Any, wired: Wired) -> None:
    held: list[Iterator[Any]] = [fv.stream_generate(*nano, "Hello!", **SHORT)]
    next(held[0])
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    gc.collect()
    assert wired.limit == 7


def test_answers_that_overlap_wire_from_the_first_to_the_last(wired: Wired) -> None:
    @ops.wired
    def numbers() -> Iterator[int]:
        yield from range(3)

    a, b = numbers(), numbers()
    assert (next(a), next(b)) == (0, 0)
    assert list(a) == [1, 2]
    assert wired.limit == WORKING_SET
    assert list(b) == [1, 2]
    assert wired.history == [7, WORKING_SET, 7]


def test_an_error_wires_no_longer(wired: Wired) -> None:
    with pytest.raises(RuntimeError, match="on purpose"), ops.wired_memory():
        raise RuntimeError("on purpose")
    assert wired.limit == 7


def test_a_batch_wires_while_it_has_requests(nano: Any, wired: Wired) -> None:
    batch = Batch(*nano)
    assert wired.limit == 7
    batch.insert("Hello!", **SHORT)
    batch.insert("What?", **SHORT)
    while batch:
        assert wired.limit == WORKING_SET
        batch.step()
    assert wired.history == [7, WORKING_SET, 7]
    batch.remove(batch.insert("Hello!", **SHORT))
    assert wired.history == [7, WORKING_SET, 7, WORKING_SET, 7]
    batch.insert("Hello!", **SHORT)
    batch.step()
    del batch
    gc.collect()
    assert wired.limit == 7


def test_nothing_is_wired_off_metal(nano: Any, wired: Wired, assume: Any) -> None:
    assume("cpu")
    fv.generate(*nano, "Hello!", **SHORT)
    assert wired.history == [7]


@pytest.mark.parametrize(
    "kept, cleared", [(0, 0), (WORKING_SET // 4, 0), (WORKING_SET // 4 + 1, 1)]
)
def test_only_a_large_cache_is_cleared(
    nano: Any, wired: Wired, monkeypatch: pytest.MonkeyPatch, kept: int, cleared: int
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(mx, "get_cache_memory", lambda: kept)
    monkeypatch.setattr(mx, "clear_cache", lambda: calls.append(1))
    fv.generate(*nano, "What is this?", image=NANO / "images" / "queen.png", **SHORT)
    assert len(calls) == cleared
