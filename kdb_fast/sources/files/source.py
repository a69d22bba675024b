"""Rows of a file as records: what is their key, and what their text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

from ...errors import UsageError
from ...records import Key, Record, Reject, is_blank
from ...tables.key import KeyColumn, unfit_for
from ...tables.template import split_template
from ...tables.text import BLANK_LINE
from ..text_fields import TextFields
from .columns import check_columns, key_part
from .opened_file import OpenedFile
from .record_file import Emptied, RecordFile
from .rows import Rows


class FileSource(RecordFile):
    """The rows of a file, for a table of vectors.

    A row whose texts are all null or blank is in no page but among :meth:`take_empty`. Besides the reasons of its
    format, a row is rejected for ``missing_key``, ``bad_key`` and ``wrong_type`` (a text that is none).

    Args:
        file: What is read.
        rows: Its rows.
        key: Columns of the key of the table of vectors.
        text: Columns that are embedded, joined by a blank line; () for all that hold text but those of the key.
        template: Text with columns in braces, in place of ``text``.
        limit: Stop after this many rows.
        total: About how many rows there are; None where that is not known.

    Raises:
        UsageError: There is no such column, it holds no text, or the template cannot be read.
    """

    def __init__(
        self,
        file: OpenedFile,
        rows: Rows,
        key: Sequence[KeyColumn],
        text: Sequence[str] = (),
        template: str = "",
        limit: int | None = None,
        total: int | None = None,
    ) -> None:
        super().__init__(file, limit)
        if text and template:
            raise UsageError("--text and --template were both given; expected one of them.")
        self._rows, self._key, self._total = rows, tuple(key), total
        self._pieces = split_template(template) if template else []
        names = [column.name for column in key]
        text = self._pieces[1::2] or text
        check_columns(rows, self._key, text)
        if not text and rows.columns is not None:
            text = [name for name in rows.texts() if name and name not in names]
            check_columns(rows, self._key, text)
        self._columns = tuple(dict.fromkeys([*names, *text]))
        self._fields = TextFields(text, names, lists=True)
        self._names = tuple(dict.fromkeys(text)) if rows.only_text else ()
        self._unfit = unfit_for(self._key)
        self._unknown: Key = ("",) * len(names)

    @property
    def entities(self) -> tuple[str, ...]:
        return ()

    def estimate(self) -> int | None:
        """Exact for Parquet and a small file, else from its size and its beginning; None for a pipe or packed data."""
        return self._total if self._total is None or self._limit is None else min(self._total, self._limit)

    def warnings(self) -> list[str]:
        return [*super().warnings(), *(() if self._names else self._fields.warnings())]

    def close(self) -> None:
        self._rows.close()
        super().close()

    def _items(self) -> Iterator[Record | Reject | Emptied]:
        for position, data, raw in self._rows.rows(self._columns):
            if isinstance(data, Reject):
                yield data._replace(key=self._unknown, position=position)
            else:
                yield self._record(position, data, raw)

    def _record(self, position: int, data: dict[str, Any], raw: bytes) -> Record | Reject | Emptied:
        key: list[str | int | float] = []
        for column in self._key:
            part = key_part(data.get(column.name), column)
            if isinstance(part, tuple):
                return Reject(self._unknown, *part, hashlib.sha256(raw).digest(), position)
            key.append(part)
        texts: list[tuple[str, str | None]]
        if self._names:
            texts = [(name, data[name]) for name in self._names]  # a third of the time
        else:
            texts, fault = self._fields.of(data)
            if fault:
                return Reject(tuple(key), "wrong_type", fault, hashlib.sha256(raw).digest(), position)
        record = Record(tuple(key), self._text(texts), None, position)
        # One without any of the fields is rejected as a record without text: a mistyped name must remove nothing.
        if record.content or not texts or self._unfit(record._replace(content="text")):
            return record
        return Emptied(record.key)

    def _text(self, texts: list[tuple[str, str | None]]) -> str:
        parts = [text for _, text in texts if text]
        if not parts or all(map(is_blank, parts)):
            return ""
        if not self._pieces:
            return BLANK_LINE.join(parts)
        values, pieces = dict(texts), self._pieces
        return pieces[0] + "".join(
            (values.get(name) or "") + literal for name, literal in zip(pieces[1::2], pieces[2::2], strict=True)
        )
