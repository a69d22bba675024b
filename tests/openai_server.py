"""A server on 127.0.0.1 that speaks OpenAI's ``POST /v1/embeddings``, and misbehaves as told.

It keeps the limits of the real one: 2,048 inputs and 300,000 tokens a request, 8,192 tokens an input, no empty input.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float32]
Items = list[dict[str, Any]]

MODEL = "text-embedding-3-small"
KEY = "sk-proj-Test0123456789abcdefABCDEF"
PATIENCE = 20.0
"""Seconds after which a request that waits for another one gives up: the test has failed then."""


class Seen(NamedTuple):
    """A request as it came."""

    texts: list[str]
    body: dict[str, Any]
    headers: dict[str, str]
    status: int


@dataclass
class Reply:
    """One answer out of the ordinary.

    Attributes:
        status: Other than 200: ``error`` is the answer.
        error: The ``error`` object of the answer.
        headers: Sent as well.
        change: Called with the items of ``data`` of a good answer; returns what is sent instead.
        body: Sent as it is.
        cut: Close the connection after this many bytes of the body.
        hold: Wait for this before answering.
        seconds: Take this long to answer.
    """

    status: int = 200
    error: dict[str, Any] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    change: Callable[[Items], Items] | None = None
    body: bytes | None = None
    cut: int | None = None
    hold: threading.Event | None = None
    seconds: float = 0.0


def hashed(texts: Sequence[str], dimensions: int = 64) -> Matrix:
    """A vector of each text, as random as its SHA-256."""
    seeds = (int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") for text in texts)
    return np.array([np.random.default_rng(seed).standard_normal(dimensions) for seed in seeds], np.float32)


def shortened(vectors: Matrix, dimensions: int) -> Matrix:
    """The first ``dimensions`` numbers of each vector, at unit length again, as the API does it."""
    part = vectors[:, :dimensions]
    result: Matrix = (part / np.linalg.norm(part, axis=1, keepdims=True)).astype(np.float32)
    return result


class OpenAIServer:
    """The server, in threads of this process; use it in a ``with`` statement.

    Attributes:
        url: What to give as ``base_url``.
        script: Answers for the next requests; after them all is well.
        always: Answer for every request, if set.
        seen: Every request with the status of its answer.
        most_in_flight: Most requests that were being answered at once.
        barrier: Requests wait here for each other before they are answered.
        refuses: A request with such a text gets 400.
        unknown_fields: A request with such a field gets 400.
        tokens: Tokens of a text.
        counts_tokens: Whether answers have ``usage``.
        always_lists: Send lists even where base64 is asked for.
    """

    def __init__(self, vectors: Callable[[Sequence[str]], Matrix] = hashed, key: str | None = KEY) -> None:
        self.vectors, self.key = vectors, key
        self.script: deque[Reply] = deque()
        self.always: Reply | None = None
        self.seen: list[Seen] = []
        self.most_in_flight = 0
        self.barrier: threading.Barrier | None = None
        self.refuses: Callable[[str], bool] = lambda text: False
        self.unknown_fields: set[str] = set()
        self.tokens: Callable[[str], int] = lambda text: -(-len(text) // 4)
        self.counts_tokens = True
        self.always_lists = False
        self._in_flight = 0
        self._lock = threading.Lock()
        outer = self

        class Handler(_Handler):
            server_of_test = outer

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.005,), daemon=True)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    @property
    def embedded(self) -> list[str]:
        """The texts of all requests that were answered with 200."""
        return [text for seen in self.seen if seen.status == 200 for text in seen.texts]

    def answer(self, path: str, headers: dict[str, str], content: bytes) -> tuple[Reply, int, bytes]:
        """The reply, the status and the body for a request."""
        with self._lock:
            self._in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self._in_flight)
            reply = self.always or (self.script.popleft() if self.script else Reply())
        try:
            if self.barrier:
                self.barrier.wait(PATIENCE)
            if reply.hold:
                reply.hold.wait(PATIENCE)
            time.sleep(reply.seconds)
            body = json.loads(content)
            texts = [body["input"]] if isinstance(body["input"], str) else body["input"]
            status, answer = self._answer(path, headers, body, texts, reply)
            with self._lock:
                self.seen.append(Seen(texts, body, headers, status))
            return reply, status, answer
        finally:
            with self._lock:
                self._in_flight -= 1

    def _answer(
        self, path: str, headers: dict[str, str], body: dict[str, Any], texts: list[str], reply: Reply
    ) -> tuple[int, bytes]:
        if reply.status != 200:
            return reply.status, json.dumps({"error": reply.error}).encode() if reply.body is None else reply.body
        if path != "/v1/embeddings":
            return _error(404, "Not found")
        if self.key is not None and headers.get("authorization") != f"Bearer {self.key}":
            given = headers.get("authorization", "").removeprefix("Bearer ")
            return _error(401, f"Incorrect API key provided: {given}.", code="invalid_api_key")
        if problem := self._refusal(body, texts):
            return problem
        items = self._items(body, texts)
        if reply.change:
            items = reply.change(items)
        answer: dict[str, Any] = {"object": "list", "data": items, "model": body["model"]}
        if self.counts_tokens:
            total = sum(map(self.tokens, texts))
            answer["usage"] = {"prompt_tokens": total, "total_tokens": total}
        return 200, json.dumps(answer).encode() if reply.body is None else reply.body

    def _refusal(self, body: dict[str, Any], texts: list[str]) -> tuple[int, bytes] | None:
        if body["model"] != MODEL:
            return _error(404, f"The model `{body['model']}` does not exist.", code="model_not_found")
        for name in self.unknown_fields & body.keys():
            message = f"Unrecognized request argument supplied: {name}"
            return _error(
                400, "This model does not support specifying dimensions." if name == "dimensions" else message
            )
        if not 0 < len(texts) <= 2048:
            return _error(400, "'input' is invalid: the array must hold 1 to 2048 items.", param="input")
        if any(not isinstance(text, str) or text == "" for text in texts):
            return _error(400, "'$.input' is invalid.", param="input")
        counts = [self.tokens(text) for text in texts]
        if max(counts) > 8192:
            return _error(400, f"This model's maximum context length is 8192 tokens, you requested {max(counts)}.")
        if sum(counts) > 300_000:
            message = f"Requested {sum(counts)} tokens, max 300000 tokens per request"
            return _error(400, message, code="max_tokens_per_request")
        if bad := [text for text in texts if self.refuses(text)]:
            return _error(400, f"The text {bad[0]!r} is refused.", param="input")
        return None

    def _items(self, body: dict[str, Any], texts: list[str]) -> Items:
        vectors = self.vectors(texts)
        vectors = shortened(vectors, body.get("dimensions") or vectors.shape[1])
        as_text = body.get("encoding_format") == "base64" and not self.always_lists
        return [
            {
                "object": "embedding",
                "index": index,
                "embedding": base64.b64encode(vector.astype("<f4").tobytes()).decode() if as_text else vector.tolist(),
            }
            for index, vector in enumerate(vectors)
        ]


def _error(status: int, message: str, *, code: str | None = None, param: str | None = None) -> tuple[int, bytes]:
    error = {"message": message, "type": "invalid_request_error", "param": param, "code": code}
    return status, json.dumps({"error": error}).encode()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet: else each answer waits 40 ms for an acknowledgement
    server_of_test: OpenAIServer

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["content-length"]))
        headers = {name.lower(): value for name, value in self.headers.items()}
        try:
            reply, status, body = self.server_of_test.answer(self.path, headers, content)
        except threading.BrokenBarrierError:
            reply, status, body = Reply(), 500, b"no other request came"
        try:
            self.send_response_only(status)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: reply.cut])
        except OSError:
            self.close_connection = True  # the client did not wait for the answer
        if reply.cut is not None:
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        return None
