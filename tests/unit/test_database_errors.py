"""Which errors of a database pass, are the data's, or are final: the same for all that reads and writes."""

from __future__ import annotations

import contextlib
import itertools
import re
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import psycopg
import pytest

from kdb_fast.catalog.definitions import Catalog
from kdb_fast.db import pg_errors, retrying, sqlite_errors, sqlite_vec
from kdb_fast.db.address import DatabaseAddress
from kdb_fast.db.pg_errors import explain, kind_of, sqlstate
from kdb_fast.db.retrying import MOST_TIMEOUTS, Backoff, ErrorKind, retry
from kdb_fast.db.sqlite_session import patiently, transaction
from kdb_fast.errors import DatabaseError, KdbFastError, LockedError, SchemaError
from kdb_fast.records import Record
from kdb_fast.search.batches import Put
from kdb_fast.search.transactions import WAITS, write_at_once
from kdb_fast.sources.insert.postgresql import PostgreSQLInserter
from kdb_fast.sources.insert.sqlite import SQLiteInserter
from kdb_fast.sources.reader import Reader
from kdb_fast.stores.postgresql.session import PgSession
from kdb_fast.stores.sqlite.index_store import SQLiteIndexStore
from kdb_fast.tables.reading import rows_of, sqlite_cursor

ADDRESS = DatabaseAddress("postgresql", "password=SENTINEL", "postgresql://tests")
PATIENCE = 5.0
EXIT_CODES = {
    ErrorKind.PASSING: 5, ErrorKind.TIMEOUT: 5, ErrorKind.DATA: 4, ErrorKind.RESOURCE: 7, ErrorKind.REFUSED: 4,
    ErrorKind.FAILED: 5,
}  # fmt: skip

CODES = {
    ErrorKind.PASSING: "08000 08003 08006 08P01 40001 40P01 40003 53000 53300 57000 57P01 57P02 57P03 57P05 "
    "55006 25006 25P03 25P04",
    ErrorKind.TIMEOUT: "57014 55P03",
    ErrorKind.DATA: "09000 21000 22000 22001 22003 22021 22P05 23502 23503 23505 23514 27000 44000 54000 54001 P0001",
    ErrorKind.RESOURCE: "53100 53200 53400 58000 58030 58P01",
    ErrorKind.REFUSED: "0A000 25P02 28000 2F000 3D000 3F000 42501 42703 42P01 42804 55000",
    ErrorKind.FAILED: "F0000 XX000 XX001 XX002",
}
STATES = [(state, kind) for kind, states in CODES.items() for state in states.split()]


class Clock:
    """Time that passes only in pauses."""

    def __init__(self) -> None:
        self.now = 100.0
        self.pauses: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(retrying, "time", SimpleNamespace(sleep=clock.sleep, monotonic=lambda: clock.now))
    monkeypatch.setenv("KDB_FAST_PATIENCE", str(PATIENCE))
    return clock


def error_of(state: str | None, text: str = "It failed.") -> psycopg.Error:
    """The error of psycopg with this SQLSTATE; a lost connection without one."""
    if state is None:
        return psycopg.OperationalError(text)
    with contextlib.suppress(KeyError):
        return psycopg.errors.lookup(state)(text)
    error = psycopg.DatabaseError(text)
    error.sqlstate = state
    return error


class Failing:
    """Fails ``times`` times (None: always) with one error, then gives rows."""

    def __init__(self, error: Exception, times: int | None) -> None:
        self.error, self.left, self.calls = error, times, 0

    def __call__(self, *ignored: Any) -> list[tuple[Any, ...]]:
        self.calls += 1
        if self.left is None or self.left > 0:
            self.left = None if self.left is None else self.left - 1
            raise self.error.with_traceback(None)
        return [("row",)]


def in_the_store(work: Failing) -> object:
    session = PgSession.__new__(PgSession)
    session.address, session._borrowed, session._retry_seconds, session._connection = ADDRESS, None, None, None
    session.on_wait = lambda what: None
    return session.retrying("trying it", work)


def in_the_source(work: Failing) -> object:
    reader = Reader.__new__(Reader)
    reader.address, reader._connection = ADDRESS, None
    cursor = SimpleNamespace(execute=lambda *given: SimpleNamespace(fetchall=work))
    connection = SimpleNamespace(cursor=lambda binary: contextlib.nullcontext(cursor), close=lambda: None)
    reader._connect = lambda: connection  # type: ignore[method-assign]
    return reader.fetch("SELECT 1", {})


def in_the_inserter(work: Failing) -> object:
    inserter = PostgreSQLInserter.__new__(PostgreSQLInserter)
    inserter._address, inserter._connection, inserter._table = ADDRESS, None, "kdb_records"
    inserter._target = SimpleNamespace(shown=lambda name: name)  # type: ignore[assignment]
    inserter._connect = lambda: setattr(inserter, "_connection", SimpleNamespace(close=lambda: None))  # type: ignore[method-assign]
    inserter._insert_once = work  # type: ignore[method-assign, assignment]
    return inserter.insert([])


SIDES = [in_the_store, in_the_source, in_the_inserter]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("state", "kind"), [*STATES, (None, ErrorKind.PASSING)])
class TestEachSide:
    """Store, source and inserter, for each SQLSTATE that the table of :mod:`kdb_fast.db.pg_errors` names."""

    def test_what_passes_is_tried_again_and_nothing_else(
        self, side: Callable[[Failing], object], state: str | None, kind: ErrorKind
    ) -> None:
        work = Failing(error_of(state), 1)
        if kind in (ErrorKind.PASSING, ErrorKind.TIMEOUT):
            assert side(work) == [("row",)]
            assert work.calls == 2
            return
        with pytest.raises(KdbFastError):
            side(work)
        assert work.calls == 1

    def test_what_does_not_pass_ends_in_the_same_exit_code(
        self, side: Callable[[Failing], object], state: str | None, kind: ErrorKind, clock: Clock
    ) -> None:
        work = Failing(error_of(state, "with SENTINEL"), None)
        with pytest.raises(KdbFastError) as raised:
            side(work)
        assert raised.value.exit_code == EXIT_CODES[kind]
        assert raised.value.remedy
        assert raised.value.__cause__ is work.error
        assert "SENTINEL" not in str(raised.value)
        if kind is ErrorKind.PASSING:
            assert 0 < sum(clock.pauses) <= PATIENCE
            assert work.calls > MOST_TIMEOUTS + 1
        else:
            assert work.calls == (1 + MOST_TIMEOUTS if kind is ErrorKind.TIMEOUT else 1)


@pytest.mark.parametrize(("state", "kind"), STATES)
def test_the_library_tries_only_conflicts_again(state: str, kind: ErrorKind) -> None:
    attempts = 0

    @contextlib.contextmanager
    def begin() -> Iterator[Any]:
        nonlocal attempts
        attempts += 1
        yield SimpleNamespace(vectors=None, write=lambda operations: None)
        error = error_of(state)
        raise explain("writing the index", error, ADDRESS) from error

    with pytest.raises(KdbFastError) as raised:
        write_at_once(begin, [Put(Record(("E", "r"), "text"))])
    assert attempts == (len(WAITS) + 1 if state in {"40001", "40P01"} else 1)
    assert raised.value.exit_code == EXIT_CODES[kind]


@pytest.mark.parametrize(("state", "kind"), [*STATES, (None, ErrorKind.PASSING)])
def test_a_search_is_tried_once_and_ends_in_the_same_exit_code(state: str | None, kind: ErrorKind) -> None:
    work = Failing(error_of(state), None)
    cursor = contextlib.nullcontext(SimpleNamespace(execute=work))
    connection = SimpleNamespace(cursor=lambda row_factory: cursor)
    with pytest.raises(Exception) as raised:
        rows_of(connection, "postgresql")("SELECT 1", {})
    assert work.calls == 1
    if raised.value is work.error:
        assert kind in (ErrorKind.DATA, ErrorKind.REFUSED), "the statement or a value in it: the caller says more"
        return
    assert isinstance(raised.value, KdbFastError)
    if kind in (ErrorKind.DATA, ErrorKind.REFUSED):
        assert raised.value.exit_code == (4 if state in {"42501", "42703", "42P01"} else 5)
    else:
        assert raised.value.exit_code == EXIT_CODES[kind]


@pytest.mark.parametrize(("state", "kind"), [*STATES, (None, ErrorKind.PASSING)])
def test_the_catalogue_is_read_once_and_ends_in_the_same_exit_code(state: str | None, kind: ErrorKind) -> None:
    work = Failing(error_of(state), None)
    with pytest.raises(KdbFastError) as raised:
        Catalog.load(SimpleNamespace(execute=work), "postgresql", "postgresql://tests")
    assert work.calls == 1
    assert raised.value.exit_code == EXIT_CODES[kind]
    assert raised.value.__cause__ is work.error
    if kind is ErrorKind.REFUSED:
        assert "is not as KameleonDB makes it" in str(raised.value) or "Not allowed to read" in str(raised.value)


def rows_of_the_table(module: Any) -> list[tuple[list[str], str]]:
    """(codes, kind) of each row of the table in a module's docstring."""
    table = re.findall(r"^\| (.+?) \| .+? \| (\S+) \| .+ \|$", module.__doc__, re.MULTILINE)
    return [(codes.split(), kind) for codes, kind in table if kind != "kind"]


def test_the_table_says_what_is_done() -> None:
    told = {code: kind for codes, kind in rows_of_the_table(pg_errors) for code in codes}
    assert [told.pop(name) for name in ("none", "FATAL", "else")] == ["passing", "passing", "refused"]
    assert told == {code: kind.value for code, kind in pg_errors.KINDS.items()}
    assert {state[: len(code)] for code in told for state, _ in STATES} >= set(told), "each is tried above"


def test_the_table_of_sqlite_says_what_is_done() -> None:
    told = {code: kind for codes, kind in rows_of_the_table(sqlite_errors) for code in codes}
    assert told.pop("else,") == told.pop("none") == told.pop("LOCKED") == "failed"
    assert {getattr(sqlite3, f"SQLITE_{code}"): kind for code, kind in told.items()} == {
        code: kind.value for code, kind in sqlite_errors.KINDS.items()
    }


class _Said(NamedTuple):
    severity: str | None
    severity_nonlocalized: str | None
    message_primary: str = "said"


@pytest.mark.parametrize("said", [_Said("FATAL", "FATAL"), _Said("PANIK", "PANIC"), _Said("FATAL", None)])
@pytest.mark.parametrize(
    ("state", "kind"),
    [("XX000", ErrorKind.PASSING), ("42P01", ErrorKind.PASSING), ("53100", ErrorKind.RESOURCE)],
)
def test_a_session_that_the_server_has_ended_is_replaced(
    monkeypatch: pytest.MonkeyPatch, said: _Said, state: str, kind: ErrorKind
) -> None:
    error = error_of(state)
    monkeypatch.setattr(type(error), "diag", said)
    assert kind_of(error) is kind


def test_an_error_of_ours_means_what_the_drivers_behind_it_means() -> None:
    for state, kind in STATES:
        error = DatabaseError("It cannot be read.")
        error.__cause__ = error_of(state)
        assert (kind_of(error), sqlstate(error)) == (kind, state)
    assert kind_of(DatabaseError("No connection was to be had.")) is ErrorKind.PASSING
    assert kind_of(LockedError("Another run holds it.")) is kind_of(ValueError()) is None
    assert kind_of(psycopg.ProgrammingError("of psycopg itself")) is ErrorKind.REFUSED


# -- the loop ----------------------------------------------------------------------------------------------


def passing(error: Exception) -> ErrorKind | None:
    return ErrorKind.PASSING if isinstance(error, ValueError) else None


def test_pauses_grow_and_end_with_the_patience(clock: Clock) -> None:
    work = Failing(ValueError("away"), None)
    with pytest.raises(ValueError, match="away") as raised:
        retry(work, Backoff(), passing, explain=lambda error: error)
    assert raised.value.__cause__ is None
    for pause, longest in zip(clock.pauses, [0.1, 0.2, 0.4, 0.8, 1.6, 3.0], strict=False):
        assert longest / 2 <= pause <= longest
    assert sum(clock.pauses) <= PATIENCE


def test_patience_begins_with_the_first_failure(clock: Clock) -> None:
    calls = 0

    def long_and_lost() -> None:
        nonlocal calls
        calls += 1
        clock.now += 3600
        raise ValueError

    with pytest.raises(ValueError):
        retry(long_and_lost, Backoff(), passing, explain=lambda error: error)
    assert calls == 2, "what takes an hour is tried again once"


def test_patience_of_nothing_tries_once_and_a_strangers_error_passes_through(clock: Clock) -> None:
    for backoff, error in ((Backoff(0.0), ValueError()), (Backoff(), KeyError())):
        work = Failing(error, None)
        with pytest.raises(type(error)):
            retry(work, backoff, passing, explain=lambda error: error)
        assert work.calls == 1
    assert clock.pauses == []


# -- SQLite ------------------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "file.db"
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = DELETE")
        connection.execute("CREATE TABLE t (a)")
    return path


def sqlite_error(code: int) -> sqlite3.Error:
    error = sqlite3.OperationalError("It failed.")
    error.sqlite_errorcode, error.sqlite_errorname = code, "SQLITE_…"
    return error


@pytest.mark.parametrize(
    ("code", "kind", "exit_code"),
    [
        (sqlite3.SQLITE_BUSY, ErrorKind.PASSING, 5),
        (sqlite3.SQLITE_BUSY | 1 << 8, ErrorKind.PASSING, 5),
        (sqlite3.SQLITE_LOCKED, ErrorKind.FAILED, 5),
        (sqlite3.SQLITE_FULL, ErrorKind.RESOURCE, 7),
        (sqlite3.SQLITE_IOERR | 3 << 8, ErrorKind.RESOURCE, 7),
        (sqlite3.SQLITE_NOMEM, ErrorKind.RESOURCE, 7),
        (sqlite3.SQLITE_ERROR, ErrorKind.REFUSED, 4),
        (sqlite3.SQLITE_READONLY, ErrorKind.REFUSED, 4),
        (sqlite3.SQLITE_PERM, ErrorKind.REFUSED, 4),
        (sqlite3.SQLITE_AUTH, ErrorKind.REFUSED, 4),
        (sqlite3.SQLITE_CONSTRAINT, ErrorKind.DATA, 5),
        (sqlite3.SQLITE_TOOBIG, ErrorKind.DATA, 5),
        (sqlite3.SQLITE_MISMATCH, ErrorKind.DATA, 5),
        (sqlite3.SQLITE_CORRUPT, ErrorKind.FAILED, 5),
        (sqlite3.SQLITE_NOTADB, ErrorKind.FAILED, 5),
        (sqlite3.SQLITE_CANTOPEN, ErrorKind.FAILED, 5),
    ],
)
def test_each_result_code_of_sqlite(code: int, kind: ErrorKind, exit_code: int) -> None:
    error = sqlite_error(code)
    assert sqlite_errors.kind_of(error) is kind
    assert sqlite_errors.explain(error, "trying it").exit_code == exit_code
    inserter = SQLiteInserter.__new__(SQLiteInserter)
    inserter._table = "t"
    reader = Reader.__new__(Reader)
    reader.address = DatabaseAddress("sqlite", ":memory:", "sqlite:///:memory:")
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        connection.execute("PRAGMA busy_timeout = 0")

        def fail(*ignored: Any) -> Any:
            raise error

        def store() -> None:
            with SQLiteIndexStore(connection).transaction():
                fail()

        inserter._connection = connection
        inserter._insert_all = fail  # type: ignore[method-assign, assignment]
        execute = lambda query, *given: fail() if query == "SELECT 1" else connection.execute(query, *given)  # noqa: E731
        reader._connection = SimpleNamespace(execute=execute)
        sides: list[Callable[[], object]] = [
            store,
            lambda: inserter.insert([]),
            lambda: reader.fetch("SELECT 1", {}),
            lambda: Catalog.load(SimpleNamespace(execute=fail), "sqlite"),
        ]
        for side in sides:
            with pytest.raises(KdbFastError) as raised:
                side()
            assert raised.value.exit_code == exit_code
            assert raised.value.__cause__ is error
            assert not connection.in_transaction
        with pytest.raises(Exception) as told, sqlite_cursor(connection):
            fail()
        if kind is ErrorKind.DATA:
            assert told.value is error, "a search writes nothing: it is the caller's to say what was wrong"
        else:
            assert isinstance(told.value, KdbFastError)
            assert told.value.exit_code == (7 if kind is ErrorKind.RESOURCE else 5)


def test_a_lock_of_another_connection_is_waited_for(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        contextlib.closing(sqlite3.connect(path, timeout=30, isolation_level=None)) as ours,
        contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other,
    ):
        # SQLite's own waits would take real time.
        monkeypatch.setattr("kdb_fast.db.sqlite_session.BUSY_STEP_MS", 1)
        attempts = itertools.count()

        def sleep(seconds: float) -> None:
            if next(attempts) == 2:
                other.execute("ROLLBACK")

        monkeypatch.setattr(retrying, "time", SimpleNamespace(sleep=sleep, monotonic=lambda: 0.0))
        other.execute("BEGIN EXCLUSIVE")
        assert patiently(ours, lambda: ours.execute("SELECT count(*) FROM t").fetchall()) == [(0,)]
        other.execute("BEGIN IMMEDIATE")
        attempts = itertools.count()
        with transaction(ours):
            ours.execute("INSERT INTO t VALUES (1)")
        assert ours.execute("PRAGMA busy_timeout").fetchone() == (30_000,)


def test_a_lock_that_stays_is_the_databases_error_and_nothing_is_begun(path: Path, clock: Clock) -> None:
    with (
        contextlib.closing(sqlite3.connect(path, timeout=30, isolation_level=None)) as ours,
        contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other,
    ):
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(sqlite3.OperationalError, match="locked"), transaction(ours, 1):
            raise AssertionError
        assert not ours.in_transaction
        assert clock.pauses == []
        assert ours.execute("PRAGMA busy_timeout").fetchone() == (30_000,)


@pytest.mark.parametrize("between", [" ", "\n  ", "\t"])
def test_a_table_of_sqlite_vec_without_the_extension(between: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[sqlite3.Connection] = []
    monkeypatch.setattr(sqlite_vec, "why_no_sqlite_vec", asked.append)
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        sqlite_vec.load_for_its_tables(connection)
        assert not asked
        # As a file has it that was written where the extension is.
        connection.execute("PRAGMA writable_schema = ON")
        made = f"CREATE VIRTUAL TABLE vecs{between}USING{between}vec0(embedding float[4])"
        connection.execute("INSERT INTO sqlite_master VALUES ('table', 'vecs', 'vecs', 0, ?)", (made,))
        connection.execute("PRAGMA writable_schema = RESET")
        sqlite_vec.load_for_its_tables(connection)
        assert asked == [connection]
        with pytest.raises(SchemaError, match=r"sqlite-vec was needed while reading it: .*kdb-fast"):
            rows_of(connection, "sqlite")("SELECT count(*) FROM vecs", {})
