"""A private PostgreSQL with pgvector for tests, records for runs, and what an index holds afterwards."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import psutil
import pytest

from kdb_fast.db.address import DatabaseAddress
from kdb_fast.db.embedded.server import EmbeddedServer
from kdb_fast.db.sqlite_connection import connect_sqlite
from kdb_fast.records import Record, Reject
from kdb_fast.sources.base import Source

Vector = npt.NDArray[np.float32]
Key = tuple[str, str]


class Server:
    """One PostgreSQL server in a temporary directory, with a database for each test.

    Args:
        programs: Directory of its ``postgres`` and ``initdb``; those of ``KDB_FAST_TEST_POSTGRESQL``, else those that
            the embedded server uses, where None.
    """

    def __init__(self, programs: Path | None = None) -> None:
        named = os.environ.get("KDB_FAST_TEST_POSTGRESQL")
        self._root = Path(tempfile.mkdtemp(prefix="kdb-fast-tests-"))
        self._root.chmod(0o755)
        self._server = EmbeddedServer(self._root / "data", programs or (Path(named) if named else None))
        self._server.start()
        self._numbers = itertools.count(1)
        self.address = DatabaseAddress("postgresql", self._server.conninfo, "postgresql://tests/postgres")
        # What these settings protect from, a power failure, does not happen to a test.
        for name in ("fsync", "synchronous_commit", "full_page_writes"):
            execute(self.address, f"ALTER SYSTEM SET {name} = off")
        execute(self.address, "SELECT pg_reload_conf()")

    def create_database(self, template: DatabaseAddress | None = None) -> DatabaseAddress:
        """A new database, a copy of ``template``; without one it is empty, also of pgvector."""
        name = f"test_{next(self._numbers)}"
        source = database_name(template) if template else "template1"
        execute(self.address, f"CREATE DATABASE {name} TEMPLATE {source} STRATEGY file_copy")
        return connect_as(replace(self.address, display=f"postgresql://tests/{name}"), dbname=name)

    def drop_database(self, address: DatabaseAddress) -> None:
        """Drop a database, and the roles that were created for it."""
        name = database_name(address)
        execute(self.address, f"DROP DATABASE {name} WITH (FORCE)")
        for (role,) in execute(self.address, "SELECT rolname FROM pg_roles WHERE rolname LIKE %s", f"{name}\\_role%"):
            execute(self.address, f"DROP ROLE {role}")

    def create_role(self, address: DatabaseAddress, *grants: str) -> DatabaseAddress:
        """The address for a new role without rights but ``grants``, such as ``SELECT ON kdb_search``."""
        role = f"{database_name(address)}_role{next(self._numbers)}"
        execute(address, f"CREATE ROLE {role} LOGIN")
        for grant in grants:
            execute(address, f"GRANT {grant} TO {role}")
        return connect_as(address, user=role)

    def program(self, name: str, *arguments: str | Path) -> None:
        """Run a program that comes with the server, such as ``pg_dump``, as the server's user.

        Skips the test where the server brings none of this name.
        """
        if not (self._server._programs / name).exists():
            pytest.skip(f"this server brings no {name}")
        done = self._server._run(name, *arguments)
        assert done.returncode == 0, done.stderr

    def empty_folder(self, name: str) -> Path:
        """An empty directory of the server's user, removed with the server."""
        folder = self._root / name
        folder.mkdir(mode=0o700)
        if self._server._data.account is not None:
            os.chown(folder, *self._server._data.account)
        return folder

    def restart(self, how: str = "fast") -> None:
        """Stop the server, cutting all sessions, and start it again.

        Args:
            how: ``fast`` or ``immediate`` as for ``pg_ctl stop -m``; ``kill`` kills its main process.
        """
        if how == "kill":
            self.kill()
        else:
            self._server.shut_down(signal.SIGQUIT if how == "immediate" else signal.SIGINT)
        self._server.ensure_running()

    def kill(self) -> None:
        """SIGKILL the server's main process; its other processes notice and end."""
        main = psutil.Process(self._server.pid)
        others = main.children(recursive=True)
        main.kill()
        psutil.wait_procs([main, *others], timeout=20)

    def kill_session(self, address: DatabaseAddress, role: str) -> None:
        """SIGKILL the server's process of a session: all sessions are cut and the server recovers by itself."""
        statement = "SELECT pid FROM pg_stat_activity WHERE application_name = %s"
        for (pid,) in execute(address, statement, f"kdb-fast/{role}"):
            psutil.Process(pid).kill()

    def stop(self) -> None:
        """Stop the server and remove its files."""
        self._server.leave()
        shutil.rmtree(self._root, ignore_errors=True)


class Standby:
    """A hot standby that follows a server, a copy of all its databases."""

    def __init__(self, primary: Server) -> None:
        folder = primary.empty_folder("standby")
        primary.program(
            "pg_basebackup", "-D", folder, "-R", "-c", "fast", "-X", "stream", "-d", primary.address.conninfo
        )
        with open(folder / "postgresql.auto.conf", "a") as settings:
            settings.write("max_standby_streaming_delay = 0\n")  # what is read there never holds it up
        for socket in folder.glob(".s.PGSQL.*"):
            socket.unlink()  # the primary's
        self._primary = primary
        self._server = EmbeddedServer(folder, primary._server._programs)
        self._server.start()

    def of(self, address: DatabaseAddress) -> DatabaseAddress:
        """The copy of one of the primary's databases."""
        return connect_as(replace(address, conninfo=self._server.conninfo), dbname=database_name(address))

    def catch_up(self) -> None:
        """Wait until it has all that was committed on the primary."""
        ((end,),) = execute(self._primary.address, "SELECT pg_current_wal_lsn()::text")
        mine = self.of(self._primary.address)
        eventually(lambda: execute(mine, "SELECT pg_last_wal_replay_lsn() >= %s::pg_lsn", end) == [(True,)])

    def lag(self, behind: bool) -> None:
        """Take nothing from the primary from now on, or catch up."""
        mine = self.of(self._primary.address)
        if behind:
            self.catch_up()
            execute(mine, "SELECT pg_wal_replay_pause()")
            eventually(lambda: execute(mine, "SELECT pg_get_wal_replay_pause_state()") == [("paused",)])
        else:
            execute(mine, "SELECT pg_wal_replay_resume()")
            self.catch_up()

    def stop(self) -> None:
        self._server.leave()


def connect_as(address: DatabaseAddress, **parts: str) -> DatabaseAddress:
    """The address with other parts of its connection string."""
    from psycopg.conninfo import make_conninfo

    return replace(address, conninfo=make_conninfo(address.conninfo, **parts))


def database_name(address: DatabaseAddress) -> str:
    from psycopg.conninfo import conninfo_to_dict

    return str(conninfo_to_dict(address.conninfo)["dbname"])


def role_name(address: DatabaseAddress) -> str:
    from psycopg.conninfo import conninfo_to_dict

    return str(conninfo_to_dict(address.conninfo)["user"])


def execute(address: DatabaseAddress, statement: str, *parameters: Any) -> list[tuple[Any, ...]]:
    """Run a statement as another program does, on a connection of its own; returns its rows.

    Parameters are written as %s for both dialects.
    """
    if address.dialect == "sqlite":
        with contextlib.closing(connect_sqlite(address, must_exist=False)) as connection:
            return list(connection.execute(statement.replace("%s", "?"), parameters))
    import psycopg

    with psycopg.connect(address.conninfo, autocommit=True) as server, server.cursor() as cursor:
        cursor.execute(statement.encode(), parameters or None)
        return cursor.fetchall() if cursor.description else []


def eventually(condition: Callable[[], Any], seconds: float = 20.0) -> Any:
    """Wait until ``condition()`` is true and return what it gave; fails after ``seconds``."""
    deadline = time.monotonic() + seconds
    while True:
        result = condition()
        if result:
            return result
        assert time.monotonic() < deadline, f"did not happen within {seconds} s"
        time.sleep(0.02)


def engine_processes() -> list[psutil.Process]:
    """Worker and writer processes that were started by this process and are still there."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "spawn_main" in " ".join(process.cmdline()) or process.status() == psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def kept_rejects(address: DatabaseAddress) -> list[tuple[str, str, str, int]]:
    """Entity, record id, reason and position of all rejects, in their order in the input."""
    rows = execute(address, "SELECT key, reason, position FROM kdb_fast_rejects ORDER BY position, key")
    return [(*json.loads(key), reason, position) for key, reason, position in rows]


class IndexRow(NamedTuple):
    """A row of ``kdb_search``. ``vector`` is None for NULL."""

    content: str
    vector: Vector | None
    model: str | None
    dimensions: int | None
    run: int | None
    fingerprint: str | None


def index_rows(address: DatabaseAddress) -> dict[Key, IndexRow]:
    """All rows of the search table by (entity, record id); asserts that no key is there twice."""
    embedding = "embedding" if address.dialect == "sqlite" else "embedding::text"
    rows = execute(
        address,
        f"SELECT entity_name, record_id, content, {embedding}, model, dimensions, kdb_fast_run, "
        "kdb_fast_fingerprint FROM kdb_search",
    )
    result = {
        (r[0], r[1]): IndexRow(r[2], None if r[3] is None else np.array(json.loads(r[3]), np.float32), *r[4:])
        for r in rows
    }
    assert len(result) == len(rows)
    return result


class ListSource(Source):
    """Records from memory. ``between`` is called with a page's number before the next one is read."""

    def __init__(
        self,
        records: Sequence[Record | Reject],
        *,
        page_rows: int = 100,
        unique_keys: bool = True,
        between: Callable[[int], None] = lambda page: None,
        estimate: int | None = None,
    ) -> None:
        self.unique_keys = unique_keys
        self._records = list(records)
        self._page_rows = page_rows
        self._between = between
        self._estimate = len(self._records) if estimate is None else estimate
        self.closed = 0

    @property
    def entities(self) -> tuple[str, ...]:
        return tuple(sorted({str(record.key[0]) for record in self._records}))

    def estimate(self) -> int | None:
        return self._estimate

    def pages(self) -> Iterator[list[Record | Reject]]:
        for number, start in enumerate(range(0, len(self._records), self._page_rows)):
            yield self._records[start : start + self._page_rows]
            self._between(number)

    def close(self) -> None:
        self.closed += 1


def records_of(texts: Sequence[str], entity: str = "Note") -> list[Record]:
    """One record for each text, with keys ``r0``, ``r1``, …"""
    return [Record((entity, f"r{number}"), text) for number, text in enumerate(texts)]


def cosine(a: Vector, b: Vector) -> float:
    left, right = a.astype(np.float64), b.astype(np.float64)
    return float(left @ right / (np.linalg.norm(left) * np.linalg.norm(right)))


class Oracle:
    """FastEmbed's own vectors, one text at a time, without any part of kdb-fast; each text is embedded once."""

    def __init__(self, name: str, path: Path) -> None:
        from fastembed import TextEmbedding

        self._model = TextEmbedding(
            name,
            specific_model_path=str(path),
            cache_dir=str(path),
            threads=1,
            local_files_only=True,
            providers=["CPUExecutionProvider"],
        )
        self._vectors: dict[str, Vector] = {}

    def vector(self, text: str) -> Vector:
        if text not in self._vectors:
            (vector,) = self._model.embed([text])
            self._vectors[text] = vector.astype(np.float32, copy=False)
        return self._vectors[text]

    def check(self, rows: Mapping[Key, IndexRow], records: Iterable[Record]) -> None:
        """The index holds exactly the records (of two with one key the later one), each with its own vector."""
        wanted = {record.key: record.content for record in records}
        assert {key: row.content for key, row in rows.items()} == wanted
        for key, row in rows.items():
            assert row.vector is not None
            assert cosine(row.vector, self.vector(row.content)) >= 0.99999, key


def mixed_texts(count: int, longest: int = 700) -> list[str]:
    """Different texts: most of some words, one of 25 of up to 150, the first of ``longest``. Always the same ones."""
    words = ["river", "stone", "lamp", "orbit", "quiet memory", "Grüße", "café", "東京", "naïve", "42", "non-linear"]
    texts = []
    for number in range(count):
        random = np.random.default_rng(number)
        length = int(random.integers(1, 15)) if number % 25 else int(random.integers(30, 150))
        texts.append(f"{number}: {' '.join(random.choice(words, length if number else longest))}")
    return texts
