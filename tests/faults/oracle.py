"""What must hold after every run, whatever happened in it: the oracle of all fault tests.

:func:`check` is the whole of it; the parts can be asked alone, for instance between two runs.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from servers import Key, Vector, engine_processes, eventually, execute, index_rows, kept_rejects

from kdb_fast.db.address import DatabaseAddress
from kdb_fast.db.sqlite_connection import connect_sqlite
from kdb_fast.records import Record

Receipt = dict[str, Any]

PARTS = ("stored", "unchanged", "reused", "superseded", "rejected")

TOLERANCE = 1e-4
"""Largest difference of a number of a vector from that of a single process: the batch a text is in changes it a bit."""

MARK = "KDB_FAST_FAULT_DIR"
"""Environment variable that all processes of a run inherit, and by which the orphans of a killed one are found.
A directory of its own for each test, which makes it a mark."""

POSTGRESQL_INDEXES = {
    "kdb_search_pkey",
    "kdb_search_entity_name_record_id_key",
    "ix_kdb_search_entity",
    "ix_kdb_search_record",
    "ix_kdb_search_fts",
    "ix_kdb_search_vector",
}


def check(
    address: DatabaseAddress,
    records: Iterable[Record],
    receipt: Receipt,
    *,
    vector: Callable[[str], Vector],
    rerun: Callable[[], Receipt] | None = None,
    rejected: Iterable[Key] = (),
    mark: Path | None = None,
) -> None:
    """Everything that must hold after a complete run over ``records``.

    Args:
        address: The database, which holds nothing but the index of these records.
        records: All that were read and can be stored, in their order: of two with one key the later one stays.
        receipt: Of the last run, which ended well.
        vector: What a text's vector must be, computed by one process without kdb-fast's engine:
            ``servers.Oracle(…).vector`` or ``poison_worker.vector_of``.
        rerun: Runs the same job again and returns its receipt; it must store nothing. None leaves that out.
        rejected: (entity, record id) of every record that must be in the table of rejects, as often as it was read.
        mark: Value of ``KDB_FAST_FAULT_DIR`` in the environment of the runs, where they were processes of their own.
    """
    records, rejected = list(records), sorted(rejected)
    check_nothing_left(address, mark)
    check_rows(address, records, vector)
    check_indexes(address)
    check_accounting(address, records, receipt, rejected)
    if rerun is not None:
        again = rerun()
        assert (again["stored"], again["reused"], again["deleted"]) == (0, 0, 0), again
        assert again["rejected"] == len(rejected)
        assert again["unchanged"] == len({record.key for record in records})
        check_nothing_left(address, mark)
        check_accounting(address, records, again, rejected)


def check_rows(address: DatabaseAddress, records: Iterable[Record], vector: Callable[[str], Vector]) -> None:
    """The index holds exactly the records, each once, with its text and the vector of that text."""
    wanted = {record.key: record.content for record in records}
    rows = index_rows(address)
    assert {key: row.content for key, row in rows.items()} == wanted
    for key, row in rows.items():
        assert row.vector is not None, key
        np.testing.assert_allclose(row.vector, vector(row.content), rtol=0, atol=TOLERANCE, err_msg=str(key))
    assert len({row.fingerprint for row in rows.values()} | {None}) <= 2, "vectors of two models are mixed"
    if address.dialect == "sqlite":
        _check_copies_of_sqlite(address)


def _check_copies_of_sqlite(address: DatabaseAddress) -> None:
    """The file is sound, and full-text table and binary vectors say what the search table says."""
    with contextlib.closing(connect_sqlite(address)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        connection.execute("INSERT INTO kdb_search_fts (kdb_search_fts) VALUES ('integrity-check')")
        columns = "id, entity_name, record_id, content"
        search = connection.execute(f"SELECT {columns} FROM kdb_search ORDER BY id").fetchall()
        assert connection.execute(f"SELECT {columns} FROM kdb_search_fts ORDER BY id").fetchall() == search
        copies = connection.execute(
            "SELECT s.embedding, v.vector FROM kdb_search s "
            "JOIN kdb_fast_vectors v ON v.search_rowid = s.rowid AND v.search_id = s.id AND v.at = s.updated_at"
        ).fetchall()
        assert len(copies) == len(search)
        assert connection.execute("SELECT count(*) FROM kdb_fast_vectors").fetchone() == (len(search),)
        for text, copy in copies:
            np.testing.assert_allclose(np.frombuffer(copy, "<f4"), json.loads(text), rtol=0, atol=1e-6)


def check_accounting(
    address: DatabaseAddress, records: Sequence[Record], receipt: Receipt, rejected: Sequence[Key] = ()
) -> None:
    """The counts of a run add up, and the database agrees with each of them."""
    assert receipt["state"] == "done"
    assert receipt["read"] == sum(receipt[part] for part in PARTS), receipt
    assert receipt["read"] == len(records) + len(rejected), receipt
    assert receipt["rejected"] == len(rejected)
    keys = {record.key for record in records}
    written = receipt["stored"] + receipt["reused"]
    assert written + receipt["unchanged"] == len(keys)
    assert execute(address, "SELECT count(*) FROM kdb_search") == [(len(keys),)]
    assert execute(address, "SELECT count(*) FROM kdb_search WHERE kdb_fast_run = %s", receipt["run"]) == [(written,)]
    assert sorted(row[:2] for row in kept_rejects(address)) == sorted(rejected)
    newest = execute(address, "SELECT run, state, receipt FROM kdb_fast_runs ORDER BY run DESC LIMIT 1")
    assert newest[0][:2] == (receipt["run"], "done")
    assert json.loads(newest[0][2]) == json.loads(json.dumps(receipt))
    assert execute(address, "SELECT count(*) FROM kdb_fast_runs WHERE state = 'running'") == [(0,)]


def check_indexes(address: DatabaseAddress) -> None:
    """Exactly KameleonDB's indexes are there, none of them invalid, and none is waiting to be built."""
    assert execute(address, "SELECT key FROM kdb_fast_state WHERE key LIKE 'dropped_indexes%%'") == []
    if address.dialect == "sqlite":
        names = execute(address, "SELECT name FROM sqlite_master WHERE type = 'index' AND tbl_name = 'kdb_search'")
        assert {name for (name,) in names if not name.startswith("sqlite_autoindex")} == {
            "ix_kdb_search_entity",
            "ix_kdb_search_record",
        }
        return
    found = execute(
        address,
        "SELECT c.relname, i.indisvalid AND i.indisready AND i.indislive FROM pg_index i "
        "JOIN pg_class c ON c.oid = i.indexrelid WHERE i.indrelid = 'kdb_search'::regclass",
    )
    assert dict(found) == dict.fromkeys(POSTGRESQL_INDEXES, True)


def check_nothing_left(address: DatabaseAddress, mark: Path | None = None, seconds: float = 20.0) -> None:
    """No process, no shared memory, no session and no lock of kdb-fast is left.

    A moment is given: a server notices only after its statement that the client of a session was killed.
    """
    assert engine_processes() == []
    if mark is not None:
        eventually(lambda: not processes_of(mark), seconds)
    gc.collect()  # an error that a test caught may hold the engine of its run in a cycle
    eventually(lambda: not shared_memory() - SHARED_MEMORY_BEFORE, seconds)
    eventually(lambda: not sessions(address), seconds)
    if address.dialect == "sqlite":
        with contextlib.closing(sqlite3.connect(address.conninfo, timeout=1.0, isolation_level=None)) as connection:
            connection.execute("BEGIN EXCLUSIVE")  # nobody reads or writes
            connection.execute("ROLLBACK")


def processes_of(mark: Path) -> list[psutil.Process]:
    """All living processes that were started with this mark in their environment, but not this one."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == str(mark) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return [process for process in found if process.pid != os.getpid()]


def is_alive(process: psutil.Process) -> bool:
    """Whether a process has not ended. One that its new parent has not yet taken away has: some
    inits look for them every two seconds only."""
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def shared_memory() -> set[str]:
    """Names of shared memory that is kdb-fast's: memory files this process holds open, and any in /dev/shm.

    The memory files of other processes end with these; see :func:`processes_of`.
    """
    names = set()
    with contextlib.suppress(OSError):
        names |= {name for name in os.listdir("/dev/shm") if name.startswith(("psm_", "kdb", "sem."))}
    with contextlib.suppress(OSError):
        for descriptor in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                target = os.readlink(f"/proc/self/fd/{descriptor}")
                if target.startswith("/memfd:kdb-fast"):
                    names.add(f"{descriptor} {target}")
    return names


SHARED_MEMORY_BEFORE = shared_memory()


def sessions(address: DatabaseAddress) -> list[tuple[Any, ...]]:
    """(application, state, statement) of every session that kdb-fast has on this database, and its advisory locks."""
    if address.dialect == "sqlite":
        return []
    return execute(
        address,
        "SELECT application_name, state, query FROM pg_stat_activity "
        "WHERE datname = current_database() AND application_name LIKE 'kdb-fast/%' UNION ALL "
        "SELECT 'advisory lock', mode, objid::text FROM pg_locks WHERE locktype = 'advisory' "
        "AND database = (SELECT oid FROM pg_database WHERE datname = current_database())",
    )
