"""What earlier runs left in an index: the newest of them, their models, and rejects that are none any more."""

from __future__ import annotations

import contextlib
from datetime import datetime
from typing import Any, NamedTuple

from ..db.address import DatabaseAddress
from ..db.reading import read
from ..errors import SchemaError
from ..origins import Origin
from ..tables.reading import no_index, rows_of
from ..tables.target import RUNS, columns_of, find_target
from . import open_store

RECENT_RUNS = 50
"""Runs of which :func:`recent_fingerprints` reads the fingerprint."""


class IndexModel(NamedTuple):
    """What made the vectors of an index; None for what is not known."""

    name: str | None
    dimensions: int | None
    fingerprint: str | None

    @classmethod
    def of(cls, origin: Origin) -> IndexModel:
        return cls(origin.model, origin.dimensions, origin.fingerprint)


def index_model(connection: Any, dialect: str) -> IndexModel | None:
    """The model of the newest run that has written, else that of any row; None for an index without vectors.

    Raises:
        SchemaError: There is no index.
        DatabaseError: The database cannot answer.
    """
    rows = rows_of(connection, dialect)
    target = find_target(rows, dialect)
    present = columns_of(rows, target, (target.index.name, RUNS))
    if target.index.name not in present:
        raise no_index(rows, target)
    fingerprint = "kdb_fast_fingerprint" if "kdb_fast_fingerprint" in present[target.index.name] else "NULL"
    runs = target.table(RUNS)
    first = "SELECT {model}, {dimensions}, {fingerprint} FROM {index} WHERE {embedding} IS NOT NULL LIMIT 1"
    found = rows(target.text(first, fingerprint=fingerprint), {})
    if found and RUNS in present:
        newest = f"SELECT model, dimensions, fingerprint FROM {runs} WHERE last_flush > 0 ORDER BY run DESC LIMIT 1"  # noqa: S608
        found = rows(newest, {}) or found
    return IndexModel(*found[0]) if found else None


def index_model_of(address: DatabaseAddress) -> tuple[bool, IndexModel | None]:
    """Whether nothing says yet how long the vectors of an index must be, and what made those that are there.

    A column of PostgreSQL says it before there is a vector.

    Raises:
        DatabaseError: The database cannot answer.
    """
    try:
        made = read(address, lambda connection: index_model(connection, address.dialect))
    except SchemaError:
        return True, None
    return made is None and address.dialect == "sqlite", made


class LastRun(NamedTuple):
    """The newest run, as its row says it; the times are datetimes of PostgreSQL or text of SQLite."""

    run: int
    state: str
    phase: str
    model: str
    fingerprint: str
    started_at: datetime | str
    heartbeat_at: datetime | str
    ended_at: datetime | str | None


def last_run(connection: Any, dialect: str) -> LastRun | None:
    """The newest run; None if there was none."""
    rows = rows_of(connection, dialect)
    target = find_target(rows, dialect)
    if not columns_of(rows, target, [RUNS]):
        return None
    names = ", ".join(LastRun._fields)
    newest = rows(f"SELECT {names} FROM {target.table(RUNS)} ORDER BY run DESC LIMIT 1", {})  # noqa: S608
    return LastRun(*newest[0]) if newest else None


def recent_fingerprints(address: DatabaseAddress) -> list[str]:
    """Fingerprints of the last RECENT_RUNS runs on an index, the newest first, each once; [] without an index."""

    def work(connection: Any) -> list[str]:
        rows = rows_of(connection, address.dialect)
        target = find_target(rows, address.dialect, address.schema)
        if not columns_of(rows, target, [RUNS]):
            return []
        query = f"SELECT fingerprint FROM {target.table(RUNS)} ORDER BY run DESC LIMIT {RECENT_RUNS}"  # noqa: S608
        return list(dict.fromkeys(row[0] for row in rows(query, {})))

    return read(address, work)


def forget_older(address: DatabaseAddress, entities: list[str], run: int) -> int:
    """Forget rejected records of entities that a run has read completely without rejecting them.

    They were stored or unchanged, are gone, or have no text any more: what the run rejected has its number.

    Args:
        run: Number of the run, which must have read every live record of these entities.

    Returns:
        How many were forgotten. Lines of files that became no record are never among them.
    """
    with contextlib.closing(open_store(address, "rejects", patient=True)) as store:
        return store.forget_older_rejects(entities, run)


def forget_older_of_input(address: DatabaseAddress, entity: str, name: str, run: int) -> int:
    """Forget what earlier runs rejected of an input of this name, now that ``run`` has read it to its end.

    Lines that became no record have no key by which they could be found again.

    Returns:
        How many were forgotten.
    """
    with contextlib.closing(open_store(address, "rejects", patient=True)) as store:
        return store.forget_rejects_of_input(entity, name, run)
