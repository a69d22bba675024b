"""CSV and TSV: rows of a file with the names of the columns in its first line. Strict, and row by row.

A field that begins with a quote ends with one; within, a quote is written twice, and lines may end. A quote elsewhere
is a character like others. What is no row becomes a Reject in its place, and the next line is read on.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections import deque
from collections.abc import Iterator, Sequence
from typing import BinaryIO

from ...errors import UsageError
from ...records import Reject, number_of
from ..input_formats import BOM
from ..json_records import MAX_LINE_BYTES, skip_line
from .rows import Row, Rows

DELIMITERS = ",\t;|"
"""Of these the one that is in the first line most often is taken where none is named."""


class DelimitedRows(Rows):
    """The rows of a file.

    A Reject's reason is one of ``not_utf8``, ``bad_quotes``, ``too_few_fields``, ``too_many_fields`` and
    ``line_too_long``; its hash is that of the row without the end of its line.

    Args:
        stream: Of bytes in UTF-8, with or without byte order mark.
        delimiter: Between the fields, one character; None finds it out.

    Attributes:
        columns: Their names.

    Raises:
        UsageError: There is no line with the names of the columns.
        OSError: Reading failed.
    """

    only_text = True

    def __init__(self, stream: BinaryIO, delimiter: str | None = None) -> None:
        self._lines = _Lines(stream)
        first = self._lines.first()
        text = first.decode("utf-8", "replace")
        self._delimiter = delimiter or max(DELIMITERS, key=lambda character: _unquoted(text).count(character))
        delim = self._delimiter.encode()
        self._end = re.compile(rb"%s|\r?\n|\r?\Z" % re.escape(delim))
        self._quoted = re.compile(rb'(?:\A|%s)"' % re.escape(delim))
        # A field in quotes, or one without; and what is behind it.
        self._field = re.compile(rf'(?:"((?:[^"]++|"")*+)"|([^{re.escape(self._delimiter)}]*+))'
                                 rf"({re.escape(self._delimiter)}|\Z)")  # fmt: skip
        header = next(self._rows(), None)
        if header is None or isinstance(header[1], Reject):
            why = "it is empty" if header is None else f"in line {header[0]} {header[1].detail}"  # type: ignore[union-attr]
            raise UsageError(f"The input has no line with the names of its columns: {why}.")
        names = header[1]
        if len(names) == 1 and "\r" in names[0]:
            raise UsageError(
                "The lines of the input end with a carriage return alone; expected a line feed.",
                remedy="Convert them: tr '\\r' '\\n' < FILE",
            )
        self.columns = tuple(names)

    def rows(self, columns: Sequence[str]) -> Iterator[Row]:
        names = self.columns or ()
        width = len(names)
        for line, values, raw in self._rows():
            if isinstance(values, Reject):
                yield line, values, b""
            elif len(values) == width:
                yield line, dict(zip(names, values)), raw  # noqa: B905 - as long
            else:
                reason = "too_few_fields" if len(values) < width else "too_many_fields"
                found = number_of(len(values), "field")
                yield line, _reject(reason, f"the row has {found}, the first line {width}", raw), b""

    def _rows(self) -> Iterator[tuple[int, list[str] | Reject, bytes]]:
        """Number of the line where a row begins, its fields, and its bytes."""
        lines, delimiter = self._lines, self._delimiter
        while line := lines.more():
            number = lines.number
            if len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
                yield number, lines.skip(line), b""
                continue
            raw = line.removesuffix(b"\n").removesuffix(b"\r")
            if not raw:
                continue
            fields: list[str] | None = None
            if b'"' in raw:
                fields = self._fields(raw)
                if fields is None:
                    whole = self._whole(number, line)
                    if isinstance(whole, Reject):
                        yield number, whole, b""
                        continue
                    raw = whole.removesuffix(b"\n").removesuffix(b"\r")
                    fields = self._fields(raw)
            else:
                with contextlib.suppress(UnicodeDecodeError):
                    fields = raw.decode().split(delimiter)
            yield number, _not_utf8(raw) if fields is None else fields, raw

    def _fields(self, raw: bytes) -> list[str] | None:
        """The fields of a row of which some are in quotes; None where one in quotes goes on, or bytes are no UTF-8."""
        try:
            found = self._field.findall(raw.decode())
        except UnicodeDecodeError:
            return None
        if len(found) > 1 and not found[-2][2]:
            found.pop()  # what follows the last field is empty
        fields = []
        for quoted, plain, _ in found:
            if plain.startswith('"'):
                return None
            fields.append(plain or quoted.replace('""', '"'))
        return fields

    def _whole(self, number: int, line: bytes) -> bytes | Reject:
        """The row that begins with a line; with an error only that line is taken from the input."""
        taken, size, inside = [line], len(line), False
        while True:
            fault = ""
            try:
                inside = self._ends_inside(line, inside)
            except ValueError:
                fault = "behind the quote that ends a field there is neither a delimiter nor the end of the line"
                if len(taken) > 1:
                    fault = f"a field in quotes does not end before line {number + len(taken) - 1}, where {fault}"
            if not fault and not inside:
                return b"".join(taken)
            if not fault and (size > MAX_LINE_BYTES or not (line := self._lines.more())):
                fault = "a field begins with a quote and does not end with one"
            if fault:
                self._lines.give_back(taken[1:])
                return _reject("bad_quotes", fault, taken[0].rstrip(b"\r\n"))
            taken.append(line)
            size += len(line)

    def _ends_inside(self, line: bytes, inside: bool) -> bool:
        """Whether a line ends within quotes. Raises ValueError where a field goes on behind its quotes.

        Args:
            inside: It begins within quotes.
        """
        at = 0
        while True:
            if not inside:
                found = self._quoted.search(line, at)
                if found is None:
                    return False
                at = found.end()
            while (end := line.find(b'"', at)) >= 0 and line[end + 1 : end + 2] == b'"':
                at = end + 2
            if end < 0:
                return True
            at, inside = end + 1, False
            if not self._end.match(line, at):
                raise ValueError


class _Lines:
    """The lines of a stream, of which some may be given back.

    Attributes:
        number: Of the line that was taken last.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._back: deque[bytes] = deque()
        self.number = 0

    def first(self) -> bytes:
        """The first line that is not blank, without byte order mark. It stays in the input."""
        line = self.more().removeprefix(BOM)
        while line and not line.strip(b"\r\n"):
            line = self.more()
        if line:
            self.give_back([line])
        return line

    def more(self) -> bytes:
        """The next line; b'' at the end."""
        line = self._back.popleft() if self._back else self._stream.readline(MAX_LINE_BYTES + 1)
        self.number += bool(line)
        return line

    def skip(self, line: bytes) -> Reject:
        """Read the rest of a line that is too long, of which this is the beginning; what became of it."""
        return skip_line(self._stream, line)

    def give_back(self, lines: Sequence[bytes]) -> None:
        """These lines, the last that were taken, are read again."""
        self._back.extendleft(reversed(lines))
        self.number -= len(lines)


def _unquoted(line: str) -> str:
    return re.sub('"[^"]*"', "", line)


def _not_utf8(raw: bytes) -> Reject:
    try:
        raw.decode()
        raise AssertionError("it is UTF-8")
    except UnicodeDecodeError as error:
        return _reject("not_utf8", f"byte {error.start + 1} of the row is not valid UTF-8", raw)


def _reject(reason: str, detail: str, raw: bytes) -> Reject:
    return Reject((), reason, detail, hashlib.sha256(raw).digest())
