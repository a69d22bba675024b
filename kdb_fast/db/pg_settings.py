"""What a role, a database, an address or the environment may set, and our statements rely on: pinned for every one.

A server's session begins with settings of the server, the database, the role, the address and libpq's environment, and
behind a pooler with what another client has left there. Some change what a statement returns or stores. So each of our
statements runs in a transaction that begins with the same ones (``PINNED``), which end with it: a pooler passes no
setting on, and a connection that was lent to us is as it was.

The encoding is also asked for in the startup packet (:func:`.pg_connection.connect_postgresql`): psycopg encodes by
what the server has reported, while the binary rows that are copied are UTF-8 as they are.

Left as they are set, because they change nothing that is stored or found, or because they are somebody's wish:

* ``default_transaction_read_only``: a server or role that must not be written is not written; reading works.
* ``synchronous_commit``: how safe a COMMIT is, is the user's choice.
* ``statement_timeout``: met by smaller statements, then named in the error.
* ``temp_tablespaces``, ``work_mem`` and their like: where and how fast. ``ivfflat.probes``: how exact an index of the
  user's own making is.
* ``idle_session_timeout``: a connection that was ended is opened again.
* ``session_replication_role``, ``lc_messages``: only a superuser sets them, and a statement's error is known by its
  SQLSTATE.
* Those that no statement of ours depends on, such as ``xmloption`` or ``default_text_search_config``.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import RefusedError

if TYPE_CHECKING:
    import psycopg

    Connection = psycopg.Connection[tuple[Any, ...]]

ENCODING = "UTF8"
"""Of every connection: texts are copied as the UTF-8 bytes that the slab holds."""

PINNED = {
    "client_encoding": ENCODING,
    # How values are written as text and read from it: times and numbers in to_jsonb(), constants in the definition of
    # an index, which is remembered in one session and built again in another.
    "DateStyle": "ISO",
    "IntervalStyle": "postgres",
    "TimeZone": "UTC",
    "extra_float_digits": "1",
    "bytea_output": "hex",
    "standard_conforming_strings": "on",
    "quote_all_identifiers": "off",
    # Keyword search would leave out matches at random.
    "gin_fuzzy_search_limit": "0",
    # Indexes and staging tables; a new search table is made where the user's own would be (see pg_prepare).
    "default_tablespace": "",
    "default_table_access_method": "heap",
    # What pgvector says of a build that does not fit into memory.
    "client_min_messages": "notice",
    # A refused row costs a savepoint, not the session.
    "exit_on_error": "off",
    # Plans that our statements are written for; without them a look-up of a page reads the table for every key.
    "enable_nestloop": "on",
    "enable_indexscan": "on",
    # Compiling takes longer than any of our statements but the builds of indexes, which it does not speed up.
    "jit": "off",
}
"""Settings of each transaction of ours. ``transaction_timeout`` is among them where the server knows it."""

BEGIN = "BEGIN ISOLATION LEVEL READ COMMITTED NOT DEFERRABLE"
"""In a snapshot of its beginning a transaction would not see the run that it has just waited for."""


def pinned(server_version: int) -> dict[str, str]:
    """PINNED as far as the server knows them.

    Args:
        server_version: As libpq gives it, such as 160004.
    """
    # An index may be built for an hour; waits of a transaction have limits of their own.
    return {**PINNED, "transaction_timeout": "0"} if server_version >= 170_000 else PINNED


@functools.cache
def _beginning(server_version: int) -> str:
    settings = "; ".join(f"SET LOCAL {name} = '{value}'" for name, value in pinned(server_version).items())
    return f"{BEGIN}; {settings}"


@functools.cache
def _calls(server_version: int) -> bytes:
    """The pins as one statement, which the extended protocol asks for."""
    calls = ", ".join(f"set_config('{name}', '{value}', true)" for name, value in pinned(server_version).items())
    return f"SELECT {calls}".encode()


@functools.cache
def _cursor_class() -> type[psycopg.Cursor[Any]]:
    # In a function, because psycopg takes a quarter of a second to import.
    import psycopg

    class PinnedCursor(psycopg.Cursor[Any]):
        """A statement outside a transaction runs in one of its own, with the pins, in one round trip.

        Its results come in binary form: the client is not told of settings that are gone again with the answer, and
        would read a time by the session's own DateStyle.
        """

        def execute(self, query: Any, params: Any = None, *, prepare: Any = None, binary: Any = None) -> Any:
            connection, execute = self._conn, super().execute
            if not _is_free(connection):
                return execute(query, params, prepare=prepare, binary=binary)
            _in_one_round_trip(
                connection, lambda: execute(query, params, prepare=prepare, binary=binary is None or binary)
            )
            return self

    return PinnedCursor


def _in_one_round_trip(connection: Connection, execute: Callable[[], object]) -> None:
    """A transaction with the pins of all the statements that ``execute`` does, on a connection that is free."""
    _send(connection, execute)()


def _send(connection: Connection, execute: Callable[[], object]) -> Callable[[], None]:
    """:func:`_in_one_round_trip` in two halves: what this gives waits for the end, and raises what has failed."""
    import psycopg

    error: BaseException | None = None
    pipeline = contextlib.ExitStack()
    try:
        entered = pipeline.enter_context(connection.pipeline())
        _begin(connection)
        execute()
        psycopg.Cursor(connection).execute("END")
        _end_of_pipeline(connection, entered)
    except BaseException as caught:  # psycopg would log what the end of the pipeline says beside it
        error = caught

    def end() -> None:
        nonlocal error
        try:
            pipeline.close()
        except BaseException as caught:  # also a signal, after which the run's end is noted on this connection
            error = error or caught
        if error is not None:
            _roll_back(connection)
            raise error

    if error is not None:
        end()
    return end


def _end_of_pipeline(connection: Connection, pipeline: psycopg.Pipeline) -> None:
    """Half of ``Pipeline.sync()``, which would wait for the results too; a pooler keeps the session for us until then.

    What psycopg sends beside it when the pipeline is left, a second Sync and a Flush, is left out: a pooler would give
    us a session for the Flush and keep it for us until our next statement, since no Sync follows.

    The parts are not public. A psycopg that has others waits here: the next page is not read meanwhile, no more.
    """
    try:
        enqueue, communicate, fetch = pipeline._enqueue_sync, pipeline._communicate_gen, pipeline._fetch_gen
    except AttributeError:
        pipeline.sync()
        return
    enqueue()
    connection.wait(communicate())
    pipeline._exit_gen = lambda: fetch(flush=False)  # type: ignore[method-assign]


Statement = tuple[bytes, Sequence[Any] | Mapping[str, Any]]
"""A statement and its parameters."""


def send(connection: Connection, statements: Iterable[Statement]) -> Callable[[], list[list[tuple[Any, ...]]]] | None:
    """Send statements, in a transaction with the pins and one round trip, and do not wait for them.

    Returns:
        Waits for the rows of each; nothing else may be done with the connection before. None where it is not free, and
        nothing was sent.
    """
    import psycopg
    from psycopg.rows import tuple_row

    if not _is_free(connection):
        return None
    cursors: list[psycopg.Cursor[tuple[Any, ...]]] = []

    def execute() -> None:
        for statement, params in statements:
            cursors.append(psycopg.Cursor(connection, row_factory=tuple_row))
            # In binary form for the reason that PinnedCursor gives.
            cursors[-1].execute(statement, params, binary=True)

    end = _send(connection, execute)

    def rows() -> list[list[tuple[Any, ...]]]:
        end()
        return [cursor.fetchall() for cursor in cursors]

    return rows


def at_once(connection: Connection, statements: Sequence[Statement]) -> list[list[tuple[Any, ...]]]:
    """The rows of each statement: as :func:`send`, and waits.

    On a connection that is in a transaction, or does not commit by itself, one after the other.
    """
    import psycopg
    from psycopg.rows import tuple_row

    if (rows := send(connection, statements)) is not None:
        return rows()
    cursor = psycopg.Cursor(connection, row_factory=tuple_row)
    return [cursor.execute(statement, params).fetchall() for statement, params in statements]


def _begin(connection: Connection) -> None:
    """Begin a transaction with the pins, within a pipeline."""
    import psycopg

    plain = psycopg.Cursor(connection)
    plain.execute(BEGIN)
    plain.execute(_calls(connection.info.server_version))


def pin(connection: Connection) -> None:
    """Make every statement outside a transaction, on a connection in autocommit mode, one with the pins."""
    connection.cursor_factory = _cursor_class()


def check_encoding(connection: Connection, display: str) -> None:
    """Refuse a database in which no text has a certain meaning.

    Raises:
        RefusedError: Its encoding is SQL_ASCII: the server keeps whatever bytes it is given, each client its own.
    """
    if server_encoding(connection) == "SQL_ASCII":
        raise RefusedError(
            f"The database {display} has the encoding SQL_ASCII, in which bytes have no meaning as letters; expected "
            "UTF8 or another real encoding.",
            remedy="Make a new one, CREATE DATABASE … ENCODING 'UTF8' TEMPLATE template0, and restore a dump into it.",
        )


def server_encoding(connection: Connection) -> str:
    """The encoding that the database keeps its texts in, as PostgreSQL names it."""
    found = connection.info.parameter_status("server_encoding")
    if not found:  # not every pooler passes it on
        row = connection.execute("SHOW server_encoding").fetchone()
        found = str(row[0]) if row else ""
    return found


@contextlib.contextmanager
def transaction(connection: Connection, settings: str = "") -> Iterator[None]:
    """A transaction with the pins, begun in one round trip; within another one a savepoint, which changes nothing.

    Args:
        settings: More statements for its beginning, such as ``SET LOCAL lock_timeout = '30s'``.
    """
    import psycopg

    if not _is_idle(connection):
        with connection.transaction():
            yield
        return
    statements = _beginning(connection.info.server_version) + (f"; {settings}" if settings else "")
    try:
        psycopg.Cursor(connection).execute(statements.encode())
        yield
    except BaseException:
        _roll_back(connection)
        raise
    connection.commit()


@contextlib.contextmanager
def lent(connection: Connection, display: str, others: tuple[str, ...] = ()) -> Iterator[None]:
    """The pins within the transaction of a caller's connection, which is given back with the caller's own settings.

    Args:
        display: The database as it may be printed.
        others: More settings that the block changes.

    Raises:
        RefusedError: See :func:`check_encoding`.
    """
    import psycopg
    from psycopg.rows import tuple_row

    check_encoding(connection, display)
    cursor = psycopg.Cursor(connection, row_factory=tuple_row)
    pins = pinned(connection.info.server_version)
    names = [*pins, *others]
    # The first statement begins the caller's transaction: in none, the savepoint would be a transaction of its own.
    before = cursor.execute(
        "SELECT current_setting(n) FROM unnest(%s::text[]) WITH ORDINALITY AS t(n, i) ORDER BY i", (names,)
    ).fetchall()
    # Rolled back to the savepoint, the settings are the caller's again by themselves.
    with connection.transaction():
        _set(cursor, pins)
        yield
        _set(cursor, dict(zip(names, (value for (value,) in before), strict=True)))


def _set(cursor: psycopg.Cursor[Any], settings: dict[str, str]) -> None:
    cursor.execute(
        "SELECT set_config(n, v, true) FROM unnest(%s::text[], %s::text[]) AS t(n, v)",
        (list(settings), list(settings.values())),
    )


def _is_idle(connection: Connection) -> bool:
    """Whether it is in no transaction."""
    import psycopg

    return bool(connection.pgconn.transaction_status == psycopg.pq.TransactionStatus.IDLE)


def _is_free(connection: Connection) -> bool:
    """Whether its next statement would be a transaction of its own."""
    return connection.autocommit and _is_idle(connection)


def _roll_back(connection: Connection) -> None:
    """After an error; where that fails too, the error says more."""
    with contextlib.suppress(Exception):
        connection.rollback()
