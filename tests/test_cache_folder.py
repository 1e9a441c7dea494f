"""A folder of arrays: its bound, also with several processes, and what it does not take for one."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import mlx.core as mx
import pytest

from fastvlm_mlx.checkpoint.cache_folder import TOTAL, CacheFolder, from_entry, to_entry


def name_of(number: int) -> str:
    return f"{number:032x}"


def array_of(number: int) -> mx.array:
    return mx.full((250,), number, mx.float32)


SIZE = len(to_entry(array_of(0), name_of(0)))


def fill(cache: CacheFolder, *numbers: int) -> list[bool]:
    return [cache.write(name_of(n), to_entry(array_of(n), name_of(n))) for n in numbers]


def held(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.array"))


def age(folder: Path, *numbers: int) -> None:
    """Let entries have been used long ago, one after the other."""
    for second, number in enumerate(numbers):
        os.utime(folder / f"{name_of(number)}.array", (second, second))


def kept(cache: CacheFolder, count: int) -> list[int]:
    return [n for n in range(count) if name_of(n) in cache]


def test_an_entry_is_what_was_written(tmp_path: Path) -> None:
    for dtype in (mx.float32, mx.bfloat16, mx.uint8):
        array = (mx.random.uniform(shape=(3, 5), key=mx.random.key(0)) * 200).astype(dtype)
        cache = CacheFolder(tmp_path, 10**6)
        assert cache.write(name_of(1), to_entry(array, name_of(1)))
        found = from_entry(CacheFolder(tmp_path, 10**6).read(name_of(1)) or b"")
        assert found.dtype == dtype and mx.array_equal(found, array)


def test_the_longest_unused_make_room_also_those_of_other_processes(tmp_path: Path) -> None:
    one, other = (CacheFolder(tmp_path, 4 * SIZE) for _ in range(2))
    assert fill(one, 0, 1) == fill(other, 2, 3) == [True, True]
    age(tmp_path, 0, 1, 2, 3)
    assert other.read(name_of(0)) is not None
    assert fill(one, 4) == [True] and kept(one, 5) == [0, 2, 3, 4]
    assert fill(other, 5, 6) == [True, True] and kept(one, 7) == [0, 4, 5, 6]
    assert held(tmp_path) == one.nbytes == other.nbytes == 4 * SIZE


def test_a_smaller_bound_holds_from_the_start(tmp_path: Path) -> None:
    fill(CacheFolder(tmp_path, 9 * SIZE), 0, 1, 2, 3)
    age(tmp_path, 3, 2, 1, 0)
    assert kept(CacheFolder(tmp_path, 2 * SIZE + 5), 4) == [0, 1]


def test_its_own_entries_may_stay(tmp_path: Path) -> None:
    fill(CacheFolder(tmp_path, 9 * SIZE), 0, 1, 2)
    age(tmp_path, 0, 1, 2)
    cache = CacheFolder(tmp_path, 3 * SIZE, own_stay=True)
    assert cache.read(name_of(1)) is not None
    assert fill(cache, 3, 4, 5) == [True, True, False]
    assert kept(cache, 6) == [1, 3, 4] and fill(cache, 3) == [True]


def test_what_is_larger_than_the_bound_drives_nothing_out(tmp_path: Path) -> None:
    cache = CacheFolder(tmp_path, 2 * SIZE)
    fill(cache, 0, 1)
    assert not cache.write(name_of(2), to_entry(mx.zeros(5000), name_of(2)))
    assert kept(cache, 3) == [0, 1]


WRITE = """
import sys
sys.path.insert(0, sys.argv[1])
from test_cache_folder import *

cache = CacheFolder(sys.argv[2], 10 * SIZE, own_stay=sys.argv[3] == "stay")
for n in map(int, sys.argv[4:]):
    fill(cache, n)
    data = cache.read(name_of(n))  # another process may have deleted it
    assert data is None or (from_entry(data) == n).all().item()
"""


@pytest.mark.parametrize("how", ["stay", "go"])
def test_processes_that_write_at_once_keep_the_bound(tmp_path: Path, how: str) -> None:
    shares = [range(start, start + 40) for start in (0, 20, 40)]  # half of them twice
    program = [sys.executable, "-c", WRITE, str(Path(__file__).parent), str(tmp_path), how]
    running = [subprocess.Popen([*program, *map(str, share)]) for share in shares]
    assert [process.wait() for process in running] == [0, 0, 0]
    cache = CacheFolder(tmp_path, 10 * SIZE)
    assert held(tmp_path) == 10 * SIZE
    for number in kept(cache, 80):
        assert mx.array_equal(from_entry(cache.read(name_of(number)) or b""), array_of(number))
    assert not list(tmp_path.glob("*.tmp"))


def test_threads_that_write_at_once_keep_the_bound(tmp_path: Path) -> None:
    cache = CacheFolder(tmp_path, 5 * SIZE)
    work = [threading.Thread(target=fill, args=(cache, *range(n, 60, 4))) for n in range(4)]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert held(tmp_path) == 5 * SIZE


@pytest.mark.parametrize("text", ["", "x", "-5"])
def test_a_damaged_total_is_looked_up_again(tmp_path: Path, text: str) -> None:
    fill(CacheFolder(tmp_path, 3 * SIZE), 0, 1)
    (tmp_path / TOTAL).write_text(text)
    cache = CacheFolder(tmp_path, 3 * SIZE)
    (tmp_path / TOTAL).write_text(text)
    assert fill(cache, 2, 3) == [True, True] and held(tmp_path) == 3 * SIZE


def test_what_a_person_deleted_leaves_its_room(tmp_path: Path) -> None:
    cache = CacheFolder(tmp_path, 3 * SIZE)
    fill(cache, 0, 1, 2)
    (tmp_path / f"{name_of(1)}.array").unlink()
    assert cache.read(name_of(1)) is None and cache.nbytes == 2 * SIZE
    cache.delete(name_of(1))
    assert fill(cache, 3) == [True] and held(tmp_path) <= 3 * SIZE
