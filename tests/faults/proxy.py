"""A TCP proxy before PostgreSQL that can be stopped in several ways: how a database "goes away" in a test.

====================  ====================================================================================
``mode = PASS``       every byte is passed on
``mode = SLOW``       the same, a kilobyte each 20 ms and direction
``mode = HOLE``       connections stay open and new ones are accepted, but no byte is passed on any more
``mode = REFUSE``     new connections are reset at once
``cut()``             all connections are reset, on both sides
``half_open()``       all connections are reset towards the client; the server is told nothing
``strand()``          no byte is passed on any more on all connections, which stay open; new ones are served
====================  ====================================================================================

``on_request`` sees what clients send and can cut at an exact place, such as a COMMIT.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
import time
from collections.abc import Callable

from servers import connect_as

from kdb_fast.db.address import DatabaseAddress

PASS, SLOW, HOLE, REFUSE = "pass", "slow", "hole", "refuse"

FORWARD = "forward"
CUT_BEFORE = "cut before"
"""The request does not reach the server."""
CUT_AFTER = "cut after"
"""The server carries the request out, and its answer does not reach the client."""

TICK_SECONDS = 0.05
SLOW_BYTES = 1024
SLOW_SECONDS = 0.02


class Proxy:
    """Listens on a port of the loopback device. A context manager; every thread ends with it.

    Args:
        address: The PostgreSQL server, on a Unix socket or TCP.

    Attributes:
        mode: What happens with bytes; may be set at any time.
        on_request: Called with each piece of bytes from a client; says what is to be done with it.
        connections: Opened so far.
        cuts: Made so far, of all kinds.
    """

    def __init__(self, address: DatabaseAddress) -> None:
        from psycopg.conninfo import conninfo_to_dict

        parts = conninfo_to_dict(address.conninfo)
        host, port = str(parts["host"]), int(parts["port"] or 0)
        self._target: str | tuple[str, int] = f"{host}/.s.PGSQL.{port}" if host.startswith("/") else (host, port)
        self._server = address
        self.mode = PASS
        self.on_request: Callable[[bytes], str] = lambda data: FORWARD
        self.connections = 0
        self.cuts = 0
        self._links: set[_Link] = set()
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(TICK_SECONDS)
        self._thread = threading.Thread(target=self._accept, name="proxy", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    @property
    def address(self) -> DatabaseAddress:
        """The same database, through the proxy."""
        return connect_as(self._server, host="127.0.0.1", port=str(self.port))

    def url(self, password: str = "") -> str:
        """The same database, through the proxy, as ``--db`` takes it."""
        from urllib.parse import quote

        from psycopg.conninfo import conninfo_to_dict

        name = conninfo_to_dict(self._server.conninfo)["dbname"]
        login = f"postgres:{quote(password, safe='')}" if password else "postgres"
        return f"postgresql://{login}@127.0.0.1:{self.port}/{name}"

    def cut(self) -> None:
        """Reset all connections."""
        for link in self._all():
            self._cut(link)

    def half_open(self) -> None:
        """Reset all connections towards their clients; the server is left waiting until the proxy is closed."""
        for link in self._all():
            self.cuts += 1
            link.client_gone = True
            _reset(link.client)

    def strand(self) -> None:
        """Pass nothing on any more on all connections; neither side is told."""
        for link in self._all():
            self.cuts += 1
            link.stranded = True

    def close(self) -> None:
        self._ended.set()
        self._thread.join(10)
        self._listener.close()
        for link in self._all():
            link.end()
        for link in self._all():
            link.thread.join(10)

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # -- threads ---------------------------------------------------------------------------------------

    def _all(self) -> list[_Link]:
        with self._lock:
            return list(self._links)

    def _cut(self, link: _Link) -> None:
        self.cuts += 1
        link.end()

    def _accept(self) -> None:
        while not self._ended.is_set():
            try:
                client, _ = self._listener.accept()
            except TimeoutError:
                continue
            except OSError:
                return
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.connections += 1
            if self.mode == REFUSE:
                _reset(client)
                continue
            link = _Link(self, client)
            with self._lock:
                self._links.add(link)
            link.thread.start()

    def _carry(self, link: _Link) -> None:
        """Thread of one connection: pass bytes both ways until one side closes, or it is cut."""
        try:
            while self.mode == HOLE and not link.ended and not self._ended.is_set():
                time.sleep(TICK_SECONDS)
            link.server = self._connect()
            while not link.ended and not self._ended.is_set():
                self._carry_once(link, link.server)
        except (OSError, ValueError):
            pass  # a side is gone, or was closed by another thread
        finally:
            link.end()
            with self._lock:
                self._links.discard(link)

    def _connect(self) -> socket.socket:
        server = socket.socket(socket.AF_UNIX if isinstance(self._target, str) else socket.AF_INET)
        server.settimeout(5)
        try:
            server.connect(self._target)
            server.setblocking(False)
        except BaseException:
            server.close()
            raise
        return server

    def _carry_once(self, link: _Link, server: socket.socket) -> None:
        if self.mode == HOLE or link.stranded:
            time.sleep(TICK_SECONDS)
            return
        sides = [server] if link.client_gone else [link.client, server]
        readable, _, _ = select.select(sides, [], [], TICK_SECONDS)
        for side in readable:
            if self.mode == HOLE or link.stranded or link.ended or (link.client_gone and side is link.client):
                return
            data = side.recv(SLOW_BYTES if self.mode == SLOW else 65536)
            if self.mode == SLOW:
                time.sleep(SLOW_SECONDS)
            if not data:
                link.ended = True
            elif side is server:
                if link.cut_at_answer:
                    self._cut(link)
                elif not link.client_gone:
                    self._send(link, link.client, data)
            else:
                what = self.on_request(data)
                if what == CUT_BEFORE:
                    self._cut(link)
                    return
                link.cut_at_answer = link.cut_at_answer or what == CUT_AFTER
                self._send(link, server, data)

    def _send(self, link: _Link, side: socket.socket, data: bytes) -> None:
        """Pass bytes on, however long the other side takes; ends when the connection does."""
        left = memoryview(data)
        while left and not link.ended and not self._ended.is_set():
            if side is link.client and link.client_gone:
                return
            _, writable, _ = select.select([], [side], [], TICK_SECONDS)
            if writable:
                left = left[side.send(left) :]


class _Link:
    """One client's connection and what belongs to it at the server."""

    def __init__(self, proxy: Proxy, client: socket.socket) -> None:
        self.client = client
        self.client.setblocking(False)
        self.server: socket.socket | None = None
        self.ended = self.client_gone = self.stranded = self.cut_at_answer = False
        self.thread = threading.Thread(target=proxy._carry, args=(self,), name="proxy-link", daemon=True)

    def end(self) -> None:
        self.ended = True
        _reset(self.client)
        if self.server is not None:
            _reset(self.server)


def _reset(sock: socket.socket) -> None:
    """Close at once; over TCP the other side gets a RST."""
    with contextlib.suppress(OSError):
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()


def nth_request(pattern: bytes, n: int, what: str) -> Callable[[bytes], str]:
    """For ``on_request``: do ``what`` with the n-th piece of bytes that holds ``pattern``, forward all others.

    The function has an attribute ``hits``, the pieces with the pattern so far.
    """
    lock = threading.Lock()

    def decide(data: bytes) -> str:
        if pattern not in data:
            return FORWARD
        with lock:
            decide.hits += 1  # type: ignore[attr-defined]
            return what if decide.hits == n else FORWARD  # type: ignore[attr-defined]

    decide.hits = 0  # type: ignore[attr-defined]
    return decide
