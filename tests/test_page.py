"""The page of the server, in a browser, below another path and under its strict policy."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from browser import CLOCK_CAMERA, View, launched
from page_server import PageServer, Refusal, pictures
from PIL import Image

from fastvlm_mlx.hub.resolve import NANO

pytestmark = pytest.mark.needs("playwright")
playwright = pytest.importorskip("playwright.sync_api")
expect = playwright.expect

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "fastvlm_mlx" / "serve" / "page"
PENGUINS = NANO / "images" / "penguins.png"
QUEEN = NANO / "images" / "queen.png"
AXE = Path(__file__).parent / "data" / "axe" / "axe.min.js"
WIDTHS = {"phone": (360, 740), "tablet": (768, 1024), "desktop": (1440, 900)}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched() as browser:
        yield browser


@pytest.fixture
def backend() -> Iterator[PageServer]:
    backend = PageServer()
    backend.start()
    yield backend
    if not backend.broken:
        backend.die()


@pytest.fixture
def view(browser: Any, backend: PageServer) -> Iterator[View]:
    """A page that is not opened yet. Nothing it does may break its policy or raise."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    view = View(context, backend)
    yield view
    context.close()
    assert view.faults == []


@pytest.fixture
def opened(view: View) -> View:
    return view.open()


@pytest.fixture
def shown(opened: View) -> View:
    """With a picture."""
    opened.choose(PENGUINS)
    return opened


def waiting(condition: Callable[[], Any], seconds: float = 8) -> Any:
    """What a condition gives once it is true."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.02)
    return found


def sent(view: View) -> list[bytes]:
    """The bytes of the pictures of the last request."""
    return [image.fp.getvalue() for image in pictures(view.server.asked[-1])]


# Pictures


def test_a_chosen_picture_goes_out_byte_for_byte(shown: View) -> None:
    shown.ask("How many penguins are there?")
    assert sent(shown) == [PENGUINS.read_bytes()]
    request = shown.server.asked[-1]
    assert request["model"] == "FastVLM-0.5B"
    assert request["stream"] and request["stream_options"] == {"include_usage": True}
    assert request["image_size"] == 1024
    assert request["messages"][-1]["content"][-1]["text"] == "How many penguins are there?"
    assert shown.answer == "There are 6 penguins."


@pytest.mark.parametrize("way", ["drop", "paste"])
def test_a_picture_may_be_dropped_and_pasted(opened: View, way: str) -> None:
    opened.hand_over(way, QUEEN)
    opened.page.locator("#stage[data-state=pictures]").wait_for()
    opened.ask("What does it say?")
    assert sent(opened) == [QUEEN.read_bytes()]
    opened.hand_over(way, PENGUINS)  # takes the place of the first
    expect(opened.page.locator("#shown")).to_have_attribute("alt", "penguins.png")
    opened.ask("How many?")
    assert sent(opened) == [PENGUINS.read_bytes()]


def test_a_sample_is_one_click_away(opened: View) -> None:
    opened.page.get_by_role("button", name="Some penguins").click()
    expect(opened.page.locator("#question")).to_have_value("How many penguins are there?")
    opened.page.click("#send")
    opened.page.locator(".card").wait_for()
    assert sent(opened) == [(PAGE / "sample-penguins.png").read_bytes()]


def test_text_is_pasted_as_text_though_a_picture_of_it_comes_along(opened: View) -> None:
    paste = """() => {
      const transfer = new DataTransfer();
      transfer.items.add(new File(["x"], "cells.png", { type: "image/png" }));
      transfer.setData("text/plain", "cells");
      const all = { bubbles: true, cancelable: true, clipboardData: transfer };
      return question.dispatchEvent(new ClipboardEvent("paste", all));
    }"""
    assert opened.page.evaluate(paste)  # the browser goes on and inserts the text
    expect(opened.page.locator("#stage")).to_have_attribute("data-state", "empty")


def test_a_drag_over_the_page_shows_where_to_drop(opened: View) -> None:
    opened.hand_over("dragenter", QUEEN)
    expect(opened.page.locator(".drop-hint")).to_have_css("opacity", "1")
    opened.hand_over("dragleave", QUEEN)
    expect(opened.page.locator(".drop-hint")).to_have_css("opacity", "0")


def test_several_pictures_keep_their_order_and_one_can_be_removed(shown: View) -> None:
    shown.choose(QUEEN, by="#add")
    expect(shown.page.locator("#strip li")).to_have_count(2)
    shown.ask("Which?")
    assert sent(shown) == [PENGUINS.read_bytes(), QUEEN.read_bytes()]
    shown.page.get_by_label("Remove penguins.png").click()
    shown.ask("Which?")
    assert sent(shown) == [QUEEN.read_bytes()]


def test_what_is_no_picture_is_said_and_replaces_nothing(shown: View, tmp_path: Path) -> None:
    for name in ("notes.txt", "empty.png"):
        (tmp_path / name).write_text("" if name == "empty.png" else "text", encoding="utf-8")
        shown.page.set_input_files("#file", tmp_path / name)
        expect(shown.page.locator("#picture-alert")).to_have_text(f"“{name}” is not a picture.")
    shown.ask("And now?")
    assert sent(shown) == [PENGUINS.read_bytes()]


def test_a_picture_that_only_the_server_can_read_is_sent_as_it_is(
    opened: View, tmp_path: Path
) -> None:
    (tmp_path / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic and more")
    opened.choose(tmp_path / "photo.heic")
    expect(opened.page.locator("#unshown")).to_contain_text("photo.heic")
    opened.ask("What is it?")
    address = opened.messages[-1]["content"][0]["image_url"]["url"]
    assert address.endswith("AAAAGGZ0eXBoZWljIGFuZCBtb3Jl")


def test_pictures_that_the_server_may_not_read_are_drawn_by_the_browser(
    opened: View, tmp_path: Path
) -> None:
    square = '<rect width="20" height="20" fill="#f00"/>'
    space = "http://www.w3.org/2000/svg"
    drawing = f'<svg xmlns="{space}" width="40" height="20">{square}</svg>'
    (tmp_path / "drawing.svg").write_text(drawing, encoding="utf-8")
    opened.choose(tmp_path / "drawing.svg")
    opened.ask("What is it?")
    (image,) = pictures(opened.server.asked[-1])
    assert (image.format, image.size) == ("PNG", (40, 20))
    assert image.convert("RGBA").getpixel((5, 5)) == (255, 0, 0, 255)
    assert image.convert("RGBA").getpixel((35, 5))[3] == 0  # transparency stays


def test_a_huge_file_is_made_smaller_before_it_is_sent(opened: View, tmp_path: Path) -> None:
    Image.new("RGB", (2600, 1300), "#204080").save(tmp_path / "huge.png", compress_level=0)
    assert (tmp_path / "huge.png").stat().st_size > 8 * 2**20
    opened.choose(tmp_path / "huge.png")
    opened.ask("What is it?")
    (image,) = pictures(opened.server.asked[-1])
    assert image.size == (2048, 1024)
    assert max(abs(a - b) for a, b in zip(image.getpixel((9, 9)), (32, 64, 128), strict=True)) <= 3


def test_without_a_picture_or_a_question_one_is_asked_for(opened: View) -> None:
    opened.page.fill("#question", "What is this?")
    opened.page.click("#send")
    expect(opened.page.locator("#answer-alert")).to_contain_text("Choose, drop or paste a picture")
    opened.choose(PENGUINS)
    opened.page.fill("#question", "  ")
    opened.page.click("#send")
    expect(opened.page.locator("#answer-alert")).to_contain_text("Write a question")
    assert opened.server.asked == []


# Answers


def test_an_answer_shows_its_timings_and_the_rest_on_demand(shown: View) -> None:
    shown.ask("How many?")
    assert (shown.text("#first"), shown.text("#rate")) == ("142 ms", "63.1")
    expect(shown.page.locator("#details-body")).not_to_be_visible()
    shown.page.click("#details summary")
    terms = shown.page.locator("#details-body dl > div").evaluate_all(
        "all => Object.fromEntries(all.map(({ children: [a, b] }) => [a.innerText, b.innerText]))"
    )
    assert terms["Encode"] == "88 ms" and terms["Prefill"] == "42 ms" and terms["Queue"] == "1.1 ms"
    assert terms["Cached tokens"] == "12 of 283" and terms["Cached images"] == "1"
    assert terms["First step"] == "7.6 ms"  # 142 - 1.1 - 3.2 - 88.4 - 41.7
    widths = shown.page.locator("#details-body .bar i").evaluate_all(
        "all => all.map(piece => piece.getBoundingClientRect().width)"
    )
    assert widths[2] / widths[3] == pytest.approx(88.4 / 41.7, rel=0.02)
    card = shown.page.locator(".card").first
    assert "142 ms to the first token · 63.1 tokens/s" in card.inner_text()
    card.locator("summary").click()
    expect(card.locator("dl")).to_contain_text("Encode")


def test_an_answer_comes_word_by_word_and_characters_whole(shown: View) -> None:
    shown.server.reply = lambda body: ["Ein 🐧 ", 0.6, "läuft 漢字"]
    shown.page.fill("#question", "What?")
    shown.page.click("#send")
    expect(shown.page.locator(".turn .text")).to_have_text("Ein 🐧 ")
    expect(shown.page.locator("#stop")).to_be_visible()
    expect(shown.page.locator(".turn .text")).to_have_text("Ein 🐧 läuft 漢字")
    expect(shown.page.locator("#send")).to_be_visible()


def test_a_stopped_answer_is_kept_and_the_server_is_left(shown: View) -> None:
    shown.server.reply = lambda body: ["So far ", *[0.05, "and on "] * 200]
    shown.page.fill("#question", "Tell me.")
    shown.page.click("#send")
    expect(shown.page.locator(".turn .text")).to_contain_text("and on")
    shown.page.click("#stop")
    expect(shown.page.locator(".turn .finish")).to_have_text("Stopped.")
    assert shown.answer.startswith("So far and on")
    expect(shown.page.locator(".card")).to_contain_text("Stopped")
    waiting(lambda: shown.server.left == 1)
    expect(shown.page.locator("#question")).to_be_focused()


def test_a_double_click_and_a_hasty_one_ask_once_about_the_picture(opened: View) -> None:
    opened.page.fill("#question", "What?")
    opened.page.evaluate(
        """async () => {
          const slow = HTMLImageElement.prototype.decode;
          HTMLImageElement.prototype.decode = async function () {
            await new Promise((done) => setTimeout(done, 500));
            return slow.call(this);
          };
        }"""
    )
    opened.hand_over("drop", PENGUINS)
    opened.page.dblclick("#send")  # while the picture is being read
    opened.page.locator(".card").wait_for()
    assert len(opened.server.asked) == 1 and sent(opened) == [PENGUINS.read_bytes()]


def test_a_question_stopped_before_its_answer_comes_back(shown: View) -> None:
    shown.server.reply = lambda body: [5.0, "Late"]
    shown.page.check("#chat")
    shown.page.fill("#question", "Are you there?")
    shown.page.click("#send")
    expect(shown.page.locator("#question")).to_have_value("")
    shown.page.click("#stop")
    expect(shown.page.locator("#question")).to_have_value("Are you there?")
    expect(shown.page.locator(".card")).to_have_count(0)


def test_a_long_answer_is_followed_and_scrolling_up_is_not_undone(shown: View) -> None:
    words = [f"word{n} " for n in range(1500)]
    shown.server.reply = lambda body: [*words[:700], 0.7, *words[700:1400], 0.7, *words[1400:]]
    shown.page.fill("#question", "Tell me.")
    shown.page.click("#send")
    reading = shown.page.locator("#reading")
    expect(reading).to_contain_text("word699")
    gap = "box => box.scrollHeight - box.scrollTop - box.clientHeight"
    assert reading.evaluate(gap) < 2
    reading.evaluate("box => box.scrollTop = 100")
    expect(shown.page.locator(".card")).to_have_count(1)
    assert reading.evaluate("box => box.scrollTop") == 100
    assert shown.answer == "".join(words).strip()
    assert shown.page.evaluate("document.scrollingElement.scrollTop") == 0
    card = shown.page.locator(".card")
    folded = card.locator(".text").bounding_box()["height"]
    card.get_by_role("button", name="Show all").click()
    assert card.locator(".text").bounding_box()["height"] > 3 * folded


def test_markup_in_an_answer_stays_text(shown: View) -> None:
    evil = (
        "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'> **bold** &amp;"
    )
    shown.server.reply = lambda body: [evil[:9], evil[9:], 0.3]
    shown.ask("<b>Really?</b>")
    assert shown.answer == evil
    for _ in range(2):
        card = shown.page.locator(".card")
        assert card.locator(".text").inner_text() == evil
        assert card.locator("h3").inner_text() == "<b>Really?</b>"
        assert shown.page.evaluate("window.hacked") is None
        assert shown.page.locator(".text *, h3 *, main script").count() == 0
        shown.page.reload()  # and when it comes from the history


def test_a_finished_answer_is_announced_once(shown: View) -> None:
    shown.server.reply = lambda body: ["One ", 0.1, "two ", 0.1, "three."]
    for n in (1, 2):  # the same text again is said again
        shown.ask("Count.")
        waiting(lambda n=n: shown.page.evaluate("window.told.length") == n)
    shown.page.wait_for_timeout(150)
    assert shown.page.evaluate("window.told") == ["One two three."] * 2
    assert shown.page.locator("[aria-live] .text, [role=status] .text, [role=log]").count() == 0


@pytest.mark.parametrize("status", [400, 413, 429, 500, 503])
def test_what_the_server_refuses_is_said_in_its_words(shown: View, status: int) -> None:
    shown.server.reply = lambda body: Refusal(status, "This <b>can't</b> be.")
    shown.page.fill("#question", "Hm?")
    shown.page.click("#send")
    expect(shown.page.locator("#answer-alert span")).to_have_text("This <b>can't</b> be.")
    again = shown.page.locator("#answer-alert button")
    expect(again).to_have_count(1 if status in (429, 500, 503) else 0)
    if again.count():
        shown.server.reply = lambda body: ["Now."]
        again.click()
        expect(shown.page.locator(".card .text")).to_have_text("Now.")
        expect(shown.page.locator("#answer-alert")).to_be_empty()


def test_a_failure_within_an_answer_keeps_what_came(shown: View) -> None:
    shown.server.reply = lambda body: ["Half an", {"error": {"message": "The model stopped."}}]
    shown.ask("Tell me.")
    assert shown.answer == "Half an"
    expect(shown.page.locator("#answer-alert span")).to_have_text("The model stopped.")


def test_an_answer_can_be_cut_or_empty(shown: View) -> None:
    shown.server.reply = lambda body: ["Too lo"]
    shown.server.finish = "length"
    shown.ask("Tell me.")
    expect(shown.page.locator(".turn .finish")).to_have_text("Cut off at the limit of tokens.")
    shown.server.finish = "stop"
    shown.server.reply = lambda body: []
    shown.ask("Nothing?")
    assert shown.answer == "(an empty answer)"


# Chat


def test_a_chat_keeps_the_picture(shown: View) -> None:
    shown.page.check("#chat")
    shown.ask("How many?")
    shown.server.reply = lambda body: ["Brown."]
    shown.ask("And on which ground?")
    first, answer, second = shown.messages
    assert [part["type"] for part in first["content"]] == ["image_url", "text"]
    assert answer == {"role": "assistant", "content": "There are 6 penguins."}
    assert [part["type"] for part in second["content"]] == ["text"]
    assert sent(shown) == [PENGUINS.read_bytes()]
    expect(shown.page.locator(".turn")).to_have_count(2)
    shown.page.click("#new-chat")
    shown.ask("Once more?")
    assert len(shown.messages) == 1 and sent(shown) == [PENGUINS.read_bytes()]


def test_a_new_chat_ends_the_answer_of_the_last_one(shown: View) -> None:
    shown.page.check("#chat")
    shown.ask("How many?")
    shown.server.reply = lambda body: ["And so ", *[0.05, "on "] * 100]
    shown.page.fill("#question", "Go on?")
    shown.page.click("#send")
    expect(shown.page.locator(".turn .text").last).to_contain_text("on")
    shown.page.click("#new-chat")
    expect(shown.page.locator(".card")).to_have_count(2)  # what came is kept
    expect(shown.page.locator("#reading")).to_have_text(re.compile("^A new chat"))
    expect(shown.page.locator("#figures")).not_to_be_visible()


def test_a_picture_added_to_a_chat_stands_at_its_turn(shown: View) -> None:
    shown.page.check("#chat")
    shown.ask("How many?")
    shown.choose(QUEEN, by="#add")
    shown.ask("And this?")
    assert [len(m["content"]) for m in shown.messages if m["role"] == "user"] == [2, 2]
    assert sent(shown) == [PENGUINS.read_bytes(), QUEEN.read_bytes()]
    shown.hand_over("drop", QUEEN)  # another picture, another chat
    expect(shown.page.locator("#strip li")).to_have_count(1)
    shown.ask("What is it?")
    assert len(shown.messages) == 1 and sent(shown) == [QUEEN.read_bytes()]


def test_an_answer_can_be_followed_up_after_it_was_given(shown: View) -> None:
    shown.ask("How many?")
    shown.page.check("#chat")
    shown.ask("Sure?")
    assert [message["role"] for message in shown.messages] == ["user", "assistant", "user"]
    shown.page.uncheck("#chat")
    shown.ask("How many?")
    assert len(shown.messages) == 1


def test_a_chat_about_the_camera_keeps_its_frame(opened: View) -> None:
    opened.page.click("#camera-on")
    opened.page.check("#chat")
    opened.page.wait_for_timeout(500)
    opened.ask("What is it?")
    first = sent(opened)
    opened.ask("And now?")
    assert len(opened.messages) == 3 and sent(opened) == first


# The camera


def test_the_camera_gives_one_frame_and_is_let_go(opened: View) -> None:
    opened.page.evaluate(
        """() => {
          const open = navigator.mediaDevices.getUserMedia.bind(navigator.mediaDevices);
          window.tracks = [];
          navigator.mediaDevices.getUserMedia = async (wanted) => {
            const stream = await open(wanted);
            window.tracks.push(...stream.getTracks());
            return stream;
          };
        }"""
    )
    states = "tracks.map((track) => track.readyState).join()"
    for end in ("#camera-off", "picture", "switch"):
        opened.page.click(
            "#camera-on-2" if opened.page.locator("#add").is_visible() else "#camera-on"
        )
        expect(opened.page.locator("#live")).to_be_visible()
        waiting(lambda: opened.page.evaluate("video.readyState") >= 2)
        assert opened.page.evaluate(states).split(",")[-1] == "live"
        opened.ask("What is it?")
        (image,) = pictures(opened.server.asked[-1])
        assert image.format == "JPEG" and max(image.size) <= 1024 and min(image.size) > 200
        assert opened.page.locator("#speed").inner_text() == "142 ms"
        if end == "#camera-off":
            opened.page.click(end)
        elif end == "picture":
            opened.choose(PENGUINS, by="#choose-2")
        else:
            opened.page.evaluate("cameras.dispatchEvent(new Event('change'))")
            waiting(lambda: opened.page.evaluate("tracks.length") == 4)
            opened.page.evaluate("dispatchEvent(new Event('pagehide'))")
        assert "live" not in waiting(lambda: opened.page.evaluate(states))
    video = opened.page.locator("#video")
    for name in ("playsinline", "muted"):  # without them an iPhone shows it full screen, or not
        expect(video).to_have_attribute(name, "")


def test_continuous_mode_asks_about_the_newest_frame(view: View) -> None:
    view.page.add_init_script(CLOCK_CAMERA)
    view.open()
    start = view.page.evaluate("window.start")
    seen: list[tuple[float, int]] = []

    def reply(body: dict) -> list:
        now = time.time() * 1000 - start
        red, green, _ = pictures(body)[0].resize((1, 1)).getpixel((0, 0))
        seen.append((now, round((red - 8) / 16) + 16 * round((green - 8) / 16)))
        return [f"{len(seen)}: ", 0.7, "done"]

    view.server.reply = reply
    view.page.check("#continuous")
    waiting(lambda: len(seen) >= 5)
    view.page.keyboard.press("Escape")
    expect(view.page.locator("#continuous")).not_to_be_checked()
    expect(view.page.locator("#send")).to_be_visible()
    ages = [(now / 50 - frame) % 256 * 50 for now, frame in seen]
    # An answer takes 700 ms; a queue of frames would make each older than that.
    assert max(ages[1:]) < 500, ages
    steps = [(b - a) % 256 for (_, a), (_, b) in pairwise(seen)]
    assert min(steps) >= 10, steps  # some 14 frames of 50 ms pass in between, and are dropped
    count = len(seen)
    view.page.wait_for_timeout(900)
    assert len(seen) == count  # nothing more is asked
    assert all(request["messages"][0]["content"][1]["text"] for request in view.server.asked)
    assert all(len(request["messages"]) == 1 for request in view.server.asked)


def test_in_continuous_mode_an_answer_stays_until_the_next_begins(opened: View) -> None:
    opened.server.reply = lambda body: [1.0, f"Answer {len(opened.server.asked)}."]
    opened.page.check("#continuous")
    expect(opened.page.locator(".turn .text")).to_have_text("Answer 1.")
    waiting(lambda: len(opened.server.asked) == 2)
    assert opened.answer == "Answer 1."
    expect(opened.page.locator(".turn .text")).to_have_text("Answer 2.")
    opened.page.fill("#question", "Another question?")  # holds from the next frame on
    waiting(lambda: opened.messages[0]["content"][1]["text"] == "Another question?")
    opened.page.click("#stop")


def test_a_scene_that_stays_as_it_is_fills_no_history(opened: View) -> None:
    opened.server.reply = lambda body: [0.02, "A wall."]
    opened.page.check("#continuous")
    waiting(lambda: len(opened.server.asked) > 4)
    opened.server.reply = lambda body: [0.02, "A door."]
    expect(opened.page.locator(".card").first).to_contain_text("A door.")
    opened.page.click("#camera-off")  # ends the continuous mode too
    expect(opened.page.locator("#continuous")).not_to_be_checked()
    expect(opened.page.locator(".card")).to_have_count(2)
    expect(opened.page.locator(".card").last).to_contain_text("×")
    assert opened.page.evaluate("told") == ["A wall.", "A door."]


def test_continuous_mode_outlives_the_server(opened: View) -> None:
    opened.server.reply = lambda body: ["Before ", 0.2, "it."]
    opened.page.check("#continuous")
    waiting(lambda: len(opened.server.asked) > 1)
    opened.server.die()
    expect(opened.page.locator("#link")).to_have_attribute("data-state", "down")
    expect(opened.page.locator("#answer-alert")).to_contain_text("It goes on by itself.")
    opened.server.reply = lambda body: [0.1, "After it."]
    opened.server.start()
    expect(opened.page.locator(".turn .text")).to_have_text("After it.")
    expect(opened.page.locator("#answer-alert")).to_be_empty()
    expect(opened.page.locator("#continuous")).to_be_checked()


def test_continuous_mode_waits_as_a_busy_server_asks(opened: View) -> None:
    times: list[float] = []

    def reply(body: dict) -> Any:
        times.append(time.monotonic())
        if len(times) == 1:
            return Refusal(429, "The queue is full.", {"Retry-After": "1"})
        return [0.2, "Room."]

    opened.server.reply = reply
    opened.page.check("#continuous")
    expect(opened.page.locator(".turn .text")).to_have_text("Room.")
    assert times[1] - times[0] >= 1
    opened.server.reply = lambda body: Refusal(400, "No such size.")
    expect(opened.page.locator("#answer-alert")).to_have_text("No such size.")
    expect(opened.page.locator("#continuous")).not_to_be_checked()


def test_continuous_mode_rests_while_the_tab_is_hidden(opened: View) -> None:
    opened.server.reply = lambda body: [0.05, "Here."]
    opened.page.check("#continuous")
    expect(opened.page.locator(".card")).to_have_count(1)
    hide = """(hidden) => {
      Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
      document.dispatchEvent(new Event("visibilitychange"));
    }"""
    opened.page.evaluate(hide, True)
    expect(opened.page.locator("#pause")).to_have_text("Paused while this tab is hidden.")
    opened.page.wait_for_timeout(300)
    count = len(opened.server.asked)
    opened.page.wait_for_timeout(500)
    assert len(opened.server.asked) == count
    opened.page.evaluate(hide, False)
    expect(opened.page.locator("#pause")).to_contain_text("goes on")
    waiting(lambda: len(opened.server.asked) > count + 1)
    expect(opened.page.locator("#pause")).to_be_empty()


def test_a_muted_and_an_unplugged_camera_are_said_and_resumed(opened: View) -> None:
    opened.server.reply = lambda body: [0.05, "Here."]
    opened.page.check("#continuous")
    expect(opened.page.locator(".card")).to_have_count(1)
    tell = "(name) => video.srcObject.getTracks()[0].dispatchEvent(new Event(name))"
    pause = opened.page.locator("#pause")

    def rests() -> int:
        opened.page.wait_for_timeout(300)
        count = len(opened.server.asked)
        opened.page.wait_for_timeout(400)
        assert len(opened.server.asked) == count
        return count

    opened.page.evaluate(tell, "mute")
    expect(pause).to_contain_text("sends no picture")
    count = rests()
    opened.page.evaluate(tell, "unmute")
    expect(pause).to_be_empty()
    waiting(lambda: len(opened.server.asked) > count)

    devices = "navigator.mediaDevices.enumerateDevices"
    opened.page.evaluate(f"window.real = {devices}.bind(navigator.mediaDevices), 0")
    opened.page.evaluate(f"{devices} = async () => [], 0")
    opened.page.evaluate(tell, "ended")
    expect(pause).to_contain_text("disconnected")
    count = rests()
    opened.page.evaluate(f"{devices} = window.real, 0")
    waiting(lambda: len(opened.server.asked) > count)
    expect(pause).to_be_empty()
    expect(opened.page.locator("#continuous")).to_be_checked()


def test_denied_missing_and_busy_cameras_are_told_apart(opened: View) -> None:
    said = set()
    for name in ("NotAllowedError", "NotFoundError", "NotReadableError"):
        opened.page.evaluate(
            """(name) => {
              const fail = () => Promise.reject(new DOMException("", name));
              navigator.mediaDevices.getUserMedia = fail;
            }""",
            name,
        )
        opened.page.locator("#picture-alert").evaluate("(alert) => alert.replaceChildren()")
        opened.page.click("#camera-on" if name == "NotFoundError" else "#continuous")
        expect(opened.page.locator("#picture-alert")).to_contain_text("camera")
        said.add(opened.text("#picture-alert"))
        expect(opened.page.locator("#continuous")).not_to_be_checked()
        expect(opened.page.locator("#empty")).to_be_visible()
    assert len(said) == 3
    assert all(sentence.endswith(".") and "camera" in sentence.lower() for sentence in said)


def test_on_plain_http_one_sentence_says_why_there_is_no_camera(view: View) -> None:
    view.open(view.server.address.replace("127.0.0.1", "phone.test"))
    assert not view.page.evaluate("isSecureContext")
    view.page.click("#camera-on")
    expect(view.page.locator("#picture-alert")).to_contain_text("--certfile")
    view.choose(PENGUINS)
    view.ask("How many?")
    # Copying works there too, though there is no navigator.clipboard.
    assert view.page.evaluate("navigator.clipboard") is None
    view.page.click("#copy")
    waiting(lambda: view.page.evaluate("window.told.at(-1)") == "Copied.")
    view.page.fill("#question", "")
    view.page.focus("#question")
    view.page.keyboard.press("ControlOrMeta+v")
    expect(view.page.locator("#question")).to_have_value("There are 6 penguins.")


# The server comes and goes


def test_a_server_that_dies_within_an_answer_and_comes_back_is_noticed(shown: View) -> None:
    shown.server.reply = lambda body: ["Half ", *[0.05, "and "] * 100]
    shown.page.fill("#question", "Tell me.")
    shown.page.click("#send")
    expect(shown.page.locator(".turn .text")).to_contain_text("and")
    shown.server.die()
    alert = shown.page.locator("#answer-alert")
    expect(alert).to_contain_text("The server went away before the answer was complete.")
    expect(shown.page.locator(".turn .finish")).to_contain_text("Broken off")
    expect(shown.page.locator(".card")).to_contain_text("Half and")
    expect(shown.page.locator("#link")).to_have_attribute("data-state", "down")
    shown.server.model = {"id": "FastVLM-7B", "fastvlm": {"precision": "float16"}}
    shown.server.reply = lambda body: ["Whole."]
    shown.server.start()
    expect(shown.page.locator("#link")).to_have_text("Connected")
    expect(shown.page.locator("#model")).to_have_text("FastVLM-7B")
    alert.get_by_role("button", name="Try again").click()
    expect(shown.page.locator(".turn .text")).to_have_text("Whole.")
    assert shown.server.asked[-1]["model"] == "FastVLM-7B"


def test_another_model_behind_the_same_address_is_found_out(shown: View) -> None:
    shown.server.model = {"id": "another"}  # the server was restarted, faster than one can notice

    def reply(body: dict) -> Any:
        return ["Yes."] if body["model"] == "another" else Refusal(404, "There is no such model.")

    shown.server.reply = reply
    shown.page.fill("#question", "Are you there?")
    shown.page.click("#send")
    shown.page.locator("#answer-alert button").click()
    expect(shown.page.locator(".card .text")).to_have_text("Yes.")
    expect(shown.page.locator("#model")).to_have_text("another")


def test_a_host_that_the_server_refuses_is_said_once(view: View) -> None:
    view.server.stranger = True
    view.page.goto(view.server.address)
    expect(view.page.locator("#link")).to_have_text("Not allowed")
    expect(view.page.locator("#answer-alert")).to_have_text("Another server is meant.")
    view.page.locator("#answer-alert").evaluate("(alert) => alert.replaceChildren()")
    view.page.wait_for_timeout(2500)  # while it is asked again and again
    expect(view.page.locator("#answer-alert")).to_be_empty()
    view.server.stranger = False
    expect(view.page.locator("#link")).to_have_text("Connected")


def test_a_model_that_has_stopped_is_said(opened: View) -> None:
    opened.server.healthy = False
    expect(opened.page.locator("#link")).to_have_text("Model stopped")
    opened.server.healthy = True
    expect(opened.page.locator("#link")).to_have_text("Connected")


def test_a_key_is_asked_for_and_sent(view: View) -> None:
    view.server.key = "correct horse"
    view.page.goto(view.server.address)
    dialog = view.page.locator("#key-dialog")
    expect(dialog).to_be_visible()
    expect(view.page.locator("#key")).to_be_focused()
    view.page.keyboard.type("wrong")
    view.page.keyboard.press("Enter")
    expect(view.page.locator("#key-said")).to_contain_text("did not accept")
    view.page.keyboard.type("correct horse")
    view.page.keyboard.press("Enter")
    expect(dialog).not_to_be_visible()
    expect(view.page.locator("#link")).to_have_text("Connected")
    view.choose(PENGUINS)
    view.ask("How many?")
    assert "correct horse" not in json.dumps(view.page.evaluate("({ ...localStorage })"))
    view.open()  # it is known until the tab is closed
    expect(dialog).not_to_be_visible()


def test_a_key_that_changes_or_is_not_given_is_asked_for_again(shown: View) -> None:
    shown.server.key = "new"
    shown.page.fill("#question", "How many?")
    shown.page.click("#send")
    expect(shown.page.locator("#key-dialog")).to_be_visible()
    shown.page.keyboard.press("Escape")
    expect(shown.page.locator("#answer-alert")).to_have_text("This server needs its API key.")
    expect(shown.page.locator("#link")).to_have_text("Key needed")
    expect(shown.page.locator("#question")).to_have_value("How many?")
    shown.page.click("#send")
    expect(shown.page.locator("#key")).to_be_focused()
    shown.page.keyboard.type("new")
    shown.page.keyboard.press("Enter")
    expect(shown.page.locator(".card")).to_have_count(1)  # the question went out by itself


# The history


def exported(view: View) -> list[dict]:
    with view.page.expect_download() as download:
        view.page.click("#export")
    assert download.value.suggested_filename == "fastvlm-history.jsonl"
    text = Path(download.value.path()).read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [json.loads(line) for line in text.removesuffix("\n").split("\n")]


def test_the_history_stays_and_is_exported_as_jsonl(shown: View) -> None:
    answers = ["Two\nlines “and” 漢字.", "🐧"]
    for answer in answers:
        shown.server.reply = lambda body, answer=answer: [answer]
        shown.ask(f"Question {answer}?")
    for _ in range(2):
        rows = exported(shown)
        assert [row["answer"] for row in rows] == answers  # oldest first
        assert [row["prompt"] for row in rows] == [f"Question {answer}?" for answer in answers]
        assert {"time", "model", "precision", "image_size", "timings", "usage"} <= rows[0].keys()
        assert rows[0]["timings"]["encode"] == 0.0884
        assert rows[0]["images"][0]["name"] == "penguins.png"
        data = rows[0]["images"][0]["thumb"]
        assert data.startswith("data:image/jpeg;base64,")
        expect(shown.page.locator(".card .text").first).to_have_text("🐧")
        expect(shown.page.locator(".card img").first).to_be_visible()
        shown.open()  # as after the next start


def test_answers_are_copied_deleted_and_cleared(shown: View) -> None:
    for n in range(3):
        shown.server.reply = lambda body, n=n: [f"Answer {n}"]
        shown.ask("Which?")
    shown.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    shown.page.get_by_label("Copy this answer").last.click()
    waiting(lambda: shown.page.evaluate("navigator.clipboard.readText()") == "Answer 0")
    shown.page.get_by_label("Delete this answer").first.click()
    expect(shown.page.locator(".card .text")).to_have_text(["Answer 1", "Answer 0"])
    shown.page.click("#clear")
    shown.page.get_by_role("button", name="Keep", exact=True).click()
    expect(shown.page.locator(".card")).to_have_count(2)
    shown.page.click("#clear")
    expect(shown.page.locator("#clear-said")).to_contain_text("2 answers")
    shown.page.locator("#clear-dialog").get_by_role("button", name="Clear").click()
    expect(shown.page.locator("#history")).not_to_be_visible()
    shown.open()
    expect(shown.page.locator(".card")).to_have_count(0)


def test_a_full_storage_loses_nothing(shown: View) -> None:
    shown.ask("Before?")
    fill = """() => {
      for (let size = 2 ** 22; size >= 1; size = Math.floor(size / 2))
        for (let n = 0; ; n++)
          try {
            localStorage.setItem(`filler ${size} ${n}`, "x".repeat(size));
          } catch {
            break;
          }
    }"""
    shown.page.evaluate(fill)
    for question in ("Full?", "Still?"):
        shown.ask(question)
    expect(shown.page.locator("#history-alert")).to_contain_text("storage is full")
    shown.page.fill("#question", "A prompt of my own")
    shown.page.click("#keep")
    expect(shown.page.locator(".chip", has_text="A prompt of my own")).to_be_visible()
    assert [row["prompt"] for row in exported(shown)] == ["Before?", "Full?", "Still?"]
    # Leaving the page now would lose them, so the browser asks; whoever makes room keeps them all.
    stops = "() => !dispatchEvent(new Event('beforeunload', { cancelable: true }))"
    assert shown.page.evaluate(stops)
    shown.page.evaluate(
        """() => {
          const names = Object.keys(localStorage).filter((name) => name.startsWith("filler"));
          for (const name of names) localStorage.removeItem(name);
        }"""
    )
    shown.page.get_by_label("Delete this answer").first.click()
    expect(shown.page.locator("#history-alert")).to_be_empty()
    assert not shown.page.evaluate(stops)
    shown.open()
    expect(shown.page.locator(".card h3")).to_have_text(["Full?", "Before?"])


def test_a_browser_that_keeps_nothing_still_answers(view: View) -> None:
    view.page.add_init_script(
        "for (const name of ['localStorage', 'sessionStorage'])"
        "  Object.defineProperty(window, name, { get() { throw new DOMException('no'); } });"
    )
    view.open()
    view.choose(PENGUINS)
    view.ask("How many?")
    expect(view.page.locator("#history-alert")).to_contain_text("storage is full or closed")
    assert len(exported(view)) == 1


def test_a_long_history_shows_its_newest_first(view: View) -> None:
    view.open()
    view.page.evaluate(
        """() => {
          for (let n = 0; n < 120; n++) {
            const time = new Date(1e12 + n * 1000).toISOString();
            const entry = { id: `${n}`, time, prompt: "?", answer: `Answer ${n}`, images: [] };
            localStorage.setItem(`fastvlm:answer:${n}`, JSON.stringify(entry));
          }
          localStorage.setItem("fastvlm:answer:broken", "{");
        }"""
    )
    view.open()
    expect(view.page.locator(".card .text").first).to_have_text("Answer 119")
    expect(view.page.locator(".card")).to_have_count(48)
    view.page.click("#more")
    expect(view.page.locator(".card")).to_have_count(96)
    assert len(exported(view)) == 120


# Prompts and settings


def test_prompts_are_offered_and_own_ones_kept(shown: View) -> None:
    chips = shown.page.locator(".chip")
    names = ["Describe", "Count", "Read", "Expression", "Emoji", "Yes or no"]
    expect(chips).to_have_text(names)
    for name in names:
        shown.page.get_by_role("button", name=name, exact=True).click()
        expect(shown.page.locator(".chip[aria-pressed=true]")).to_have_text(name)
    selected = "question.value.slice(question.selectionStart, question.selectionEnd)"
    assert shown.page.evaluate(selected) == "a person"  # what to write over
    shown.page.fill("#question", "Is the <door> open?")
    shown.page.click("#keep")
    shown.open()
    own = chips.last
    expect(own).to_have_text("Is the <door> open?")
    own.click()
    expect(shown.page.locator("#question")).to_have_value("Is the <door> open?")
    shown.page.get_by_label("Forget the prompt Is the <door> open?").click()
    shown.open()
    expect(chips).to_have_text(names)


def test_the_model_is_shown_and_the_image_size_can_be_chosen(shown: View) -> None:
    assert shown.text("#model") == "FastVLM-0.5B" and shown.text("#precision") == "4 bits"
    values = shown.page.locator("#size option").evaluate_all("all => all.map(o => o.value)")
    assert "1024" in values and all(int(value) % 64 == 0 for value in values)
    assert "512 px · 64 tokens" in shown.page.locator("#size").inner_text()
    shown.page.select_option("#size", "512")
    shown.ask("How many?")
    assert shown.server.asked[-1]["image_size"] == 512
    shown.open()
    expect(shown.page.locator("#size")).to_have_value("512")


def test_visual_tokens_are_counted_in_the_models_own_patches(view: View) -> None:
    facts = {"precision": "4 bits", "image_size": 384, "patch_size": 32}
    view.server.model = {"id": "another", "fastvlm": facts}
    view.open()
    sizes = view.page.locator("#size option")
    values = sizes.evaluate_all("all => all.map(o => +o.value)")
    assert 384 in values and all(value % 32 == 0 for value in values)
    said = sizes.evaluate_all("all => all.map(o => o.textContent)")
    assert "384 px · 144 tokens ✓" in said


def test_another_servers_models_are_enough(view: View) -> None:
    view.server.model = {"id": "some/model"}
    view.open()
    view.choose(PENGUINS)
    view.ask("How many?")
    assert "image_size" not in view.server.asked[-1]
    expect(view.page.locator("#precision")).not_to_be_visible()
    expect(view.page.locator("#size-label")).not_to_be_visible()


def test_nano_says_what_it_can_do_until_it_is_known(view: View) -> None:
    view.server.model = {"id": "nano", "fastvlm": {"precision": "8 bits", "image_size": 256}}
    view.open()
    expect(view.page.locator("#note")).to_contain_text("names emoji")
    view.page.get_by_label("Close this note").click()
    view.open()
    expect(view.page.locator("#note")).not_to_be_visible()


# Keyboard, screen reader, widths


def test_all_goes_by_keyboard(opened: View) -> None:
    page = opened.page
    page.keyboard.press("Tab")
    reached = []
    for _ in range(40):
        element = page.evaluate(
            """() => {
              const { activeElement: at } = document;
              const style = getComputedStyle(at);
              const visible = style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 1;
              const name = at.id || at.textContent || at.firstElementChild?.alt;
              return [name, at === document.body || visible];
            }"""
        )
        if element[0] in reached or element[0] == "":
            break
        assert element[1], f"{element[0]} shows no focus"
        reached.append(element[0])
        page.keyboard.press("Tab")
    expected = ["size", "choose", "camera-on", "reading", "Describe", "Yes or no", "question"]
    order = [reached.index(name) for name in [*expected, "send", "chat", "continuous"]]
    assert order == sorted(order)
    opened.choose(PENGUINS)
    expect(page.locator("#question")).to_be_focused()
    page.keyboard.type("Line one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("Line two")
    assert opened.server.asked == []
    opened.server.reply = lambda body: ["On ", *[0.05, "and on "] * 200]
    page.keyboard.press("Enter")
    expect(page.locator(".turn .text")).to_contain_text("and on")
    assert opened.messages[0]["content"][1]["text"] == "Line one\nLine two"
    page.keyboard.press("Enter")  # while an answer comes in, nothing is sent and nothing lost
    page.keyboard.press("Escape")
    expect(page.locator(".turn .finish")).to_have_text("Stopped.")
    expect(page.locator("#question")).to_have_value("Line one\nLine two")
    assert len(opened.server.asked) == 1


def test_composing_a_word_never_sends(shown: View) -> None:
    shown.page.focus("#question")
    session = shown.page.context.new_cdp_session(shown.page)
    compose = {"text": "にほん", "selectionStart": 3, "selectionEnd": 3}
    session.send("Input.imeSetComposition", compose)
    key = {"type": "rawKeyDown", "key": "Enter", "code": "Enter"}
    session.send("Input.dispatchKeyEvent", key | {"windowsVirtualKeyCode": 229})
    press = """(composing) => question.dispatchEvent(new KeyboardEvent("keydown",
      { key: "Enter", keyCode: composing ? 13 : 229, isComposing: composing, bubbles: true }))"""
    shown.page.evaluate(press, True)
    shown.page.evaluate(press, False)  # Safari's, just after the end of composing
    session.send("Input.insertText", {"text": "日本"})
    shown.page.wait_for_timeout(200)
    assert shown.server.asked == []
    expect(shown.page.locator("#question")).to_have_value("日本")
    shown.page.keyboard.press("Enter")
    expect(shown.page.locator(".card h3")).to_have_text("日本")


def check_width(view: View) -> None:
    wide = view.page.evaluate("document.scrollingElement.scrollWidth - innerWidth")
    assert wide <= 0, f"{wide} pixels too wide"
    small = view.page.locator("button:visible, select:visible, summary:visible").evaluate_all(
        """all => all.map((node) => [node.id || node.textContent, node.getBoundingClientRect()])
          .filter(([, box]) => box.width < 24 || box.height < 24).map(([name]) => name)"""
    )
    assert small == [], "too small to touch"


def check_accessible(view: View) -> None:
    if not view.page.evaluate("typeof axe === 'object'"):
        view.page.evaluate(AXE.read_text(encoding="utf-8") + "; 0")
    found = view.page.evaluate("axe.run(document, { resultTypes: ['violations'] })")
    assert found["passes"] or found["violations"]
    said = [
        f"{fault['id']}: {node['html'][:150]} {node['failureSummary']}"
        for fault in found["violations"]
        for node in fault["nodes"]
    ]
    assert said == []


@pytest.mark.parametrize(
    "width, scheme", [("phone", "dark"), ("tablet", "light"), ("desktop", "dark")]
)
def test_every_state_is_accessible_and_fits(
    browser: Any, backend: PageServer, width: str, scheme: str
) -> None:
    size = dict(zip(("width", "height"), WIDTHS[width], strict=True))
    # Without motion, so that colours are measured as they stay.
    calm = {"reduced_motion": "reduce", "color_scheme": scheme}
    context = browser.new_context(viewport=size, **calm)
    view = View(context, backend)

    def check() -> None:
        check_width(view)
        check_accessible(view)

    backend.key = "key"
    backend.model["id"] = "nano-with-a-name-that-is-longer-than-any-phone-is-wide-really"
    view.page.goto(backend.address)
    view.page.locator("#key-dialog").wait_for()
    check()
    backend.key = ""
    view.page.fill("#key", "key")
    view.page.keyboard.press("Enter")
    view.page.locator("#link[data-state=up]").wait_for()
    check()  # empty
    view.choose(PENGUINS)
    view.choose(QUEEN, by="#add")
    view.page.fill("#question", "Donaudampfschifffahrtsgesellschaftskapitänsmützenabzeichen?")
    view.page.click("#keep")
    view.page.check("#chat")
    for answer in ("🐧", "Six.", "Donaudampfschifffahrtsgesellschaftskapitän " * 60):
        backend.reply = lambda body, answer=answer: [answer]
        view.ask("Donaudampfschifffahrtsgesellschaftskapitänsmützenabzeichen?")
    view.page.click("#details summary")
    view.page.locator(".card summary").first.click()
    check()  # a chat, its figures and the history
    backend.reply = lambda body: Refusal(429, "The queue is full.")
    view.page.fill("#question", "And now?")
    view.page.click("#send")
    view.page.set_input_files("#file", AXE)
    expect(view.page.locator("#picture-alert")).not_to_be_empty()
    expect(view.page.locator("#answer-alert")).not_to_be_empty()
    check()  # errors
    view.page.click("#camera-on-2")
    backend.reply = lambda body: ["Here ", 30.0]
    view.page.check("#continuous")
    expect(view.page.locator(".turn .text").last).to_contain_text("Here")
    check()  # the camera, while an answer comes in
    view.page.click("#stop")
    view.page.click("#clear")
    check()  # a question before something is deleted
    context.close()
    assert view.faults == []


# The server of the package


@pytest.mark.needs("fastapi")
@pytest.mark.needs("uvicorn")
@pytest.mark.needs("prometheus_client")
def test_the_packages_own_server_and_the_page_understand_each_other(view: View) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "fastvlm_mlx", "serve", "--port", str(port)]
    environment = os.environ | {"FASTVLM_API_KEY": "a key", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    try:
        waiting(lambda: listens(port), 60)
        view.page.goto(f"http://127.0.0.1:{port}/")
        view.page.fill("#key", "a key")
        view.page.keyboard.press("Enter")
        expect(view.page.locator("#model")).to_have_text("nano")
        expect(view.page.locator("#size")).to_have_value("256")
        view.page.get_by_role("button", name="Some penguins").click()
        view.page.click("#send")
        answer = view.page.locator(".card .text")
        expect(answer).to_have_text("There are 6 penguins.", timeout=30000)
        timings = exported(view)[0]["timings"]
        assert 0 < timings["encode"] < timings["first_token"]
        assert timings["queue"] + timings["read"] + timings["prefill"] < timings["first_token"]
        assert timings["tokens_per_second"] > 0
        view.page.check("#chat")
        view.page.set_default_timeout(30000)
        view.ask("How many objects are there?")
        expect(view.page.locator(".turn")).to_have_count(2)
        process.terminate()
        link = view.page.locator("#link")
        expect(link).to_have_attribute("data-state", "down", timeout=30000)
    finally:
        process.kill()
        process.wait()


def listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


# The files


def test_the_page_is_small_and_needs_nothing_from_elsewhere() -> None:
    files = {path.name: path.read_bytes() for path in PAGE.iterdir()}
    assert sum(map(len, files.values())) < 100_000
    for name in ("index.html", "app.js", "style.css"):
        text = files[name].decode()
        for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
            assert word not in text, f"{name} has {word}"
        addresses = [part.split("'")[0].split('"')[0] for part in text.split("http")[1:]]
        assert {a for a in addresses if a.startswith(("://", "s://"))} <= {
            "://www.w3.org/2000/svg"  # a name, which nothing fetches
        }
    html = files["index.html"].decode()
    assert " style=" not in html and " onclick=" not in html and "<style" not in html
    assert 'src="/' not in html and 'href="/' not in html


@pytest.mark.needs("setuptools")
def test_the_page_is_installed_with_the_package(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    installed = tmp_path / "fastvlm_mlx" / "serve" / "page"
    assert {path.name for path in installed.iterdir()} == {path.name for path in PAGE.iterdir()}
