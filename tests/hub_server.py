"""A server on this machine that answers as the Hub and its CDN do, and fails when told to."""

import base64
import errno
import io
import json
import os
import re
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_a_token"
REPO = "user/nano"  # of the `server` fixture
MIB = 2**20
LARGE = (".safetensors", ".bin", "tokenizer.json")  # what the Hub keeps in its large file storage


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    host: str
    """`hub` or `cdn`."""


@dataclass
class Fault:
    """How to answer requests whose path matches, `times` times."""

    path: str
    times: int = 1
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    cut: int | None = None
    """Close the connection after so many bytes of the body."""
    stall: int | None = None
    """Say nothing more after so many bytes, until the client goes away."""
    method: str = "GET|HEAD|POST|PUT"


class Hub:
    """What the server has and was asked.

    Attributes:
        files: contents by repository and name.
        archives: contents by path, on the CDN.
        faults: the first that matches a request is used up by it.
        requests: all so far, in order.
        commits: (repository, what each line of the commit said).
        created: repositories that were made, with the body of the request.
        stored: large files that were uploaded, by SHA-256.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.archives: dict[str, bytes] = {}
        self.private: set[str] = set()
        self.user: dict[str, Any] = {"type": "user", "name": "user", "orgs": []}
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.commits: list[tuple[str, list[dict[str, Any]]]] = []
        self.created: list[dict[str, Any]] = []
        self.stored: dict[str, bytes] = {}
        self.heeds_ranges = True
        self.heeds_if_range = True
        self.gives_etags = True
        self.piece = 2**40
        """Most bytes of an answer to a range."""
        self.commit = COMMIT
        """What `main` is at."""
        self.tags: dict[str, str] = {}
        """Other revisions and their commits, of the same files."""
        self.corrupt: dict[str, bytes] = {}
        self.url = self.cdn = ""

    def commit_of(self, revision: str) -> str | None:
        named = {"main": self.commit, **self.tags}
        return named.get(revision, revision if revision in named.values() else None)

    def asked(self, pattern: str, method: str = "GET") -> list[Request]:
        return [r for r in self.requests if r.method == method and re.search(pattern, r.path)]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def answer(self) -> None:
        hub: Hub = self.server.hub
        path = unquote(urlsplit(self.path).path)
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        headers = {name.lower(): value for name, value in self.headers.items()}
        hub.requests.append(Request(self.command, path, headers, self.server.name))
        self.fault = self.take_fault(hub, path)
        if self.fault is not None and self.fault.status is not None:
            return self.reply(self.fault.status, self.fault.body, **self.fault.headers)
        if self.server.name == "cdn":
            return self.answer_as_cdn(hub, path)
        if path.startswith("/api/"):
            return self.answer_api(hub, path.split("/")[2:])
        if path.endswith("/info/lfs/objects/batch"):
            return self.answer_batch(hub)
        self.answer_resolve(hub, path)

    def take_fault(self, hub: Hub, path: str) -> Fault | None:
        for fault in hub.faults:
            if fault.times and re.search(fault.path, path) and self.command in fault.method:
                fault.times -= 1
                return fault
        return None

    # Downloads

    def answer_api(self, hub: Hub, parts: list[str]) -> None:
        if parts == ["repos", "create"]:
            return self.create_repo(hub)
        if parts == ["whoami-v2"]:
            known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            return self.say(200, hub.user) if known else self.say(401, {"error": "Who?"})
        if parts == ["validate-yaml"]:
            return self.say(200, {"warnings": [], "errors": []})
        if parts[0] != "models":
            return self.say(404, {"error": "not here"})
        repo, rest = "/".join(parts[1:3]), parts[3:]
        if repo not in hub.files:
            return self.reply(404, b"{}", **{"X-Error-Code": "RepoNotFound"})
        if repo in hub.private and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.reply(401, b"{}")
        if rest[:1] == ["preupload"]:
            return self.preupload(hub, repo)
        if rest[:1] == ["commit"]:
            return self.take_commit(hub, repo)
        commit = hub.commit_of(rest[1] if rest[:1] == ["revision"] else "main")
        if commit is None:
            return self.reply(404, b"{}", **{"X-Error-Code": "RevisionNotFound"})
        listed = [listing(name, data) for name, data in hub.files[repo].items()]
        if rest[:1] == ["tree"]:
            return self.say(200, listed)
        siblings = [{"rfilename": file["path"], "blobId": file["oid"], **file} for file in listed]
        info = {"_id": "1", "id": repo, "modelId": repo, "sha": commit, "siblings": siblings}
        self.say(200, {**info, "private": False, "tags": [], "downloads": 0})

    def answer_resolve(self, hub: Hub, path: str) -> None:
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        data = hub.files.get(found[1], {}).get(found[3]) if found else None
        if found is None or data is None:
            return self.reply(404, b"", **{"X-Error-Code": "EntryNotFound"})
        if found[1] in hub.private and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.reply(401, b"")
        file = listing(found[3], data)
        headers = {"X-Repo-Commit": hub.commit_of(found[2]) or ""}
        if "lfs" not in file:
            return self.send_file(hub, data, file["oid"], **headers)
        digest = file["lfs"]["oid"]
        headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data))}
        self.reply(302, b"", Location=f"{hub.cdn}/large/{found[1]}/{digest}", **headers)

    def answer_as_cdn(self, hub: Hub, path: str) -> None:
        if self.command == "PUT":
            hub.stored[path.removeprefix("/upload/")] = self.body
            return self.reply(200, b"")
        contents = {
            f"/large/{repo}/{sha256(data).hexdigest()}": data
            for repo, files in hub.files.items()
            for data in files.values()
        }
        contents |= hub.archives
        if path not in contents:
            return self.reply(404, b"")
        data = hub.corrupt.get(path.rpartition("/")[2], contents[path])
        self.send_file(hub, data, sha1(data).hexdigest())

    def send_file(self, hub: Hub, data: bytes, etag: str, **headers: str) -> None:
        if hub.gives_etags:
            headers["ETag"] = f'"{etag}"'
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        same = self.headers.get("If-Range") in (None, f'"{etag}"') or not hub.heeds_if_range
        if asked is None or not hub.heeds_ranges or not same:
            return self.reply(200, data, **headers)
        first = int(asked[1])
        if first >= len(data):
            return self.reply(416, b"", **headers, **{"Content-Range": f"bytes */{len(data)}"})
        end = min(first + hub.piece, len(data))
        headers["Content-Range"] = f"bytes {first}-{end - 1}/{len(data)}"
        self.reply(206, data[first:end], **headers)

    # Uploads

    def create_repo(self, hub: Hub) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.say(401, {"error": "Invalid username or password."})
        asked = json.loads(self.body)
        repo = "/".join(filter(None, (asked.get("organization"), asked["name"])))
        if repo in hub.files:
            return self.say(409, {"error": "exists", "url": f"{hub.url}/{repo}"})
        hub.created.append(asked)
        hub.files[repo] = {}
        self.say(200, {"url": f"{hub.url}/{repo}", "name": repo, "id": "1"})

    def preupload(self, hub: Hub, repo: str) -> None:
        def answer(file: dict[str, Any]) -> dict[str, Any]:
            mode = "lfs" if file["path"].endswith(LARGE) else "regular"
            return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None}

        files = json.loads(self.body)["files"]
        self.say(200, {"files": [answer(file) for file in files]})

    def answer_batch(self, hub: Hub) -> None:
        objects = [
            {**one, "actions": {"upload": {"href": f"{hub.cdn}/upload/{one['oid']}"}}}
            if one["oid"] not in hub.stored
            else one
            for one in json.loads(self.body)["objects"]
        ]
        self.say(200, {"transfer": "basic", "objects": objects})

    def take_commit(self, hub: Hub, repo: str) -> None:
        lines = [json.loads(line) for line in self.body.splitlines()]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                hub.files[repo][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                hub.files[repo][value["path"]] = hub.stored[value["oid"]]
        hub.commits.append((repo, lines))
        url = f"{hub.url}/{repo}/commit/{hub.commit}"
        self.say(200, {"success": True, "commitUrl": url, "commitOid": hub.commit})

    # Both

    def say(self, status: int, value: Any) -> None:
        self.reply(status, json.dumps(value).encode())

    def reply(self, status: int, data: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault is not None and self.fault.cut is not None:
            data = data[: self.fault.cut]
            self.close_connection = True
        if self.fault is not None and self.fault.stall is not None:
            self.wfile.write(data[: self.fault.stall])
            self.rfile.read(1)
        else:
            self.wfile.write(data)

    def log_message(self, *arguments: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *arguments: Any) -> None:  # a client that goes away is part of a test
        pass


def listing(name: str, data: bytes) -> dict[str, Any]:
    """A file as the Hub lists it."""
    file = {"type": "file", "path": name, "size": len(data), "oid": sha1(data).hexdigest()}
    if name.endswith(LARGE):
        digest = sha256(data).hexdigest()
        file["lfs"] = {"oid": digest, "sha256": digest, "size": len(data), "pointerSize": 134}
    return file


@contextmanager
def serve() -> Iterator[Hub]:
    """A Hub and a CDN, each on a port of its own."""
    hub, servers = Hub(), []
    for name in ("hub", "cdn"):
        server: Any = Server(("127.0.0.1", 0), Handler)
        server.hub, server.name = hub, name
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        servers.append(server)
    hub.url, hub.cdn = (  # of different hosts: the Hub library follows redirects within one
        f"http://{host}:{server.server_port}"
        for host, server in zip(("127.0.0.1", "localhost"), servers, strict=True)
    )
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


def use(hub: Hub, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this server the Hub, and `home` the place of every cache, for the rest of a test."""
    from huggingface_hub import close_session, constants

    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("FASTVLM_CACHE", str(home / "archives"))
    close_session()  # which keeps connections


def everything(folder: Path) -> list[str]:
    """Every file and empty folder below, locks apart."""
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if (path.is_file() or not any(path.iterdir())) and path.suffix != ".lock"
    )


def assert_one_sentence(error: BaseException, *said: str) -> None:
    message = str(error)
    assert "\n" not in message and message.endswith("."), message
    for text in said:
        assert text in message, message


class FullFile:
    """A file on a disk that fills up."""

    def __init__(self, file: io.BufferedWriter, room: int):
        self.file, self.room = file, room

    def write(self, data: bytes) -> int:
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)

    def __enter__(self) -> "FullFile":
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()


def fill_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give every file that is opened from now on room for two megabytes."""
    real = Path.open

    def opened(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        file = real(path, mode, *arguments, **options)
        return FullFile(file, 2 * 2**20) if set(mode) & set("awx") and "b" in mode else file

    monkeypatch.setattr(Path, "open", opened)


def zipped(files: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return stream.getvalue()


def special(name: str, mode: int = 0, data: bytes = b"/etc/passwd") -> bytes:
    """An archive of one harmless file and one entry, as its name and mode make it."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("model/config.json", "{}")
        info = zipfile.ZipInfo("placeholder")
        info.filename, info.external_attr = name, mode << 16
        archive.writestr(info, data)
    return stream.getvalue()
