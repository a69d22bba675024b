"""``rejects``: show what could not be stored, try it again, forget it."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ..catalog.definitions import active_entities
from ..db.address import DatabaseAddress
from ..db.reading import read
from ..receipt import Receipt, Retried
from ..records import KeptReject, storable_key
from ..settings import DEFAULT_MODEL, ReindexOptions, RejectLimit
from ..sources import SourceSpec
from ..stores import open_store
from ..stores.base import Store
from ..stores.past_runs import last_run
from ..stores.targets import find_in, kept_in
from ..tables.definition import Definition
from ..tables.index_table import IndexTable
from ..tables.kdb_search import KDB_SEARCH
from ..tables.key import KeyColumn
from ..tables.reading import rows_of
from ..tables.target import REJECTS, columns_of, find_target
from .progress import Progress
from .reindex import reindex


def list_all(address: DatabaseAddress, entity: str | None = None, target: str | None = None) -> list[KeptReject]:
    """Rejected records as :func:`list_rejects` gives them, those of a target with its name as ``target``.

    Args:
        entity: Only those of this entity.
        target: Only those of the target of this name.

    Raises:
        SchemaError: There is no such target.
        DatabaseError: The database cannot be reached.
    """
    rows: list[KeptReject] = []
    if target is None:
        rows = list_rejects(address, entity)
    if entity is None:
        homes = kept_in(address)
        for kept in homes.meant if target is None else [homes.one(target)]:
            name, index = kept.definition.name, _index_of(kept.definition)
            rows += [row._replace(target=name) for row in list_rejects(kept.where(address), index=index)]
    return rows


def clear_of(address: DatabaseAddress, target: str) -> int:
    """Forget the rejected records of the target of this name; returns how many.

    Raises:
        SchemaError: There is no such target.
    """
    where, definition = find_in(address, target)
    return clear_rejects(where, index=_index_of(definition))


def _index_of(definition: Definition) -> IndexTable:
    """What has the name under which the rejects of a target are kept."""
    return IndexTable(definition.identity, (KeyColumn("key", "text", "key"),))


def list_rejects(
    address: DatabaseAddress, entity: str | None = None, index: IndexTable = KDB_SEARCH
) -> list[KeptReject]:
    """The rejected records, those of the newest run first; [] where there has been no run.

    Args:
        entity: Only those of this entity.
        index: Only those of runs on this index.

    Raises:
        DatabaseError: The database cannot be reached.
    """
    if address.dialect == "sqlite":
        from ..stores.sqlite.index_store import SQLiteIndexStore

        def work(file: Any) -> list[KeptReject]:
            return list(SQLiteIndexStore(file, index).rejects(entity)) if _is_there(file, address, index) else []

        return read(address, work)
    with _opened(address, index) as store:
        return list(store.rejects(entity)) if store is not None else []


def clear_rejects(address: DatabaseAddress, entity: str | None = None, index: IndexTable = KDB_SEARCH) -> int:
    """Forget the rejected records of an entity or all; returns how many. The records themselves stay as they are."""
    with _opened(address, index) as store:
        return store.clear_rejects(entity=entity) if store is not None else 0


def retry_rejects(
    address: DatabaseAddress,
    options: ReindexOptions,
    progress: Progress | None = None,
    *,
    model: str | None = None,
) -> Retried:
    """Read the entities that have rejected records again, and store what can be stored now.

    A record that is stored now, is gone, or has no text any more is forgotten in the table of rejects. A line of a
    file that became no record is not in the database, so it cannot be tried again and stays.

    Args:
        address: The database; an embedded server must be running.
        options: As for a reindex; all rejects are allowed.
        model: Name of the model; None means that of the newest run, so that unchanged records stay as they are.

    Raises:
        KdbFastError: As for :func:`kdb_fast.indexing.reindex.reindex`.
    """
    before = list_rejects(address)
    known = _known_entities(address)
    names = sorted({known[row.entity] for row in before if row.entity in known and row.record_id})
    receipt: Receipt | None = None
    if names:
        chosen = replace(
            options,
            entities=tuple(names),
            model=model or _model_of_newest_run(address),
            max_rejects=RejectLimit(count=None, share=1.0),
        )
        receipt = reindex(address, SourceSpec(names), chosen, progress)
    after = list_rejects(address)
    of_known = [row for row in after if row.entity in known]
    return Retried(
        rejects_before=len(before),
        remaining=sum(1 for row in of_known if row.record_id),
        lines_of_inserts=dict(Counter(row.entity for row in of_known if not row.record_id)),
        lines_of_files=dict(Counter(row.entity for row in after if row.entity not in known)),
        receipt=receipt,
    )


@contextlib.contextmanager
def _opened(address: DatabaseAddress, index: IndexTable = KDB_SEARCH) -> Iterator[Store | None]:
    """The store, or None where no run has made its tables."""
    if not read(address, lambda connection: _is_there(connection, address, index)):
        yield None
        return
    with contextlib.closing(open_store(address, "rejects", target=index)) as store:
        yield store


def _is_there(connection: Any, address: DatabaseAddress, index: IndexTable) -> bool:
    rows = rows_of(connection, address.dialect)
    target = find_target(rows, address.dialect, address.schema, index)
    return bool(columns_of(rows, target, [REJECTS]))


def _known_entities(address: DatabaseAddress) -> dict[str, str]:
    """Entities that KameleonDB defines, by name as the table of rejects has it."""
    return {storable_key(name): name for name in active_entities(address)}


def _model_of_newest_run(address: DatabaseAddress) -> str:
    run = read(address, lambda connection: last_run(connection, address.dialect))
    return run.model if run else DEFAULT_MODEL
