"""What a server allows, and where it listens: a value each, without any library of the server."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, fields
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

from ..checks import check_whole_number, is_number, reason, shown

KEEP_ALIVE = 10.0  # seconds after which a waiting client hears that it is not forgotten
MIB = 2**20
IMAGES_OF_MOST_PIXELS = 4


@dataclass(frozen=True)
class Settings:
    """What a server allows; the flags of `fastvlm serve`.

    Attributes:
        api_key: what clients must send as `Authorization: Bearer …` or `x-api-key`; None for no
            key.
        cors: origins of web pages on other hosts that may use the server, as in
            "https://example.com".
        allowed_hosts: names under which the server may be addressed, beside localhost and IP
            addresses; any other name in the Host header is refused, as DNS rebinding needs one.
        allow_remote_images: fetch images of requests from public addresses of the Internet.
        media_root: folder below which requests may name files; None for nowhere.
        max_body: bytes of a request.
        max_image_bytes: bytes of an image's file.
        max_image_pixels: width × height of an image; those of a request together may have
            `IMAGES_OF_MOST_PIXELS` times as many.
        max_images: images of a request.
        max_prompt_tokens: tokens of a prompt, images included; None for the model's own limit.
        max_output_tokens: tokens of an answer: the most that a request may ask for, and what it
            gets if it does not say.
        timeout: seconds from a request to the end of its answer.
        stall_timeout: seconds that a step of the engine, as long as the encoding of some images,
            may take before the server counts as hung.
        log_prompts: whether logs have the texts of prompts and answers.
        keep_alive: seconds after which a client that waits is sent a sign of life.

    Raises:
        ValueError: a number is out of its range, a key is empty, or an origin is none.
    """

    api_key: str | None = None
    cors: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    allow_remote_images: bool = False
    media_root: Path | None = None
    max_body: int = 64 * MIB
    max_image_bytes: int = 32 * MIB
    max_image_pixels: int = 50_000_000
    max_images: int = 16
    max_prompt_tokens: int | None = None
    max_output_tokens: int = 4096
    timeout: float = 600.0
    stall_timeout: float = 300.0
    log_prompts: bool = False
    keep_alive: float = KEEP_ALIVE

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.name.startswith("max_") and getattr(self, field.name) is not None:
                check_whole_number(field.name, getattr(self, field.name))
        for name in ("timeout", "stall_timeout", "keep_alive"):
            if not (is_number(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name} must be a number of seconds above 0.")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.strip()):
            raise ValueError("The API key must be a text of ASCII characters that is not empty.")
        if self.media_root is not None and not self.media_root.is_dir():
            raise FileNotFoundError(f"There is no folder {shown(str(self.media_root))} of media.")
        for origin in self.cors:
            _check_origin(origin)


def _check_origin(origin: str) -> None:
    """ValueError unless it is what a browser sends as the Origin of a page."""
    parts = urlsplit(origin)
    if parts.scheme not in ("http", "https") or origin != f"{parts.scheme}://{parts.netloc}":
        raise ValueError(
            f"{shown(origin)} is not the origin of a web page: write it as https://example.com or "
            "http://localhost:3000, without a path."
        )


@dataclass(frozen=True)
class Place:
    """Where a server listens, and how it ends.

    Attributes:
        host: a name or address; only this machine reaches 127.0.0.1.
        port: 0 is any free one.
        certfile, keyfile: a certificate and its key in PEM, for https.
        grace: seconds that running answers have once the server is to end.

    Raises:
        ValueError: a port, certificate or time that can't be.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    certfile: Path | None = None
    keyfile: Path | None = None
    grace: float = 30.0

    def __post_init__(self) -> None:
        check_whole_number("port", self.port, 0)
        if self.port > 65535:
            raise ValueError(f"port must be at most 65535, found {self.port}.")
        if not (is_number(self.grace) and self.grace >= 0):
            raise ValueError(
                f"grace must be a number of seconds from 0, found {shown(self.grace)}."
            )
        if self.keyfile is not None and self.certfile is None:
            raise ValueError("A key needs its certificate: give --certfile too.")
        if self.certfile is not None:
            self._check_certificate(self.certfile)

    def _check_certificate(self, certfile: Path) -> None:
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certfile, self.keyfile, password=lambda: "")
        except (OSError, ValueError) as error:
            raise ValueError(
                f"The certificate {shown(str(certfile))} can't be used: {reason(error)}; it and "
                "its key must be files in PEM."
            ) from None

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches it."""
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def url(self, port: int) -> str:
        """What a browser on this machine is given."""
        scheme = "https" if self.certfile else "http"
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
