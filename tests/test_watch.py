"""Live sources, the newest of their frames, and `fastvlm watch`."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from clips import plain, write_clip
from command import Run
from PIL import Image, ImageDraw
from rtsp_server import Camera, tcp_server

import fastvlm_mlx as fv
from fastvlm_mlx.cli.live import printable
from fastvlm_mlx.cli.watch import seconds_of
from fastvlm_mlx.generation.inputs import read_inputs
from fastvlm_mlx.generation.options import Options
from fastvlm_mlx.hub.resolve import NANO
from fastvlm_mlx.live.actions import Actions, checked_url, post, run_command, split_command
from fastvlm_mlx.live.condition import Hysteresis, YesNo
from fastvlm_mlx.live.pace import Pace
from fastvlm_mlx.live.records import JsonLines, Subtitles, srt_time
from fastvlm_mlx.live.watch import Answer
from fastvlm_mlx.video import camera, screen
from fastvlm_mlx.video.changes import Changes
from fastvlm_mlx.video.decode import read_frames
from fastvlm_mlx.video.folder import FolderSource
from fastvlm_mlx.video.frame import Frame
from fastvlm_mlx.video.newest import Newest
from fastvlm_mlx.video.open import open_source
from fastvlm_mlx.video.pipe import PipeSource, split_pictures
from fastvlm_mlx.video.source import PictureSource, Source
from fastvlm_mlx.video.stream import StreamSource, quoted_login, without_login

Nano = tuple[fv.FastVLM, fv.Processor]
PANDA, PENGUINS = (NANO / "images" / name for name in ("panda.png", "penguins.png"))
ANSWERS = {PANDA: "The image shows a panda.", PENGUINS: "The image shows 6 penguins."}


class Fast(Source):
    """A live source that makes so many frames, as fast as it can or so many a second."""

    def __init__(self, count: int, make: Callable[[int], Any], rate: float = 1e9):
        self.count, self.make, self.rate, self.made = count, make, rate, 0

    def frames(self) -> Iterator[Frame]:
        start = time.monotonic()
        for number in range(self.count):
            due = start + number / self.rate
            while self.rate < 1e6 and time.monotonic() < due:
                time.sleep(max(0.0, due - time.monotonic()))
            self.made += 1
            picture = self.make(number)
            yield Frame(number / min(self.rate, 1e3), lambda picture=picture: picture)


def picture(path: Path) -> Image.Image:
    return fv.load_image(path)


# The newest frame


def test_frames_that_nobody_takes_are_dropped() -> None:
    source = Fast(200, lambda number: number, rate=1000)
    with closing(Newest(source)) as newest:
        taken = []
        for frame in newest:
            taken.append(frame.image)
            assert source.made - frame.image <= 3  # another may be made meanwhile
            time.sleep(0.02)
    assert taken == sorted(taken) and len(taken) < 30
    assert len(taken) + newest.dropped == 200


def test_the_last_frame_is_not_lost_and_errors_come_after_it() -> None:
    def make(number: int) -> int:
        if number == 3:
            raise OSError("unplugged")
        return number

    newest = Newest(Fast(10, make))
    newest._thread.join()
    assert next(newest).image == 2
    with pytest.raises(OSError, match="unplugged"):
        next(newest)
    newest.close()


def test_memory_stays_flat_over_thousands_of_frames() -> None:
    import tracemalloc

    alive: list[int] = []
    with closing(Newest(Fast(4000, lambda number: np.zeros((48, 64, 3), np.uint8)))) as newest:
        tracemalloc.start()
        for n, _ in enumerate(newest):
            if n % 50 == 0:
                alive.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
    assert newest.source.made == 4000  # type: ignore[attr-defined]
    assert max(alive, default=0) < 20 * 48 * 64 * 3


@pytest.mark.skipif(sys.platform != "linux", reason="reads the memory of a process from /proc")
@pytest.mark.needs("av")
def test_decoding_thousands_of_frames_keeps_memory_flat(tmp_path: Path) -> None:
    pictures = [plain((i % 250, 9, 9), 160, 120) for i in range(2000)]
    clip = write_clip(tmp_path / "long.mp4", pictures, crf=40)
    del pictures
    taken = []
    for number, frame in enumerate(read_frames(clip)):
        assert frame.image.size == (160, 120)
        if number % 400 == 399:
            resident = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
            taken.append(resident * os.sysconf("SC_PAGE_SIZE") / 2**20)
    assert max(taken) - taken[0] < 10  # megabytes; the frames' pixels would be 92


def test_age_is_at_most_one_inference(nano: Nano) -> None:
    image = picture(PANDA)
    source = Fast(400, lambda number: image, rate=200)
    answers = list(fv.watch(source, "Describe the image.", model=nano, max_tokens=8))
    assert len(answers) >= 2 and {a.text for a in answers} == {ANSWERS[PANDA]}
    assert max(a.age for a in answers[1:]) <= max(a.seconds for a in answers)
    assert sum(a.skipped for a in answers) > 0
    assert all(one.time < other.time for one, other in pairwise(answers))


def test_a_watch_that_is_left_ends_its_thread(nano: Nano) -> None:
    before = threading.active_count()
    answers = fv.watch(Fast(10**6, lambda n: picture(PANDA), rate=100), model=nano, max_tokens=2)
    next(answers)
    assert threading.active_count() == before + 1
    answers.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


# Streams


def open_files() -> int:
    folder = "/proc/self/fd" if Path("/proc/self/fd").exists() else "/dev/fd"
    return len(os.listdir(folder))


@pytest.mark.needs("av")
def test_a_thousand_reconnects_leak_nothing(tmp_path: Path) -> None:
    data = write_clip(tmp_path / "s.ts", [plain((i * 40, 9, 9)) for i in range(4)]).read_bytes()
    connections, notes, waits = 0, [], []

    def answer(connection: socket.socket) -> None:
        nonlocal connections
        with connection:
            connections += 1
            connection.sendall(data)

    with tcp_server(answer) as port:
        source = StreamSource(f"tcp://127.0.0.1:{port}")
        with closing(
            Newest(source, notes.append, lambda event, seconds: waits.append(seconds))
        ) as newest:
            while connections < 20:
                next(newest)
            before, times = (threading.active_count(), open_files()), []
            while connections < 1000:
                times.append(next(newest).time)
            after = (threading.active_count(), open_files())
    assert abs(after[0] - before[0]) <= 2 and abs(after[1] - before[1]) <= 3
    assert set(waits) == {0.5}  # frames came each time
    assert "broke off" in notes[0] and len(notes) >= 900
    assert times[-1] > times[0]  # time goes on over breaks


def test_waits_grow_until_frames_come_again() -> None:
    waits: list[float] = []

    class Flaky(Source):
        reconnects = True
        opened = 0

        def frames(self) -> Iterator[Frame]:
            self.opened += 1
            if self.opened in (1, 12, 14):
                yield Frame(0.0, lambda: Image.new("RGB", (8, 8)))
            if self.opened == 14:
                self.reconnects = False
            raise ConnectionError("gone")

    newest = Newest(Flaky(), wait=lambda event, seconds: waits.append(seconds))
    with pytest.raises(ConnectionError):
        for _ in newest:
            pass
    assert waits == [0.5, 1, 2, 4, 8, 16, 30, 30, 30, 30, 30, 0.5, 1]


def test_a_source_that_can_not_be_opened_is_not_tried_for_ever() -> None:
    class Missing(Source):
        reconnects = True

        def frames(self) -> Iterator[Frame]:
            raise FileNotFoundError("There is no camera 7.")
            yield

    with pytest.raises(FileNotFoundError, match="no camera 7"):
        next(Newest(Missing()))


@pytest.mark.needs("av")
@pytest.mark.parametrize("password", ["secret", "p@ss", "s%s/w?#:é@d", "p%40ss"])
def test_passwords_reach_the_camera_and_nobody_else(password: str) -> None:
    camera = Camera(b"", login="nobody:knows")
    with tcp_server(camera) as port:
        source = StreamSource(f"rtsp://admin:{password}@127.0.0.1:{port}/live/1")
        with pytest.raises(OSError) as caught:
            next(Newest(source))
    assert camera.logins and set(camera.logins) == {f"admin:{password.replace('%40', '@')}"}
    said = f"{caught.value} {source.name}"
    assert "401" in said and "***@127.0.0.1" in said
    assert password not in said and "admin" not in said


@pytest.mark.parametrize(
    ("url", "quoted", "shown"),
    [
        ("rtsp://h/x", "rtsp://h/x", "rtsp://h/x"),
        ("rtsp://u:p@h/x", "rtsp://u:p@h/x", "rtsp://***@h/x"),
        ("rtsp://u:p@[::1]:5/x", "rtsp://u:p@[::1]:5/x", "rtsp://***@[::1]:5/x"),
        ("rtsp://u:a@b@cam/x", "rtsp://u:a%40b@cam/x", "rtsp://***@cam/x"),
        ("rtsp://u:a/b@cam:554/x", "rtsp://u:a%2Fb@cam:554/x", "rtsp://***@cam:554/x"),
        ("http://h:80/a@b", "http://h:80/a@b", "http://***@b"),
    ],
)
def test_logins_in_urls(url: str, quoted: str, shown: str) -> None:
    assert quoted_login(url) == quoted
    assert without_login(quoted_login(url)) == shown


@pytest.mark.needs("av")
@pytest.mark.parametrize("then", ["close", "silence"])
def test_a_camera_that_breaks_off_is_opened_again(then: str, tmp_path: Path) -> None:
    pictures = [plain((i * 20, 9, 9)) for i in range(12)]
    stream = write_clip(tmp_path / "s.ts", pictures, keyframes=3).read_bytes()
    camera, notes, frames = Camera(stream, "admin:p@ss/1", then), [], []
    with tcp_server(camera) as port:
        source = StreamSource(f"rtsp://admin:p@ss/1@127.0.0.1:{port}/live", timeout=1.0)
        with closing(Newest(source, notes.append, lambda event, seconds: None)) as newest:
            while camera.connections < 3:
                frames.append(next(newest))
    assert frames[0].image.size == (64, 48)
    assert all(one.time <= other.time for one, other in pairwise(frames))
    assert all("***@127.0.0.1" in note and "p@ss" not in note for note in notes)


@pytest.mark.needs("av")
@pytest.mark.parametrize("scheme", ["rtsp", "tcp"])
def test_a_silent_peer_times_out(scheme: str) -> None:
    with tcp_server(lambda connection: time.sleep(30)) as port:
        start = time.monotonic()
        with pytest.raises(TimeoutError, match="did not answer in time"):
            next(Newest(StreamSource(f"{scheme}://127.0.0.1:{port}/x", timeout=0.5)))
        assert time.monotonic() - start < 5


# Changes


def scene(random: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    blotches = random.integers(40, 200, (12, 16, 3), dtype=np.uint8)
    return Image.fromarray(blotches).resize(size, Image.Resampling.BICUBIC)


def noisy(image: Image.Image, random: np.random.Generator, sigma: float) -> np.ndarray:
    pixels = np.asarray(image, np.float32)
    noise = random.standard_normal(pixels.shape, np.float32) * sigma
    return np.clip(pixels + noise, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("size", [(160, 120), (320, 240)], ids=str)
@pytest.mark.parametrize("sigma", [0.0, 4.0, 12.0])
def test_a_static_scene_is_answered_once(sigma: float, size: tuple[int, int]) -> None:
    random = np.random.default_rng(0)
    still, changes, frames = scene(random, size), Changes(), 150
    new = sum(changes.is_new(Image.fromarray(noisy(still, random, sigma))) for _ in range(frames))
    assert 1 <= new <= 0.05 * frames


@pytest.mark.needs("av")
def test_real_changes_of_a_labelled_clip_are_seen(tmp_path: Path) -> None:
    """Things come and go every second, in a noisy scene that is coded as cameras do."""
    random, labels, pictures = np.random.default_rng(3), [], []
    still = scene(random, (320, 240))
    shown = still
    for number in range(400):
        if number % 10 == 5:
            labels.append(number)
            shown = still.copy()
            if len(labels) % 2:
                draw, side = ImageDraw.Draw(shown), int(random.integers(24, 100))
                x, y = int(random.integers(0, 320 - side)), int(random.integers(0, 240 - side))
                shape = draw.ellipse if len(labels) % 4 == 1 else draw.rectangle
                shape((x, y, x + side, y + side), fill=tuple(random.integers(0, 256, 3).tolist()))
        pictures.append(noisy(shown, random, 6.0))
    clip = write_clip(tmp_path / "labelled.mp4", pictures, crf=26)
    changes = Changes()
    new = [i for i, frame in enumerate(read_frames(clip)) if changes.is_new(frame.image)]
    seen = sum(any(label <= i < label + 3 for i in new) for label in labels)
    assert seen >= 0.9 * len(labels)
    assert len(new) <= 1.3 * len(labels)  # and not much else


def test_slow_changes_add_up() -> None:
    changes = Changes()
    frames = [Image.new("RGB", (64, 64), (i, i, i)) for i in range(0, 60)]
    assert 4 <= sum(map(changes.is_new, frames)) <= 7


def test_on_change_answers_only_what_is_new(nano: Nano) -> None:
    random = np.random.default_rng(0)
    pictures = [picture(PANDA)] * 30 + [picture(PENGUINS)] * 30
    frames = [noisy(image, random, 3.0) for image in pictures]
    answers = list(fv.watch(frames, model=nano, on_change=True))
    assert [a.text for a in answers] == [ANSWERS[PANDA], ANSWERS[PENGUINS]]
    assert [a.skipped for a in answers] == [0, 29]


# Rates


def test_every_counts_in_the_time_of_a_file(tmp_path: Path, nano: Nano) -> None:
    pytest.importorskip("av")
    clip = write_clip(tmp_path / "clip.mp4", [plain((9, 9, 9))] * 40, rate=10)
    answers = fv.watch(clip, model=nano, every=1.0, realtime=False, max_tokens=1)
    assert [round(a.time, 1) for a in answers] == [0.0, 1.0, 2.0, 3.0]


def test_a_file_plays_at_its_own_speed(tmp_path: Path, nano: Nano) -> None:
    pytest.importorskip("av")
    clip = write_clip(tmp_path / "clip.mp4", [plain((9, 9, 9))] * 30, rate=20)
    start = time.monotonic()
    answers = list(fv.watch(clip, model=nano, every=0.5, max_tokens=1))
    assert time.monotonic() - start >= 1.4
    assert 2 <= len(answers) <= 4


def hold(pace: Pace, seconds_of_size: Callable[[int], float], answers: int = 300) -> list[int]:
    """The image sizes of answers that take as long as their size says."""
    sizes = []
    for _ in range(answers):
        sizes.append(pace.size)
        pace.took(seconds_of_size(pace.size))
    return sizes


def test_a_rate_is_held_by_the_image_size() -> None:
    pace = Pace(fps=4, largest=1024, step=64)
    sizes = hold(pace, lambda size: 0.05 + 0.8 * (size / 1024) ** 2)
    assert (
        0.05 + 0.8 * (sizes[-1] / 1024) ** 2 <= 0.25 < 0.05 + 0.8 * ((sizes[-1] + 64) / 1024) ** 2
    )
    assert len(set(sizes[20:150])) == 1  # it has settled
    assert all(size % 64 == 0 for size in sizes) and not pace.behind


def test_the_size_comes_back_when_there_is_time_again() -> None:
    pace = Pace(fps=4, largest=1024, step=64)
    hold(pace, lambda size: 0.8 * (size / 1024) ** 2)
    assert pace.size < 600
    hold(pace, lambda size: 0.1 * (size / 1024) ** 2, answers=700)
    assert pace.size == 1024


def test_a_rate_that_can_not_be_held_is_said_once() -> None:
    pace = Pace(fps=10, largest=512, step=64)
    said = [pace.took(1.0) and pace.behind for _ in range(50)]
    assert sum(said) == 1 and pace.size == 128


def test_a_watch_says_when_it_adapts(nano: Nano) -> None:
    notes: list[str] = []
    image = picture(PANDA)
    source = Fast(10**6, lambda number: image, rate=500)
    answers = fv.watch(source, model=nano, fps=2000, note=notes.append, max_tokens=1)
    sizes = []
    with closing(answers):  # type: ignore[type-var]
        for answer in answers:
            sizes.append(answer.image_size)
            if any("can't be held" in note for note in notes):
                break
    assert sizes[0] == 256 and sizes[-1] == 64
    assert "The image size is now 64, to hold 2000 a second." in notes


# Conditions


def test_the_probability_of_yes_is_that_of_the_logits(nano: Nano) -> None:
    condition = YesNo(*nano, "Is there a panda?")
    found = condition.probability(picture(PANDA))
    prompt = "Is there a panda? Answer yes or no."
    model, processor = nano
    inputs = read_inputs(model, processor, prompt, picture(PANDA), Options())
    logits = model(mx.array([inputs.input_ids]), input_embeddings=inputs.embeddings)[0, -1]
    chances = np.array(mx.softmax(logits.astype(mx.float32)))
    words = {
        word: {processor.tokenizer.encode(b + w)[0] for w in forms for b in ("", " ")}
        for word, forms in {"yes": ("yes", "Yes", "YES"), "no": ("no", "No", "NO")}.items()
    }
    both = words["yes"] & words["no"]
    yes, no = (float(chances[sorted(ids - both)].sum()) for ids in words.values())
    assert found == pytest.approx(yes / (yes + no), abs=1e-4)


def test_an_answer_does_not_flicker() -> None:
    state = Hysteresis()
    probabilities = [0.1, 0.55, 0.65, 0.5, 0.45, 0.55, 0.35, 0.5, 0.7]
    turns = [state.turns(p) for p in probabilities]
    assert turns == [False, False, True, False, False, False, True, False, True]


def test_when_it_turns_the_prompt_is_asked(nano: Nano, monkeypatch: pytest.MonkeyPatch) -> None:
    chances = iter([0.1, 0.9, 0.9, 0.2, 0.8])
    monkeypatch.setattr(YesNo, "probability", lambda self, image, **options: next(chances))
    answers = list(fv.watch([picture(PANDA)] * 5, "Describe the image.", when="Is it?", model=nano))
    assert [a.text for a in answers] == ["no", ANSWERS[PANDA], "yes", "no", ANSWERS[PANDA]]
    assert [a.turned for a in answers] == [False, True, False, True, True]


def test_a_condition_and_its_prompt_encode_a_frame_once(
    nano: Nano, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = []
    encode = fv.FastVLM.encode_image
    monkeypatch.setattr(
        fv.FastVLM, "encode_image", lambda self, x: (counted.append(1), encode(self, x))[1]
    )
    monkeypatch.setattr(Hysteresis, "turns", lambda self, p: setattr(self, "yes", True) or True)
    (answer,) = fv.watch([picture(PANDA)], "Describe the image.", when="Is it?", model=nano)
    assert answer.text == ANSWERS[PANDA] and len(counted) == 1


# Folders, pipes, cameras, the screen


def test_new_pictures_of_a_folder_are_seen_whole_and_once(tmp_path: Path) -> None:
    (tmp_path / "old.png").write_bytes(PANDA.read_bytes())
    seen: list[tuple[int, int]] = []
    frames = FolderSource(tmp_path, every=0.05).frames()
    data = PENGUINS.read_bytes()

    def put() -> None:
        time.sleep(0.2)
        with (tmp_path / "slow.png").open("wb") as file:
            for start in range(0, len(data), len(data) // 5):
                file.write(data[start : start + len(data) // 5])
                file.flush()
                time.sleep(0.03)
        time.sleep(0.3)
        Image.new("RGB", (9, 7)).save(tmp_path / "b.jpg")
        (tmp_path / "notes.txt").write_text("no picture", encoding="utf-8")
        (tmp_path / "._b.jpg").write_bytes(b"a Mac's shadow of it")
        time.sleep(0.3)
        Image.new("RGB", (5, 4)).save(tmp_path / "old.png")  # written anew

    thread = threading.Thread(target=put)
    thread.start()
    for frame in frames:
        seen.append(frame.image.size)
        if len(seen) == 3:
            break
    thread.join()
    assert seen == [picture(PENGUINS).size, (9, 7), (5, 4)]


def test_a_damaged_picture_is_passed_over(nano: Nano) -> None:
    notes: list[str] = []
    pictures = [PANDA.read_bytes(), b"\x89PNG\r\n\x1a\nnothing", PENGUINS.read_bytes()]
    answers = fv.watch(pictures, model=nano, note=notes.append)
    assert [a.text for a in answers] == [ANSWERS[PANDA], ANSWERS[PENGUINS]]
    assert len(notes) == 1 and "left out" in notes[0]


def jpeg(size: tuple[int, int], **options: Any) -> bytes:
    data = io.BytesIO()
    random = np.random.default_rng(size[0])
    pixels = random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(data, "JPEG", **options)
    return data.getvalue()


def pieces(data: bytes, size: int) -> Callable[[int], bytes]:
    stream = io.BytesIO(data)
    return lambda most: stream.read(min(size, most))


@pytest.mark.parametrize("size", [1, 7, 10**6])
def test_pictures_on_a_pipe_are_told_apart(size: int) -> None:
    exif = Image.Exif()
    exif[0x927C] = jpeg((8, 8))  # a picture within the picture, as cameras leave previews
    pictures = [
        PANDA.read_bytes(),
        jpeg((40, 30)),
        jpeg((64, 64), progressive=True, exif=exif),
        jpeg((33, 21), quality=95, subsampling=0),
        PENGUINS.read_bytes(),
    ]
    assert list(split_pictures(pieces(b"".join(pictures), size))) == pictures
    between = b"\r\n--boundary\xff\xff\r\n".join(pictures)
    assert list(split_pictures(pieces(between, size))) == pictures


def test_a_picture_is_there_with_its_last_byte() -> None:
    for whole in (jpeg((40, 30)), PANDA.read_bytes()):
        waiting = iter([whole])
        found = split_pictures(lambda size, waiting=waiting: next(waiting))
        assert next(found) == whole  # without asking for more


def test_half_a_picture_does_not_spoil_the_next() -> None:
    whole, other = jpeg((40, 30)), jpeg((20, 20))
    found = list(split_pictures(pieces(whole[:-400] + other + whole, 100)))
    assert found[-1] == whole and other in found
    assert list(split_pictures(pieces(whole + other[:50], 100))) == [whole]


@pytest.mark.parametrize("data", [b"", b"hi\n", b"RIFF....WEBP" * 9, jpeg((8, 8))[:100]])
def test_what_is_no_picture_on_a_pipe(data: bytes) -> None:
    with pytest.raises(ValueError, match="Standard input"):
        list(PipeSource(pieces(data, 4)).frames())


class FakeAV:
    """What AVFoundation does through PyAV: only 30.000030 frames a second are taken."""

    def __init__(self, logged: str, taken: str = "30.000030"):
        self.logged, self.taken, self.tried = logged, taken, []

    def open(self, name: str, format: str, options: dict[str, str]) -> str:
        import av

        assert (name, format) == ("1:none", "avfoundation")
        self.tried.append(options["framerate"])
        if options["framerate"] == self.taken:
            return "opened"
        av.logging.log(av.logging.ERROR, "avfoundation", f"{self.logged}\n")
        raise OSError(5, "Input/output error")


MODES = """Selected framerate (30.000000) is not supported by the device. Supported modes:
  640x480@[15.000015 30.000030]fps
  1280x720@[15.000015 24.000000]fps"""


@pytest.mark.needs("av")
@pytest.mark.parametrize(
    ("logged", "taken", "kind", "said"),
    [
        (MODES, "30.000030", None, ""),
        ("Selected framerate (30) is not supported by the device.", "15", None, ""),
        ("Invalid device index", "", FileNotFoundError, "There is no camera 1"),
        ("Cannot use FaceTime HD Camera", "", OSError, "another program is using it"),
        ("Not authorized to capture video", "", PermissionError, "Privacy & Security → Camera"),
        ("", "", OSError, "Input/output error"),
    ],
)
def test_cameras_of_a_mac(
    logged: str, taken: str, kind: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import av

    fake = FakeAV(logged, taken)
    monkeypatch.setattr(av, "open", fake.open)
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(camera, "_mac_authorization", lambda: None)
    if kind is None:
        assert camera.open_camera(1) == "opened"
        assert fake.tried[:2] == ["30", "30.000030" if "Supported" in logged else "60"]
    else:
        with pytest.raises(kind, match=said):
            camera.open_camera(1)
        assert fake.tried == ["30"]


class Device(Source):
    """A camera that begins to give frames once it is allowed to, and tells when it is closed."""

    ready = True

    def __init__(self, error: Exception | None = None):
        self.error, self.closed, self.came = error, False, 0

    def frames(self) -> Iterator[Frame]:
        try:
            if self.error is not None:
                raise self.error
            while True:
                self.came += 1
                yield Frame(self.came / 100, lambda: Image.new("RGB", (64, 64)), time.monotonic())
                time.sleep(0.01)
        finally:
            self.closed = True


def test_what_is_wrong_with_a_source_is_said_before_a_model_is_loaded() -> None:
    def load() -> Any:
        raise AssertionError("it was loaded")

    with pytest.raises(PermissionError, match="not allowed"):
        fv.watch(Device(PermissionError("not allowed")), model=load)


def test_frames_of_the_time_that_loading_takes_are_no_skipped_ones(nano: Nano) -> None:
    source = Device()

    def load() -> Nano:
        seen = source.came
        while source.came < seen + 9:
            time.sleep(0.01)
        return nano

    answers = fv.watch(source, model=load, max_tokens=1, image_size=64)
    first = next(answers)
    assert first.skipped < 5 and first.time >= 0.09
    answers.close()  # type: ignore[attr-defined]
    assert source.closed


def test_a_source_is_let_go_where_no_answer_is_wanted(nano: Nano) -> None:
    def fail() -> Any:
        raise ValueError("no such model")

    source = Device()
    with pytest.raises(ValueError, match="no such model"):
        fv.watch(source, model=fail)
    assert source.closed
    source = Device()
    fv.watch(source, model=nano).close()  # type: ignore[attr-defined]
    assert source.closed


@pytest.mark.needs("av")
def test_permissions_of_a_mac_are_asked_for_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(camera, "_mac_authorization", lambda: camera.DENIED)
    with pytest.raises(PermissionError, match="System Settings → Privacy & Security → Camera"):
        camera.open_camera(0)
    pytest.importorskip("mss")
    monkeypatch.setattr(screen, "_mac_says_no", lambda: True)
    with pytest.raises(PermissionError, match="Screen & System Audio Recording"):
        next(screen.ScreenSource().frames())


@pytest.mark.skipif(sys.platform != "linux", reason="Linux names its cameras as files")
@pytest.mark.needs("av")
@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (PermissionError(13, "Permission denied"), PermissionError, "usermod -aG video"),
        (OSError(16, "Device or resource busy"), OSError, "another program is using it"),
        (OSError(25, "Inappropriate ioctl for device"), OSError, "Inappropriate ioctl"),
    ],
)
def test_cameras_of_linux(
    error: OSError, kind: type[OSError], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import av

    def refuse(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(av, "open", refuse)
    monkeypatch.setattr(camera.os.path, "exists", lambda path: path == "/dev/video3")
    with pytest.raises(kind, match=said):
        camera.open_camera(3)
    with pytest.raises(FileNotFoundError, match="no camera 4"):
        camera.open_camera(4)


DEVICES = """AVFoundation video devices:
[0] FaceTime HD Camera
[1] Studio Display Camera
[2] Capture screen 0
AVFoundation audio devices:
[0] MacBook Pro Microphone"""


@pytest.mark.needs("av")
def test_the_cameras_of_a_mac_have_names(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    import av

    def list_them(name: str, format: str, options: dict[str, str]) -> None:
        assert (format, options) == ("avfoundation", {"list_devices": "true"})
        for line in DEVICES.splitlines():
            av.logging.log(av.logging.INFO, "avfoundation", f"{line}\n")
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(av, "open", list_them)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert camera.list_cameras() == {0: "FaceTime HD Camera", 1: "Studio Display Camera"}
    found = run("watch", "--list-cameras")
    assert (found.code, found.out) == (0, "0  FaceTime HD Camera\n1  Studio Display Camera\n")
    numbers = {"0": 0, "7": 7, "face": 0, "Studio Display Camera": 1}
    assert {name: camera.find_camera(name) for name in numbers} == numbers
    with pytest.raises(ValueError, match=r"Several cameras .* \(0\), Studio Display Camera \(1\)"):
        camera.find_camera("camera")
    for missing in ("Webcam", "-1", "²", ""):
        with pytest.raises((FileNotFoundError, ValueError), match="camera"):
            camera.find_camera(missing)


@pytest.mark.needs("av")
def test_the_cameras_of_linux_have_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each camera has several devices, of which the first gives its pictures."""
    for number, index, name in ((10, 0, "C920"), (0, 0, "Integrated"), (1, 1, "Integrated")):
        device = tmp_path / f"video{number}"
        device.mkdir()
        (device / "index").write_text(f"{index}\n")
        (device / "name").write_text(f"{name}\n")
    (tmp_path / "video5").mkdir()  # which went away meanwhile
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(camera, "VIDEO4LINUX", tmp_path)
    assert list(camera.list_cameras().items()) == [(0, "Integrated"), (10, "C920")]
    assert camera.find_camera("c920") == 10


@pytest.mark.needs("av")
@pytest.mark.parametrize("system", ["linux", "darwin", "win32"])
def test_systems_without_cameras(system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import av

    def refuse(*arguments: Any, format: str, **options: Any) -> None:
        raise ValueError(f"no container format {format!r}")

    monkeypatch.setattr(av, "open", refuse)
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(camera, "_mac_authorization", lambda: None)
    monkeypatch.setattr(camera.os.path, "exists", lambda path: True)
    said = "only" if system == "win32" else "pip install --upgrade av"
    with pytest.raises(OSError, match=said):
        camera.open_camera(0)


@pytest.mark.needs("mss")
def test_the_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    import mss

    class Grabber:
        monitors = ("all", "first")

        def __enter__(self) -> "Grabber":
            return self

        def __exit__(self, *error: Any) -> None: ...

        def grab(self, monitor: str) -> Any:
            assert monitor == "first"
            shot = type("Shot", (), {})()
            shot.size, shot.bgra = (2, 1), bytes([1, 2, 3, 0, 4, 5, 6, 0])
            return shot

    monkeypatch.setattr(mss, "mss", Grabber)
    frame = next(screen.ScreenSource(1).frames())
    assert np.asarray(frame.image).tolist() == [[[3, 2, 1], [6, 5, 4]]]
    with pytest.raises(ValueError, match=r"no screen 2: there are 1"):
        next(screen.ScreenSource(2).frames())


def test_what_is_named_as_a_source(tmp_path: Path) -> None:
    pytest.importorskip("av")
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(b"")
    kinds = {
        0: "CameraSource",
        "rtsp://h/x": "StreamSource",
        "https://h/x.m3u8": "StreamSource",
        "-": "PipeSource",
        "screen": "ScreenSource",
        clip: "FileSource",
        str(tmp_path): "FolderSource",
    }
    assert {given: type(open_source(given)).__name__ for given in kinds} == kinds
    assert isinstance(open_source(iter([])), PictureSource)
    ready = {0, "rtsp://h/x", "screen"}  # a film of the network would begin unseen
    assert all(open_source(given).ready is (given in ready) for given in kinds)
    with pytest.raises(FileNotFoundError, match=r"no video 'nothing\.mp4'"):
        open_source("nothing.mp4")
    for nothing in (-1, 1.5, None):
        with pytest.raises(ValueError, match="no frames in"):
            open_source(nothing)  # type: ignore[arg-type]


# What is done with answers


def answer(text: str = "A cat.", time: float = 1.0, **fields: Any) -> Answer:
    return Answer(text, Image.new("RGB", (320, 200), "red"), time, 1.7e9, 0.01, 0.2, 256, **fields)


def test_json_lines_are_appended_whole(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"mine": 1}\n{"half')
    lines = JsonLines(path, thumbnails=True)
    lines.write(answer('Two\n"cats" é', yes=True, probability=0.75, turned=True))
    lines.close()
    first, half, ours = path.read_text(encoding="utf-8").splitlines()
    assert (first, half) == ('{"mine": 1}', '{"half')
    found = json.loads(ours)
    assert found["text"] == 'Two\n"cats" é'
    assert (found["yes"], found["probability"], found["time"]) == (True, 0.75, 1.0)
    assert found["at"].startswith("2023-11-1") and found["at"][-6] in "+-"
    small = fv.load_image(found["thumbnail"])
    assert small.size == (160, 100)


def test_subtitles(tmp_path: Path) -> None:
    path = tmp_path / "film.srt"
    subtitles = Subtitles(path)
    for text, seconds in (("A cat.", 0.0), ("A cat.", 2.0), ("A dog.\n\nIt runs.", 3661.5)):
        subtitles.write(answer(text, seconds))
    subtitles.close()
    assert path.read_text(encoding="utf-8") == (
        "1\n00:00:00,000 --> 01:01:01,500\nA cat.\n\n"
        "2\n01:01:01,500 --> 01:01:05,500\nA dog.\nIt runs.\n\n"
    )
    with pytest.raises(FileExistsError, match="there already"):
        Subtitles(path)
    assert srt_time(59.9996) == "00:01:00,000"


def test_a_command_gets_the_answer_and_no_shell_does(tmp_path: Path) -> None:
    script = tmp_path / "do.py"
    script.write_text(
        "import os, sys, pathlib\n"
        "pathlib.Path(sys.argv[1]).write_bytes(os.environb[b'FASTVLM_TEXT'] + b'|' + "
        "sys.stdin.buffer.read() + b'|' + sys.argv[2].encode())\n"
        "print('done')\n",
        encoding="utf-8",
    )
    out, owned = tmp_path / "out", tmp_path / "owned"
    text = f"$(touch {owned}) `touch {owned}`; touch {owned}\né"
    command = split_command(f"'{sys.executable}' {script} {out} '$FASTVLM_TEXT'")
    assert run_command(command, answer(text)) == "done\n"
    assert out.read_text(encoding="utf-8") == f"{text}|{text}|$FASTVLM_TEXT"
    assert not owned.exists()


def test_what_fails_is_told_and_the_watch_goes_on(tmp_path: Path) -> None:
    notes: list[str] = []
    actions = Actions(f"'{sys.executable}' -c 'import sys; sys.exit(\"no\")'", note=notes.append)
    for _ in range(2):
        actions.act(answer())
    actions.close()
    assert len(notes) == 2 and "failed with exit code 1: no" in notes[0]


@pytest.fixture
def hook() -> Iterator[tuple[str, list[Any]]]:
    """A URL, and the objects that were posted to it; /bad answers 500."""
    posted: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            posted.append((self.headers["Content-Type"], json.loads(body)))
            self.send_response(500 if "bad" in self.path else 204)
            self.end_headers()

        def log_message(self, *said: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", posted
    server.shutdown()
    server.server_close()


def test_a_webhook_gets_json(hook: tuple[str, list[Any]]) -> None:
    url, posted = hook
    post(f"{url}/here", answer("Ein Käse."))
    ((kind, found),) = posted
    assert kind == "application/json" and found["text"] == "Ein Käse."
    assert found["thumbnail"].startswith("data:image/jpeg;base64,")
    for path, said in (("/bad/token", "answered 500"),):
        with pytest.raises(OSError, match=said) as caught:
            post(url + path, answer())
        assert "token" not in str(caught.value)
    with pytest.raises(OSError, match="can't be reached") as caught:
        post("http://127.0.0.1:9/token", answer())
    assert "token" not in str(caught.value)


@pytest.mark.parametrize("url", ["ftp://h/x", "h/x", "http://", "file:///etc/passwd"])
def test_webhooks_that_are_none(url: str) -> None:
    with pytest.raises(ValueError, match="http or https URL"):
        checked_url(url)


@pytest.mark.parametrize(
    ("command", "kind"),
    [("", ValueError), ("'half", ValueError), ("no-such-program x", FileNotFoundError)],
)
def test_commands_that_are_none(command: str, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="--do"):
        split_command(command)


# The command


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seconds of a panda, then two of penguins."""
    pytest.importorskip("av")
    pictures = [np.asarray(picture(path).resize((256, 256))) for path in (PANDA, PENGUINS)]
    path = tmp_path_factory.mktemp("clips") / "zoo.mp4"
    return write_clip(path, [pictures[0]] * 20 + [pictures[1]] * 20)


def test_the_command_writes_what_it_sees(run: Run, clip: Path, tmp_path: Path) -> None:
    log, srt = tmp_path / "log.jsonl", tmp_path / "zoo.srt"
    found = run(
        *("watch", "--video", clip, "--no-realtime", "--every", "1s", "--on-change"),
        *("--jsonl", log, "--srt", srt),
    )
    assert found.code == 0
    assert found.out == f"0:00.0  {ANSWERS[PANDA]}\n0:02.0  {ANSWERS[PENGUINS]}\n"
    assert [json.loads(line)["time"] for line in log.read_text().splitlines()] == [0.0, 2.0]
    assert srt.read_text().count("-->") == 2


def test_pictures_come_through_standard_input() -> None:
    data = PANDA.read_bytes() + PENGUINS.read_bytes()
    command = [sys.executable, "-m", "fastvlm_mlx", "watch", "-", "--no-realtime"]
    done = subprocess.run(command, input=data, capture_output=True, timeout=60)
    lines = done.stdout.decode().splitlines()
    assert [line[10:] for line in lines] == list(ANSWERS.values()), done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_on_signals_with_its_files_whole(number: int, clip: Path, tmp_path: Path) -> None:
    srt = tmp_path / "zoo.srt"
    flags = ["--video", str(clip), "--srt", str(srt)]
    process = subprocess.Popen(
        [sys.executable, "-m", "fastvlm_mlx", "watch", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert ANSWERS[PANDA] in process.stdout.readline()
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 0 and "Traceback" not in errors
    assert srt.read_text(encoding="utf-8").endswith(f"{ANSWERS[PANDA]}\n\n")


def test_a_terminal_is_not_cleared(clip: Path) -> None:
    import pty

    master, slave = pty.openpty()
    flags = ["--video", str(clip), "--no-realtime", "--every", "2s"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fastvlm_mlx", "watch", *flags],
        stdout=slave,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"TERM": "xterm"},
    )
    os.close(slave)
    written = b""
    try:
        while data := os.read(master, 65536):
            written += data
    except OSError:  # how Linux says that the other side is closed
        pass
    os.close(master)
    assert process.wait(30) == 0
    text = written.decode()
    for said in ANSWERS.values():
        assert said in text
    assert "frames skipped" in text
    assert "\x1b[2J" not in text and "\x1bc" not in text


BAD = {
    "no source": ([], "Name one source"),
    "two sources": (["--camera", "0", "--screen"], "2 were given"),
    "no such file": (["--video", "none.mp4"], "no video 'none.mp4'"),
    "no such folder": (["--folder", "none"], "no folder none"),
    "no time": (["-", "--every", "soon"], "--every must be a time"),
    "no rate": (["-", "--fps", "0"], "fps must be a number above 0"),
    "two rates": (["-", "--fps", "1", "--every", "2s"], "every or fps, not both"),
    "no option": (["-", "--max-tokens", "0"], "max_tokens"),
    "no program": (["-", "--do", "no-such-program"], "no such program"),
    "no webhook": (["-", "--webhook", "me"], "http or https"),
    "no place": (["-", "--jsonl", "none/log.jsonl"], "can't be written"),
    "no pictures": (["-"], "Standard input"),
    "no camera": (["--camera", "-1"], "There is no camera '-1'"),
    "thumbnails": (["-", "--thumbnails"], "--jsonl"),
    "no size": (["-", "--image-size", "100"], "multiple of 64"),
}


@pytest.mark.needs("av")
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(
    case: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fastvlm_mlx.video.pipe._read_stdin", lambda size: b"")
    flags, said = BAD[case]
    found = run("watch", *flags)
    errors = [line for line in found.err.splitlines() if not line.startswith("Note: ")]
    assert (found.code, found.out, len(errors)) == (2, "", 1), found.err
    assert errors[0].startswith("Error: ") and said in errors[0]


def test_times_of_every() -> None:
    times = {"2s": 2, "500ms": 0.5, "1.5m": 90, "3": 3, ".5 s": 0.5, "1h": 3600}
    assert {text: seconds_of(text) for text in times} == times
    for text in ("", "s", "-1s", "0", "1 parsec"):
        with pytest.raises(ValueError, match="--every"):
            seconds_of(text)


def test_answers_do_not_steer_a_terminal() -> None:
    assert printable("red\x1b[31m\n\x07cat\u202e") == "red[31m cat"
