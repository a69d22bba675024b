from __future__ import annotations

import hashlib
import struct
import uuid
from datetime import UTC, datetime, timedelta, timezone

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from psycopg.adapt import PyFormat, Transformer
from psycopg.types import numeric

from kdb_fast.ipc.row_block import NO_VALUE
from kdb_fast.stores.postgresql.key_fields import NotInBinaryError, key_fields
from kdb_fast.stores.postgresql.pgcopy import (
    NULL,
    SIGNATURE,
    TRAILER,
    id_fields,
    int_field,
    number_fields,
    pack_rows,
    text_field,
    timestamp_field,
    timestamp_fields,
    vector_fields,
    vector_hashes,
)

INT64 = st.integers(-(2**63), 2**63 - 1)
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MICROSECONDS = st.datetimes(timezones=st.just(UTC)).map(lambda moment: (moment - EPOCH) // timedelta(microseconds=1))


def dumped(value: object) -> bytes:
    """What psycopg's own binary dumper sends for a value, with its length."""
    transformer = Transformer()
    raw = transformer.get_dumper(value, PyFormat.BINARY).dump(value)
    assert raw is not None
    return struct.pack(">i", len(raw)) + bytes(raw)


def test_signature_and_trailer_are_those_of_the_binary_format() -> None:
    assert SIGNATURE == b"PGCOPY\n\xff\r\n\0" + b"\0\0\0\0" + b"\0\0\0\0"
    assert TRAILER == b"\xff\xff"
    assert NULL == b"\xff\xff\xff\xff"


@settings(deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\0")))
def test_text_is_what_psycopg_sends(value: str) -> None:
    assert text_field(value) == text_field(value.encode()) == dumped(value)


@settings(deadline=None)
@given(st.integers(-(2**15), 2**15 - 1))
def test_int2_is_what_psycopg_sends(value: int) -> None:
    assert int_field(value, 2) == dumped(numeric.Int2(value))


@settings(deadline=None)
@given(st.integers(-(2**31), 2**31 - 1))
def test_int4_is_what_psycopg_sends(value: int) -> None:
    assert int_field(value, 4) == dumped(numeric.Int4(value))


@settings(deadline=None)
@given(INT64)
def test_int8_is_what_psycopg_sends(value: int) -> None:
    assert int_field(value, 8) == dumped(numeric.Int8(value))


@pytest.mark.parametrize(("value", "size"), [(2**15, 2), (2**31, 4), (2**63, 8), (-(2**63) - 1, 8)])
def test_an_integer_too_large_for_its_column_is_an_error_and_not_another_number(value: int, size: int) -> None:
    with pytest.raises(OverflowError):
        int_field(value, size)


@settings(deadline=None)
@given(MICROSECONDS)
def test_a_timestamp_of_any_year_is_what_psycopg_sends(value: int) -> None:
    assert timestamp_field(value) == dumped(EPOCH + timedelta(microseconds=value))


@pytest.mark.parametrize(
    ("moment", "since_2000"),
    [
        (datetime(2000, 1, 1, tzinfo=UTC), 0),
        (datetime(1999, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC), -1),
        (datetime(1970, 1, 1, tzinfo=UTC), -946_684_800_000_000),
        (datetime(2000, 1, 1, 1, tzinfo=timezone(timedelta(hours=1))), 0),
        (datetime(2024, 2, 29, 12, 30, 0, 7, tzinfo=UTC), 762_525_000_000_007),
    ],
)
def test_timestamps_count_microseconds_from_2000(moment: datetime, since_2000: int) -> None:
    value = (moment - EPOCH) // timedelta(microseconds=1)
    assert timestamp_field(value) == struct.pack(">iq", 8, since_2000)


def test_a_missing_timestamp_is_null() -> None:
    assert timestamp_field(NO_VALUE) == NULL
    assert timestamp_fields(np.array([NO_VALUE, 0, NO_VALUE, NO_VALUE])) == [NULL, timestamp_field(0), NULL, NULL]
    assert timestamp_fields(np.array([NO_VALUE, NO_VALUE])) == NULL, "the same in every row"


@settings(deadline=None)
@given(st.lists(st.one_of(st.just(NO_VALUE), st.sampled_from([0, 1]), MICROSECONDS), max_size=20))
def test_many_timestamps_are_each_packed_as_one(values: list[int]) -> None:
    fields = timestamp_fields(np.array(values, dtype=np.int64))
    assert pack_rows(1, [fields], len(values)) == b"".join(b"\0\1" + timestamp_field(v) for v in values)


@settings(deadline=None)
@given(
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 5), st.integers(1, 12)),
        elements=st.floats(width=32, allow_nan=True, allow_infinity=True),
    )
)
def test_vectors_are_sent_big_endian_with_their_dimensions(vectors: np.ndarray) -> None:
    fields = vector_fields(vectors)
    assert len(fields) == len(vectors)
    for field, vector in zip(fields, vectors, strict=True):
        size, dimensions, unused = struct.unpack(">ihh", bytes(field[:8]))
        assert (size, dimensions, unused) == (len(field) - 4, len(vector), 0)
        back = np.array(struct.unpack(f">{dimensions}f", bytes(field[8:])), dtype=np.float32)
        np.testing.assert_array_equal(back, vector)


def test_vector_bytes_are_those_of_pgvectors_own_client() -> None:
    from pgvector import Vector

    values = np.array([[1.0, -2.5, 3.25]], dtype=np.float32)
    expected = Vector(values[0]).to_binary()
    assert bytes(vector_fields(values)[0]) == struct.pack(">i", len(expected)) + expected


def test_a_vector_is_hashed_as_the_server_sends_it() -> None:
    fields = vector_fields(np.array([[1.0, 2.0], [3.0, 4.0]], dtype=np.float32))
    assert [row.tobytes() for row in vector_hashes(fields)] == [
        hashlib.sha256(f.tobytes()[4:]).digest() for f in fields
    ]


def test_vectors_given_are_not_changed_and_slices_of_a_slot_are_fine() -> None:
    slot = np.arange(24, dtype=np.float32).reshape(6, 4)
    copy = slot.copy()
    fields = vector_fields(slot[2:4])
    assert struct.unpack(">4f", bytes(fields[1][8:])) == (12.0, 13.0, 14.0, 15.0)
    np.testing.assert_array_equal(slot, copy)


def test_no_vectors_make_no_fields() -> None:
    fields = vector_fields(np.empty((0, 4), dtype=np.float32))
    assert [len(part) for part in (fields, vector_hashes(fields), id_fields(0))] == [0, 0, 0]
    assert pack_rows(2, [id_fields(0), fields], 0) == b""


def test_ids_are_text_values_with_their_length() -> None:
    fields = [row.tobytes() for row in id_fields(3)]
    assert {field[:4] for field in fields} == {struct.pack(">i", 36)}
    assert len({str(uuid.UUID(field[4:].decode())) for field in fields}) == 3


def test_a_row_is_its_number_of_fields_and_then_the_fields() -> None:
    texts, numbers = [text_field("a"), text_field("bc")], number_fields(np.array([1, -2]), 4)
    assert pack_rows(3, [texts, NULL, numbers], 2) == (
        b"\0\3" + b"\0\0\0\1a" + NULL + int_field(1, 4) + b"\0\3" + b"\0\0\0\2bc" + NULL + int_field(-2, 4)
    )
    assert pack_rows(3, [numbers, texts, NULL], 2) == (
        b"\0\3" + int_field(1, 4) + b"\0\0\0\1a" + NULL + b"\0\3" + int_field(-2, 4) + b"\0\0\0\2bc" + NULL
    )
    assert pack_rows(2, [numbers, NULL], 2) == b"\0\2" + int_field(1, 4) + NULL + b"\0\2" + int_field(-2, 4) + NULL


def test_a_column_with_too_few_pieces_is_an_error() -> None:
    with pytest.raises(ValueError):
        pack_rows(2, [[text_field("a")], NULL], 2)
    with pytest.raises(ValueError):
        pack_rows(2, [number_fields(np.array([1]), 4), NULL], 2)


@settings(deadline=None)
@given(st.sampled_from(["smallint", "integer", "bigint"]), st.lists(st.integers(-(2**65), 2**65), min_size=1))
def test_a_key_too_large_for_its_column_is_left_to_the_server(kind: str, numbers: list[int]) -> None:
    fields, values = key_fields(kind), [str(number).encode() for number in numbers]
    assert fields is not None
    size = {"smallint": 2, "integer": 4, "bigint": 8}[kind]
    if all(-(2 ** (8 * size - 1)) <= number < 2 ** (8 * size - 1) for number in numbers):
        packed = b"".join(b"\0\1" + int_field(number, size) for number in numbers)
        assert pack_rows(1, [fields(values)], len(numbers)) == packed
    else:
        with pytest.raises(NotInBinaryError):
            fields(values)


def test_a_key_that_is_no_uuid_is_left_to_the_server() -> None:
    fields, key = key_fields("uuid"), uuid.uuid4()
    assert fields is not None
    assert pack_rows(1, [fields([str(key).encode(), key.hex.encode()])], 2) == 2 * (b"\0\1\0\0\0\x10" + key.bytes)
    for wrong in (b"x", key.hex[:-2].encode()):
        with pytest.raises(NotInBinaryError):
            fields([wrong])


@settings(deadline=None)
@given(st.lists(st.tuples(st.text(max_size=5), INT64, st.one_of(st.just(NO_VALUE), MICROSECONDS)), max_size=6))
def test_rows_can_be_taken_apart_again(rows: list[tuple[str, int, int]]) -> None:
    packed = pack_rows(
        4,
        [
            [text_field(text) for text, _, _ in rows],
            text_field("same"),
            number_fields(np.array([number for _, number, _ in rows], dtype=np.int64), 8),
            timestamp_fields(np.array([moment for _, _, moment in rows], dtype=np.int64)),
        ],
        len(rows),
    )
    raw, position = bytes(packed), 0

    def take(size: int) -> bytes:
        nonlocal position
        position += size
        return raw[position - size : position]

    for text, number, moment in rows:
        assert take(2) == b"\0\4"
        values = []
        for _ in range(4):
            (size,) = struct.unpack(">i", take(4))
            values.append(None if size < 0 else take(size))
        assert values[:2] == [text.encode(), b"same"]
        assert values[2] is not None
        assert struct.unpack(">q", values[2]) == (number,)
        assert (values[3] is None) == (moment == NO_VALUE)
    assert position == len(raw)
