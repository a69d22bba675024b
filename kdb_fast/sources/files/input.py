"""A file that is read into a table of vectors: of which format it is, and how it is packed."""

from __future__ import annotations

import io
import itertools
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePath
from typing import BinaryIO

from ...db.address import DatabaseAddress
from ...errors import UsageError
from ...tables.key import KeyColumn
from ..input_formats import BOM, EXPECTED_ANY, HEAD_BYTES, READ_INTO_TABLES, check_format, is_wide
from .delimited import DelimitedRows
from .opened_file import OpenedFile
from .parquet import ParquetRows
from .record_file import estimated
from .rows import JsonRows, Rows
from .source import FileSource
from .unpacking import in_utf8, stream_of, unpacked

FORMATS = {
    "csv": (".csv",),
    "tsv": (".tsv", ".tab"),
    "json": (".json", ".jsonl", ".ndjson"),
    "parquet": (".parquet", ".pq"),
}
"""The formats, and how names of such files end."""

PACKED = (".gz", ".zst", ".zstd")


@dataclass(frozen=True)
class FileInput:
    """A file, and what of it is read.

    A file is no complete list of anything: rows of the table that are not in it stay.

    Attributes:
        path: Of the file; ``-`` for standard input. It may be packed by gzip or Zstandard.
        key: Columns of the key of the table of vectors, see :func:`~kdb_fast.sources.files.columns.key_columns`.
        text: Columns that are embedded, joined by a blank line; () for all that hold text but those of the key.
        template: Text with columns in braces, in place of ``text``.
        format: ``csv``, ``tsv``, ``json`` or ``parquet``; '' for that of its name or its first bytes.
        delimiter: Between the fields of CSV; '' finds it out.
        encoding: Of a text; '' for UTF-8.
        limit: Read at most this many rows.
    """

    path: str
    key: tuple[KeyColumn, ...]
    text: tuple[str, ...] = ()
    template: str = ""
    format: str = ""
    delimiter: str = ""
    encoding: str = ""
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.format and self.format not in FORMATS:
            raise UsageError(f"--format is {self.format!r}; expected one of {', '.join(FORMATS)}.")
        if self.delimiter and (len(self.delimiter) > 1 or self.delimiter in '"\r\n\0'):
            raise UsageError(f"--delimiter is {self.delimiter!r}; expected one character, no quote or end of a line.")

    def open(self, address: DatabaseAddress) -> FileSource:
        """The source.

        Raises:
            UsageError: The file cannot be read, is of another format, or has not these columns.
            MissingPackageError: The package for its format is not installed.
        """
        file = OpenedFile(self.path, EXPECTED_ANY)
        found: list[FileSource] = []
        file.checked(lambda: found.append(self._source(file)))
        return found[0]

    def _source(self, file: OpenedFile) -> FileSource:
        rows, total = self._rows(file)
        try:
            return FileSource(file, rows, self.key, self.text, self.template, self.limit, total)
        except BaseException:
            rows.close()
            raise

    def _rows(self, file: OpenedFile) -> tuple[Rows, int | None]:
        """The rows of the file, and about how many there are."""
        stream, head = _looked_at(file.stream, file)
        expected = f"expected {EXPECTED_ANY}"
        check_format(head, expected, file.word, READ_INTO_TABLES)
        plain = unpacked(stream, head)
        packed = plain is not stream
        if packed:
            stream, head = _looked_at(plain)
            check_format(head, expected, file.word, READ_INTO_TABLES[:1])
        kind = self._format(file, head)
        if kind == "parquet":
            rows = ParquetRows(stream if file.size is not None and not packed else _spooled(stream))
            return rows, rows.total
        if is_wide(head) and not self.encoding:
            raise UsageError(
                "The input is UTF-16 or UTF-32 text; expected UTF-8.", remedy="Name its encoding: --encoding utf-16"
            )

        def made(stream: BinaryIO) -> Rows:
            stream = in_utf8(stream, self.encoding) if self.encoding else stream
            if kind == "json":
                return JsonRows(stream)
            return DelimitedRows(stream, self.delimiter or ("\t" if kind == "tsv" else None))

        def count(head: bytes) -> int:
            return sum(1 for _ in made(io.BytesIO(head)).rows(()))

        rows_of_file = made(stream)
        return rows_of_file, None if packed else estimated(file, count)

    def _format(self, file: OpenedFile, head: bytes) -> str:
        if head.startswith(READ_INTO_TABLES[0]):
            return "parquet"
        if self.format:
            return self.format
        path = PurePath(file.path.name.lower() if file.path else "")
        ending = PurePath(path.stem).suffix if path.suffix in PACKED else path.suffix
        named = (kind for kind, endings in FORMATS.items() if ending in endings)
        by_text = "json" if head.removeprefix(BOM).lstrip()[:1] in (b"{", b"[") else "csv"
        return next(named, by_text)


def _looked_at(stream: BinaryIO, file: OpenedFile | None = None) -> tuple[BinaryIO, bytes]:
    """The stream from its beginning, and its first bytes."""
    if file is not None and file.size is not None:
        return stream, file.head(HEAD_BYTES)
    head = stream.read(HEAD_BYTES)
    read: Callable[[int], bytes] = getattr(stream, "read1", stream.read)  # of a pipe, what is there
    return stream_of(itertools.chain([head], iter(lambda: read(1 << 18), b""))), head


def _spooled(stream: BinaryIO) -> BinaryIO:
    """A copy in a temporary file without a name: Parquet is read from its end."""
    copy = tempfile.TemporaryFile()  # noqa: SIM115 - it ends with the source
    shutil.copyfileobj(stream, copy, 1 << 20)
    copy.seek(0)
    return copy
