"""Records of a JSON Lines file, of one JSON array, or of standard input."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import UsageError
from ..records import Record, Reject, content_from_fields, storable_key
from ..tables.kdb_search import MAX_ENTITY_CHARS, unfit
from .files.opened_file import OpenedFile
from .files.record_file import Emptied, RecordFile, estimated
from .input_formats import EXPECTED_JSON, HEAD_BYTES, check_head
from .json_records import iter_json_items, iter_json_records, kind
from .text_fields import TextFields, shown


class JsonlSource(RecordFile):
    """Records of a file, one JSON object each; see :func:`iter_json_records` for the two forms.

    The content is ``name: value | …`` over the fields in the order given; without ``fields`` over all
    keys with a text value but ``id_field``, in the order of the object. A null or missing field is left
    out. A whole number as id becomes its decimal text, so 1 and "1" are the same record.

    A record whose fields are all null or blank is in no page but among :meth:`take_empty`. One that has no field at
    all, or none of the named ones, is a Record without content, which is rejected: a mistyped name must remove nothing.

    Besides the reasons of :func:`iter_json_records`, a record is rejected for ``missing_id`` (or null),
    ``bad_id`` (not text or a whole number) and ``wrong_type`` (a named field that is not text, or no field that is).

    Args:
        path: The file, ``"-"`` for standard input, or an open stream, which is not closed.
        entity: Name of the entity that the records belong to.
        id_field: Key of the record id.
        fields: Keys to embed; empty means every text but the id.
        limit: Stop after this many records, rejected ones included.

    Raises:
        UsageError: The file cannot be read, or is not UTF-8 text at its first bytes.
    """

    def __init__(
        self,
        path: Path | str | BinaryIO,
        entity: str,
        id_field: str = "id",
        fields: Sequence[str] = (),
        limit: int | None = None,
    ) -> None:
        if not entity or len(entity) > MAX_ENTITY_CHARS:
            raise UsageError(
                f"The entity name has {len(entity)} characters; expected 1 to {MAX_ENTITY_CHARS}.",
                remedy="Name the entity that the records of the file belong to.",
            )
        if fault := unfit(Record((entity, "id"), "text")):
            raise UsageError(f"The entity name {storable_key(entity, 60)!r} cannot be stored: {fault[1]}.")
        self._entity = entity
        self._id_field = id_field
        self._fields = TextFields(fields, (id_field,))
        file = OpenedFile(path, EXPECTED_JSON)
        if file.size is not None:  # a pipe is looked at when it is read: it may be slow to start
            file.checked(lambda: check_head(file.head(HEAD_BYTES), file.word))
        super().__init__(file, limit)

    @property
    def entities(self) -> tuple[str, ...]:
        return (self._entity,)

    def estimate(self) -> int | None:
        """Exact for a file under 64 KiB, else from its size and its first 64 KiB; None for a pipe."""
        found = estimated(self._file, lambda head: sum(1 for _ in iter_json_records(io.BytesIO(head))))
        return found if found is None or self._limit is None else min(found, self._limit)

    def warnings(self) -> list[str]:
        """Says if the file was changed or replaced since it was opened, and which fields were left out."""
        return [*super().warnings(), *self._fields.warnings()]

    def _items(self) -> Iterator[Record | Reject | Emptied]:
        for position, data, raw in iter_json_items(self._file.stream):
            if isinstance(data, Reject):
                yield data._replace(key=(self._entity, ""), position=position)
            else:
                yield self._record(position, data, raw)

    def _record(self, position: int, data: dict[str, Any], raw: bytes) -> Record | Reject | Emptied:
        value = data.get(self._id_field)
        if type(value) is str:
            record_id = value
        elif type(value) is int:
            record_id = str(value)
        elif value is None:
            found = "is null" if self._id_field in data else "is missing"
            return self._reject(position, raw, "", "missing_id", f"the id field {shown(self._id_field)} {found}")
        else:
            detail = f"the id field {shown(self._id_field)} is {kind(value)}, expected text or a whole number"
            return self._reject(position, raw, "", "bad_id", detail)
        texts, fault = self._fields.of(data)
        if fault:
            return self._reject(position, raw, record_id, "wrong_type", fault)
        record = Record((self._entity, record_id), content_from_fields(texts), None, position)
        if record.content or not texts or unfit(record._replace(content="text")):
            return record
        return Emptied(record.key)

    def _reject(self, position: int, raw: bytes, record_id: str, reason: str, detail: str) -> Reject:
        return Reject((self._entity, record_id), reason, detail, hashlib.sha256(raw).digest(), position)
