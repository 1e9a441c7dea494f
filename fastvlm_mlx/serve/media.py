"""Images as requests name them → PIL images, within what the server allows."""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from ..checks import reason
from ..http import Pin
from ..image.addresses import NotPublicError, public_address
from ..image.decode import Picture, Purpose, from_file
from ..image.download import TIMEOUT, download_bytes
from ..image.load import from_data_url
from .errors import bad
from .settings import IMAGES_OF_MOST_PIXELS, Settings
from .videos import Messages, frames_of_each, show, video_sources, with_frames

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

# What a path or URL has within its first letters, and base64 has not
NO_BASE64 = frozenset(":.\\ ~")
LONGEST_PATH = 4096
BASE64_URL = str.maketrans("-_", "+/")
# The beginnings of the files that are decoded; whatever else PIL can read stays shut.
IMAGE_MARKS = (
    b"\xff\xd8\xff",  # JPEG
    b"\x89PNG\r\n\x1a\n",
    b"GIF87a",
    b"GIF89a",
    b"BM",  # BMP
    b"II*\0",  # TIFF
    b"MM\0*",
)
AT_ONCE = 6  # images that are read at a time; each may take as many pixels as are allowed


class Media:
    """Reads the images of requests.

    Args:
        settings: what is allowed.
        pin: chooses the address of each host of a remote image; by default a checked public one.
    """

    def __init__(self, settings: Settings, pin: Pin = public_address):
        self._settings = settings
        self._pin = pin
        self._threads = ThreadPoolExecutor(AT_ONCE, "images")

    async def read(self, messages: Messages) -> list[dict[str, Any]]:
        """The messages with images, instead of what names them, in their image parts; videos
        become a few of their frames.

        Raises:
            ApiError: there are too many images, one is not allowed, or one can't be read.
        """
        messages = await self._show_videos(messages)
        sources = [part["image"] for part in image_parts(messages)]
        limit = self._settings.max_images
        if len(sources) > limit:
            raise bad(f"The request has {len(sources)} images; at most {limit} are allowed.")
        read = await asyncio.gather(*map(self._read, sources, count(1)))
        most = IMAGES_OF_MOST_PIXELS * self._settings.max_image_pixels
        if sum(image.width * image.height for image in read) > most:
            raise bad(f"The images have more than {most:,} pixels together; send fewer or smaller.")
        images = iter(read)
        return [
            {
                "role": message["role"],
                "content": [
                    {"type": "image", "image": next(images)} if part["type"] == "image" else part
                    for part in message["content"]
                ],
            }
            for message in messages
        ]

    async def _show_videos(self, messages: Messages) -> Messages:
        """The messages with frames in the places of their videos."""
        sources = video_sources(messages)
        if not sources:
            return messages
        images = len(image_parts(messages))
        limit = self._settings.max_images
        if images + len(sources) > limit:
            raise bad(f"The request has more than {limit} images and videos.")
        frames = frames_of_each(len(sources), images, limit)
        loop = asyncio.get_running_loop()
        shown = [
            loop.run_in_executor(self._threads, self._show_video, source, f"video {i}", frames)
            for i, source in enumerate(sources, 1)
        ]
        return with_frames(messages, await asyncio.gather(*shown))

    def _show_video(self, source: str, name: str, frames: int) -> list[dict[str, Any]]:
        try:
            data, limit = self._bytes(source, name), self._settings.max_image_bytes
            if len(data) > limit:
                raise ValueError(f"Cannot read {name}: it has more than {limit:,} bytes.")
            return show(data, name, frames, self._settings.max_image_pixels)
        except ImportError:
            raise bad("This server reads no videos: it needs the extra video.") from None
        except (ValueError, OSError) as error:
            raise bad(str(error), code="invalid_video") from None

    async def _read(self, source: str | PILImage, number: int) -> PILImage:
        if not isinstance(source, str):
            return source  # a frame of a video
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self.open, source, f"image {number}")

    def close(self) -> None:
        """End the threads, without waiting for what they still read."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def open(self, source: str, name: str) -> PILImage:
        """The image that a text of a request names, as a person sees it.

        Args:
            source: a data URI, base64, an http or https URL, a file URL or a path.
            name: what errors call it.

        Raises:
            ApiError: it is not allowed, or can't be read.
        """
        try:
            data = self._bytes(source, name)
            self._check_bytes(data, name)
            return from_file(BytesIO(data), name, Purpose(self._check_size, None)).upright()
        except (ValueError, OSError) as error:
            raise bad(str(error), code="invalid_image") from None

    def _bytes(self, source: str, name: str) -> bytes:
        source = source.strip()
        kind = source[:8].lower()
        if kind.startswith("data:"):
            return _from_data(source, name)
        if kind.startswith(("http://", "https://")):
            return self._download(source, name)
        if kind.startswith("file:") or _is_path(source):
            return self._from_disk(source, name)
        return _from_data(f"data:;base64,{source}", name)

    def _download(self, url: str, name: str) -> bytes:
        if not self._settings.allow_remote_images:
            raise ValueError(
                f"Cannot read {name}: images by URL are off here; send it as a data URI, or start "
                "the server with --allow-remote-images."
            )
        try:
            limit = self._settings.max_image_bytes
            return download_bytes(url, name, TIMEOUT, limit, pin=self._pin)
        except NotPublicError as error:
            raise ValueError(f"Cannot read {name}: {reason(error)}.") from None

    def _from_disk(self, source: str, name: str) -> bytes:
        root = self._settings.media_root
        if root is None:
            raise ValueError(
                f"Cannot read {name}: files of the server are not open here; send it as a data "
                "URI, or start the server with --media-root FOLDER."
            )
        try:
            return read_below(root, _path_of(source), self._settings.max_image_bytes)
        except (OSError, ValueError):  # whether a file is there is no request's business
            raise ValueError(
                f"Cannot read {name}: there is no such file below the server's media root, or it "
                "is too large."
            ) from None

    def _check_bytes(self, data: bytes, name: str) -> None:
        limit = self._settings.max_image_bytes
        if len(data) > limit:
            raise ValueError(f"Cannot read {name}: it has more than {limit:,} bytes.")
        if not is_listed(data[:16]):
            raise ValueError(
                f"Cannot read {name}: it is not an image in JPEG, PNG, WebP, GIF, BMP, TIFF, HEIC "
                "or AVIF."
            )

    def _check_size(self, picture: Picture) -> None:
        (width, height), limit = picture.full_size, self._settings.max_image_pixels
        if width * height > limit:
            raise ValueError(
                f"An image has {width} × {height} pixels; at most {limit:,} are allowed."
            )


def image_parts(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The parts of messages that are images, in order."""
    return [part for m in messages for part in m["content"] if part["type"] == "image"]


def is_listed(head: bytes) -> bool:
    """Whether a file that begins so is of a kind that the server decodes."""
    webp = head[:4] == b"RIFF" and head[8:12] == b"WEBP"
    heic_or_avif = head[4:8] == b"ftyp"
    return webp or heic_or_avif or head.startswith(IMAGE_MARKS)


def read_below(root: Path, path: str, max_bytes: int) -> bytes:
    """The bytes of a regular file below a folder, wherever links lead.

    Args:
        root: the folder.
        path: absolute, or from the folder on.
        max_bytes: the largest file.

    Raises:
        OSError, ValueError: there is no such file there, or it is larger.
    """
    folder = os.path.realpath(root)
    real = os.path.realpath(os.path.join(folder, path))
    if os.path.commonpath([folder, real]) != folder:
        raise ValueError("outside")
    # The real path has no links; if one was put there meanwhile, it is not followed. Opening a
    # named pipe must not wait for its writer.
    number = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(number, "rb") as file:
        found = os.fstat(number)
        if not stat.S_ISREG(found.st_mode) or found.st_size > max_bytes:
            raise ValueError("not a file of that size")
        return file.read(max_bytes + 1)


def _path_of(source: str) -> str:
    """The path in a file URL, or the path itself; ValueError for a URL of another host."""
    if source[:5].lower() != "file:":
        return source
    parts = urlsplit(source)
    if parts.netloc not in ("", "localhost"):
        raise ValueError("another host")
    return unquote(parts.path)


def _is_path(source: str) -> bool:
    """Whether a text is a path rather than base64, whose letters include the slash."""
    if len(source) > LONGEST_PATH:
        return False
    return bool(NO_BASE64 & set(source[:LONGEST_PATH])) or not _looks_encoded(source)


def _looks_encoded(source: str) -> bool:
    """Whether a text begins as an image does in base64."""
    letters = "".join(source[:256].split())[:24].translate(BASE64_URL)
    try:
        return is_listed(from_data_url(f"data:;base64,{letters}", ""))
    except ValueError:
        return False


def _from_data(url: str, name: str) -> bytes:
    """The bytes of a data URI, in base64 if it says so or looks so; both alphabets are read."""
    header, comma, payload = url.partition(",")
    plain = not header.lower().rstrip().endswith(";base64")
    if plain and comma and _looks_encoded(payload):
        header, plain = f"{header};base64", False
    return from_data_url(
        url if plain else f"{header.rstrip()},{payload.translate(BASE64_URL)}", name
    )
