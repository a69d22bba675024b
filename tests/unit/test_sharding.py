from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from kdb_fast.engine.sharding import SHARD_CHARS, SHARD_ROWS, cut_shards, text_bytes
from kdb_fast.ipc.slab import Row
from kdb_fast.records import Record, encode_key

ROWS = st.lists(st.builds(lambda e, i, c: Row(Record((e, i), c)), st.text(max_size=5), st.text(max_size=5), st.text()))


def utf8_bytes(row: Row) -> int:
    return len(encode_key(row.record.key)) + len(row.record.content.encode())


def effective_chars(row: Row, read_chars: int) -> int:
    """Characters of a row that the model may read."""
    return min(len(row.record.content), read_chars)


def same(rows: list[Row], others: list[Row]) -> bool:
    return [id(row) for row in rows] == [id(row) for row in others]


@settings(deadline=None)
@given(
    rows=ROWS, shard_rows=st.integers(1, 8), shard_chars=st.integers(1, 60), blob=st.integers(1, 300),
    read_chars=st.integers(1, 40),
)  # fmt: skip
def test_every_row_is_in_one_shard_within_all_limits(
    rows: list[Row], shard_rows: int, shard_chars: int, blob: int, read_chars: int
) -> None:
    shards = list(
        cut_shards(rows, shard_rows=shard_rows, shard_chars=shard_chars, blob_bytes=blob, read_chars=read_chars)
    )
    assert sorted(id(row) for shard in shards for row in shard) == sorted(id(row) for row in rows)
    for shard in shards:
        assert 1 <= len(shard) <= shard_rows
        if len(shard) > 1:
            assert sum(effective_chars(row, read_chars) for row in shard) <= shard_chars
            assert sum(utf8_bytes(row) for row in shard) <= blob


@settings(deadline=None)
@given(rows=ROWS, shard_rows=st.integers(1, 8))
def test_rows_come_longest_first_and_equal_lengths_keep_their_order(rows: list[Row], shard_rows: int) -> None:
    shards = cut_shards(rows, shard_rows=shard_rows, blob_bytes=10**6, read_chars=10**6)
    in_order = [row for shard in shards for row in shard]
    assert all(len(a.record.content) >= len(b.record.content) for a, b in pairwise(in_order))
    assert same(in_order, sorted(rows, key=lambda row: len(row.record.content), reverse=True))


@settings(deadline=None)
@given(ROWS)
def test_a_shard_is_closed_only_when_the_next_row_does_not_fit(rows: list[Row]) -> None:
    limits = {"shard_rows": 3, "shard_chars": 30, "blob_bytes": 60, "read_chars": 20}
    shards = list(cut_shards(rows, **limits))
    for shard, following in pairwise(shards):
        more = [*shard, following[0]]
        assert (
            len(more) > 3
            or sum(effective_chars(row, 20) for row in more) > 30
            or sum(text_bytes(row) for row in more) > 60
        )


@settings(deadline=None)
@given(st.text(max_size=50), st.text(max_size=10), st.text(max_size=10))
def test_text_bytes_never_says_less_than_utf8_needs(content: str, record_id: str, entity: str) -> None:
    row = Row(Record((entity, record_id), content))
    assert text_bytes(row) >= utf8_bytes(row)
    if (content + record_id + entity).isascii():
        assert text_bytes(row) == utf8_bytes(row)


def test_long_texts_come_in_shards_of_fewer_rows() -> None:
    rows = [Row(Record(("E", str(i)), "x" * 4096)) for i in range(20)]
    sizes = [len(shard) for shard in cut_shards(rows, blob_bytes=10**6, read_chars=10**6)]
    assert sizes == [SHARD_CHARS // 4096] * 2 + [4]


def test_what_the_model_does_not_read_does_not_count_as_work() -> None:
    rows = [Row(Record(("E", str(i)), "x" * 4096)) for i in range(SHARD_ROWS)]
    assert len(list(cut_shards(rows, blob_bytes=10**6, read_chars=256))) == 1


def test_short_texts_fill_a_shard() -> None:
    rows = [Row(Record(("E", str(i)), "short")) for i in range(2 * SHARD_ROWS + 1)]
    assert [len(s) for s in cut_shards(rows, blob_bytes=10**6, read_chars=100)] == [SHARD_ROWS, SHARD_ROWS, 1]


def test_nothing_makes_no_shard() -> None:
    assert list(cut_shards([], blob_bytes=100, read_chars=100)) == []
