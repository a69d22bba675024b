"""Records of a KameleonDB database, PostgreSQL or SQLite."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

from ..catalog.definitions import Catalog, Entity, Place
from ..catalog.records import count_query, ids_query, live_rows, rows_query
from ..db import pg_settings
from ..db.address import DatabaseAddress
from ..errors import KdbFastError
from ..records import Key, Record, Reject, content_from_fields, storable_key
from ..tables.target import Target, rows_on
from .base import PAGE_ROWS, Source
from .reader import Reader

BLOCK_ROWS = 50_000
"""Ids read ahead by one query (about 4 MB).

A page is then a look-up by primary key, whatever else is in the table. Paging by ``id > last`` alone would,
with many entities in one table and no index on (entity, id), read the whole entity or walk the other
entities' rows for every page; this does so once in fifty pages.
"""

PAGE_BYTES = 8 << 20
"""Stored bytes of one page, about: large records make smaller pages."""

FIRST_PAGE_ROWS = 100
"""Rows of the first page, before the size of a record is known."""

COUNT_SECONDS = 2.0
"""Longest time spent on an exact count; the planner's estimate must do for a larger table."""


class KameleonDBSource(Source):
    """All live records of some or all entities, by keyset pages, each a short query of its own.

    Nothing is held open between pages: a record changed meanwhile is read as it is then.

    Args:
        address: The database, running.
        entities: Names of the entities to read; empty means all active ones.
        limit: Stop after this many records.

    Attributes:
        catalog: KameleonDB's definitions, as read at the start.

    Raises:
        SchemaError: No KameleonDB there, or an entity is unknown or its table is missing.
        DatabaseError: The database cannot be reached.
    """

    unique_keys = True

    def __init__(self, address: DatabaseAddress, entities: Sequence[str] = (), limit: int | None = None) -> None:
        self._address = address
        self._dialect = address.dialect
        self._limit = limit
        # With a limit, the source has not seen every record, so it cannot say which rows have none.
        self.live_rows = live_rows if limit is None else None
        self._emptied: list[Key] = []
        self._warnings: list[str] = []
        self._page_rows = FIRST_PAGE_ROWS
        self._reader = Reader(address)
        try:
            connection = self._reader.connection()
            self.catalog = Catalog.load(connection, self._dialect, address.display)
            self._entities = self.catalog.select(entities)
            self.catalog.check_fields(connection, address.display)
        except BaseException:
            self.close()
            raise

    @property
    def entities(self) -> tuple[str, ...]:
        return tuple(entity.name for entity in self._entities)

    @property
    def _target(self) -> Target:
        return self.catalog.target

    def estimate(self) -> int | None:
        """Live records, with or without text: exact where counting takes under two seconds."""
        deadline = time.monotonic() + COUNT_SECONDS
        total = sum(self._count(place, deadline) for entity in self._entities for place in entity.places)
        return total if self._limit is None else min(total, self._limit)

    def pages(self) -> Iterator[list[Record | Reject]]:
        """The records entity by entity, each in the order of its ids.

        A page may be empty, when none of its records has text: call :meth:`take_empty` after each.

        Raises:
            DatabaseError: The connection was lost and did not come back in time.
        """
        left = self._limit
        for entity in self._entities:
            for place in entity.places:
                for record_ids in self._id_pages(place):
                    page = self._page(entity, place, record_ids)
                    if left is not None:
                        page = page[:left]
                        left -= len(page)
                    yield page
                    if left == 0:
                        return
        self._check_definitions()

    def sample(self, rows: int) -> list[str]:
        """The first of each entity in the order of ids, which are random."""
        places = [(entity, place) for entity in self._entities for place in entity.places]
        texts: list[str] = []
        empty = self.empty
        for entity, place in places:
            each = max(1, rows // len(places))
            for record_ids in self._id_pages(place):
                page = self._page(entity, place, record_ids[:each])
                texts += [record.content for record in page if isinstance(record, Record)]
                each -= len(record_ids)
                if each <= 0:
                    break
        self.empty, self._emptied = empty, []
        return texts[:rows]

    def take_empty(self) -> list[Key]:
        taken, self._emptied = self._emptied, []
        return taken

    def warnings(self) -> list[str]:
        return list(self._warnings)

    def changed(self) -> bool:
        return bool(self._warnings)

    def close(self) -> None:
        self._reader.close()

    def _id_pages(self, place: Place) -> Iterator[list[str]]:
        """The ids of the live records, a page at a time."""
        # Each block begins behind the last id of the one before, so none is read twice. A record that is created while
        # this goes on is read if its id comes later; else the next run finds it.
        by_primary_key = self._dialect == "sqlite" and self._walk_primary_key(place)
        after: str | None = None
        while True:
            rows = self._reader.fetch(*ids_query(place, self._target, after, BLOCK_ROWS, by_primary_key=by_primary_key))
            record_ids = [row[0] for row in rows]
            start = 0
            while start < len(record_ids):
                stop = start + self._page_rows
                yield record_ids[start:stop]
                start = stop
            if len(record_ids) < BLOCK_ROWS:
                return
            after = record_ids[-1]

    def _walk_primary_key(self, place: Place) -> bool:
        """Whether SQLite should find ids by the primary key: it has no statistics to choose by itself."""
        if place.entity_id is None:
            return True
        # By the entity's index, each block reads and sorts what is left of the entity; by the primary
        # key, all blocks together read the whole table once.
        own = self._reader.fetch(*count_query(place, self._target))[0][0]
        everything = self._reader.fetch(f"SELECT count(*) FROM {self._target.table(place.table)}", {})[0][0]  # noqa: S608
        return bool(own * own > 2 * BLOCK_ROWS * everything)

    def _page(self, entity: Entity, place: Place, record_ids: list[str]) -> list[Record | Reject]:
        fields = place.stored(entity.text_fields)
        rows = self._reader.fetch(*rows_query(place, self._target, fields, record_ids), text=bytes)
        page: list[Record | Reject] = []
        name, size = entity.name, 0
        labels = [(field.name, field.column) for field in fields]
        for row in rows:
            try:
                if self._dialect == "sqlite":
                    row = _decoded(row)
                if place.columns is None:
                    get = _stored(row[2]).get
                    content = content_from_fields([(label, get(column)) for label, column in labels])
                    size += len(row[2] or "")
                else:
                    content = content_from_fields(zip([label for label, _ in labels], row[2:], strict=True))
                    size += len(content)
            except _Unreadable as fault:
                record_id, digest = _identity(row)
                page.append(Reject((name, record_id), fault.reason, fault.detail, digest))
                continue
            if content:
                page.append(Record((name, row[0]), content, _utc(row[1])))
            else:
                self.empty += 1
                self._emptied.append((name, row[0]))
        average = size / len(rows) if rows else 0.0
        self._page_rows = max(1, min(PAGE_ROWS, int(PAGE_BYTES / max(average, 1.0))))
        return page

    def _count(self, place: Place, deadline: float) -> int:
        query, parameters = count_query(place, self._target)
        if self._dialect == "sqlite":
            return int(self._reader.fetch(query, parameters)[0][0])
        import psycopg

        milliseconds = max(50, int(1000 * (deadline - time.monotonic())))
        try:
            # SET LOCAL, since a pooler may give the next statement another session.
            with pg_settings.transaction(self._reader.connection(), f"SET LOCAL statement_timeout = {milliseconds}"):
                return int(rows_on(self._reader.connection(), self._dialect)(query, parameters)[0][0])
        except psycopg.errors.QueryCanceled:
            plan = self._reader.fetch("EXPLAIN (FORMAT JSON) " + query.replace("count(*)", "1", 1), parameters)[0][0]
            return int((json.loads(plan) if isinstance(plan, str | bytes) else plan)[0]["Plan"]["Plan Rows"])
        except psycopg.Error:  # lost connections and their like: repeated and reported in one place
            return int(self._reader.fetch(query, parameters)[0][0])

    def _check_definitions(self) -> None:
        """Warn where an entity was moved or redefined meanwhile: some records may have been missed."""
        try:
            connection = self._reader.connection()
            if isinstance(connection, sqlite3.Connection):
                connection.text_factory = str
            now = Catalog.load(connection, self._dialect, self._address.display, self._target).entities
        except KdbFastError:
            return  # all records were read; whatever comes next will notice that the database is gone
        changed = [entity.name for entity in self._entities if now.get(entity.name) != entity]
        if changed:
            names = ", ".join(storable_key(name) for name in changed)
            self._warnings.append(
                f"The definition or storage of {names} changed while it was read; run the command again."
            )


class _Unreadable(Exception):
    """One stored row cannot be understood; the others can."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail


def _stored(text: Any) -> dict[str, Any]:
    """The fields of a record in the shared table, by column name."""
    try:
        data = json.loads(text) if text is not None else None
    except RecursionError:
        raise _Unreadable("too_deep", "the stored data is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise _Unreadable("invalid_json", f"the stored data is not valid JSON: {error.msg}") from None
    except (ValueError, TypeError):
        raise _Unreadable("invalid_json", "the stored data cannot be read as JSON") from None
    if isinstance(data, dict):
        return data
    if data is None:
        return {}
    raise _Unreadable("not_an_object", f"the stored data is {type(data).__name__}, expected a JSON object")


def _text(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value


def _decoded(row: tuple[Any, ...]) -> tuple[Any, ...]:
    try:
        record_id, changed, *values = row
        if isinstance(changed, bytes):
            changed = changed.decode(errors="replace")  # no time then, but the record is fit
        return (_text(record_id), changed, *map(_text, values))
    except UnicodeDecodeError as error:
        raise _Unreadable("not_utf8", f"a stored text is not UTF-8 (at its byte {error.start + 1})") from None


def _identity(row: tuple[Any, ...]) -> tuple[str, bytes]:
    """The id of a row, and SHA-256 of its stored values."""
    record_id = row[0].decode(errors="replace") if isinstance(row[0], bytes) else str(row[0])
    digest = hashlib.sha256()
    for value in row[2:]:
        digest.update(value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogatepass"))
    return record_id, digest.digest()


def _utc(changed: Any) -> datetime | None:
    """``updated_at`` as an aware datetime in UTC; None if it is not a time. A naive one is UTC already."""
    if isinstance(changed, str):
        try:
            changed = datetime.fromisoformat(changed)
        except ValueError:
            return None
    if not isinstance(changed, datetime):
        return None
    try:
        return changed.replace(tzinfo=UTC) if changed.tzinfo is None else changed.astimezone(UTC)
    except OverflowError:  # in the first or last hours that Python knows
        return None
