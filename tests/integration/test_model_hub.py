"""Download from a hub, in processes of their own. The hub is a small server here that speaks its protocol."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

MODEL = "BAAI/bge-small-en-v1.5"
REPOSITORY = "Qdrant/bge-small-en-v1.5-onnx-Q"
REVISION = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "model_optimized.onnx": b"\x08\x08",
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b'{"model_max_length": 512}',
    "special_tokens_map.json": b"{}",
    "config.json": b"{}",
    "README.md": b"not wanted",
}

PULL = """
import json, sys
from kdb_fast.errors import KdbFastError
from kdb_fast.embedding.models.lookup import resolve
try:
    model = resolve(sys.argv[1], report=lambda line: print(line, file=sys.stderr))
except KdbFastError as error:
    sys.exit(f"{type(error).__name__}: {error}")
print(json.dumps([str(model.path), model.fingerprint(), dict(model.files)]))
"""


def blob_id(content: bytes) -> str:
    """Name of the content in git, which the hub gives for each file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub(BaseHTTPRequestHandler):
    """The few requests that a download makes."""

    status: ClassVar[int] = 200
    gets: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.gets.append(self.path)
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        headers, content = {"Content-Type": "application/json"}, b"{}"
        if path.startswith(f"/api/models/{REPOSITORY}/tree/"):
            tree = [{"type": "file", "path": p, "size": len(c), "oid": blob_id(c)} for p, c in FILES.items()]
            content = json.dumps(tree).encode()
        elif path.startswith(f"/api/models/{REPOSITORY}"):
            info = {"id": REPOSITORY, "sha": REVISION, "siblings": [{"rfilename": name} for name in FILES]}
            content = json.dumps(info | {"private": False, "tags": [], "downloads": 0, "likes": 0}).encode()
        elif path.startswith(f"/{REPOSITORY}/resolve/"):
            content = FILES[path.rpartition("/")[2]]
            etag = f'"{blob_id(content)}"'
            headers = {"Content-Type": "application/octet-stream", "ETag": etag, "X-Repo-Commit": REVISION}
        self.send_response(self.status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(Hub, "gets", [])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def start(home: Path, endpoint: str, name: str = MODEL) -> subprocess.Popen[str]:
    settings = {"KDB_FAST_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HOME": str(home.parent / "hf")}
    environment = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")} | settings
    for variable in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
        environment.pop(variable, None)
    command = [sys.executable, "-c", PULL, name]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_model_comes_from_the_hub_without_noise(hub: str, tmp_path: Path) -> None:
    process = start(tmp_path / "home", hub)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    path, _, files = json.loads(out)
    assert files == {name: hashlib.sha256(FILES[name]).hexdigest() for name in FILES if name != "README.md"}
    assert {p.name for p in Path(path).iterdir()} == {*files, "kdb_fast.json"}
    assert not any(p.is_symlink() for p in Path(path).iterdir())
    assert err.splitlines() == [
        f"Fetching {MODEL} from the model hub (0.067 GB) …",
        f"{MODEL} is in {path}.",
    ]
    assert [p.name for p in (tmp_path / "home" / "models").iterdir() if p.is_dir()] == [Path(path).name]
    # Nothing but the model was asked for, and the hub's client kept nothing of its own.
    assert not [path for path in Hub.gets if REPOSITORY not in path]
    assert not (tmp_path / "hf").exists()


def test_two_processes_that_ask_at_once_get_the_same_model(hub: str, tmp_path: Path) -> None:
    processes = [start(tmp_path / "home", hub) for _ in range(2)]
    answers = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], answers
    assert answers[0][0] == answers[1][0]
    downloads = [path for path in Hub.gets if path.endswith("/model_optimized.onnx")]
    assert len(downloads) == 1


def test_hub_that_is_blocked_is_a_clean_error(hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Hub, "status", 403)
    process = start(tmp_path / "home", hub)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert out == ""
    assert err.startswith(f"ModelError: {MODEL} is not in {tmp_path}/home/models and cannot be fetched: ")
    assert "answers with HTTP status 403" in err
    assert len(Hub.gets) == 1


def test_hub_that_cannot_be_reached_is_a_clean_error(tmp_path: Path) -> None:
    process = start(tmp_path / "home", "http://127.0.0.1:9")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "http://127.0.0.1:9 cannot be reached (ConnectionError)" in err
    assert len(err.splitlines()) == 1


def test_damaged_download_is_a_clean_error(hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # An ONNX file whose only field says that it is longer than the file.
    monkeypatch.setitem(FILES, "model_optimized.onnx", b"\x3a\x7f")
    process = start(tmp_path / "home", hub)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "is not a complete ONNX file" in err
    assert not [p for p in (tmp_path / "home" / "models").iterdir() if p.is_dir()]
