"""Records → shards of similar length. Pure: no processes, no database.

Sorting a window, not the table, is enough: within a window of some thousand records neighbours in length
are near-equal, and memory does not grow with the table.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..ipc.slab import Row
from ..records import encode_key

SHARD_ROWS = 128
"""Rows of a slot. 128 records of 30 tokens are 0.8 s of a core: long enough that pipes and wake-ups do not
count, short enough that the last shard does not hold up the end."""

SHARD_CHARS = 32_768
"""Characters of a shard that the model will read (about 8,000 tokens, 1.7 s of a core): long texts come in
shards of fewer rows."""

WINDOW_ROWS = 4096
"""Records that are sorted together."""


def cut_shards(
    rows: Sequence[Row],
    *,
    shard_rows: int = SHARD_ROWS,
    shard_chars: int = SHARD_CHARS,
    blob_bytes: int,
    read_chars: int,
) -> Iterator[list[Row]]:
    """Rows in shards of similar length, longest first: :func:`shard_numbers`, with the rows themselves."""
    for numbers in shard_numbers(
        rows, shard_rows=shard_rows, shard_chars=shard_chars, blob_bytes=blob_bytes, read_chars=read_chars
    ):
        yield [rows[number] for number in numbers]


def shard_numbers(
    rows: Sequence[Row], *, shard_rows: int, shard_chars: int, blob_bytes: int, read_chars: int
) -> Iterator[list[int]]:
    """Numbers of the rows of each shard, longest first.

    Longest first: what costs most memory fails at once if at all, and the work left at the end of a window
    is in small pieces. Equal lengths keep their order.

    Args:
        shard_rows: Most rows of a shard.
        shard_chars: Most characters the model reads in a shard; a single row may have more.
        blob_bytes: Room for keys and texts in a slot, UTF-8.
        read_chars: Characters of a text beyond which the model reads nothing.
    """
    lengths = [len(row.record.content) for row in rows]
    shard: list[int] = []
    chars = size = 0
    for number in sorted(range(len(rows)), key=lengths.__getitem__, reverse=True):
        length = lengths[number]
        row_chars = length if length < read_chars else read_chars
        record = rows[number].record
        # No text needs more. To count exactly takes a third of the time of cutting, so only where it matters.
        row_size = 4 * length + len(encode_key(record.key))
        if shard and size + row_size > blob_bytes:
            size = sum(text_bytes(rows[i]) for i in shard)
            row_size = text_bytes(rows[number])
        if shard and (len(shard) >= shard_rows or chars + row_chars > shard_chars or size + row_size > blob_bytes):
            yield shard
            shard, chars, size = [], 0, 0
        shard.append(number)
        chars += row_chars
        size += row_size
    if shard:
        yield shard


def text_bytes(row: Row) -> int:
    """Bytes of key and text of a row in a slot: at most, UTF-8 needs at most 4 for a character."""
    record = row.record
    return len(encode_key(record.key)) + (len(text) if (text := record.content).isascii() else len(text.encode()))
