"""Connections to PostgreSQL on which no wait is endless.

Keepalives notice a network that is gone. They do not notice a proxy, a pooler or a firewall that keeps the connection
open and passes nothing on, nor an answer that got lost there: the client would wait for ever. So a server that has
been silent for a while is asked, on a second connection, whether it still works on the statement. A long statement
may take as long as it takes; one that nobody works on ends with an error, after which a new connection is made.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import socket
import time
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

from ..errors import DatabaseError, RefusedError
from ..settings import silence_seconds
from .address import DatabaseAddress, redact
from .pg_settings import ENCODING, check_encoding, pin

if TYPE_CHECKING:
    import psycopg

    Connection = psycopg.Connection[tuple[Any, ...]]

CONNECT_TIMEOUT = 10
"""Seconds to wait for a server before saying that it cannot be reached."""

KEEPALIVE: dict[str, Any] = {
    "keepalives": 1,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
}
"""A dead network is noticed in about 30 s instead of the kernel's two hours (psycopg issue 777)."""

SEND_BYTES = 1024 * 1024
"""What the kernel is asked to take before we wait for the server, on a socket of this machine (TCP finds it by itself).
Such a socket can be written to again once three quarters of it were read. With the usual 208 kB the server has 30 rows
of a COPY left by then, 0.2 ms of work, while the next 128 take the writer twice as long."""

TIMES_UNKNOWN = 10
"""Checks without an answer (behind a pooler the session is not known) before the connection is given up."""

NO_SESSION = (
    "no session of the server was to be had: a pooler in front of it has none left, where a run takes 5 "
    "(PgBouncer: SHOW POOLS, default_pool_size)"
)
"""A pooler lets clients in before it has a session for them, and then says nothing."""

SPARE_SECONDS = 5.0
"""How long a pooler may take to give one more session, before it is taken to have none left."""

SECOND_LOOK_SECONDS = 1.0
"""An answer may be on its way when the server says that it has nothing to do."""


class ConnectionWatchdog:
    """Watches one connection, so that no answer is waited for that nobody is working on.

    Args:
        second: Opens another connection to the same database.
        silence: Seconds after which the server is asked; by default what the environment says.

    Attributes:
        session: The server process that works for the connection in its present transaction, where libpq does not
            know it: behind a pooler.
    """

    def __init__(self, second: Callable[[], Connection] | None, silence: float | None = None) -> None:
        self.silence = silence_seconds() if silence is None else silence
        self.session: int | None = None
        self._second = second
        self._answered = False

    def over(self, connection: Connection, waiting: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
        """psycopg's generator ``waiting``, ended with an OperationalError when nobody works on it any more.

        psycopg resumes it whenever the socket is ready, and some ten times a second while it is not.
        """
        import psycopg

        status = connection.pgconn.transaction_status
        if status == psycopg.pq.TransactionStatus.IDLE:
            self.session = None
        elif status == psycopg.pq.TransactionStatus.INTRANS:
            self._answered = True
        began = heard = time.monotonic()
        unknown = idle = 0
        try:
            wanted = next(waiting)
            while True:
                ready = yield wanted
                now = time.monotonic()
                if ready:
                    heard, unknown, idle = now, 0, 0
                elif now - heard >= self.silence:
                    try:
                        works = self._works(connection)
                    except psycopg.errors.ConnectionTimeout:
                        works, idle = False, 1  # there is nobody there to look at a second time
                    if works is None and not self._answered:
                        connection.pgconn.finish()
                        raise psycopg.OperationalError(NO_SESSION)
                    unknown += works is None
                    idle = idle + 1 if works is False else 0
                    if idle > 1 or unknown >= TIMES_UNKNOWN:
                        connection.pgconn.finish()
                        raise psycopg.OperationalError(f"no answer for {time.monotonic() - began:.0f} s")
                    heard = time.monotonic()
                    if idle:
                        heard -= self.silence - min(SECOND_LOOK_SECONDS, self.silence)
                wanted = waiting.send(ready)
        except StopIteration as ended:
            self._answered = self._answered or bool(ended.value)
            return ended.value

    def _works(self, connection: Connection) -> bool | None:
        """Whether the server works on a statement of this connection; None where that cannot be known.

        A server that waits for us does not work.

        Raises:
            psycopg.errors.ConnectionTimeout: A new connection gets no answer either.
        """
        import psycopg

        if self._second is None:
            return False
        session = self.session or connection.info.backend_pid
        try:
            with contextlib.closing(self._second()) as second:
                row = second.execute(
                    # Without track_activities only its locks tell: no session idles in a transaction of ours for long.
                    "SELECT CASE WHEN state = 'disabled' "
                    "THEN EXISTS (SELECT FROM pg_locks l WHERE l.pid = a.pid AND l.locktype = 'virtualxid') "
                    "ELSE state = 'active' AND wait_event_type IS DISTINCT FROM 'Client' END "
                    "FROM pg_stat_activity a WHERE pid = %s",
                    (session,),
                ).fetchone()
        except psycopg.errors.ConnectionTimeout:
            raise
        except psycopg.Error:
            return None
        return row[0] if row else None


@functools.cache
def _connection_class() -> type[Connection]:
    # In a function, because psycopg takes a quarter of a second to import.
    import psycopg

    class WatchedConnection(psycopg.Connection[tuple[Any, ...]]):
        watchdog: ConnectionWatchdog | None = None

        def wait(self, gen: Any, *args: Any, **options: Any) -> Any:
            return super().wait(self.watchdog.over(self, gen) if self.watchdog else gen, *args, **options)

    return WatchedConnection


def connect(conninfo: str, **options: Any) -> Connection:
    """:func:`psycopg.connect` with a :class:`ConnectionWatchdog` over it, and the pins of :mod:`.pg_settings`.

    Args:
        options: Of psycopg.connect; ``application_name`` among them.

    Raises:
        psycopg.Error: The server cannot be reached, or refuses.
    """

    def open_watched(second: Callable[[], Connection] | None, **changed: Any) -> Connection:
        connection = _connection_class().connect(conninfo, **{**options, **changed})
        _widen(connection)
        pin(connection)
        connection.watchdog = ConnectionWatchdog(second)  # type: ignore[attr-defined]
        return connection

    return open_watched(lambda: open_watched(None, application_name="kdb-fast/check", autocommit=True))


def _widen(connection: Connection) -> None:
    """Let the kernel take more of what is sent at once, where the server is on this machine: see SEND_BYTES."""
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(connection.fileno())) as ours:
        if ours.family == getattr(socket, "AF_UNIX", None):
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)


def connect_postgresql(address: DatabaseAddress, *, role: str, autocommit: bool = True) -> Connection:
    """A connection in UTF-8 with short time-outs and no server-side prepared statements (poolers lose them).

    In autocommit mode each of its statements has the settings of :mod:`.pg_settings`.

    Args:
        role: What it is for; becomes ``application_name`` as ``kdb-fast/<role>``.

    Raises:
        DatabaseError: The server cannot be reached, or refuses; the message holds no secret.
        RefusedError: The database has no encoding (SQL_ASCII).
    """
    import psycopg

    options: dict[str, Any] = dict(KEEPALIVE)
    given = psycopg.conninfo.conninfo_to_dict(address.conninfo)
    options = {k: v for k, v in options.items() if k not in given}
    if "connect_timeout" not in given and not os.environ.get("PGCONNECT_TIMEOUT"):
        options["connect_timeout"] = CONNECT_TIMEOUT
    connection = None
    try:
        connection = connect(
            address.conninfo,
            autocommit=autocommit,
            prepare_threshold=None,
            application_name=f"kdb-fast/{role}",
            client_encoding=ENCODING,  # whatever the address, the environment or the role asks for
            **options,
        )
        check_encoding(connection, address.display)
        return connection
    except RefusedError:
        assert connection is not None
        connection.close()
        raise
    except psycopg.Error as error:
        detail = " ".join(redact(str(error), address).split()).rstrip(".?")
        raise DatabaseError(
            f"Cannot connect to {address.display}: {detail}.",
            remedy=connection_remedy(detail, address.given_as),
        ) from None


def connection_remedy(detail: str, given_as: str) -> str:
    """What to do where a connection is refused. libpq gives no code, only words, which may be in any language.

    Args:
        given_as: The option that gave the address.
    """
    if "startup parameter" in detail:
        return (
            f"A pooler takes no such options: leave them out of {given_as} and PGOPTIONS, and give them to the role "
            "instead, such as ALTER ROLE … SET search_path = …"
        )
    if "does not exist" in detail:
        return f"Check user and database name in {given_as}; createdb makes a database."
    if re.search(r"(invalid|unrecognized|bad|definition of) .*(value|parameter|service)", detail):
        return f"Correct this option in {given_as} (or in the environment: PG…)."
    if "FATAL" in detail:
        return f"The server runs, and refuses: check user, password, database name and options in {given_as}."
    if "session attrs" in detail or "standby" in detail or "read-only" in detail or "read-write" in detail:
        return "The server is there, but is not of the kind that target_session_attrs asks for."
    return f"Check host and port in {given_as}, and that the server runs and can be reached from here."


def is_only_session(connection: Connection, address: DatabaseAddress) -> bool:
    """Whether a pooler has no session left for others as long as a transaction of the connection is open.

    Args:
        connection: In a transaction. Where no pooler is between it and the server, this is one round trip.
    """
    import psycopg

    ((session,),) = connection.execute("SELECT pg_backend_pid()").fetchall()
    if session == connection.info.backend_pid:
        return False
    try:
        with contextlib.closing(connect_postgresql(address, role="check")) as other:
            other.watchdog = ConnectionWatchdog(None, min(SPARE_SECONDS, silence_seconds()))  # type: ignore[attr-defined]
            other.execute("SELECT")
    except (DatabaseError, psycopg.Error):
        return True
    return False


def name_session(connection: Connection, session: int) -> None:
    """Say which server process works for the connection until the end of the transaction."""
    watchdog = getattr(connection, "watchdog", None)
    if watchdog is not None:
        watchdog.session = session
