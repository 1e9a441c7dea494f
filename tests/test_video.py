"""Video files: frames in time, upright, in true colours; and the frames that a prompt gets."""

import shutil
import subprocess
import threading
import warnings
from base64 import b64encode
from dataclasses import replace
from fractions import Fraction
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from clips import plain, rotated_file, write_clip, write_yuv_clip, yuv_of
from command import Run

import fastvlm_mlx as fv
from fastvlm_mlx.hub.resolve import NANO
from fastvlm_mlx.video import choose, decode
from fastvlm_mlx.video.choose import Look, choose_frames, spread
from fastvlm_mlx.video.decode import Timeline, read_frames
from fastvlm_mlx.video.frame import timestamp

pytestmark = pytest.mark.needs("av")
RED, GREEN, BLUE, GREY = (220, 30, 30), (30, 200, 40), (30, 40, 220), (128, 128, 128)
COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (200, 120, 40), (255, 255, 255), (90, 90, 90)]
# The number of each matrix in H.273, and its weights of red and blue
MATRICES = {
    "BT.709": (1, 0.2126, 0.0722),
    "BT.601": (6, 0.299, 0.114),
    "BT.601 of PAL": (5, 0.299, 0.114),
    "BT.2020": (9, 0.2627, 0.0593),
    "none": (2, 0.299, 0.114),  # as ffmpeg takes it
}


def colours_of(path: Path) -> list[list[int]]:
    """The mean colour of each frame."""
    return [
        np.asarray(f.image).mean((0, 1)).round().astype(int).tolist() for f in read_frames(path)
    ]


def assert_colours(found: list[list[int]], expected: list[tuple[int, ...]], within: int) -> None:
    assert len(found) == len(expected)
    assert np.abs(np.array(found) - np.array(expected)).max() <= within


# Colours and geometry


@pytest.mark.parametrize(("name", "full", "bits"), [*product(MATRICES, (False, True), (8, 10))])
def test_colours_follow_matrix_range_and_depth(
    name: str, full: bool, bits: int, tmp_path: Path
) -> None:
    number, kr, kb = MATRICES[name]
    coded = [yuv_of(colour, kr, kb, full, bits) for colour in COLOURS]
    path = tmp_path / "colours.mp4"
    write_yuv_clip(path, coded, bits=bits, colorspace=number, full=full)
    # 8 bits of Y'CbCr hold a colour to within 1, and swscale's integers add as much again; the
    # wrong matrix or range would be off by 10 and more.
    assert_colours(colours_of(path), COLOURS, within=3)


def picture_of_corners() -> np.ndarray:
    """Red and green above, blue and grey below, wider than high."""
    pixels = np.empty((32, 64, 3), np.uint8)
    pixels[:16, :32], pixels[:16, 32:], pixels[16:, :32], pixels[16:, 32:] = RED, GREEN, BLUE, GREY
    return pixels


# Each display matrix, and what is then seen of the corners, row by row
TURNS = {
    "as it is": ((1, 0, 0, 1), [RED, GREEN, BLUE, GREY]),
    "a quarter clockwise": ((0, 1, -1, 0), [BLUE, RED, GREY, GREEN]),
    "half": ((-1, 0, 0, -1), [GREY, BLUE, GREEN, RED]),
    "a quarter anticlockwise": ((0, -1, 1, 0), [GREEN, GREY, RED, BLUE]),
    "mirrored": ((-1, 0, 0, 1), [GREEN, RED, GREY, BLUE]),
    "upside down": ((1, 0, 0, -1), [BLUE, GREY, RED, GREEN]),
    "transposed": ((0, 1, 1, 0), [RED, BLUE, GREEN, GREY]),
}


@pytest.mark.parametrize("turn", TURNS)
def test_frames_are_upright(turn: str, tmp_path: Path) -> None:
    matrix, expected = TURNS[turn]
    path = write_clip(tmp_path / "turned.mp4", [picture_of_corners()])
    rotated_file(path, matrix)
    image = next(read_frames(path)).image
    assert image.size == ((32, 64) if matrix[0] == 0 else (64, 32))
    width, height = image.size
    places = [(x * width // 4, y * height // 4) for y in (1, 3) for x in (1, 3)]
    found = [image.getpixel(place) for place in places]
    assert np.abs(np.array(found) - np.array(expected)).max() <= 6


def test_pixels_become_square(tmp_path: Path) -> None:
    path = tmp_path / "dv.mp4"
    write_clip(path, [picture_of_corners()], sample_aspect_ratio=Fraction(16, 11))
    image = next(read_frames(path)).image
    assert image.size == (93, 32)
    assert np.abs(np.array(image.getpixel((20, 8))) - RED).max() <= 6
    assert np.abs(np.array(image.getpixel((70, 24))) - GREY).max() <= 6


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs the ffmpeg command")
def test_frames_are_those_that_ffmpeg_shows(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (6, 12, 16, 3), dtype=np.uint8)
    path = write_clip(tmp_path / "noise.mp4", list(noise.repeat(4, 1).repeat(4, 2)))
    rotated_file(path, (0, 1, -1, 0))
    command = ["ffmpeg", "-v", "error", "-i", str(path), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    shown = subprocess.run(command, capture_output=True, check=True).stdout
    ours = np.stack([np.asarray(frame.image) for frame in read_frames(path)])
    theirs = np.frombuffer(shown, np.uint8).reshape(ours.shape)
    assert np.abs(ours.astype(int) - theirs).max() <= 2


# Time


def test_times_come_from_pts(tmp_path: Path) -> None:
    pts = [1000, 1040, 1500, 1501, 4000]  # of a camera that slows down in the dark
    path = write_clip(tmp_path / "variable.mkv", [plain(GREY)] * 5, pts=pts)
    times = [frame.time for frame in read_frames(path)]
    assert times == pytest.approx([0.0, 0.04, 0.5, 0.501, 3.0], abs=0.0015)


def test_a_file_without_pts_duration_and_frame_count(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "raw.h264", [plain(GREY)] * 10, rate=25, format="h264")
    assert decode.duration_of(path) is None
    times = [frame.time for frame in read_frames(path)]
    assert times == pytest.approx([i / 25 for i in range(10)], abs=1e-6)


@pytest.mark.parametrize(
    ("pts", "expected"),
    [
        ([0, 10, 20], [0, 1, 2]),
        ([500, 510, 520], [0, 1, 2]),
        ([0, 10, 10, 20], [0, 1, 1, 2]),  # repeated
        ([0, 10, 5, 20], [0, 1, 1, 2]),  # a step back
        ([None, None, None], [0, 0.5, 1]),
        ([0, None, 20], [0, 0.5, 2]),
        ([1000, 1010, 0, 10], [0, 1, 1.5, 2.5]),  # a recorder that was restarted
        ([-20, -10, 0], [0, 1, 2]),
    ],
)
def test_time_never_runs_backwards(pts: list[int | None], expected: list[float]) -> None:
    timeline = Timeline(Fraction(1, 10), 0.5)
    assert [timeline.at(value) for value in pts] == pytest.approx(expected)


def test_timestamps() -> None:
    assert [timestamp(t) for t in (0, 7.9, 61, 3723)] == ["0:00", "0:07", "1:01", "1:02:03"]
    assert timestamp(7.96, tenths=True) == "0:07.9"


# What a file may hold


def test_broken_packets_are_passed_over(tmp_path: Path) -> None:
    pictures = [plain(RED)] * 20 + [plain(BLUE)] * 20
    path = write_clip(tmp_path / "broken.ts", pictures, keyframes=5)
    data = bytearray(path.read_bytes())
    middle = slice(len(data) // 4, len(data) // 2)
    data[middle] = bytes(np.random.default_rng(0).integers(0, 256, len(data[middle]), np.uint8))
    found = colours_of(Path(path.write_bytes(data) and path))
    assert len(found) >= 10
    assert np.abs(np.array(found[-1]) - BLUE).max() <= 6


def test_a_file_that_breaks_off(tmp_path: Path) -> None:
    pictures = [plain((i * 6, 0, 0)) for i in range(40)]
    path = write_clip(tmp_path / "cut.mkv", pictures, keyframes=5)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert 5 <= len(colours_of(path)) < 40


def test_bytes_and_file_objects_are_read_too(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.mp4", [plain(RED), plain(BLUE)])
    data = path.read_bytes()
    for video in (data, BytesIO(data), str(path)):
        assert len(list(read_frames(video))) == 2
        assert decode.pixels_of(video) == 64 * 48
    with pytest.raises(ValueError, match="not a video"):  # FFmpeg would show it as a film
        list(read_frames((NANO / "images" / "panda.png").read_bytes()))


def test_a_name_with_a_colon_is_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_clip(tmp_path / "clip.mp4", [plain(RED)]).rename(tmp_path / "at 10:30.mp4")
    assert len(list(read_frames("at 10:30.mp4"))) == 1


def make_music(path: Path) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))


def test_what_is_no_video(tmp_path: Path) -> None:
    text, music, unknown = tmp_path / "notes.txt", tmp_path / "music.wav", tmp_path / "x.mkv"
    nonsense = tmp_path / "nonsense.mp4"
    nonsense.write_bytes(bytes(range(256)) * 9)
    text.write_text("Nothing to see here. " * 100, encoding="utf-8")
    make_music(music)
    write_clip(unknown, [plain(RED)] * 3, codec="mpeg4")
    unknown.write_bytes(unknown.read_bytes().replace(b"V_MPEG4/ISO", b"V_QUACK/ISO"))
    cases: list[tuple[Path, type[Exception], str]] = [
        (text, ValueError, "a text"),
        (music, ValueError, "no video in it"),
        (unknown, ValueError, "codec"),
        (nonsense, ValueError, "not a video"),
        (tmp_path / "none.mp4", FileNotFoundError, "no such file"),
        (tmp_path, IsADirectoryError, "folder"),
    ]
    for path, kind, said in cases:
        with pytest.raises(kind, match=said) as caught:
            list(read_frames(path))
        assert path.name in str(caught.value)


def test_a_playlist_opens_nothing_else(tmp_path: Path) -> None:
    write_clip(tmp_path / "clip.ts", [plain(RED)] * 3)
    head = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n"
    for target in (f"file:{tmp_path}/clip.ts", "http://127.0.0.1:9/clip.ts"):
        with pytest.raises((ValueError, OSError)):
            list(read_frames(f"{head}{target}\n#EXT-X-ENDLIST\n".encode()))


def test_without_pyav_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(ImportError, match=r"pip install 'fastvlm-mlx\[video\]'"):
        list(read_frames(b"any"))


# The frames that stand for a video


def looks(changes: dict[int, float], count: int) -> list[Look]:
    return [Look(i, i / 5, changes.get(i, 0.0)) for i in range(count)]


def test_frames_of_one_scene_are_uniform() -> None:
    assert spread(looks({}, 100), 4) == [12, 37, 62, 87]
    assert spread(looks({}, 3), 8) == [0, 1, 2]
    assert spread(looks({}, 1), 1) == [0]


def test_every_scene_is_shown_and_long_ones_more() -> None:
    found = spread(looks({11: 90.0, 20: 80.0}, 100), 6)
    assert [sum(a <= i < b for i in found) for a, b in ((0, 11), (11, 20), (20, 100))] == [1, 1, 4]
    assert spread(looks({11: 90.0, 20: 80.0}, 100), 2) == [5, 55]  # only the greatest cut


def test_frames_of_a_file_are_chosen_by_scene(tmp_path: Path) -> None:
    scenes = [plain(RED)] * 25 + [plain(GREEN)] * 6 + [plain(BLUE)] * 9
    path = write_clip(tmp_path / "scenes.mp4", scenes, rate=10)
    found = choose_frames(path, 3)
    colours = [list(frame.image.getpixel((20, 20))) for frame in found]
    assert_colours(colours, [RED, GREEN, BLUE], within=6)
    assert 0 < found[0].time < 2.5 <= found[1].time < 3.1 <= found[2].time


def test_a_video_that_takes_too_long_is_given_up(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.mp4", [plain(RED)] * 30)
    with pytest.raises(TimeoutError, match="takes too long"):
        choose_frames(path, 3, patience=0.0)


@pytest.mark.parametrize("gap", [5, 250])
def test_a_long_video_is_read_by_its_keyframes_if_they_are_enough(
    gap: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose, "LONG", 3.0)
    asked = []
    read = choose.read_frames
    monkeypatch.setattr(
        choose,
        "read_frames",
        lambda v, keyframes: (asked.append(keyframes), read(v, keyframes=keyframes))[1],
    )
    path = write_clip(
        tmp_path / "long.mp4", [plain((i * 4, 0, 0)) for i in range(60)], keyframes=gap
    )
    found = choose_frames(path, 2)
    assert [frame.time for frame in found] == pytest.approx([1.5, 4.5], abs=0.6)
    assert asked == ([True, True] if gap == 5 else [True, False, False])


# Prompts


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four seconds of a panda, then two of penguins."""
    pictures = [
        np.asarray(fv.load_image(NANO / "images" / name).resize((256, 256)))
        for name in ("panda.png", "penguins.png")
    ]
    path = tmp_path_factory.mktemp("clips") / "zoo.mp4"
    return write_clip(path, [pictures[0]] * 20 + [pictures[1]] * 10, rate=5)


def test_a_video_is_images_with_their_times(
    clip: Path, nano: tuple[fv.FastVLM, fv.Processor]
) -> None:
    chosen = choose_frames(clip, 2)
    parts = []
    for frame, time in zip(chosen, ("0:02", "0:05"), strict=True):
        parts += [{"type": "text", "text": f"Frame at {time}:\n"}]
        parts += [{"type": "image", "image": frame.image}]
    expected = fv.generate(*nano, [*parts, {"type": "text", "text": "Describe the image."}])
    assert fv.generate(*nano, "Describe the image.", video=clip, frames=2) == expected
    assert "penguins" in expected


def test_each_frame_is_encoded_once(
    clip: Path, nano: tuple[fv.FastVLM, fv.Processor], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = []
    encode = fv.FastVLM.encode_image
    monkeypatch.setattr(
        fv.FastVLM, "encode_image", lambda self, x: (counted.append(len(x)), encode(self, x))[1]
    )
    fv.generate(*nano, "How many?", video=clip, frames=5, max_tokens=4)
    assert sum(counted) == 5


def test_frames_that_do_not_fit_are_left_out_with_a_warning(
    clip: Path, nano: tuple[fv.FastVLM, fv.Processor]
) -> None:
    model, processor = nano
    small = replace(processor, max_length=400)
    with pytest.warns(UserWarning, match="50 frames do not fit into the 400 tokens"):
        responses = list(
            fv.stream_generate(model, small, "How many?", video=clip, frames=50, max_tokens=2)
        )
    assert 300 < responses[-1].prompt_tokens < 400 - 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fv.generate(*nano, "How many?", video=clip, frames=8, max_tokens=2)


def test_a_video_stands_in_the_first_turn_of_a_chat(
    clip: Path, nano: tuple[fv.FastVLM, fv.Processor]
) -> None:
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": "A panda."},
        {"role": "user", "content": [{"type": "text", "text": "Describe the image."}]},
    ]
    before = [dict(turn) for turn in chat]
    first = next(fv.stream_generate(*nano, chat, video=clip, frames=1))
    assert first.prompt_tokens > 16
    assert chat == before


def test_videos_stand_in_parts_of_messages(
    clip: Path, nano: tuple[fv.FastVLM, fv.Processor]
) -> None:
    data = clip.read_bytes()
    question = {"type": "text", "text": "Describe the image."}
    expected = list(fv.stream_generate(*nano, "Describe the image.", video=clip, frames=2))
    for part in (
        {"type": "video", "video": str(clip)},
        {"type": "video", "video": data},
        {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{b64(data)}"}},
        {"type": "input_video", "video_url": str(clip)},
    ):
        message = {"role": "user", "content": [part, question]}
        found = list(fv.stream_generate(*nano, [message], frames=2))
        assert [r.token for r in found] == [r.token for r in expected]
        assert found[0].prompt_tokens == expected[0].prompt_tokens
    two = [{"type": "video", "video": data}, {"type": "text", "text": "or"}] * 2
    last = next(fv.stream_generate(*nano, [*two, question], frames=1))
    assert last.prompt_tokens > expected[0].prompt_tokens


def b64(data: bytes) -> str:
    return b64encode(data).decode()


@pytest.mark.parametrize("part", [{}, {"video": 3}, {"video": "a", "url": "b"}, {"video_url": {}}])
def test_parts_without_a_video(
    part: dict[str, object], nano: tuple[fv.FastVLM, fv.Processor]
) -> None:
    with pytest.raises(ValueError, match=r"[Vv]ideo"):
        fv.generate(*nano, [{"type": "video", **part}])


def test_a_video_from_the_network(clip: Path, nano: tuple[fv.FastVLM, fv.Processor]) -> None:
    handler = partial(SimpleHTTPRequestHandler, directory=str(clip.parent))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        found = fv.generate(*nano, "Describe the image.", video=f"{url}/zoo.mp4", frames=1)
        assert found == "The image shows a panda."
        with pytest.raises(OSError, match="404"):
            fv.generate(*nano, "Describe the image.", video=f"{url}/none.mp4")
        server.shutdown()


@pytest.mark.parametrize(
    ("prompt", "given", "said"),
    [
        ("What is it?", {"image": str(NANO / "images" / "panda.png")}, "image or video, not both"),
        ("<image> What is it?", {}, "places for images"),
        ("What is it?", {"frames": 0}, "frames must be a whole number from 1"),
        ("<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n", {}, "chat template"),
        ([{"role": "system", "content": "Hm."}], {}, "no turn of the user's"),
    ],
)
def test_prompts_that_can_take_no_video(
    prompt: object,
    given: dict[str, object],
    said: str,
    clip: Path,
    nano: tuple[fv.FastVLM, fv.Processor],
) -> None:
    with pytest.raises(ValueError, match=said):
        fv.generate(*nano, prompt, video=clip, **given)


# The command


def test_the_command_answers_about_a_video(run: Run, clip: Path) -> None:
    found = run("generate", "--video", clip, "--frames", 1, "--prompt", "Describe the image.")
    assert (found.code, found.out) == (0, "The image shows a panda.\n")
    assert "nano" in found.err


@pytest.mark.parametrize("name", ["none.mp4", "notes.mp4"])
def test_the_command_says_what_is_wrong_with_a_video(run: Run, name: str, tmp_path: Path) -> None:
    (tmp_path / "notes.mp4").write_text("no video", encoding="utf-8")
    found = run("generate", "--video", tmp_path / name)
    assert (found.code, found.out) == (2, "")
    assert found.err.startswith("Error: Cannot read ") and name in found.err
    assert found.err.count("\n") == 1
