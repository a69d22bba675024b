"""PostgreSQL: the lock under which tables are made and runs begin, and who holds what we wait for."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from ...records import local_time, storable_key

if TYPE_CHECKING:
    import psycopg

DDL_LOCK = 0x6B64625F66617374
"""Key of the advisory lock ("kdb_fast") that keeps two first runs from creating the same table at once."""

_BLOCKER = """
SELECT l.pid, coalesce(x.name, %(lock)s), a.usename::text, a.application_name, a.xact_start
FROM pg_locks l JOIN pg_stat_activity a USING (pid)
LEFT JOIN unnest(%(names)s::text[], %(qualified)s::text[]) x(name, q)
  ON l.locktype = 'relation' AND l.relation = to_regclass(x.q)
WHERE l.granted AND l.pid <> pg_backend_pid()
  AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
  AND (x.name IS NOT NULL OR l.locktype = 'advisory' AND l.objsubid = 1
       AND (l.classid::bigint << 32 | l.objid::bigint) = %(key)s)
ORDER BY a.xact_start LIMIT 1
"""

_OLDEST = """
SELECT pid, NULL, usename::text, application_name, xact_start FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid() AND xact_start IS NOT NULL ORDER BY xact_start LIMIT 1
"""


class Blocker(NamedTuple):
    """A session of the server that holds a lock which we wait for.

    Attributes:
        pid: Its process.
        what: The table whose lock it holds, or that lock itself, for a message.
        who: The session, for a message.
    """

    pid: int
    what: str
    who: str


def take(cursor: psycopg.Cursor[tuple[Any, ...]]) -> None:
    """Take DDL_LOCK for the rest of the transaction; waits as long as ``lock_timeout`` allows."""
    cursor.execute("SELECT pg_advisory_xact_lock(%s)", (DDL_LOCK,))


def find_blocker(cursor: psycopg.Cursor[tuple[Any, ...]], tables: Mapping[str, str]) -> Blocker | None:
    """Of the sessions that hold locks on these tables, or DDL_LOCK, the one whose transaction is the oldest.

    None where it has ended meanwhile. A role that may not see other roles' sessions is told the process only.

    Args:
        tables: For messages, each with its name as ``to_regclass()`` reads it.
    """
    row = cursor.execute(
        _BLOCKER.encode(),
        {
            "names": list(tables),
            "qualified": list(tables.values()),
            "lock": "the lock for changes of kdb-fast's tables",
            "key": DDL_LOCK,
        },
    ).fetchone()
    return None if row is None else _blocker(*row)


def find_oldest(cursor: psycopg.Cursor[tuple[Any, ...]]) -> Blocker | None:
    """The session of this database that has been in a transaction for the longest time; None where no other is."""
    row = cursor.execute(_OLDEST.encode()).fetchone()
    return None if row is None else _blocker(*row)


def _blocker(pid: int, what: str | None, role: str | None, application: str | None, since: datetime | None) -> Blocker:
    known = [f"role {storable_key(role)}"] if role else []
    known += [f"application {storable_key(application)}"] if application else []
    known += [f"in a transaction since {local_time(since)}"] if since else []
    who = f"the server's process {pid}" + (f" ({', '.join(known)})" if known else "")
    return Blocker(pid, what or "its snapshot", who)
