"""The shared memory that texts and vectors travel in.

The slab is one anonymous memory file (``memfd`` on Linux) cut into equal slots. One slot carries one
shard from the parent to a worker and on to the writer; texts, keys and vectors never cross a pipe, so
control messages stay tiny and a send to a stopped process cannot block.

Only the parent owns the state of a slot, in its own memory::

    FREE ──lease──► LEASED ──worker done──► FILLED ──flush sent──► WRITING ──COMMIT──► FREE

Slot layout, in bytes, every part aligned to 64::

    header       8 × int64        lease, rows, crc of the vectors, blob length
    code         R × uint8        0 = stored as it is, else why the row is unfit (ROW_REASONS)
    exists       R × uint8        1 = the index has a row for this key, as far as the parent saw
    row_version  R × int64        that row's version as the parent saw it (NO_VALUE: none)
    source_at    R × int64        last change of the record at its source, µs since 1970 UTC (NO_VALUE: unknown)
    hashes       R × 32 × uint8   SHA-256 of the content of each row
    ends         R × 2 × int32    where key and content of each row end in the blob
    vectors      R × D × float32  written by the worker
    blob         B × uint8        key and content of row 0, of row 1, …, as :meth:`RowBlock.raw_rows` gives them

A message about a slot carries its lease, and the message that says it is filled carries the CRC-32
of the vectors, so a late or wrong write is seen (faults A8 and D5 in docs/reliability.md).
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import mmap
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import reduction, shared_memory
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import ResourceError
from ..records import MAX_CONTENT_BYTES, Record, encode_key
from .row_block import HASH_BYTES, NO_VALUE, ROW_OK, RowBlock

ALIGNMENT = 64
"""Cache line of x86-64 and most arm64: parts written by different processes share none."""
BLOB_BYTES = MAX_CONTENT_BYTES + 64 * 1024
"""Text area of a slot: the longest record with its key always fits."""

FIRST_BLOB_BYTES = 48 * 1024
"""Of a text area that grows: 128 records of 300 bytes."""


@dataclass(frozen=True)
class SlabShape:
    """Dimensions of a slab.

    Attributes:
        slots: How many.
        rows: Of a slot.
        dimensions: Length of a vector.
        blob_bytes: Room for keys and texts in a slot.
        grows: Only FIRST_BLOB_BYTES of that are allocated at once, and more while longer texts are there. Thousands of
            slots take a sixth of the memory so; but where that runs out, a run ends in the middle and not at its start.
    """

    slots: int
    rows: int
    dimensions: int
    blob_bytes: int = BLOB_BYTES
    grows: bool = False

    def offsets(self) -> dict[str, int]:
        """Byte offset of each part within a slot; ``end`` is the size of a slot."""
        sizes = [
            ("header", 8 * 8),
            ("code", self.rows),
            ("exists", self.rows),
            ("row_version", self.rows * 8),
            ("source_at", self.rows * 8),
            ("hashes", self.rows * HASH_BYTES),
            ("ends", self.rows * 2 * 4),
            ("vectors", self.rows * self.dimensions * 4),
            ("blob", self.blob_bytes),
        ]
        result, position = {}, 0
        for name, size in sizes:
            result[name] = position
            position += -(-size // ALIGNMENT) * ALIGNMENT
        result["end"] = position
        return result

    @property
    def slot_bytes(self) -> int:
        return self.offsets()["end"]

    @property
    def total_bytes(self) -> int:
        return self.slots * self.slot_bytes

    @property
    def first_bytes(self) -> int:
        """Of a slot, allocated at once."""
        return self.slot_bytes - (max(0, self.blob_bytes - FIRST_BLOB_BYTES) if self.grows else 0)


class Row(NamedTuple):
    """A record on its way into a slot, with what the parent knows about the index's row for it."""

    record: Record
    exists: bool = False
    row_version: int = NO_VALUE


class Slot(RowBlock):
    """Views on one slot of the slab. Arrays are shared memory: writing to them is seen by all processes."""

    def __init__(self, buffer: Any, shape: SlabShape, number: int) -> None:
        at = shape.offsets()
        base = number * shape.slot_bytes
        rows = shape.rows

        def part(name: str, dtype: Any, count: int) -> npt.NDArray[Any]:
            return np.frombuffer(buffer, dtype=dtype, count=count, offset=base + at[name])

        self.number = number
        self.capacity = rows
        self.header: npt.NDArray[np.int64] = part("header", np.int64, 8)
        self.code: npt.NDArray[np.uint8] = part("code", np.uint8, rows)
        self.exists: npt.NDArray[np.uint8] = part("exists", np.uint8, rows)
        self.row_version: npt.NDArray[np.int64] = part("row_version", np.int64, rows)
        self.source_at: npt.NDArray[np.int64] = part("source_at", np.int64, rows)
        self.hashes: npt.NDArray[np.uint8] = part("hashes", np.uint8, rows * HASH_BYTES).reshape(rows, HASH_BYTES)
        self.ends: npt.NDArray[np.int32] = part("ends", np.int32, rows * 2)
        self.vectors: npt.NDArray[np.float32] = part("vectors", np.float32, rows * shape.dimensions).reshape(
            rows, shape.dimensions
        )
        self._blob_at = base + at["blob"]
        self._blob = memoryview(buffer)[self._blob_at : self._blob_at + shape.blob_bytes]
        self._memory: tuple[int, mmap.mmap] | None = None
        self._room = shape.blob_bytes

    @property
    def lease(self) -> int:
        return int(self.header[0])

    @property
    def rows(self) -> int:
        return int(self.header[1])

    @property
    def text_bytes(self) -> int:
        return int(self.header[3])

    def put(
        self, lease: int, rows: Sequence[Row], sources: Sequence[int], hashes: Sequence[bytes] | None = None
    ) -> None:
        """Write keys, texts and what is known of each row; vectors are left as they are.

        Args:
            lease: Number of this use of the slot.
            rows: At most ``capacity`` rows whose text fits the blob.
            sources: For each row, microseconds since 1970 of its last change, or NO_VALUE.
            hashes: SHA-256 of each text; made here where they are not known yet.

        Raises:
            ResourceError: The memory for the texts cannot be had; only where the text area grows.
        """
        records, exists, versions = zip(*rows, strict=True) if rows else ((), (), ())
        parts = [part for record in records for part in (encode_key(record.key), record.content.encode())]
        if hashes is None:
            hashes = [hashlib.sha256(text).digest() for text in parts[1::2]]
        ends = list(itertools.accumulate(map(len, parts)))
        n, position = len(rows), ends[-1] if ends else 0
        if position > self._room:
            self._make_room(position)
        self._blob[:position] = b"".join(parts)
        self.ends[: 2 * n] = ends
        self.code[:n] = ROW_OK
        self.exists[:n] = exists
        self.row_version[:n] = versions
        self.source_at[:n] = sources
        self.hashes[:n] = np.frombuffer(b"".join(hashes), dtype=np.uint8).reshape(n, HASH_BYTES)
        self.header[:4] = (lease, n, 0, position)

    def grows_in(self, fd: int, memory: mmap.mmap) -> None:
        """From here on allocate what texts need beyond FIRST_BLOB_BYTES."""
        self._memory, self._room = (fd, memory), min(self._room, FIRST_BLOB_BYTES)

    def _make_room(self, size: int) -> None:
        if self._memory is None or size > len(self._blob):
            return  # writing them raises ValueError
        try:
            os.posix_fallocate(self._memory[0], self._blob_at, size)
        except OSError as error:
            raise no_memory(size, error) from None
        self._room = size

    def trim(self) -> None:
        """Give back what long texts needed, once nobody reads them any more."""
        if self._memory is None or self._room <= FIRST_BLOB_BYTES:
            return
        first, end = (self._blob_at + size for size in (FIRST_BLOB_BYTES, self._room))
        first, end = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
        if end > first:
            self._memory[1].madvise(mmap.MADV_REMOVE, first, end - first)
        self._room = FIRST_BLOB_BYTES

    def contents(self, start: int, stop: int) -> list[str]:
        ends = self.ends[: 2 * stop].tolist()
        blob = self._blob
        return [str(blob[ends[2 * i] : ends[2 * i + 1]], "utf-8") for i in range(start, stop)]

    def raw_rows(self) -> list[tuple[bytes, bytes]]:
        n = self.rows
        raw = bytes(self._blob[: self.text_bytes])
        ends = [0, *self.ends[: 2 * n].tolist()]
        return [(raw[ends[2 * i] : ends[2 * i + 1]], raw[ends[2 * i + 1] : ends[2 * i + 2]]) for i in range(n)]


class Slab:
    """All slots. The parent creates it and passes ``handle`` to its children, which attach.

    Raises:
        ResourceError: The memory cannot be had. It is allocated for real at once: a sparse file would end
            a process with SIGBUS at first touch, long after the start (CPython issue 114390).
    """

    def __init__(self, shape: SlabShape, buffer: Any, keep: Any, fd: int | None, name: str | None) -> None:
        self.shape = shape
        self._buffer, self._keep, self._fd, self._name = buffer, keep, fd, name
        self.slots = [Slot(buffer, shape, number) for number in range(shape.slots)]

    @classmethod
    def local(cls, shape: SlabShape) -> Slab:
        """A slab in this process only, for runs without children."""
        return cls(shape, bytearray(shape.total_bytes), None, None, None)

    @classmethod
    def create(cls, shape: SlabShape) -> Slab:
        size = shape.total_bytes
        try:
            if sys.platform == "linux":
                fd = os.memfd_create("kdb-fast-slab", os.MFD_CLOEXEC)
                try:
                    os.ftruncate(fd, size)
                    for number in range(shape.slots):
                        os.posix_fallocate(fd, number * shape.slot_bytes, shape.first_bytes)
                    memory = mmap.mmap(fd, size)
                    slab = cls(shape, memory, None, fd, None)
                    if shape.grows:
                        for slot in slab.slots:
                            slot.grows_in(fd, memory)
                    return slab
                except BaseException:
                    os.close(fd)
                    raise
            segment = shared_memory.SharedMemory(create=True, size=size)
            return cls(shape, segment.buf, segment, None, segment.name)
        except OSError as error:
            raise no_memory(size, error) from None

    def handle(self) -> SlabHandle:
        """What a spawned child needs to attach. Only valid while a child is being started."""
        return SlabHandle(self.shape, reduction.DupFd(self._fd) if self._fd is not None else None, self._name)

    def send(self, connection: Connection, pid: int) -> None:
        """Let a child that is running already attach, by :meth:`receive`."""
        connection.send((self.shape, self._name))
        if self._fd is not None:
            reduction.send_handle(connection, self._fd, pid)

    @staticmethod
    def receive(connection: Connection) -> Slab:
        """The slab that the parent sends to this process."""
        shape, name = connection.recv()
        return _attach(shape, reduction.recv_handle(connection) if name is None else None, name)

    def close(self) -> None:
        """Give the memory back once no process uses it. Views must not be used afterwards."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
        if self._keep is not None:
            self._keep.unlink()
            self._keep = None


def no_memory(size: int, error: OSError) -> ResourceError:
    """What a person is told when ``size`` bytes of shared memory are refused."""
    limits = {errno.EMFILE: "of open files (ulimit -n)", errno.EFBIG: "of the size of a file (ulimit -f)"}
    limit = limits.get(error.errno or 0)
    return ResourceError(
        f"Shared memory of {size / 1e6:.0f} MB cannot be allocated: {error.strerror or error}.",
        remedy=f"Raise the limit {limit}." if limit else "Use fewer --workers, or give the container more memory.",
    )


class SlabHandle(NamedTuple):
    shape: SlabShape
    fd: Any
    name: str | None

    def attach(self) -> Slab:
        return _attach(self.shape, self.fd.detach() if self.fd is not None else None, self.name)


def _attach(shape: SlabShape, fd: int | None, name: str | None) -> Slab:
    if fd is not None:
        buffer = mmap.mmap(fd, shape.total_bytes)
        os.close(fd)
        return Slab(shape, buffer, None, None, None)
    segment = shared_memory.SharedMemory(name=name)
    slab = Slab(shape, segment.buf, None, None, None)
    slab._keep_attached = segment  # type: ignore[attr-defined]
    return slab
