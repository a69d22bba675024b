from __future__ import annotations

import errno
import mmap
import os
import sys
import zlib
from collections.abc import Iterator
from multiprocessing import reduction
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdb_fast.errors import ResourceError
from kdb_fast.ipc.row_block import (
    NO_VALUE,
    ROW_NOT_ENCODABLE,
    ROW_NOT_FINITE,
    ROW_OK,
    ROW_REASONS,
    ROW_WORKER_DIED,
    ROW_ZERO,
)
from kdb_fast.ipc.slab import ALIGNMENT, BLOB_BYTES, Row, Slab, SlabHandle, SlabShape
from kdb_fast.records import MAX_CONTENT_BYTES, Record, content_hash, encode_key
from kdb_fast.tables.kdb_search import MAX_ENTITY_CHARS, MAX_RECORD_ID_CHARS

SMALL = SlabShape(slots=3, rows=4, dimensions=5, blob_bytes=4096)
TEXT = st.text(max_size=30)
KEYS = st.lists(st.one_of(TEXT, st.integers(), st.floats(allow_nan=False), st.binary(max_size=9)), max_size=3).map(
    tuple
)
ROWS = st.lists(
    st.builds(
        Row,
        st.builds(Record, KEYS, TEXT),
        st.booleans(),
        st.integers(NO_VALUE, 2**63 - 1),
    ),
    max_size=SMALL.rows,
)


class _DuplicateFd(NamedTuple):
    """Stands for multiprocessing's DupFd: gives the receiving process a descriptor of its own."""

    fd: int

    def detach(self) -> int:
        return os.dup(self.fd)


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> Iterator[Slab]:
    monkeypatch.setattr(reduction, "DupFd", _DuplicateFd)
    slab = Slab.create(SMALL)
    yield slab
    slab.close()


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 200), st.integers(1, 800), st.integers(1, 5000))
def test_parts_of_a_slot_are_aligned_and_do_not_overlap(slots: int, rows: int, dimensions: int, blob: int) -> None:
    shape = SlabShape(slots, rows, dimensions, blob)
    offsets = shape.offsets()
    sizes = {
        "header": 64,
        "code": rows,
        "exists": rows,
        "row_version": 8 * rows,
        "source_at": 8 * rows,
        "hashes": 32 * rows,
        "ends": 8 * rows,
        "vectors": 4 * rows * dimensions,
        "blob": blob,
    }
    position = 0
    for name, size in sizes.items():
        assert offsets[name] % ALIGNMENT == 0
        assert position <= offsets[name] < position + ALIGNMENT
        position = offsets[name] + size
    assert position <= shape.slot_bytes < position + ALIGNMENT
    assert shape.total_bytes == slots * shape.slot_bytes


def test_text_area_holds_the_longest_record_with_the_longest_key() -> None:
    assert BLOB_BYTES >= MAX_CONTENT_BYTES + 4 * (MAX_ENTITY_CHARS + MAX_RECORD_ID_CHARS)
    assert BLOB_BYTES < 2**31, "ends are int32"
    shape = SlabShape(1, 1, 1)
    slot = Slab.local(shape).slots[0]
    record = Record(("𝕖" * MAX_ENTITY_CHARS, "𝕣" * MAX_RECORD_ID_CHARS), "x" * MAX_CONTENT_BYTES)
    slot.put(1, [Row(record)], [NO_VALUE])
    assert slot.contents(0, 1) == [record.content]


@settings(deadline=None)
@given(ROWS, st.data())
def test_what_is_put_into_a_slot_comes_out_again(rows: list[Row], data: st.DataObject) -> None:
    sources = data.draw(st.lists(st.integers(NO_VALUE, 2**63 - 1), min_size=len(rows), max_size=len(rows)))
    slot = Slab.local(SMALL).slots[1]
    slot.put(7, rows, sources)
    n = len(rows)
    assert (slot.lease, slot.rows) == (7, n)
    assert slot.raw_rows() == [(encode_key(row.record.key), row.record.content.encode()) for row in rows]
    assert [slot.hashes[i].tobytes() for i in range(n)] == [content_hash(row.record.content) for row in rows]
    start = data.draw(st.integers(0, n))
    stop = data.draw(st.integers(start, n))
    assert slot.contents(start, stop) == [row.record.content for row in rows[start:stop]]
    assert slot.exists[:n].tolist() == [int(row.exists) for row in rows]
    assert slot.row_version[:n].tolist() == [row.row_version for row in rows]
    assert slot.source_at[:n].tolist() == sources
    assert slot.text_bytes == sum(len(part) for raw in slot.raw_rows() for part in raw)


@settings(deadline=None)
@given(st.lists(ROWS, min_size=2, max_size=5))
def test_a_slot_used_again_holds_nothing_of_its_former_use(uses: list[list[Row]]) -> None:
    slot = Slab.local(SMALL).slots[0]
    for lease, rows in enumerate(uses):
        slot.code[:] = ROW_NOT_FINITE
        slot.put(lease, rows, [0] * len(rows))
        assert slot.lease == lease
        assert slot.contents(0, len(rows)) == [row.record.content for row in rows]
        assert (slot.code[: len(rows)] == ROW_OK).all()


def test_slots_do_not_touch_each_other() -> None:
    slab = Slab.local(SMALL)
    texts = ["ä" * 1000, "b" * 2000, "日" * 500]
    for slot, text in zip(slab.slots, texts, strict=True):
        slot.put(slot.number, [Row(Record(("E", str(i)), f"{i}{text}")) for i in range(2)], [0, 0])
        slot.vectors[:] = slot.number
    for slot, text in zip(slab.slots, texts, strict=True):
        assert slot.contents(0, 2) == [f"0{text}", f"1{text}"]
        assert (slot.vectors == slot.number).all()


def test_too_many_rows_or_too_much_text_leave_the_slot_as_it_was() -> None:
    slot = Slab.local(SMALL).slots[0]
    slot.put(1, [Row(Record(("E", "1"), "text"))], [0])
    with pytest.raises(ValueError):
        slot.put(2, [Row(Record(("E", str(i)), "text")) for i in range(SMALL.rows + 1)], [0] * (SMALL.rows + 1))
    assert (slot.lease, slot.rows) == (1, 1)
    with pytest.raises(ValueError):
        slot.put(3, [Row(Record(("E", "1"), "x" * SMALL.blob_bytes))], [0])
    assert (slot.lease, slot.rows) == (1, 1)


def test_a_text_that_just_fits_is_stored() -> None:
    slab = Slab.local(SMALL)
    record = Record(("E", "1"), "x" * (SMALL.blob_bytes - len(encode_key(("E", "1")))))
    for slot in slab.slots:
        slot.put(1, [Row(record)], [0])
    assert [slot.contents(0, 1) for slot in slab.slots] == [[record.content]] * SMALL.slots


def test_checksum_is_crc32_of_the_vectors_of_the_rows_in_use() -> None:
    slot = Slab.local(SMALL).slots[2]
    slot.put(1, [Row(Record(("E", str(i)), "t")) for i in range(2)], [0, 0])
    slot.vectors[:] = np.arange(20, dtype=np.float32).reshape(4, 5)
    assert slot.checksum() == zlib.crc32(np.arange(10, dtype=np.float32).tobytes())
    slot.vectors[2:] = 0
    assert slot.checksum() == zlib.crc32(np.arange(10, dtype=np.float32).tobytes())


def test_rows_whose_vector_says_nothing_are_marked_but_for_those_that_are_marked_already() -> None:
    slot = Slab.local(SlabShape(slots=1, rows=8, dimensions=2, blob_bytes=4096)).slots[0]
    slot.put(1, [Row(Record(("E", str(i)), "t")) for i in range(7)], [NO_VALUE] * 7)
    slot.vectors[:7] = np.array([[1, 0], [0, 0], [np.nan, 0], [-np.inf, 1], [0, 0], [np.nan, np.nan], [0, 0]])
    slot.code[4] = ROW_NOT_ENCODABLE
    slot.mark_unfit(0, 6)
    marked = [ROW_OK, ROW_ZERO, ROW_NOT_FINITE, ROW_NOT_FINITE, ROW_NOT_ENCODABLE, ROW_NOT_FINITE, ROW_OK]
    assert slot.code[:7].tolist() == marked


def test_every_code_of_an_unfit_row_has_a_reason() -> None:
    assert set(ROW_REASONS) == {ROW_NOT_FINITE, ROW_ZERO, ROW_NOT_ENCODABLE, ROW_WORKER_DIED}
    assert ROW_OK not in ROW_REASONS


# -- shared between processes ------------------------------------------------------------------------------


def test_whoever_attaches_sees_the_same_memory(shared: Slab) -> None:
    other = shared.handle().attach()
    shared.slots[1].put(5, [Row(Record(("E", "é"), "日本"), True, 42)], [43])
    seen = other.slots[1]
    assert (seen.lease, seen.contents(0, 1), seen.row_version[0], seen.source_at[0]) == (5, ["日本"], 42, 43)
    seen.vectors[0] = 1.5
    seen.code[0] = ROW_ZERO
    assert (shared.slots[1].vectors[0] == 1.5).all()
    assert shared.slots[1].code[0] == ROW_ZERO


def test_attached_memory_outlives_the_creators_descriptor(shared: Slab) -> None:
    other = shared.handle().attach()
    shared.close()
    shared.close()  # a second time does nothing
    other.slots[0].put(1, [Row(Record(("E", "1"), "text"))], [0])
    assert other.slots[0].contents(0, 1) == ["text"]


@pytest.mark.skipif(sys.platform != "linux", reason="memfd")
def test_memory_is_allocated_at_once_and_not_seen_by_other_programs(shared: Slab) -> None:
    assert shared._fd is not None
    status = os.fstat(shared._fd)
    assert status.st_size == SMALL.total_bytes
    assert status.st_blocks * 512 >= SMALL.total_bytes, "a sparse file would end a process with SIGBUS at first touch"
    assert status.st_nlink == 0
    assert not os.get_inheritable(shared._fd)


@pytest.mark.skipif(sys.platform != "linux", reason="memfd")
def test_attaching_leaves_no_descriptor_behind(shared: Slab) -> None:
    before = len(os.listdir("/proc/self/fd"))
    attached = [shared.handle().attach() for _ in range(3)]
    # mmap keeps a duplicate of its own for each mapping.
    assert len(os.listdir("/proc/self/fd")) == before + len(attached)


@pytest.mark.skipif(sys.platform != "linux", reason="memfd")
def test_without_memory_the_error_says_how_much_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ResourceError, match=r"Shared memory of \d+ MB cannot be allocated: No space left") as caught:
        Slab.create(SlabShape(100, 128, 384))
    assert "--workers" in caught.value.remedy
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.skipif(sys.platform != "linux", reason="memfd")
def test_the_memory_of_long_texts_is_there_while_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    slab = Slab.create(SlabShape(4, 8, 16, grows=True))
    assert slab._fd is not None
    at_first = os.fstat(slab._fd).st_blocks
    assert 4 * slab.shape.first_bytes <= 512 * at_first < slab.shape.total_bytes // 10
    texts = ["short", "x" * 300_000, "long" * 250_000]
    slab.slots[3].put(1, [Row(Record(("E", "1"), "of the neighbour"))], [0])
    for text in texts:
        slab.slots[2].put(1, [Row(Record(("E", "1"), text))], [0])
        assert slab.slots[2].contents(0, 1) == [text]
    assert 512 * os.fstat(slab._fd).st_blocks >= 512 * at_first + 900_000
    slab.slots[2].trim()
    assert 512 * os.fstat(slab._fd).st_blocks <= 512 * at_first + 2 * mmap.PAGESIZE
    assert slab.slots[3].contents(0, 1) == ["of the neighbour"]

    def full(fd: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ResourceError, match="Shared memory of 1 MB"):
        slab.slots[2].put(2, [Row(Record(("E", "1"), texts[2]))], [0])
    slab.slots[2].put(2, [Row(Record(("E", "1"), texts[0]))], [0])
    assert slab.slots[2].contents(0, 1) == [texts[0]]
    slab.close()


def test_a_local_slab_needs_no_handle_and_closes_quietly() -> None:
    slab = Slab.local(SMALL)
    assert slab.handle() == SlabHandle(SMALL, None, None)
    slab.close()
    assert len(slab.slots) == SMALL.slots
