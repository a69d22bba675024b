"""New records of an input, inserted into KameleonDB's table on their way to the index."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from uuid import uuid4

from ...db.address import DatabaseAddress
from ...errors import ResourceError
from ...records import Record, Reject, content_from_fields, number_of
from ...settings import RejectLimit
from ..base import PAGE_ROWS
from ..files.record_file import PAGE_CHARS
from ..json_records import iter_json_items
from ..jsonl import JsonlSource
from .base import Inserter, NewRow
from .field_values import SYSTEM_FIELDS, UnfitError, check_record

REJECTS_KEPT = 100
"""Rejects of the input that are kept for showing; all of them are counted, and stored with the run."""

IDS_KEPT = 5
"""Ids of new records that are kept for showing: as many as KameleonDB shows."""

_ESCAPES = re.compile(rb"\\u(?:0000|[dD][89a-fA-F])")
"""Only JSON text with one of these can give a NUL or half a surrogate pair."""


class _New(NamedTuple):
    """A record on its way: what is inserted, and what is indexed."""

    row: NewRow
    content: str
    position: int
    digest: bytes


class InsertingSource(JsonlSource):
    """Records of an input, each page inserted and committed before it is given out.

    The input has the fields of KameleonDB's definition by their names; every record gets a new id. So the input can
    be read once only: what was inserted when a run ended early is brought into the index by a reindex of the entity.

    Besides the reasons of :func:`~kdb_fast.sources.json_records.iter_json_records` and
    :func:`~kdb_fast.sources.insert.field_values.check_record`, a record is rejected where the database refuses its row:
    ``unique``, ``foreign_key``, ``not_null``, ``check`` and ``database_refused``.

    A page with which the limit of rejects is exceeded is not inserted: its rejects are the last thing given out.

    Args:
        address: The database, running.
        entity: Name of an entity of KameleonDB.
        path: The file, ``"-"`` for standard input, or an open stream, which is not closed.
        max_rejects: When to give up on bad input.
        created_by: Who creates the records; None leaves it open.

    Attributes:
        read: Records of the input that were read, rejected ones included.
        line: Line where the last record begins that was inserted or rejected: what follows is still to be done.
        inserted: Records inserted and committed.
        ids: The ids of the first IDS_KEPT of these.
        rejected: Records of the input that were rejected.
        rejects: The first REJECTS_KEPT of these.

    Raises:
        UsageError: The file cannot be read, or is not UTF-8 text at its first bytes.
        SchemaError: The entity is unknown, or its table cannot be inserted into.
        DatabaseError: The database cannot be reached.
    """

    unique_keys = True

    def __init__(
        self,
        address: DatabaseAddress,
        entity: str,
        path: Path | str | BinaryIO,
        max_rejects: RejectLimit,
        created_by: str | None = None,
    ) -> None:
        super().__init__(path, entity)
        self.input = ""  # what was inserted is not inserted again: another reading is of other records
        self._max_rejects = max_rejects
        self.read = self.line = self.inserted = self.rejected = 0
        self.rejects: list[Reject] = []
        self.ids: list[str] = []
        self._ignored: dict[str, int] = {}
        try:
            self._inserter = open_inserter(address, entity, created_by)
        except BaseException:
            super().close()
            raise
        self._text_columns = [
            (field.name, field.column)
            for field in self._inserter.definition.text_fields
            if self._inserter.rules[field.name].stored
        ]

    def pages(self) -> Iterator[list[Record | Reject]]:
        """The records in the order of the input, inserted; bad ones as Rejects in their place.

        Raises:
            UsageError: Standard input is compressed or not UTF-8.
            ResourceError: Reading the input failed, or the disk is full.
            SchemaError, DatabaseError: As for :meth:`~kdb_fast.sources.insert.base.Inserter.insert`.
        """
        for items, last in self._batches():
            read, faulty = self.read + len(items), sum(isinstance(item, Reject) for item in items)
            if self._max_rejects.exceeded(rejected=self.rejected + faulty, read=read, finished=last):
                yield self._given([item for item in items if isinstance(item, Reject)], read)
                return
            # Committed before it is given out: what the pipeline counts is in KameleonDB's table, however the run ends.
            page = self._insert(items)
            self.line = items[-1].position
            yield self._given(page, read)

    def warnings(self) -> list[str]:
        found = super().warnings()
        for name in sorted(self._ignored):
            found.append(
                f"{number_of(self._ignored[name], 'record has', 'records have')} a value for {name!r}, which "
                "KameleonDB gives itself; it was not used."
            )
        return found

    def close(self) -> None:
        self._inserter.close()
        super().close()

    def _batches(self) -> Iterator[tuple[list[_New | Reject], bool]]:
        """Checked records a page at a time, and whether the input ended with them."""
        batch: list[_New | Reject] = []
        size = 0
        try:
            for position, data, raw in iter_json_items(self._file.stream):
                if len(batch) >= PAGE_ROWS or size >= PAGE_CHARS:
                    yield batch, False
                    batch, size = [], 0
                if isinstance(data, Reject):
                    batch.append(data._replace(key=(self._entity, ""), position=position))
                else:
                    batch.append(self._checked(position, data, raw))
                size += len(raw)
        except OSError as error:
            raise ResourceError(f"Reading {self._file.display} failed: {error.strerror or error}.") from error
        if batch:
            yield batch, True

    def _checked(self, position: int, data: dict[str, Any], raw: bytes) -> _New | Reject:
        digest = hashlib.sha256(raw).digest()
        try:
            values = check_record(self._inserter.rules, data, escapes=_ESCAPES.search(raw) is not None)
            fields = self._inserter.fields(values)
        except UnfitError as fault:
            return Reject((self._entity, ""), fault.reason, fault.detail, digest, position)
        except RecursionError:
            return Reject((self._entity, ""), "too_deep", "objects or arrays are nested too deeply", digest, position)
        for name in SYSTEM_FIELDS.intersection(data):
            self._ignored[name] = self._ignored.get(name, 0) + 1
        # From what is stored, just as a reindex will read it.
        content = content_from_fields((name, values.get(column)) for name, column in self._text_columns)
        return _New(NewRow(str(uuid4()), fields), content, position, digest)

    def _insert(self, items: list[_New | Reject]) -> list[Record | Reject]:
        rows = [item.row for item in items if isinstance(item, _New)]
        if not rows:
            return [item for item in items if isinstance(item, Reject)]
        at, refused = self._inserter.insert(rows)
        self.inserted += len(rows) - len(refused)
        if len(self.ids) < IDS_KEPT:
            new = [row.record_id for row in rows if row.record_id not in refused]
            self.ids += new[: IDS_KEPT - len(self.ids)]
        page: list[Record | Reject] = []
        for item in items:
            if isinstance(item, Reject):
                page.append(item)
            elif item.row.record_id in refused:
                page.append(Reject((self._entity, ""), *refused[item.row.record_id], item.digest, item.position))
            elif item.content:
                page.append(Record((self._entity, item.row.record_id), item.content, at, item.position))
            else:
                self.empty += 1
        return page

    def _given(self, page: list[Record | Reject], read: int) -> list[Record | Reject]:
        """Count a page that is given out now."""
        self.read = read
        rejects = [item for item in page if isinstance(item, Reject)]
        self.rejected += len(rejects)
        self.rejects += rejects[: REJECTS_KEPT - len(self.rejects)]
        return page


def open_inserter(address: DatabaseAddress, entity: str, created_by: str | None = None) -> Inserter:
    """The inserter for this database; see :class:`Inserter`."""
    if address.dialect == "postgresql":
        from .postgresql import PostgreSQLInserter

        return PostgreSQLInserter(address, entity, created_by)
    from .sqlite import SQLiteInserter

    return SQLiteInserter(address, entity, created_by)
