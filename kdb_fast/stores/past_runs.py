"""What earlier runs left in an index: the newest of them, their models, and rejects that are none any more."""

from __future__ import annotations

import contextlib
from collections.abc import Container
from dataclasses import replace
from datetime import datetime
from typing import Any, NamedTuple

from ..db.address import DatabaseAddress
from ..db.reading import read
from ..db.sqlite import moment
from ..errors import SchemaError
from ..origins import IndexModel
from ..records import Key, key_of_json
from ..tables.kdb_search import KDB_SEARCH
from ..tables.reading import no_index, rows_of
from ..tables.target import REJECTS, RUNS, Params, Rows, Target, columns_of, find_target
from . import open_store
from .base import TargetTable
from .runs import HEARTBEAT_AGE, is_alive

RECENT_RUNS = 50
"""Runs of which :func:`recent_fingerprints` reads the fingerprint."""


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
        params = Params(target.dialect)
        found = (
            rows(
                f"SELECT model, dimensions, fingerprint FROM {runs} WHERE last_flush > 0 "  # noqa: S608
                f"AND {of_target(target, present[RUNS], params)} ORDER BY run DESC LIMIT 1",
                params.values,
            )
            or found
        )
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
    """The newest run; its times are aware.

    ``state`` is ``abandoned`` as soon as it is known that nobody goes on with it, also before another run takes over.
    """

    run: int
    state: str
    phase: str
    model: str
    fingerprint: str
    started_at: datetime
    heartbeat_at: datetime
    ended_at: datetime | None


def last_run(connection: Any, dialect: str) -> LastRun | None:
    """The newest run; None if there was none."""
    rows = rows_of(connection, dialect)
    target = find_target(rows, dialect)
    return newest_run(rows, target)


def newest_run(rows: Rows, target: Target) -> LastRun | None:
    """The target's newest run; None if there was none."""
    process = f"host, pid, process_started, {HEARTBEAT_AGE[target.dialect]}"
    for *found, host, pid, started, age in newest_runs(rows, target, f"{', '.join(LastRun._fields)}, {process}", 1):
        if target.dialect == "sqlite":
            found = [*found[:-3], *(time and moment(time) for time in found[-3:])]
        run = LastRun(*found)
        lives = run.state != "running" or is_alive(host, pid, started, age)
        return run if lives else run._replace(state="abandoned")
    return None


def newest_runs(rows: Rows, target: Target, columns: str, limit: int) -> list[tuple[Any, ...]]:
    """These columns of the target's newest runs, the newest first; [] where there is no table of runs."""
    present = columns_of(rows, target, [RUNS])
    if RUNS not in present:
        return []
    params = Params(target.dialect)
    return rows(
        f"SELECT {columns} FROM {target.table(RUNS)} WHERE {of_target(target, present[RUNS], params)} "  # noqa: S608
        f"ORDER BY run DESC LIMIT {limit}",
        params.values,
    )


def of_target(target: Target, columns: Container[str], params: Params) -> str:
    """The condition that a row of one of our own tables is the target's.

    Args:
        columns: Those of the table: in one that is not migrated yet all rows are those of KameleonDB's index.
    """
    return f"target = {params(target.name)}" if "target" in columns else "true"


def rejected_keys(rows: Rows, target: Target) -> list[Key]:
    """Keys of all rejects of the target, once for each reject; [] where there is no table of rejects."""
    columns = columns_of(rows, target, [REJECTS]).get(REJECTS, frozenset())
    if not columns:
        return []
    names = "key" if "key" in columns else "entity_name, record_id"
    params = Params(target.dialect)
    which = of_target(target, columns, params)
    found = rows(f"SELECT {names} FROM {target.table(REJECTS)} WHERE {which}", params.values)  # noqa: S608
    return [key_of_json(row[0]) if len(row) == 1 else row for row in found]


def recent_fingerprints(address: DatabaseAddress, name: str = KDB_SEARCH.name) -> list[str]:
    """Fingerprints of the last RECENT_RUNS runs on a target, the newest first, each once; [] without an index.

    Args:
        name: The target's.
    """

    def work(connection: Any) -> list[str]:
        rows = rows_of(connection, address.dialect)
        target = replace(find_target(rows, address.dialect, address.schema), kept_as=name)
        return list(dict.fromkeys(row[0] for row in newest_runs(rows, target, "fingerprint", RECENT_RUNS)))

    return read(address, work)


def forget_older(address: DatabaseAddress, entities: list[str], run: int, target: TargetTable = KDB_SEARCH) -> int:
    """Forget rejected records of entities that a run has read completely without rejecting them.

    They were stored or unchanged, are gone, or have no text any more: what the run rejected has its number.

    Args:
        run: Number of the run, which must have read every live record of these entities.
        target: What the run has written.

    Returns:
        How many were forgotten. Lines of files that became no record are never among them.
    """
    with contextlib.closing(open_store(address, "rejects", target=target, patient=True)) as store:
        return store.forget_older_rejects(entities, run)


def forget_older_of_input(
    address: DatabaseAddress, entity: str | None, name: str, run: int, target: TargetTable = KDB_SEARCH
) -> int:
    """Forget what earlier runs rejected of an input of this name, of an entity or all, now that ``run`` has read it to
    its end.

    Lines that became no record have no key by which they could be found again.

    Returns:
        How many were forgotten.
    """
    with contextlib.closing(open_store(address, "rejects", target=target, patient=True)) as store:
        return store.forget_rejects_of_input(entity, name, run)
