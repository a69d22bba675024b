"""Records of a JSON Lines file, of one JSON array, or of standard input."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import ResourceError, UsageError
from ..records import MAX_ENTITY_CHARS, Record, Reject, content_from_fields, storable_key, unfit
from .base import PAGE_ROWS, Source
from .json_records import check_head, iter_json_items, iter_json_records, kind

__all__ = ["JsonlSource", "iter_json_records"]

PAGE_CHARS = 8 << 20
"""Characters of one page, about: long texts make smaller pages."""

HELD_PAGES = 16
"""Most pages that a sample keeps in memory: each holds at most PAGE_CHARS characters."""

SAMPLE_BYTES = 1 << 16
"""Start of a file that is read to estimate its number of records."""


class JsonlSource(Source):
    """Records of a file, one JSON object each; see :func:`iter_json_records` for the two forms.

    The content is ``name: value | …`` over the fields in the order given; without ``fields`` over all
    keys with a text value but ``id_field``, in the order of the object. A null or missing field is left
    out. A whole number as id becomes its decimal text, so 1 and "1" are the same record.

    Besides the reasons of :func:`iter_json_records`, a record is rejected for ``missing_id`` (or null),
    ``bad_id`` (not text or a whole number) and ``wrong_type`` (a named field that is not text).

    Args:
        path: The file, or ``"-"`` for standard input.
        entity: Name of the entity that the records belong to.
        id_field: Key of the record id.
        fields: Keys to embed; empty means every text but the id.
        limit: Stop after this many records, rejected ones included.

    Raises:
        UsageError: The file cannot be read, or is not UTF-8 text at its first bytes.
    """

    def __init__(
        self,
        path: Path | str,
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
        if fault := unfit(Record(entity, "id", "text")):
            raise UsageError(f"The entity name {storable_key(entity, 60)!r} cannot be stored: {fault[1]}.")
        self._entity = entity
        self._id_field = id_field
        self._fields = tuple(dict.fromkeys(fields))
        self._limit = limit
        self._path: Path | None = None if str(path) == "-" else Path(path)
        self._display = "standard input" if self._path is None else storable_key(str(self._path))
        self._stream, self._opened = self._open()
        self._held: deque[list[Record | Reject]] = deque()
        self._rest: Iterator[list[Record | Reject]] | None = None

    @property
    def entities(self) -> tuple[str, ...]:
        return (self._entity,)

    def estimate(self) -> int | None:
        """Exact for a file under 64 KiB, else from its size and its first 64 KiB; None for a pipe."""
        if self._opened is None or not stat.S_ISREG(self._opened.st_mode):
            return None
        head = os.pread(self._stream.fileno(), SAMPLE_BYTES, 0)
        count = sum(1 for _ in iter_json_records(io.BytesIO(head)))
        if len(head) < self._opened.st_size:
            count = max(1, round(count * self._opened.st_size / len(head)))
        return count if self._limit is None else min(count, self._limit)

    def sample(self, rows: int) -> list[str]:
        """The first of the input, which may be a pipe: what was read is kept for :meth:`pages`."""
        if self._rest is None:
            self._rest = self._read()
        texts: list[str] = []
        while len(texts) < rows and len(self._held) < HELD_PAGES and (page := next(self._rest, None)):
            self._held.append(page)
            texts += [record.content for record in page if isinstance(record, Record)]
        return texts[:rows]

    def pages(self) -> Iterator[list[Record | Reject]]:
        """The records in the order of the input, bad ones as Rejects in their place.

        Raises:
            UsageError: Standard input is compressed or not UTF-8.
            ResourceError: Reading failed.
        """
        while self._held:
            yield self._held.popleft()
        yield from self._rest or self._read()

    def _read(self) -> Iterator[list[Record | Reject]]:
        page: list[Record | Reject] = []
        read = size = 0
        try:
            for position, data, raw in iter_json_items(self._stream):
                if isinstance(data, Reject):
                    page.append(data._replace(entity=self._entity, position=position))
                else:
                    record = self._record(position, data, raw)
                    page.append(record)
                    size += len(record[2])  # the content, or a reject's short reason
                read += 1
                if len(page) >= PAGE_ROWS or size >= PAGE_CHARS or read == self._limit:
                    yield page
                    page, size = [], 0
                    if read == self._limit:
                        return
        except OSError as error:
            raise ResourceError(
                f"Reading {self._display} failed at about record {read + 1}: {error.strerror or error}.",
                remedy="What was committed is safe; the same command carries on.",
            ) from error
        if page:
            yield page

    def warnings(self) -> list[str]:
        """Says if the file was changed or replaced since it was opened."""
        change = self._change()
        if not change:
            return []
        return [f"{self._display} {change} while it was read; run the command again to be sure of every record."]

    def changed(self) -> bool:
        return bool(self._change())

    def _change(self) -> str:
        """What happened to the file since it was opened; '' for nothing."""
        if self._path is None or self._opened is None or not stat.S_ISREG(self._opened.st_mode):
            return ""
        before = self._opened
        try:
            after = os.stat(self._path)
        except OSError:
            return "was removed"
        if (after.st_dev, after.st_ino) != (before.st_dev, before.st_ino):
            return "was replaced by another file"
        if after.st_size != before.st_size:
            return f"changed its size from {before.st_size:,} to {after.st_size:,} bytes"
        return "was written to" if after.st_mtime_ns != before.st_mtime_ns else ""

    def close(self) -> None:
        if self._path is not None:
            self._stream.close()

    def _open(self) -> tuple[BinaryIO, os.stat_result | None]:
        if self._path is None:
            if sys.stdin is None:
                raise UsageError("Standard input is closed; expected JSON Lines or a JSON array.")
            return sys.stdin.buffer, None
        try:
            stream = open(self._path, "rb")  # noqa: SIM115 — closed by close()
        except (OSError, ValueError) as error:
            raise UsageError(
                f"Cannot read {self._display}: {getattr(error, 'strerror', None) or error}.",
                remedy="Is the path right, and may you read it?",
            ) from None
        try:
            opened = os.fstat(stream.fileno())
            if stat.S_ISREG(opened.st_mode):  # a pipe is looked at when it is read: it may be slow to start
                check_head(os.pread(stream.fileno(), 8, 0))
        except BaseException:
            stream.close()
            raise
        return stream, opened

    def _record(self, position: int, data: dict[str, Any], raw: bytes) -> Record | Reject:
        value = data.get(self._id_field)
        if type(value) is str:
            record_id = value
        elif type(value) is int:
            record_id = str(value)
        elif value is None:
            found = "is null" if self._id_field in data else "is missing"
            return self._reject(position, raw, "", "missing_id", f"the id field {self._shown(self._id_field)} {found}")
        else:
            detail = f"the id field {self._shown(self._id_field)} is {kind(value)}, expected text or a whole number"
            return self._reject(position, raw, "", "bad_id", detail)
        if not self._fields:
            texts = [(key, text) for key, text in data.items() if type(text) is str and key != self._id_field]
            return Record(self._entity, record_id, content_from_fields(texts), None, position)
        named = []
        for name in self._fields:
            field = data.get(name)
            if type(field) is str:
                named.append((name, field))
            elif field is not None:
                detail = f"the field {self._shown(name)} is {kind(field)}, expected text"
                return self._reject(position, raw, record_id, "wrong_type", detail)
        return Record(self._entity, record_id, content_from_fields(named), None, position)

    def _reject(self, position: int, raw: bytes, record_id: str, reason: str, detail: str) -> Reject:
        return Reject(self._entity, record_id, reason, detail, hashlib.sha256(raw).digest(), position)

    @staticmethod
    def _shown(name: str) -> str:
        return repr(storable_key(name, 60))
