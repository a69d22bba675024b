"""A client of OpenAI's embeddings API: texts → float32 matrix.

::

    texts ─► fit? ─► cut ─► requests of ≤ 2,048 inputs ─► threads ─► POST ◄─┐ 429, 5xx, no answer: wait, again
                │                                                     │ ────┘
             refused ◄── stands alone ◄── 400: halve, cut shorter ◄───┤
                                                                      └─► decoded ─► rows of the matrix

What goes into a request: inputs.py. Sending it until it is answered: requests.py, over the connections of
connections.py. What an answer says and what follows from it: answers.py, problems.py.

No message holds the key or a record's text: of what a server says about records only its error code is quoted.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ....errors import ModelError, OptionError
from ....records import was_cut
from ...encoder import Matrix, Tally
from ..texts import unfit_rows
from .answers import named_batch, named_window, speaks_of_length
from .connections import HTTPConnections
from .inputs import (
    CUT_BYTES_PER_TOKEN,
    MAX_INPUT_TOKENS,
    MAX_INPUTS,
    Input,
    cut_bytes,
    pack,
    shorter,
    why_refused,
)
from .problems import RefusedRequestError
from .requests import Requests, ServerLimits

if TYPE_CHECKING:
    import httpx


class _Part(NamedTuple):
    """What came of some rows: their vectors, or why they were refused."""

    rows: list[int]
    vectors: Matrix
    tokens: int
    truncated: int
    refused: dict[int, str]


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
        base_url: Without a final slash.
        has_key: Whether a key is sent.

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
        if dimensions is not None:
            _check_whole("dimensions", dimensions, 1)
        _check_whole("max_retries", max_retries, 0)
        _check_whole("concurrency", concurrency, 1)
        _check_whole("max_inputs", max_inputs, 1, MAX_INPUTS)
        _check_whole("max_input_tokens", max_input_tokens, 1)
        if not isinstance(model, str) or not model:
            raise OptionError(f"model is {model!r}; expected a model's name.")
        self._connections = HTTPConnections(
            base_url,
            api_key=api_key,
            organization=organization,
            timeout=timeout,
            count=concurrency,
            transport=transport,
        )
        self.base_url, self.has_key = self._connections.base_url, self._connections.has_key
        self.model, self.max_inputs, self.max_input_tokens = model, max_inputs, max_input_tokens
        self.concurrency = concurrency
        options: dict[str, object] = {"encoding_format": "base64"}
        if dimensions is not None:
            options["dimensions"] = dimensions
        self._limits = ServerLimits(options, max_inputs, max_input_tokens)
        self._requests = Requests(
            self._connections,
            self._limits,
            model=model,
            dimensions=dimensions,
            max_retries=max_retries,
            sleep=sleep,
            clock=clock,
        )
        self._probing = threading.Lock()

    @property
    def known_dimensions(self) -> int | None:
        """Length of a vector; None as long as nothing has asked for it."""
        return self._requests.known_dimensions

    @property
    def dimensions(self) -> int:
        """Length of a vector. Sends a probe where it is not known; raises as :meth:`probe`."""
        with self._probing:
            if self._requests.known_dimensions is None:
                self.probe()
        assert self._requests.known_dimensions is not None
        return self._requests.known_dimensions

    @property
    def accepted(self) -> bool:
        """Whether the server has answered with vectors before."""
        return self._requests.accepted

    def close(self) -> None:
        """Close the connections; the API cannot be used again. A connection in use is closed after its request."""
        self._connections.close()

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
        self._connections.check_open()
        refused = unfit_rows(texts, why_refused)
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
        before, self._requests.known_dimensions = self._requests.known_dimensions, None
        try:
            self.probe()
        except BaseException:
            self._requests.known_dimensions = before
            raise

    def probe(self) -> None:
        """Embed one sentence of our own. Raises as :meth:`embed_into`, and quotes what the server says."""
        self._connections.check_open()
        vectors = self._requests.probe(threading.Event())
        self._requests.known_dimensions = vectors.shape[1]
        if not np.isfinite(vectors).all() or not vectors.any():
            raise ModelError(f"{self.model} gives a vector that is zero or not finite; expected a direction.")

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
        if len(inputs) > (most := self._limits.inputs):
            pieces = [inputs[start : start + most] for start in range(0, len(inputs), most)]
            return [part for piece in pieces for part in self._embed(piece, stop)]
        inputs = [self._within_window(i) for i in inputs]
        rows = [i.row for i in inputs]
        options_before, inputs_before = self._limits.options, self._limits.inputs
        try:
            vectors, tokens = self._requests.post([i.text for i in inputs], stop)
        except RefusedRequestError as error:
            problem = error.problem
            if not self._requests.accepted:
                self._requests.probe(stop)  # Is it these texts, or would any be refused?
            if window := named_window(problem):
                self._limits.window = min(self._limits.window, window)
            if batch := named_batch(problem):
                self._limits.inputs = min(self._limits.inputs, batch)
            # Less is sent now than was refused: fewer inputs, shorter ones, fewer options.
            learnt = self._limits.options is not options_before or self._limits.inputs < min(inputs_before, len(inputs))
            if learnt or any(self._within_window(i) is not i for i in inputs):
                return self._embed(inputs, stop)
            if len(inputs) > 1:
                middle = len(inputs) // 2
                parts = self._embed(inputs[:middle], stop) + self._embed(inputs[middle:], stop)
                if not speaks_of_length(problem) and not any(p.refused for p in parts):
                    # It was none of the texts: the server takes so many at once and no more.
                    self._limits.inputs = min(self._limits.inputs, len(inputs) - middle)
                return parts
            if less := shorter(inputs[0].text, self._limits.window, too_long=speaks_of_length(problem)):
                return self._embed([Input(rows[0], less, True)], stop)
            nothing = np.empty((0, self.dimensions), np.float32)
            return [_Part([], nothing, 0, 0, {rows[0]: f"the API refuses it, {error}"})]
        odd = np.flatnonzero(~np.isfinite(vectors).all(axis=1)).tolist()
        reasons = {rows[i]: "the API gives a vector that is not finite" for i in odd}
        return [_Part(rows, vectors, tokens, sum(i.cut for i in inputs), reasons)]

    def _within_window(self, given: Input) -> Input:
        """A text that the server is certain to refuse, cut to what it would be cut to then."""
        window = self._limits.window
        if len(given.text) <= 2 * CUT_BYTES_PER_TOKEN[0] * window or window == self.max_input_tokens:
            return given
        return Input(given.row, cut_bytes(given.text, CUT_BYTES_PER_TOKEN[0] * window), True)


def _check_whole(name: str, value: object, least: int, most: int | None = None) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least or (most and value > most):
        expected = f"of at least {least}" if most is None else f"from {least} to {most:,}"
        raise OptionError(f"{name} is {value!r}; expected a whole number {expected}.")
