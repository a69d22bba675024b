"""Parquet: the columns that are needed, some rows at a time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from hashlib import sha256
from typing import Any, BinaryIO

from ...errors import MissingPackageError, UsageError
from ...records import Reject
from .rows import Row, Rows

BATCH_ROWS = 1000
BUFFER_BYTES = 1 << 20
"""Of each column that is read: without it a column of a row group, which may be the whole file's, is read at once."""


class ParquetRows(Rows):
    """The rows of a file, numbered from 1.

    A Reject's reason is ``not_utf8``.

    Args:
        file: It can be read anywhere; closed with the rows.

    Raises:
        MissingPackageError: pyarrow is not installed.
        UsageError: It is no Parquet, or damaged at its end.
    """

    def __init__(self, file: BinaryIO) -> None:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise MissingPackageError(
                "The input is Parquet, and the package pyarrow is not installed.",
                remedy="Run: pip install 'kdb-fast[parquet]'",
            ) from None
        self._arrow, self._handle = pyarrow, file
        try:
            self._file = pyarrow.parquet.ParquetFile(file, buffer_size=BUFFER_BYTES, pre_buffer=False)
        except (pyarrow.ArrowException, OSError) as error:
            raise UsageError(f"The input cannot be read as Parquet: {error}.", remedy="Is the file whole?") from None
        self._types = {field.name: field.type for field in self._file.schema_arrow}
        self.columns = tuple(field.name for field in self._file.schema_arrow)
        self.total = int(self._file.metadata.num_rows)

    def close(self) -> None:
        self._handle.close()

    def texts(self) -> tuple[str, ...]:
        return tuple(name for name in self.columns or () if self.type_of(name) == "text")

    def type_of(self, column: str) -> str:
        types, kind = self._arrow.types, self._types[column]
        if types.is_list(kind) or types.is_large_list(kind) or types.is_dictionary(kind):
            kind = kind.value_type
        if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
            return "text"
        return "integer" if types.is_integer(kind) else str(self._types[column])

    def rows(self, columns: Sequence[str]) -> Iterator[Row]:
        number = 0
        try:
            for batch in self._file.iter_batches(batch_size=BATCH_ROWS, columns=list(columns), use_threads=False):
                for values in zip(*map(self._values, batch.columns), strict=True):
                    number += 1
                    if bad := next((value for value in values if isinstance(value, Reject)), None):
                        yield number, bad, b""
                    else:
                        yield number, dict(zip(batch.schema.names, values, strict=True)), repr(values).encode()
        except self._arrow.ArrowException as error:
            raise OSError(f"the Parquet data are damaged ({error})") from None

    def _values(self, column: Any) -> list[Any]:
        """The values of a column; a Reject for a text that is none."""
        try:
            values: list[Any] = column.to_pylist()
            return values
        except UnicodeDecodeError:
            return list(itertools.chain.from_iterable(map(self._one, (column[i : i + 1] for i in range(len(column))))))

    @staticmethod
    def _one(column: Any) -> list[Any]:
        try:
            values: list[Any] = column.to_pylist()
            return values
        except UnicodeDecodeError as error:
            return [
                Reject(
                    (),
                    "not_utf8",
                    f"byte {error.start + 1} of a text is not valid UTF-8",
                    sha256(error.object).digest(),
                )
            ]
