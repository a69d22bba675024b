"""What an input is, told by its first bytes; for one that is not read, the command that makes of it what is."""

from __future__ import annotations

import re
from collections.abc import Collection

from ..errors import PIPED, UsageError

HEAD_BYTES = 4096
"""Start of an input by which its format is told."""

BOM = b"\xef\xbb\xbf"

EXPECTED_JSON = "JSON Lines or a JSON array"
EXPECTED_ANY = "CSV, TSV, Parquet, JSON Lines or a JSON array"

COMPRESSED = {
    b"\x1f\x8b": ("gzip", "zcat"),
    b"\x28\xb5\x2f\xfd": ("Zstandard", "zstdcat"),
    b"\xfd7zXZ\x00": ("xz", "xzcat"),
    b"BZh": ("bzip2", "bzcat"),
    b"PK\x03\x04": ("zip", "unzip -p"),
}
"""First bytes of formats that people feed by mistake, and the command that unpacks each to a pipe."""

_ROWS = "[print(json.dumps(r, default=str)) for r in {}]"
_TO_LINES = {
    "csv": "import csv, json, sys; csv.field_size_limit(1 << 30); "
    'f = open(sys.argv[1], encoding="utf-8-sig", newline=""); ' + _ROWS.format('csv.DictReader(f, delimiter="%s")'),
    "parquet": "import json, sys, pyarrow.parquet as p; "
    + _ROWS.format("(r for b in p.ParquetFile(sys.argv[1]).iter_batches() for r in b.to_pylist())"),
    "arrow": "import json, sys, pyarrow.feather as p; " + _ROWS.format("p.read_table(sys.argv[1]).to_pylist()"),
    "xlsx": "import json, sys, openpyxl; "
    "v = openpyxl.load_workbook(sys.argv[1], read_only=True).active.values; n = next(v); "
    + _ROWS.format("(dict(zip(n, r)) for r in v)"),
}
"""Programs that print a table's rows as JSON Lines, their column names as keys."""

_TABLES = {
    b"PAR1": ("Parquet", "parquet", "pyarrow"),
    b"ARROW1": ("Arrow", "arrow", "pyarrow"),
    b"FEA1": ("Feather", "arrow", "pyarrow"),
    b"PK\x03\x04": ("an Excel workbook (XLSX)", "xlsx", "openpyxl"),
}
_OTHERS = {
    b"SQLite format 3\x00": ("an SQLite database", "Name it as the database: --db sqlite:///FILE."),
    b"\xd0\xcf\x11\xe0": ("an old Office document", "Save the table as CSV."),
    b"%PDF-": ("a PDF", "Extract its texts to one JSON object a line."),
    b"Obj\x01": ("Avro", "Convert it to one JSON object a line."),
    b"ORC": ("ORC", "Convert it to one JSON object a line."),
}

READ_INTO_TABLES = (b"PAR1", b"\x1f\x8b", b"\x28\xb5\x2f\xfd")
"""What of the above is read into a table target as it is."""

_CELL = re.compile(r'"[^"]{1,80}"|[^\W\d_][\w .#/()-]{0,80}|_?\w{1,80}')
_DELIMITERS = {",": "CSV", "\t": "TSV", ";": "CSV with semicolons", "|": "CSV with bars"}


def check_head(head: bytes, file: str = "FILE") -> None:
    """Refuse input that cannot be UTF-8 JSON, by its first bytes.

    Args:
        head: The first HEAD_BYTES, or the first line of that.
        file: Name of the file, as a word of a shell, for the remedy.

    Raises:
        UsageError: Compressed data, UTF-16 or UTF-32, a table or a document of another format.
    """
    expected = f"expected {EXPECTED_JSON} as UTF-8 text"
    check_format(head, expected, file)
    if is_wide(head):
        raise UsageError(
            f"The input is UTF-16 or UTF-32 text; {expected}.",
            remedy=f"Convert it: iconv -f UTF-16 -t UTF-8 {file} | {PIPED}",
        )
    line = head.removeprefix(BOM).lstrip(b"\r\n").partition(b"\n")[0].rstrip(b"\r").decode(errors="replace")
    if delimiter := _delimiter(line, file):
        program = _TO_LINES["csv"] % delimiter.replace("\t", "\\t")
        raise UsageError(
            f"The input is {_DELIMITERS[delimiter]}, by its first line; {expected}.",
            remedy=f"Convert it on the way: {_converted(program, file)}",
        )


def is_wide(head: bytes) -> bool:
    """Whether a text is in UTF-16 or UTF-32."""
    return head.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\x00" in head[:4]


def check_format(head: bytes, expected: str, file: str = "FILE", fit: Collection[bytes] = ()) -> None:
    """Refuse input of a format that is not read, by its first bytes.

    Args:
        head: At least the first four, of a workbook more.
        expected: The end of the sentence about it.
        file: Name of the file, as a word of a shell, for the remedy.
        fit: First bytes of the formats below that are read.

    Raises:
        UsageError: Compressed data, a table or a document.
    """
    if head.startswith(tuple(fit)):
        return
    for magic, (what, program, package) in _TABLES.items():
        if head.startswith(magic) and (program != "xlsx" or b"[Content_Types].xml" in head or b"xl/" in head):
            raise UsageError(
                f"The input is {what}; {expected}.",
                remedy=f"Convert it on the way (pip install {package}): {_converted(_TO_LINES[program], file)}",
            )
    for magic, (what, remedy) in _OTHERS.items():
        if head.startswith(magic):
            raise UsageError(f"The input is {what}; {expected}.", remedy=remedy.replace("FILE", file))
    for magic, (name, command) in COMPRESSED.items():
        if head.startswith(magic):
            raise UsageError(
                f"The input is compressed ({name}); {expected}.",
                remedy=f"Unpack it into standard input: {command} {file} | {PIPED}",
            )


def _delimiter(line: str, file: str) -> str | None:
    """What separates the names of columns in the first line of a table; None for any other line."""
    if not line or line.startswith(("{", "[")):
        return None
    for delimiter in _DELIMITERS:
        cells = line.split(delimiter)
        if len(cells) > 1 and all(_CELL.fullmatch(cell) for cell in cells):
            return delimiter
    return {".csv": ",", ".tsv": "\t"}.get(file.strip("'").lower()[-4:])


def _converted(program: str, file: str) -> str:
    return f"python3 -c '{program}' {file} | {PIPED}"
