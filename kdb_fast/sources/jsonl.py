"""Records of a JSON Lines file, of one JSON array, or of standard input."""

from __future__ import annotations

import hashlib
import io
import os
import shlex
import stat
import sys
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ..errors import PIPED, ResourceError, UsageError
from ..records import Key, Record, Reject, content_from_fields, storable_key
from ..tables.kdb_search import MAX_ENTITY_CHARS, unfit
from .base import PAGE_ROWS, Source
from .input_formats import HEAD_BYTES, check_head
from .json_records import iter_json_items, iter_json_records, kind

PAGE_CHARS = 8 << 20
"""Characters of one page, about: long texts make smaller pages."""

HELD_PAGES = 16
"""Most pages that a sample keeps in memory: each holds at most PAGE_CHARS characters."""

SAMPLE_BYTES = 1 << 16
"""Start of a file that is read to estimate its number of records."""


PATH_CHARS = 4096
"""Longest path of a file that Linux opens."""

NAMES_KEPT, NAMES_SHOWN = 1000, 10
"""Names of fields that were left out, kept and shown: an object may have its data as names."""


class _Emptied(NamedTuple):
    """Key of a record that has no text."""

    key: Key


class _Page(NamedTuple):
    """Records in the order of the input, and how often each key came without text: that counts after all of them."""

    items: list[Record | Reject]
    emptied: dict[Key, int]


class JsonlSource(Source):
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
        self._fields = tuple(dict.fromkeys(fields))
        self._limit = limit
        self._path: Path | None = None
        if isinstance(path, (str, Path)) and str(path) != "-":
            self._path = Path(path)
        self._display = "standard input" if self._path is None else storable_key(str(self._path))
        self.input = self._display if self._path is None else storable_key(str(self._path.absolute()), PATH_CHARS)
        self._stream, self._opened = self._open() if isinstance(path, (str, Path)) else (path, None)
        self._held: deque[_Page] = deque()
        self._rest: Iterator[_Page] | None = None
        self._emptied: list[Key] = []
        self._left_out: Counter[str] = Counter()
        self._unseen = set(self._fields)

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
            texts += [record.content for record in page.items if isinstance(record, Record)]
        return texts[:rows]

    def pages(self) -> Iterator[list[Record | Reject]]:
        """The records in the order of the input, bad ones as Rejects in their place.

        A page may be empty, when none of its records has text: call :meth:`take_empty` after each.

        Raises:
            UsageError: Standard input is compressed or not UTF-8.
            ResourceError: Reading failed.
        """
        rest = self._rest or self._read()
        while page := self._held.popleft() if self._held else next(rest, None):
            self._emptied += page.emptied
            self.empty += sum(page.emptied.values())
            yield page.items

    def take_empty(self) -> list[Key]:
        taken, self._emptied = self._emptied, []
        return taken

    def _read(self) -> Iterator[_Page]:
        page = _Page([], {})
        read = size = 0
        try:
            for position, data, raw in iter_json_items(self._stream):
                if isinstance(data, Reject):
                    item: Record | Reject | _Emptied = data._replace(key=(self._entity, ""), position=position)
                else:
                    item = self._record(position, data, raw)
                if isinstance(item, _Emptied):
                    page.emptied[item.key] = page.emptied.get(item.key, 0) + 1
                elif page.emptied and item.key in page.emptied:
                    # It has text again: what is emptied leaves the index after its page.
                    yield page
                    page, size = _Page([item], {}), len(item[1])
                else:
                    page.items.append(item)
                    size += len(item[1])  # the content, or a reject's short reason
                read += 1
                if len(page.items) + len(page.emptied) >= PAGE_ROWS or size >= PAGE_CHARS or read == self._limit:
                    yield page
                    page, size = _Page([], {}), 0
                    if read == self._limit:
                        return
        except OSError as error:
            raise ResourceError(
                f"Reading {self._display} failed at about record {read + 1}: {error.strerror or error}.",
                remedy="What was committed is safe; the same command carries on.",
            ) from error
        if page.items or page.emptied:
            yield page

    def warnings(self) -> list[str]:
        """Says if the file was changed or replaced since it was opened, and which fields were left out."""
        found = []
        if change := self._change():
            found.append(
                f"{self._display} {change} while it was read; run the command again to be sure of every record."
            )
        if self._left_out:
            names = [f"{self._shown(n)} ({count:,} records)" for n, count in self._left_out.most_common(NAMES_SHOWN)]
            more = len(self._left_out) - len(names)
            found.append(
                f"Fields that do not hold text were left out: {', '.join(names)}{f' and {more} more' if more else ''}."
            )
        if unseen := [self._shown(name) for name in self._fields if name in self._unseen]:
            found.append(f"No record has the field {' or '.join(unseen)}.")
        return found

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
        except IsADirectoryError:
            directory = UsageError(
                f"Cannot read {self._display}: it is a directory; expected a file.",
                remedy=f"Read all of its files: cat {shlex.quote(str(self._path))}/*.jsonl | {PIPED}",
            )
            directory.file = self._path
            raise directory from None
        except (OSError, ValueError) as error:
            raise UsageError(
                f"Cannot read {self._display}: {getattr(error, 'strerror', None) or error}.",
                remedy="Is the path right, and may you read it?",
            ) from None
        try:
            opened = os.fstat(stream.fileno())
            if stat.S_ISREG(opened.st_mode):  # a pipe is looked at when it is read: it may be slow to start
                check_head(os.pread(stream.fileno(), HEAD_BYTES, 0), shlex.quote(str(self._path)))
        except BaseException as error:
            stream.close()
            if isinstance(error, UsageError):
                error.file = self._path
            raise
        return stream, opened

    def _record(self, position: int, data: dict[str, Any], raw: bytes) -> Record | Reject | _Emptied:
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
        given = self._values(data)
        texts = [(name, value) for name, value in given if type(value) is str]
        if len(texts) < len(given):
            others = [name for name, value in given if value is not None and type(value) is not str]
            if others and (self._fields or len(others) == len(given)):
                detail = f"the field {self._shown(others[0])} is {kind(data[others[0]])}, expected text"
                return self._reject(position, raw, record_id, "wrong_type", detail)
            if others and len(self._left_out) < NAMES_KEPT:
                self._left_out.update(others)
        record = Record((self._entity, record_id), content_from_fields(texts), None, position)
        if record.content or not given or unfit(record._replace(content="text")):
            return record
        return _Emptied(record.key)

    def _values(self, data: dict[str, Any]) -> list[tuple[str, Any]]:
        """The fields to embed that the record has, null and other types too."""
        if not self._fields:
            return [(name, value) for name, value in data.items() if name != self._id_field]
        found = [(name, data[name]) for name in self._fields if name in data]
        if self._unseen:
            self._unseen.difference_update(data)
        return found

    def _reject(self, position: int, raw: bytes, record_id: str, reason: str, detail: str) -> Reject:
        return Reject((self._entity, record_id), reason, detail, hashlib.sha256(raw).digest(), position)

    @staticmethod
    def _shown(name: str) -> str:
        return repr(storable_key(name, 60))
