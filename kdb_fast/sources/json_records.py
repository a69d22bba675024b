"""JSON Lines, or one JSON array, as a stream of objects. Strict, and with memory that does not grow.

Whatever is not a valid object becomes a Reject in its place; the rest of the input is read on.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator
from typing import Any, BinaryIO, NoReturn

from ..records import Reject, storable_key
from .input_formats import BOM, HEAD_BYTES, check_head

MAX_LINE_BYTES = 16 << 20
"""Longest line, or element of an array, in bytes: 16 times the longest content the index keeps."""

CHUNK_BYTES = 1 << 16
"""Bytes of one read of an array, and of a line that is skipped."""

Item = tuple[int, dict[str, Any] | Reject, bytes]
"""Number of the line where it starts, the object or why there is none, and the bytes of the object."""


def iter_json_records(stream: BinaryIO) -> Iterator[tuple[int, dict[str, Any] | Reject]]:
    """The objects of JSON Lines or of one JSON array, each with the number of the line where it starts.

    It is an array if the first character is ``[`` and the next is ``{`` or ``]`` or on another line. An object that
    begins on the first line may go on over several, as pretty-printed JSON does, up to MAX_LINE_BYTES.
    Blank lines are skipped. A byte order mark at the start is accepted.

    A Reject has no key; its hash is SHA-256 of the line without its end, or of the
    element. Its reason is one of ``invalid_json``, ``duplicate_key``, ``not_finite_number``,
    ``too_deep``, ``number_too_long``, ``line_too_long``, ``not_an_object``, ``not_utf8`` and
    ``truncated_input`` (the input ends in the middle of a record).

    Args:
        stream: A buffered binary stream; it is not closed.

    Raises:
        UsageError: Compressed data, UTF-16 or UTF-32, a table or a document of another format.
        OSError: Reading failed.
    """
    return ((position, data) for position, data, _ in iter_json_items(stream))


def iter_json_items(stream: BinaryIO) -> Iterator[Item]:
    """As :func:`iter_json_records`, and with the bytes that the hash of a Reject is made of."""
    number = 0
    first = True
    ahead = b""
    while raw := ahead or stream.readline(MAX_LINE_BYTES + 1):
        ahead = b""
        number += 1
        if number == 1:
            check_head(raw[:HEAD_BYTES])
            raw = raw.removeprefix(BOM)
        if len(raw) > MAX_LINE_BYTES and not raw.endswith(b"\n"):
            if not (first and _starts_array(raw[:CHUNK_BYTES])):
                first = False
                yield number, skip_line(stream, raw), b""
                continue
        elif raw.isspace() or not raw:
            continue
        if first:
            first = False
            if _starts_array(raw[:CHUNK_BYTES]):
                yield from _Array(stream, raw, number).items()
                return
            if _goes_on(raw):
                whole, lines, ahead = _rest_of_object(stream, raw)
                yield number, _parse(whole.rstrip(), ended=bool(ahead)), whole.rstrip()
                number += lines
                continue
        ended = raw.endswith(b"\n")
        raw = raw.rstrip(b"\r\n")
        yield number, _parse(raw, ended=ended), raw


def _starts_array(head: bytes) -> bool:
    text = head.lstrip()
    if not text.startswith(b"["):
        return False
    rest = text[1:].lstrip()
    return not rest or rest[:1] in b"{]"


def _goes_on(line: bytes) -> bool:
    """Whether a line is the beginning of an object that goes on: it ends with ``{``, ``[``, ``,`` or ``:``."""
    text = line.strip()
    if not text.startswith(b"{") or not line.endswith(b"\n") or text[-1:] not in b"{[,:":
        return False
    try:
        json.JSONDecoder().raw_decode(text.decode())
    except (ValueError, RecursionError):  # a complete object with a comma behind it is a mistake of its own
        return True
    return False


def _rest_of_object(stream: BinaryIO, first: bytes) -> tuple[bytes, int, bytes]:
    """An object, the number of its lines after the first, and the line behind it if that was read to find its end.

    A line that begins with ``{``, without a blank, is the next record: the first one was broken.
    """
    parts, size, lines = [first], len(first), 0
    depth = _depth(first)
    while depth > 0 and size <= MAX_LINE_BYTES and (line := stream.readline(MAX_LINE_BYTES + 1)):
        if line.startswith(b"{"):
            return b"".join(parts), lines, line
        parts.append(line)
        size, lines, depth = size + len(line), lines + 1, depth + _depth(line)
    return b"".join(parts), lines, b""


def _depth(line: bytes) -> int:
    """Brackets that a line opens, less those it closes: no string of JSON goes on over the end of a line."""
    bare = _STRINGS.sub(b"", line)
    return sum(bare.count(c) for c in (b"{", b"[")) - sum(bare.count(c) for c in (b"}", b"]"))


_STRINGS = re.compile(rb'"(?:[^"\\]++|\\.)*+"')


def skip_line(stream: BinaryIO, raw: bytes) -> Reject:
    """Read the rest of a line that is too long; what it became. ``raw`` is its beginning."""
    digest, size = hashlib.sha256(raw), len(raw)
    while chunk := stream.readline(CHUNK_BYTES):
        if chunk.endswith(b"\n"):
            chunk = chunk.rstrip(b"\r\n")
            digest.update(chunk)
            size += len(chunk)
            break
        digest.update(chunk)
        size += len(chunk)
    return _too_long("line", size, digest.digest())


def _too_long(what: str, size: int, digest: bytes) -> Reject:
    detail = f"the {what} has {size:,} bytes, at most {MAX_LINE_BYTES:,} are read"
    return Reject((), "line_too_long", detail, digest)


class _Fault(ValueError):
    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        seen = set()
        for key, _ in pairs:
            if key in seen:
                raise _Fault("duplicate_key", f"the key {storable_key(key, 60)!r} occurs twice in one object")
            seen.add(key)
    return data


def _constant(name: str) -> NoReturn:
    raise _Fault("not_finite_number", f"{name} is not a JSON number")


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise _Fault("not_finite_number", "a number is too large for a 64-bit float")
    return value


_decode = json.JSONDecoder(object_pairs_hook=_pairs, parse_constant=_constant, parse_float=_float).decode


def _parse(raw: bytes, *, ended: bool = True) -> dict[str, Any] | Reject:
    """The object in ``raw``, or why there is none. ``ended`` is False for what the input's end may have cut."""
    try:
        data = _decode(raw.decode())
        if isinstance(data, dict):
            return data
        reason, detail = "not_an_object", f"found {kind(data)}, expected a JSON object"
    except _Fault as fault:
        reason, detail = fault.reason, fault.detail
    except UnicodeDecodeError as error:
        reason, detail = "not_utf8", f"byte {error.start + 1} of the record is not valid UTF-8"
        if not ended and error.end == len(raw) and error.reason == "unexpected end of data":
            reason, detail = "truncated_input", "the input ends in the middle of a character"
    except json.JSONDecodeError as error:
        reason, detail = "invalid_json", f"not valid JSON at character {error.pos + 1}: {error.msg}"
        if not ended:
            reason, detail = "truncated_input", f"the input ends in the middle of a record ({error.msg})"
    except RecursionError:
        reason, detail = "too_deep", "objects or arrays are nested too deeply"
    except ValueError:
        reason, detail = "number_too_long", "a whole number has too many digits"
    return Reject((), reason, detail, hashlib.sha256(raw).digest())


_KINDS = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "an array", dict: "an object"}


def kind(value: Any) -> str:
    """The JSON name of a value's type, for messages."""
    return "null" if value is None else _KINDS.get(type(value), type(value).__name__)


_OUTSIDE = re.compile(rb'[{}\[\],"]')
_STRING = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)


class _Array:
    """The elements of one JSON array, found by a scanner that knows only strings and brackets.

    So a faulty element has an end too, and the next one is read. Each byte is scanned once.
    """

    def __init__(self, stream: BinaryIO, head: bytes, line: int) -> None:
        self._stream = stream
        start = head.index(b"[") + 1
        self._buffer = bytearray(head[start:])
        self._at = 0  # scanned up to here
        self._depth = 0
        self._in_string = False
        self._line = line + head.count(b"\n", 0, start)
        self._dropped = hashlib.sha256()
        self._dropped_bytes = 0  # of the element being read: it is over the cap
        self._dropped_line = line

    def items(self) -> Iterator[Item]:
        elements = 0
        while True:
            end = self._scan()
            closed = end >= 0 and self._buffer[end] == ord("]")
            raw = bytes(self._buffer[: end if end >= 0 else len(self._buffer)])
            body = raw.strip()
            position = self._line + raw.count(b"\n", 0, len(raw) - len(raw.lstrip()))
            if self._dropped_bytes or len(body) > MAX_LINE_BYTES:
                self._dropped.update(raw)
                size = self._dropped_bytes + len(raw)
                line = self._dropped_line if self._dropped_bytes else position
                yield line, _too_long("element", size, self._dropped.digest()), b""
            elif body:
                element = _parse(body, ended=end >= 0)
                if end >= 0 or isinstance(element, dict):
                    yield position, element, body
            elif not (closed and elements == 0) and end >= 0:
                yield position, Reject((), "invalid_json", "an element of the array is empty", _EMPTY), b""
            if end < 0:
                detail = "the input ends before the array does"
                yield position, Reject((), "truncated_input", detail, hashlib.sha256(body).digest()), body
                return
            elements += 1
            self._line += raw.count(b"\n")
            del self._buffer[: end + 1]
            self._at = 0
            self._dropped, self._dropped_bytes = hashlib.sha256(), 0
            if closed:
                yield from self._rest()
                return

    def _scan(self) -> int:
        """Where the element ends in the buffer (at ``,`` or ``]``), or -1 at the end of the input."""
        while True:
            if self._in_string:
                found = _STRING.match(self._buffer, self._at)
                assert found is not None
                self._at = found.end()
                if self._at < len(self._buffer) and self._buffer[self._at] == ord('"'):
                    self._at += 1
                    self._in_string = False
                    continue
            elif found := _OUTSIDE.search(self._buffer, self._at):
                self._at = found.end()
                token = found[0]
                if token == b'"':
                    self._in_string = True
                elif token in (b"{", b"["):
                    self._depth += 1
                elif self._depth == 0 and token in (b",", b"]"):
                    return found.start()
                elif token != b",":
                    self._depth = max(0, self._depth - 1)
                continue
            else:
                self._at = len(self._buffer)
            if len(self._buffer) > MAX_LINE_BYTES:
                self._drop()
            chunk = self._stream.read(CHUNK_BYTES)
            if not chunk:
                return -1
            self._buffer += chunk

    def _drop(self) -> None:
        """Forget what was scanned of an element that is over the cap."""
        scanned = bytes(self._buffer[: self._at])
        if not self._dropped_bytes:
            self._dropped_line = self._line + scanned.count(b"\n", 0, len(scanned) - len(scanned.lstrip()))
        self._dropped.update(scanned)
        self._dropped_bytes += len(scanned)
        self._line += scanned.count(b"\n")
        del self._buffer[: self._at]
        self._at = 0

    def _rest(self) -> Iterator[Item]:
        """What follows the array must be white space."""
        while True:
            text = self._buffer.lstrip()
            if text:
                line = self._line + self._buffer.count(b"\n", 0, len(self._buffer) - len(text))
                detail = "there is more after the end of the array; it was not read"
                yield line, Reject((), "invalid_json", detail, hashlib.sha256(text).digest()), b""
                return
            self._line += self._buffer.count(b"\n")
            self._buffer = bytearray(self._stream.read(CHUNK_BYTES))
            if not self._buffer:
                return


_EMPTY = hashlib.sha256().digest()
