"""A record, the text that is embedded for it, and what makes one unfit."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any, NamedTuple

MAX_CONTENT_BYTES = 1_000_000
"""Longest content kept for one record, in UTF-8 bytes.

PostgreSQL's ``to_tsvector`` refuses more than 1,048,575 bytes of lexemes, and KameleonDB's table has
a generated ``tsv`` column; a longer text is cut here (counted as ``truncated``), and no known encoder
reads beyond the first few ten thousand characters.
"""

Key = tuple[str | int | float | bytes, ...]
"""What tells a record from others, in the order of the target's key columns. Passed on as it is: only the target
(:mod:`kdb_fast.tables.key`) and what reads or writes its columns look inside."""


class Record(NamedTuple):
    """One text with its key.

    Attributes:
        key: In canonical form: for a table of PostgreSQL the text of each part.
        content: The text to embed and to search by keyword.
        source_at: When the record was last changed at its source, if the source knows.
        position: Where it was read (a line number), for messages; 0 where it has no meaning.
    """

    key: Key
    content: str
    source_at: datetime | None = None
    position: int = 0


class Reject(NamedTuple):
    """A record that cannot be stored, and why.

    Attributes:
        key: Of the record; what is not known of it is ''.
        reason: A short machine-readable word such as ``nul_byte`` or ``empty_text``.
        detail: One sentence for a person, without the record's text.
        content_hash: SHA-256 of the content, or of the raw line where there is no content; 32 bytes.
        position: Line number in the input, or 0.
    """

    key: Key
    reason: str
    detail: str
    content_hash: bytes = b""
    position: int = 0


class KeptReject(NamedTuple):
    """A rejected record, as it is kept.

    Attributes:
        entity: Of KameleonDB; '' for a record of a target.
        record_id: Its key, of several columns with commas between; '' for a line of an input that became no record.
        reason: One word, such as ``nul_byte``.
        detail: What was found, in words.
        position: Number of its line in the input; 0 for a record of the database.
        run: The run that rejected it.
        rejected_at: When; aware.
        content_hash: SHA-256 of its text in hexadecimal digits.
        target: Name of its target; '' for a record of KameleonDB's index.
    """

    entity: str
    record_id: str
    reason: str
    detail: str
    position: int
    run: int
    rejected_at: datetime
    content_hash: str
    target: str = ""

    def as_json(self) -> dict[str, Any]:
        """What ``rejects list --json`` prints."""
        values = self._asdict()
        target, line, _ = values.pop("target"), values.pop("position"), values.pop("content_hash")
        return {**({"target": target} if target else {}), **values, "line": line}


NOT_TEXT = b"\xff"
"""First byte of an encoded key that has other parts than texts: UTF-8 has no such byte."""


def encode_key(key: Key) -> bytes:
    """A key as one field of bytes: texts in UTF-8 joined by NUL, which no text of a database holds; a key with other
    parts as :func:`key_json`."""
    try:
        return "\0".join(key).encode()  # type: ignore[arg-type]
    except TypeError:
        return NOT_TEXT + key_json(key).encode()


def decode_key(raw: bytes) -> Key:
    """The key that :func:`encode_key` was given."""
    if raw.startswith(NOT_TEXT):
        return key_of_json(raw[1:])
    return tuple(raw.decode().split("\0"))


def key_json(key: Key) -> str:
    """A key as text that keeps types apart, of ASCII only: ``["Note","a"]``, ``[42,"en"]``, ``[{"hex":"00ff"}]``."""
    parts = [{"hex": part.hex()} if isinstance(part, bytes) else part for part in key]
    return json.dumps(parts, separators=(",", ":"))


def key_of_json(text: str | bytes) -> Key:
    """The key that :func:`key_json` was given."""
    return tuple(bytes.fromhex(part["hex"]) if isinstance(part, dict) else part for part in json.loads(text))


def shown_key(key: Key) -> str:
    """A key for a message, whatever it is: ``'Note'/'a'``."""
    return "/".join(repr(storable_key(part, 60)) for part in key)


UNSEEN = "".join(map(chr, (*range(9, 14), *range(28, 33), 0x85, 0xA0, 0x1680, *range(0x2000, 0x2010), 0x2028, 0x2029,
                           *range(0x202A, 0x2030), 0x205F, *range(0x2060, 0x2070), 0x3000, 0xAD, 0x34F, 0x61C, 0x115F,
                           0x1160, 0x17B4, 0x17B5, *range(0x180B, 0x1810), 0x3164, *range(0xFE00, 0xFE10), 0xFEFF,
                           0xFFA0)))  # fmt: skip
"""White space, and the characters that Unicode says are not shown (``Default_Ignorable_Code_Point``, of the first
plane), such as the zero-width space and the byte order mark."""


def is_blank(text: str) -> bool:
    """Whether a text shows nothing: it is empty, or only white space and characters that are not shown."""
    return not text or text.isspace() or (not text.isascii() and not text.strip(UNSEEN))


def content_hash(content: str) -> bytes:
    """SHA-256 of the UTF-8 form: the value PostgreSQL gives for ``sha256(convert_to(content, 'UTF8'))``."""
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).digest()


def content_from_fields(fields: Iterable[tuple[str, Any]]) -> str:
    """Join named values as KameleonDB does: ``name: Headphones | description: Noise-cancelling``.

    Values that are None or an empty string are left out. Returns '' when nothing is left, or only blank text.
    """
    kept = [(name, value) for name, value in fields if value is not None and value != ""]
    if all(isinstance(value, str) and is_blank(value) for _, value in kept):
        return ""
    return " | ".join([f"{name}: {value}" for name, value in kept])


def content_of(data: Mapping[str, Any], names: Iterable[str]) -> str:
    """:func:`content_from_fields` over the keys ``names`` of ``data``, in that order."""
    return content_from_fields((name, data.get(name)) for name in names)


def bad_encoding(what: str, missing: Iterable[str], encoding: str) -> tuple[str, str]:
    """(reason, detail) for a text with characters that the database's encoding has not; up to three are named."""
    numbers = ", ".join(f"U+{ord(character):04X}" for character in sorted(missing)[:3])
    return (
        "bad_encoding",
        f"the {what} has characters that the database's encoding {encoding} has not, such as {numbers}",
    )


def cut_content(content: str) -> str:
    """The content cut to :data:`MAX_CONTENT_BYTES`, on a character boundary."""
    if len(content) * 4 <= MAX_CONTENT_BYTES:
        return content
    raw = content.encode("utf-8")
    if len(raw) <= MAX_CONTENT_BYTES:
        return content
    return raw[:MAX_CONTENT_BYTES].decode("utf-8", "ignore")


def was_cut(content: str) -> bool:
    """Whether the content has the length that :func:`cut_content` leaves: some of the text is missing then.

    One that just has this length by itself is taken for a cut one, too.
    """
    if len(content) * 4 <= MAX_CONTENT_BYTES - 4:
        return False
    return MAX_CONTENT_BYTES - 4 < len(content.encode("utf-8", "surrogatepass")) <= MAX_CONTENT_BYTES


def storable_key(value: object, limit: int = 200) -> str:
    """A key that could not be stored as it is, in a form that can: printable, at most ``limit`` characters.

    Control characters, lone surrogates and NUL are written as \\xNN or \\uNNNN, so the result is also safe
    on a terminal.
    """
    text = value if isinstance(value, str) else repr(value)
    cut = text[: limit + 1]
    safe = "".join(c if c.isprintable() and not "\ud800" <= c <= "\udfff" else ascii(c)[1:-1] for c in cut)
    return safe if len(safe) <= limit else safe[: limit - 1] + "…"


def local_time(moment: datetime) -> str:
    """An aware time for a person: as it is here, with the zone's name."""
    return moment.astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")


def number_of(count: int, one: str, several: str = "") -> str:
    """A number of things, as a sentence has it: "1 record", "2 records".

    Args:
        several: What stands after another number than 1; with an s where it is not given.
    """
    return f"{count:,} {one if count == 1 else several or f'{one}s'}"


def shell_word(text: str) -> str:
    """``text`` as one word of a command that can be typed in a shell, without unprintable characters."""
    if text.isprintable():
        return shlex.quote(text)
    # The shells' form for characters that cannot be printed.
    quoted = text.replace("\\", "\\\\").replace("'", "\\'")
    return "$'" + "".join(c if c.isprintable() else _escape(ord(c)) for c in quoted) + "'"


def _escape(code: int) -> str:
    # Half a surrogate pair stands for a byte of the argument that is not UTF-8.
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"\\U{code:08x}"
