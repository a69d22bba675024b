"""Streams of bytes on their way to a reader: unpacked, and turned into UTF-8, a piece at a time."""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

from ...errors import MissingPackageError, UsageError
from ...records import storable_key

CHUNK_BYTES = 1 << 18
"""Bytes of one read."""

ZSTD_BYTES = 1 << 10
"""Packed bytes that are unpacked at once: of data that were made to do harm, they become 32 MB at most."""

GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
"""What packed data begin with."""


class _Chunks(io.RawIOBase):
    """Chunks of bytes, one after the other, as a stream."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._left = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._left = memoryview(chunk)
        size = min(len(buffer), len(self._left))
        buffer[:size] = self._left[:size]
        self._left = self._left[size:]
        return size


def stream_of(chunks: Iterator[bytes]) -> BinaryIO:
    """The chunks as a buffered stream."""
    return io.BufferedReader(_Chunks(chunks), CHUNK_BYTES)


def chunks_of(stream: BinaryIO) -> Iterator[bytes]:
    """A stream in pieces of CHUNK_BYTES."""
    while chunk := stream.read(CHUNK_BYTES):
        yield chunk


def unpacked(stream: BinaryIO, head: bytes) -> BinaryIO:
    """What is in gzip's or Zstandard's format, unpacked; any other stream as it is.

    Reading it raises OSError where the data are damaged or end early.

    Args:
        head: Its first bytes.

    Raises:
        MissingPackageError: No package for Zstandard is installed.
    """
    if head.startswith(GZIP):
        return stream_of(_gzip(stream))
    if head.startswith(ZSTD):
        return stream_of(_zstd(stream, *_zstd_package()))
    return stream


def _gzip(stream: BinaryIO) -> Iterator[bytes]:
    try:
        with gzip.GzipFile(fileobj=stream) as file:
            yield from chunks_of(file)  # type: ignore[arg-type]  # it has read()
    except EOFError:
        raise OSError("the gzip data end early") from None
    except (zlib.error, gzip.BadGzipFile) as error:
        raise OSError(f"the gzip data are damaged ({error})") from None


def _zstd(stream: BinaryIO, decompressor: Any, fault: type[Exception]) -> Iterator[bytes]:
    """Args: what makes an object that unpacks one frame, and what that raises for damaged data."""
    current: Any = None
    try:
        while piece := stream.read(ZSTD_BYTES):
            while piece:
                current = current or decompressor()
                if chunk := current.decompress(piece):
                    yield chunk
                piece = b""
                if current.eof:  # another frame may follow
                    piece, current = current.unused_data, None
    except fault as error:
        raise OSError(f"the Zstandard data are damaged ({error})") from None
    if current is not None:
        raise OSError("the Zstandard data end early")


def _zstd_package() -> tuple[Any, type[Exception]]:
    try:
        from compression import zstd  # type: ignore[import-not-found,unused-ignore]  # Python 3.14

        return zstd.ZstdDecompressor, zstd.ZstdError
    except ImportError:
        pass
    try:
        import zstandard

        return lambda: zstandard.ZstdDecompressor().decompressobj(), zstandard.ZstdError
    except ImportError:
        raise MissingPackageError(
            "The input is packed by Zstandard, and no package for that is installed.",
            remedy="Run: pip install 'kdb-fast[zstd]'",
        ) from None


def _mark(error: UnicodeError) -> tuple[str, int]:
    """What stands for bytes that are no text in their encoding: no text either, so that their line is rejected."""
    assert isinstance(error, UnicodeDecodeError)
    return "\udcff", error.end


codecs.register_error("kdb_fast.mark", _mark)


def in_utf8(stream: BinaryIO, encoding: str) -> BinaryIO:
    """A text in another encoding, in UTF-8. Where it holds what is none, a byte that UTF-8 does not have.

    Raises:
        UsageError: Python knows no such encoding of text.
    """
    try:
        found = codecs.lookup(encoding)
        if not getattr(found, "_is_text_encoding", True):
            raise LookupError
    except (LookupError, ValueError):
        raise UsageError(
            f"--encoding is {storable_key(encoding, 60)!r}; expected the name of an encoding, such as latin-1, cp1252 "
            "or utf-16."
        ) from None
    if found.name == "utf-8":
        return stream
    return stream_of(_in_utf8(stream, codecs.getincrementaldecoder(encoding)("kdb_fast.mark")))


def _in_utf8(stream: BinaryIO, decoder: codecs.IncrementalDecoder) -> Iterator[bytes]:
    for chunk in chunks_of(stream):
        yield decoder.decode(chunk).encode("utf-8", "surrogatepass")
    yield decoder.decode(b"", True).encode("utf-8", "surrogatepass")
