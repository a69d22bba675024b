"""A client of OpenAI's embeddings API: texts → float32 matrix. The only importer of httpx.

::

    texts ─► fit? ─► cut ─► requests of ≤ 2,048 inputs ─► threads ─► POST ◄─┐ 429, 5xx, no answer: wait, again
                │                                                     │ ────┘
             refused ◄── stands alone ◄── 400: halve, cut shorter ◄───┤
                                                                      └─► decoded ─► rows of the matrix

No message holds the key or a record's text: of what a server says about records only its error code is quoted.
"""

from __future__ import annotations

import contextlib
import math
import queue
import random
import re
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from . import __version__
from .encoder import Matrix, Tally
from .errors import ModelError, UsageError
from .openai_answers import (
    OddAnswerError,
    Problem,
    decode,
    named_batch,
    named_window,
    read_problem,
    server_wait,
    speaks_of_length,
)
from .openai_inputs import (
    CUT_BYTES_PER_TOKEN,
    MAX_INPUT_TOKENS,
    MAX_INPUTS,
    Input,
    cut_bytes,
    pack,
    shorter,
    typical_tokens,
    unfit_for_api,
)
from .provider_errors import MissingPackageError, OptionError, ProviderError, ProviderKeyError
from .records import was_cut

if TYPE_CHECKING:
    import httpx

RETRY_SECONDS = 600.0
"""A request is given up this long after its first failure. Rate limits are by the minute; a longer wait is a day's."""

MAX_BACKOFF_SECONDS = 30.0
"""Longest wait between attempts where the server names none."""

MAX_ODD_ANSWERS = 2
"""Repeats after a damaged answer (no JSON, a vector missing, NaN). More would pay for the same defect again."""

CONNECT_SECONDS = 10.0
"""Time to reach the server; a host that is up answers within one."""

PROBE = "The quick brown fox jumps over the lazy dog."


class _Part(NamedTuple):
    """What came of some rows: their vectors, or why they were refused."""

    rows: list[int]
    vectors: Matrix
    tokens: int
    truncated: int
    refused: dict[int, str]


class _RefusedRequestError(Exception):
    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem


class _CancelledError(Exception):
    """Another request has failed for good."""


class EmbeddingsAPI:
    """A client of ``POST {base_url}/embeddings``; safe to use from several threads.

    Args:
        model: Name of the model.
        dimensions: Length of a vector; sent, and checked in every answer. None takes what the server gives, which a
            probe finds out when it is first needed, and sends nothing.
        api_key: Sent as a bearer token; None sends none.
        base_url: Such as ``https://api.openai.com/v1``; a missing ``/v1`` is found out.
        organization: Sent as ``OpenAI-Organization``.
        timeout: Seconds without a byte after which an attempt has failed.
        max_retries: Attempts after the first.
        concurrency: Requests in flight.
        max_inputs: Most inputs of a request.
        max_input_tokens: Window of the model in tokens; longer inputs are cut and counted as truncated.
        transport: Of httpx, instead of the network.
        sleep: Called with seconds instead of waiting.
        clock: Seconds, monotonic.

    Attributes:
        has_key: Whether a key is sent.
        known_dimensions: Length of a vector; None as long as nothing has asked for it.

    Raises:
        MissingPackageError: httpx is not installed.
        OptionError: An argument makes no sense.
    """

    def __init__(
        self,
        *,
        model: str,
        dimensions: int | None,
        api_key: str | None,
        base_url: str,
        organization: str | None = None,
        timeout: float = 60.0,
        max_retries: int = 6,
        concurrency: int = 4,
        max_inputs: int = MAX_INPUTS,
        max_input_tokens: int = MAX_INPUT_TOKENS,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], object] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        try:
            import httpx
        except ImportError:
            raise MissingPackageError(
                "The openai provider needs the package httpx.", remedy="Run: pip install 'kdb-fast[openai]'"
            ) from None
        if dimensions is not None:
            _check_whole("dimensions", dimensions, 1)
        _check_whole("max_retries", max_retries, 0)
        _check_whole("concurrency", concurrency, 1)
        _check_whole("max_inputs", max_inputs, 1, MAX_INPUTS)
        _check_whole("max_input_tokens", max_input_tokens, 1)
        if not timeout > 0:
            raise OptionError(f"timeout is {timeout!r}; expected seconds, more than 0.")
        if not isinstance(model, str) or not model:
            raise OptionError(f"model is {model!r}; expected a model's name.")
        self.model, self.known_dimensions, self.base_url = model, dimensions, _checked_url(base_url)
        self._urls = [f"{self.base_url}/embeddings"]
        if not re.search(r"/v\d", self.base_url):
            self._urls.append(f"{self.base_url}/v1/embeddings")
        self.max_inputs, self.max_input_tokens, self.concurrency = max_inputs, max_input_tokens, concurrency
        self._max_retries, self._sleep, self._clock = max_retries, sleep, clock
        # Fields that some compatible servers do not know; each is left out once a server has said so.
        self._optional: dict[str, object] = {"encoding_format": "base64"}
        if dimensions is not None:
            self._optional["dimensions"] = dimensions
        # What this server has shown not to do: several inputs at once, even one of them in a list, a large window.
        self._most, self._bare, self._window = max_inputs, False, max_input_tokens
        self._probing = threading.Lock()
        self.has_key = api_key is not None
        self._accepted = self._closed = False
        self._not_before = -math.inf
        self._transport_error = httpx.TransportError
        headers = {"User-Agent": f"kdb-fast/{__version__}"}
        if api_key is not None:
            headers["Authorization"] = f"Bearer {_checked_header('api_key', api_key)}"
        if organization:
            headers["OpenAI-Organization"] = _checked_header("organization", organization)
        # A closure, so that no attribute of this object shows the key.
        self._redact: Callable[[str], str] = lambda text: _redacted(text, api_key)
        secure = self.base_url.startswith("https:")
        # Reading the certificates takes 50 ms. Without any, nothing is trusted.
        verify = httpx.create_ssl_context() if secure else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        # One client for each request in flight. Threads that share a client's connection pool may find their
        # connection closed by another one (httpcore issue 1110, open in 1.0.9): seen here as texts that were sent,
        # and paid for, twice, and as requests that hung until their timeout.
        self._clients: queue.LifoQueue[httpx.Client] = queue.LifoQueue()
        for _ in range(concurrency):
            self._clients.put(
                httpx.Client(
                    headers=headers,
                    timeout=httpx.Timeout(timeout, connect=min(timeout, CONNECT_SECONDS)),
                    limits=httpx.Limits(max_connections=1),
                    verify=verify,
                    transport=transport,
                )
            )

    @property
    def dimensions(self) -> int:
        """Length of a vector. Sends a probe where it is not known; raises as :meth:`probe`."""
        with self._probing:
            if self.known_dimensions is None:
                self.probe()
        assert self.known_dimensions is not None
        return self.known_dimensions

    @property
    def accepted(self) -> bool:
        """Whether the server has answered with vectors before."""
        return self._accepted

    def close(self) -> None:
        """Close the connections; the API cannot be used again. A connection in use is closed after its request."""
        self._closed = True
        clients = []
        with contextlib.suppress(queue.Empty):
            while True:
                clients.append(self._clients.get_nowait())
        for client in clients:
            client.close()
            self._clients.put(client)

    @contextlib.contextmanager
    def _borrowed(self) -> Iterator[httpx.Client]:
        client = self._clients.get()
        try:
            self._check_open()
            yield client
        finally:
            if self._closed:
                client.close()
            self._clients.put(client)

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError("The provider is closed.")

    def embed_into(self, texts: Sequence[str], out: Matrix) -> tuple[Tally, dict[int, str]]:
        """Embed every text that can be into its row of ``out`` (float32, len(texts) × dimensions).

        Returns:
            What was computed, in the tokens that the server counts; and the rows that were refused, with the
            reason. Those rows of ``out`` are zero.

        Raises:
            ProviderKeyError: The key is refused.
            ProviderError: No answer in time, no quota, or not a proper answer.
            ModelError: No such model, or it gives vectors of another length.
        """
        self._check_open()
        refused = {row: reason for row, text in enumerate(texts) if (reason := unfit_for_api(text))}
        requests = pack(texts, refused, max_inputs=self.max_inputs, max_input_tokens=self.max_input_tokens)
        tokens = truncated = 0
        for part in self._run(list(requests)):
            out[part.rows] = part.vectors
            tokens, truncated = tokens + part.tokens, truncated + part.truncated
            refused.update(part.refused)
        out[list(refused)] = 0
        # What was cut before it came here was counted there; these are far beyond the window.
        truncated -= sum(was_cut(text) for row, text in enumerate(texts) if row not in refused)
        return Tally(tokens, tokens, max(0, truncated)), dict(sorted(refused.items()))

    def settle(self) -> None:
        """:meth:`probe`, and take the length that the server gives for the one that is wanted."""
        before, self.known_dimensions = self.known_dimensions, None
        try:
            self.probe()
        except BaseException:
            self.known_dimensions = before
            raise

    def probe(self) -> None:
        """Embed one sentence of our own. Raises as :meth:`embed_into`, and quotes what the server says."""
        self._check_open()
        vectors = self._probe(threading.Event())
        self.known_dimensions = vectors.shape[1]
        if not np.isfinite(vectors).all() or not vectors.any():
            raise ModelError(f"{self.model} gives a vector that is zero or not finite; expected a direction.")

    def _probe(self, stop: threading.Event) -> Matrix:
        while True:
            try:
                return self._post([PROBE], stop, ours=True)[0]
            except _RefusedRequestError as refused:
                if not self._simplify(refused.problem.message):
                    asked = f" with {self.known_dimensions} dimensions" if self.known_dimensions else ""
                    raise ModelError(
                        f"{self.base_url} refuses every request for {self.model}{asked}: "
                        f"{refused}{self._quoted(refused.problem, '.')}",
                        remedy="Check the model's name and the dimensions it can give.",
                    ) from None

    def _quoted(self, said: Problem, otherwise: str = "") -> str:
        """What the server says of a text of our own."""
        message = self._redact(said.message)
        return f": {message}" if message else otherwise

    def _simplify(self, message: str) -> bool:
        """Leave out the next thing that the server may not know, if it may be that what it refuses; else False."""
        if self._optional and not message:
            self._optional = dict(list(self._optional.items())[1:])
            return True
        if self._bare or (message and not _LIST.search(message)):
            return False
        self._bare, self._most = True, 1
        return True

    def _run(self, requests: list[list[Input]]) -> Iterator[_Part]:
        """The parts of all requests as they come, ``concurrency`` in flight; the first error ends all."""
        stop = threading.Event()
        if len(requests) <= 1:
            for request in requests:
                yield from self._embed(request, stop)
            return
        pool = ThreadPoolExecutor(min(self.concurrency, len(requests)), thread_name_prefix="kdb-fast-openai")
        try:
            for future in as_completed([pool.submit(self._embed, request, stop) for request in requests]):
                yield from future.result()
        finally:
            # Requests in flight end by themselves; nobody takes their vectors, so there is nothing to wait for.
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def _embed(self, inputs: list[Input], stop: threading.Event) -> list[_Part]:
        if len(inputs) > self._most:
            pieces = [inputs[start : start + self._most] for start in range(0, len(inputs), self._most)]
            return [part for piece in pieces for part in self._embed(piece, stop)]
        inputs = [self._within_window(i) for i in inputs]
        rows = [i.row for i in inputs]
        before = self._most, self._window, self._optional
        try:
            vectors, tokens = self._post([i.text for i in inputs], stop)
        except _RefusedRequestError as error:
            problem = error.problem
            if not self._accepted:
                self._probe(stop)  # Is it these texts, or would any be refused?
            if window := named_window(problem):
                self._window = min(self._window, window)
            if batch := named_batch(problem):
                self._most = min(self._most, batch)
            # Less is sent now than was refused: fewer inputs, shorter ones, fewer options.
            learnt = self._optional is not before[2] or self._most < min(before[0], len(inputs))
            if learnt or any(self._within_window(i) is not i for i in inputs):
                return self._embed(inputs, stop)
            if len(inputs) > 1:
                middle = len(inputs) // 2
                parts = self._embed(inputs[:middle], stop) + self._embed(inputs[middle:], stop)
                if not speaks_of_length(problem) and not any(p.refused for p in parts):
                    # It was none of the texts: the server takes so many at once and no more.
                    self._most = min(self._most, len(inputs) - middle)
                return parts
            if less := shorter(inputs[0].text, self._window, too_long=speaks_of_length(problem)):
                return self._embed([Input(rows[0], less, True)], stop)
            nothing = np.empty((0, self.dimensions), np.float32)
            return [_Part([], nothing, 0, 0, {rows[0]: f"the API refuses it, {error}"})]
        odd = np.flatnonzero(~np.isfinite(vectors).all(axis=1)).tolist()
        reasons = {rows[i]: "the API gives a vector that is not finite" for i in odd}
        return [_Part(rows, vectors, tokens, sum(i.cut for i in inputs), reasons)]

    def _within_window(self, given: Input) -> Input:
        """A text that the server is certain to refuse, cut to what it would be cut to then."""
        if len(given.text) <= 2 * CUT_BYTES_PER_TOKEN[0] * self._window or self._window == self.max_input_tokens:
            return given
        return Input(given.row, cut_bytes(given.text, CUT_BYTES_PER_TOKEN[0] * self._window), True)

    def _post(self, texts: list[str], stop: threading.Event, *, ours: bool = False) -> tuple[Matrix, int]:
        """Send one request until it is answered: its vectors (not finite ones too) and tokens.

        Args:
            ours: The text is our own, so what the server says of it may be shown.
        """
        turn, failures, odd, deadline = -math.inf, 0, 0, math.inf
        while True:
            self._wait_until(max(turn, self._not_before), stop)
            url, bare = self._urls[0], self._bare and len(texts) == 1
            sent = {"model": self.model, "input": texts[0] if bare else texts, **self._optional}
            wait, limited = None, False
            try:
                with self._borrowed() as client:
                    response = client.post(url, json=sent)
            except self._transport_error as error:
                problem = self._redact(f"{type(error).__name__}: {error}")
            else:
                if response.status_code == 200:
                    try:
                        vectors, tokens = decode(response.content, len(texts), self.known_dimensions, self.model)
                        if odd >= MAX_ODD_ANSWERS or np.isfinite(vectors).all():
                            self._accepted = True
                            return vectors, tokens or typical_tokens(texts)
                        problem = "a vector that is not finite"
                    except OddAnswerError as error:
                        problem = str(error)
                        said = read_problem(200, response.content)
                        if self._elsewhere(url):
                            continue
                        if said.message and error.vectors is None and ours:
                            raise ModelError(
                                f"{self.base_url} gives no vector for {self.model}{self._quoted(said, '.')}",
                                remedy="Check the base URL and the model's name.",
                            ) from None
                        if error.vectors == 1 < len(texts) and odd == MAX_ODD_ANSWERS - 1:
                            # The last repeat asks for the first text only: is it all that this server reads?
                            odd += 1
                            if self._reads_one(texts[0], response.content, url, sent):
                                self._most = 1
                                raise _RefusedRequestError(Problem(200, "one_input", "", "")) from None
                    odd += 1
                else:
                    said = read_problem(response.status_code, response.content)
                    if said.status in (404, 405) and self._elsewhere(url):
                        continue
                    if name := _unknown_option(said, sent):
                        self._optional = {key: v for key, v in self._optional.items() if key != name}
                        continue
                    self._raise_if_final(said, len(texts), self._quoted(said, ".") if ours else ".")
                    problem, limited = f"{said}{self._quoted(said) if ours else ''}", said.status == 429
                    wait = server_wait(response.headers)
            now, failures = self._clock(), failures + 1
            if failures == 1:
                deadline = now + RETRY_SECONDS
            if wait is None:
                # Full jitter, so that clients that failed together do not come back together.
                wait = random.uniform(0, min(MAX_BACKOFF_SECONDS, 0.5 * 2**failures))  # noqa: S311
            turn = now + wait
            if failures > self._max_retries or odd > MAX_ODD_ANSWERS or turn > deadline:
                asked = f", and asks to wait {wait:,.0f} seconds" if wait > RETRY_SECONDS else ""
                raise ProviderError(
                    f"{self.base_url} gave no proper answer in {failures} attempts; the last was {problem}{asked}.",
                    remedy="Run it again later; it carries on where it stopped.",
                )
            if limited:
                self._not_before = max(self._not_before, turn)  # The limit is the key's: it holds for all threads.

    def _reads_one(self, text: str, content: bytes, url: str, sent: Mapping[str, object]) -> bool:
        """Whether the one vector that a server has given for several texts is that of the first."""
        try:
            given = decode(content, 1, self.known_dimensions, self.model)[0]
            with self._borrowed() as client:
                response = client.post(url, json={**sent, "input": [text]})
            alone = decode(response.content, 1, self.known_dimensions, self.model)[0]
        except (OddAnswerError, ModelError, self._transport_error):
            return False
        return bool(np.allclose(given, alone, rtol=1e-3, atol=1e-5))

    def _elsewhere(self, url: str) -> bool:
        """Whether to ask at the next address, since there is no embeddings API at ``url``."""
        if self._accepted or len(self._urls) == 1:
            return False
        if url == self._urls[0]:
            self._urls = self._urls[1:]
        return True

    def _wait_until(self, moment: float, stop: threading.Event) -> None:
        seconds = moment - self._clock()
        if seconds > 0:
            (self._sleep or stop.wait)(seconds)
        if stop.is_set():
            raise _CancelledError

    def _raise_if_final(self, said: Problem, inputs: int, quoted: str) -> None:
        """Raise for an answer that waiting does not change; ``quoted`` ends its message."""
        if said.status == 401:
            what = "refuses the API key" if self.has_key else "asks for an API key"
            raise ProviderKeyError(f"{self.base_url} {what}: {said}.", remedy="Set OPENAI_API_KEY to a valid key.")
        if said.status == 403:
            raise ProviderKeyError(
                f"{self.base_url} does not let this key use {self.model}: {said}.",
                remedy="Check the key's project, its rights, and that the API serves your country.",
            )
        if said.status == 402 or (said.status == 429 and _NO_QUOTA.search(said.code)):
            raise ProviderError(
                f"The account at {self.base_url} has no quota left: {said}.", remedy="Check its plan and billing."
            )
        if said.status == 404:
            raise ModelError(
                f"{self.base_url} knows no embedding model {self.model}: {said}{quoted}",
                remedy="Check the model's name, and that the base URL is right.",
            )
        if said.status == 501 or (said.status in (400, 500) and _NO_EMBEDDINGS.search(said.message)):
            raise ModelError(
                f"{self.base_url} gives no embeddings for {self.model}: {said}{quoted}",
                remedy="Choose an embedding model; start llama.cpp with --embeddings.",
            )
        too_large = said.status == 429 and inputs > 1 and _TOO_LARGE.search(said.message)
        # llama.cpp and Ollama answer 500 where a text is longer than they read, or its vector is not a number.
        of_text = said.status == 500 and (
            speaks_of_length(said) or _NAN.search(said.message) or (inputs > 1 and _LIST.search(said.message))
        )
        if said.status in (400, 413, 422) or too_large or of_text:
            raise _RefusedRequestError(said)
        if said.status not in (408, 409, 429) and said.status < 500:
            raise ProviderError(f"{self.base_url} answered {said}; expected 200.", remedy="Check the base URL.")


_NO_QUOTA = re.compile("insufficient_quota|billing")
# One request beyond the whole limit of a minute: no wait makes it fit.
_TOO_LARGE = re.compile("request too large", re.IGNORECASE)
_NO_EMBEDDINGS = re.compile(r"(?:does|do) not support embeddings?|start it with .?--embeddings", re.IGNORECASE)
_NAN = re.compile(r"unsupported value: \+?(?:NaN|[+-]?Inf)", re.IGNORECASE)
_LIST = re.compile(
    r"\b(?:list|array|llama_decode|batch|single string|must be a string|multiple inputs)\b", re.IGNORECASE
)
_NO_DIMENSIONS = re.compile(
    r"not support\w* .{0,40}(?:dimensions|matryoshka)|dimensions.{0,60}not (?:supported|permitted|allowed)|"
    r"(?:unknown|unrecognized|unexpected|extra)\b.{0,60}\bdimensions",
    re.IGNORECASE,
)


def _unknown_option(said: Problem, sent: Mapping[str, object]) -> str | None:
    """The optional field of ``sent`` that the server does not know, if that is what it says."""
    if said.status not in (400, 422):
        return None
    if "encoding_format" in sent and "encoding_format" in (said.param or said.message):
        return "encoding_format"
    if "dimensions" in sent and _NO_DIMENSIONS.search(said.message):
        return "dimensions"
    return None


def _check_whole(name: str, value: object, least: int, most: int | None = None) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least or (most and value > most):
        expected = f"of at least {least}" if most is None else f"from {least} to {most:,}"
        raise OptionError(f"{name} is {value!r}; expected a whole number {expected}.")


def _checked_url(url: str) -> str:
    """``url`` without a final slash. Raises OptionError if it is no HTTP address, or may carry a secret."""
    import httpx

    try:
        parts = httpx.URL(url.strip())
    except (httpx.InvalidURL, UnicodeError):
        parts = httpx.URL()
    if parts.scheme not in ("http", "https") or not parts.host:
        raise OptionError("base_url is not an HTTP address; expected one such as https://api.openai.com/v1.")
    if parts.userinfo or parts.query or parts.fragment:
        raise OptionError("base_url holds a user, a query or a fragment.", remedy="Give the key as api_key.")
    return str(parts).rstrip("/").removesuffix("/embeddings").rstrip("/")


def _checked_header(name: str, value: str) -> str:
    if not value or not value.isascii() or not value.isprintable() or " " in value:
        raise OptionError(f"{name} is empty or holds a space, a line break or a character beyond ASCII.")
    return value


def _redacted(text: str, key: str | None) -> str:
    """One line of at most 300 characters without the key, or the part of one that servers quote."""
    if key:
        text = text.replace(key, "[key]")
    text = re.sub(r"\bsk-[\w*.…-]+", "[key]", text)
    return "".join(c if c.isprintable() else " " for c in " ".join(text.split()))[:300]
