"""Connections to an embeddings API: a client for each request in flight. The only importer of httpx.

No message holds the key.
"""

from __future__ import annotations

import contextlib
import queue
import re
import ssl
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

from .... import __version__
from ....errors import MissingPackageError, OptionError, UsageError

if TYPE_CHECKING:
    import httpx

CONNECT_SECONDS = 10.0
"""Time to reach the server; a host that is up answers within one."""


class Answer(NamedTuple):
    """What a server has answered; names in ``headers`` are in lower case."""

    status: int
    content: bytes
    headers: Mapping[str, str]


class NoAnswerError(Exception):
    """The server was not reached, or did not answer in time; the text says how."""


class HTTPConnections:
    """HTTP connections to one server; safe to use from several threads. To be closed.

    Args:
        base_url: Such as ``https://api.openai.com/v1``.
        api_key: Sent as a bearer token; None sends none.
        organization: Sent as ``OpenAI-Organization``.
        timeout: Seconds without a byte after which an attempt has failed.
        count: Requests in flight.
        transport: Of httpx, instead of the network.

    Attributes:
        base_url: Without a final slash.
        has_key: Whether a key is sent.
        redact: One line of at most 300 characters of a text, without the key.

    Raises:
        MissingPackageError: httpx is not installed.
        OptionError: An argument makes no sense.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None,
        organization: str | None,
        timeout: float,
        count: int,
        transport: httpx.BaseTransport | None,
    ) -> None:
        try:
            import httpx
        except ImportError:
            raise MissingPackageError(
                "The openai provider needs the package httpx.", remedy="Run: pip install 'kdb-fast[openai]'"
            ) from None
        if not timeout > 0:
            raise OptionError(f"timeout is {timeout!r}; expected seconds, more than 0.")
        self.base_url, self.has_key = _checked_url(base_url), api_key is not None
        self._closed = False
        self._transport_error = httpx.TransportError
        headers = {"User-Agent": f"kdb-fast/{__version__}"}
        if api_key is not None:
            headers["Authorization"] = f"Bearer {_checked_header('api_key', api_key)}"
        if organization:
            headers["OpenAI-Organization"] = _checked_header("organization", organization)
        # A closure, so that no attribute of this object shows the key.
        self.redact: Callable[[str], str] = lambda text: _redacted(text, api_key)
        secure = self.base_url.startswith("https:")
        # Reading the certificates takes 50 ms. Without any, nothing is trusted.
        verify = httpx.create_ssl_context() if secure else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        # One client for each request in flight. Threads that share a client's connection pool may find their
        # connection closed by another one (httpcore issue 1110, open in 1.0.9): seen here as texts that were sent,
        # and paid for, twice, and as requests that hung until their timeout.
        self._clients: queue.LifoQueue[httpx.Client] = queue.LifoQueue()
        for _ in range(count):
            self._clients.put(
                httpx.Client(
                    headers=headers,
                    timeout=httpx.Timeout(timeout, connect=min(timeout, CONNECT_SECONDS)),
                    limits=httpx.Limits(max_connections=1),
                    verify=verify,
                    transport=transport,
                )
            )

    def post(self, url: str, body: Mapping[str, object]) -> Answer:
        """Send ``body`` as JSON, once; waits for a free connection first.

        Raises:
            NoAnswerError: There is no answer.
            UsageError: The connections are closed.
        """
        try:
            with self._borrowed() as client:
                response = client.post(url, json=body)
        except self._transport_error as error:
            raise NoAnswerError(self.redact(f"{type(error).__name__}: {error}")) from None
        return Answer(response.status_code, response.content, response.headers)

    def close(self) -> None:
        """Close all connections for good; one in use is closed after its request."""
        self._closed = True
        clients = []
        with contextlib.suppress(queue.Empty):
            while True:
                clients.append(self._clients.get_nowait())
        for client in clients:
            client.close()
            self._clients.put(client)

    def check_open(self) -> None:
        """Raises UsageError once they are closed."""
        if self._closed:
            raise UsageError("The provider is closed.")

    @contextlib.contextmanager
    def _borrowed(self) -> Iterator[httpx.Client]:
        client = self._clients.get()
        try:
            self.check_open()
            yield client
        finally:
            if self._closed:
                client.close()
            self._clients.put(client)


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
