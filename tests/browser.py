"""Chromium for the tests of the page, and what they do in it again and again."""

import base64
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import page_server
import pytest

MAC = "/Applications/{0}.app/Contents/MacOS/{0}"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
ARGUMENTS = (
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
    "--host-resolver-rules=MAP phone.test 127.0.0.1",  # another device, on plain http
)

# A camera whose every frame says when it was drawn: 256 times in turn, 50 ms each.
CLOCK_CAMERA = """
    window.start = Date.now();
    navigator.mediaDevices.getUserMedia = async () => {
      const canvas = document.createElement("canvas");
      canvas.width = 320;
      canvas.height = 240;
      const context = canvas.getContext("2d");
      setInterval(() => {
        const n = Math.floor((Date.now() - window.start) / 50) % 256;
        context.fillStyle = `rgb(${(n % 16) * 16 + 8}, ${Math.floor(n / 16) * 16 + 8}, 0)`;
        context.fillRect(0, 0, 320, 240);
      }, 10);
      return canvas.captureStream(30);
    };
"""
# Says what a screen reader is told.
LISTEN = """
    window.told = [];
    addEventListener("DOMContentLoaded", () => {
      const place = document.getElementById("announce");
      const hear = () => place.textContent && window.told.push(place.textContent);
      new MutationObserver(hear).observe(place, { childList: true, subtree: true });
    });
"""


def executable() -> str | None:
    on_a_mac = [MAC.format(name) for name in ("Chromium", "Google Chrome")]
    found = [*map(shutil.which, NAMES), *(path for path in on_a_mac if Path(path).exists())]
    return next(filter(None, found), None)


@contextmanager
def launched() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        path = executable()
        if path is None and Path(playwright.chromium.executable_path).exists():
            path = playwright.chromium.executable_path
        if path is None:
            pytest.skip("no Chromium was found; `apt-get install chromium` brings it")
        browser = playwright.chromium.launch(executable_path=path, args=list(ARGUMENTS))
        yield browser
        browser.close()


class View:
    """One open page; the tests' verbs."""

    def __init__(self, context: Any, server: page_server.PageServer) -> None:
        self.server = server
        self.page = context.new_page()
        self.page.set_default_timeout(8000)
        self.faults: list[str] = []
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("console", self._note)
        self.page.add_init_script(LISTEN)

    def _note(self, message: Any) -> None:
        if "Content Security Policy" in message.text or "went wrong" in message.text:
            self.faults.append(message.text[:300])

    def open(self, address: str = "", state: str = "up") -> "View":
        self.page.goto(address or self.server.address)
        self.page.locator(f"#link[data-state={state}]").wait_for()
        return self

    def choose(self, *paths: Path, by: str = "#choose") -> None:
        with self.page.expect_file_chooser() as chooser:
            self.page.click(by)
        chooser.value.set_files([str(path) for path in paths])
        self.page.locator("#stage[data-state=pictures]").wait_for()

    def hand_over(self, event: str, path: Path, kind: str = "image/png") -> None:
        """Drop or paste a file, as a browser tells of it."""
        self.page.evaluate(
            """([event, name, kind, data]) => {
              const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
              const transfer = new DataTransfer();
              transfer.items.add(new File([bytes], name, { type: kind }));
              const all = { bubbles: true, cancelable: true };
              const target = document.getElementById("stage");
              const happened =
                event === "paste"
                  ? new ClipboardEvent("paste", { ...all, clipboardData: transfer })
                  : new DragEvent(event, { ...all, dataTransfer: transfer });
              target.dispatchEvent(happened);
            }""",
            [event, path.name, kind, base64.b64encode(path.read_bytes()).decode()],
        )

    def ask(self, question: str) -> None:
        """Ask, and wait until the answer is complete."""
        count = self.page.locator(".card").count()
        self.page.fill("#question", question)
        self.page.click("#send")
        self.page.locator(".card").nth(count).wait_for()

    def text(self, selector: str) -> str:
        return self.page.locator(selector).inner_text()

    @property
    def answer(self) -> str:
        return self.page.locator(".turn .text").last.inner_text()

    @property
    def messages(self) -> list[dict]:
        """Those of the last request."""
        return self.server.asked[-1]["messages"]
