"""One request to an embeddings API, sent until it is answered; and what the server has shown not to take."""

from __future__ import annotations

import math
import random
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from ....errors import ModelError, ProviderError
from ...encoder import PROBE, Matrix
from ..texts import typical_tokens
from .answers import OddAnswerError, Problem, decode, read_problem, server_wait
from .connections import HTTPConnections, NoAnswerError
from .problems import Asked, RefusedRequestError, raise_if_final, speaks_of_lists, unknown_option

RETRY_SECONDS = 600.0
"""A request is given up this long after its first failure. Rate limits are by the minute; a longer wait is a day's."""

MAX_BACKOFF_SECONDS = 30.0
"""Longest wait between attempts where the server names none."""

MAX_ODD_ANSWERS = 2
"""Repeats after a damaged answer (no JSON, a vector missing, NaN). More would pay for the same defect again."""


@dataclass
class ServerLimits:
    """What a server takes in one request, as far as it is known. Requests side by side learn from each other.

    Attributes:
        options: Fields that some compatible servers do not know; each is left out once a server has said so.
        inputs: Most texts at once.
        window: Tokens of a text.
        bare: Whether even one text must not be in a list.
    """

    options: dict[str, object]
    inputs: int
    window: int
    bare: bool = False

    def simplify(self, message: str) -> bool:
        """Leave out the next thing that the server may not know, if it may be that what it refuses; else False."""
        if self.options and not message:
            self.options = dict(list(self.options.items())[1:])
            return True
        if self.bare or (message and not speaks_of_lists(message)):
            return False
        self.bare, self.inputs = True, 1
        return True


class CancelledError(Exception):
    """Another request has failed for good."""


class Requests:
    """Sends requests for the vectors of one model; safe to use from several threads.

    Args:
        connections: To the server.
        limits: What the server takes; learnt on the way.
        model: Name of the model.
        dimensions: Length of a vector; None takes what the server gives.
        max_retries: Attempts after the first.
        sleep: Called with seconds instead of waiting.
        clock: Seconds, monotonic.

    Attributes:
        accepted: Whether the server has answered with vectors before.
        known_dimensions: Length of a vector; None as long as nothing has asked for it.
    """

    def __init__(
        self,
        connections: HTTPConnections,
        limits: ServerLimits,
        *,
        model: str,
        dimensions: int | None,
        max_retries: int,
        sleep: Callable[[float], object] | None,
        clock: Callable[[], float],
    ) -> None:
        self._connections, self._limits = connections, limits
        self.model, self.known_dimensions = model, dimensions
        self._asked = Asked(connections.base_url, model, connections.has_key)
        self._urls = [f"{connections.base_url}/embeddings"]
        if not re.search(r"/v\d", connections.base_url):
            self._urls.append(f"{connections.base_url}/v1/embeddings")
        self._max_retries, self.sleep, self._clock = max_retries, sleep, clock
        self.accepted = False
        self._not_before = -math.inf

    def probe(self, stop: threading.Event) -> Matrix:
        """The vector of PROBE, float32 [1, dimensions], with as little asked for as the server needs.

        Raises:
            CancelledError: ``stop`` was set.
            KdbFastError: As :meth:`~EmbeddingsAPI.embed_into`, and quotes what the server says.
        """
        while True:
            try:
                return self.post([PROBE], stop, ours=True)[0]
            except RefusedRequestError as refused:
                if not self._limits.simplify(refused.problem.message):
                    asked = f" with {self.known_dimensions} dimensions" if self.known_dimensions else ""
                    raise ModelError(
                        f"{self._asked.base_url} refuses every request for {self.model}{asked}: "
                        f"{refused}{self._quoted(refused.problem, '.')}",
                        remedy="Check the model's name and the dimensions it can give.",
                    ) from None

    def post(self, texts: list[str], stop: threading.Event, *, ours: bool = False) -> tuple[Matrix, int]:
        """Send one request until it is answered: its vectors (not finite ones too) and tokens.

        Args:
            texts: No more than the server's limits allow.
            stop: Once it is set, no wait is begun or ended.
            ours: The text is our own, so what the server says of it may be shown.

        Raises:
            RefusedRequestError: The server does not take this request.
            CancelledError: ``stop`` was set.
            KdbFastError: As :meth:`~EmbeddingsAPI.embed_into`.
        """
        turn, failures, odd, deadline = -math.inf, 0, 0, math.inf
        while True:
            self._wait_until(max(turn, self._not_before), stop)
            url, bare = self._urls[0], self._limits.bare and len(texts) == 1
            sent = {"model": self.model, "input": texts[0] if bare else texts, **self._limits.options}
            wait, limited = None, False
            try:
                answer = self._connections.post(url, sent)
            except NoAnswerError as error:
                problem = str(error)
            else:
                if answer.status == 200:
                    try:
                        vectors, tokens = decode(answer.content, len(texts), self.known_dimensions, self.model)
                        if odd >= MAX_ODD_ANSWERS or np.isfinite(vectors).all():
                            self.accepted = True
                            return vectors, tokens or typical_tokens(texts)
                        problem = "a vector that is not finite"
                    except OddAnswerError as error:
                        problem = str(error)
                        said = read_problem(200, answer.content)
                        if self._elsewhere(url):
                            continue
                        if said.message and error.vectors is None and ours:
                            raise ModelError(
                                f"{self._asked.base_url} gives no vector for {self.model}{self._quoted(said, '.')}",
                                remedy="Check the base URL and the model's name.",
                            ) from None
                        if error.vectors == 1 < len(texts) and odd == MAX_ODD_ANSWERS - 1:
                            # The last repeat asks for the first text only: is it all that this server reads?
                            odd += 1
                            if self._reads_one(texts[0], answer.content, url, sent):
                                self._limits.inputs = 1
                                raise RefusedRequestError(Problem(200, "one_input", "", "")) from None
                    odd += 1
                else:
                    said = read_problem(answer.status, answer.content)
                    if said.status in (404, 405) and self._elsewhere(url):
                        continue
                    if name := unknown_option(said, sent):
                        self._limits.options = {key: v for key, v in self._limits.options.items() if key != name}
                        continue
                    raise_if_final(said, self._asked, len(texts), self._quoted(said, ".") if ours else ".")
                    problem, limited = f"{said}{self._quoted(said) if ours else ''}", said.status == 429
                    wait = server_wait(answer.headers)
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
                    f"{self._asked.base_url} gave no proper answer in {failures} attempts; "
                    f"the last was {problem}{asked}.",
                    remedy="Run it again later; it carries on where it stopped.",
                )
            if limited:
                self._not_before = max(self._not_before, turn)  # The limit is the key's: it holds for all threads.

    def _reads_one(self, text: str, content: bytes, url: str, sent: Mapping[str, object]) -> bool:
        """Whether the one vector that a server has given for several texts is that of the first."""
        try:
            given = decode(content, 1, self.known_dimensions, self.model)[0]
            answer = self._connections.post(url, {**sent, "input": [text]})
            alone = decode(answer.content, 1, self.known_dimensions, self.model)[0]
        except (OddAnswerError, ModelError, NoAnswerError):
            return False
        return bool(np.allclose(given, alone, rtol=1e-3, atol=1e-5))

    def _elsewhere(self, url: str) -> bool:
        """Whether to ask at the next address, since there is no embeddings API at ``url``."""
        if self.accepted or len(self._urls) == 1:
            return False
        if url == self._urls[0]:
            self._urls = self._urls[1:]
        return True

    def _wait_until(self, moment: float, stop: threading.Event) -> None:
        seconds = moment - self._clock()
        if seconds > 0:
            (self.sleep or stop.wait)(seconds)
        if stop.is_set():
            raise CancelledError

    def _quoted(self, said: Problem, otherwise: str = "") -> str:
        """What the server says of a text of our own."""
        message = self._connections.redact(said.message)
        return f": {message}" if message else otherwise
