"""Records → shards of similar length. Pure: no processes, no database.

Sorting a window, not the table, is enough: within a window of some thousand records neighbours in length
are near-equal, and memory does not grow with the table.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .slab import Row

SHARD_ROWS = 128
"""Rows of a slot. 128 records of 30 tokens are 0.8 s of a core: long enough that pipes and wake-ups do not
count, short enough that the last shard does not hold up the end."""

SHARD_CHARS = 32_768
"""Characters of a shard that the model will read (about 8,000 tokens, 1.7 s of a core): long texts come in
shards of fewer rows."""

WINDOW_ROWS = 4096
"""Records that are sorted together."""


def effective_chars(row: Row, read_chars: int) -> int:
    """Characters of a row that the model may read."""
    return min(len(row.record.content), read_chars)


def cut_shards(
    rows: Sequence[Row],
    *,
    shard_rows: int = SHARD_ROWS,
    shard_chars: int = SHARD_CHARS,
    blob_bytes: int,
    read_chars: int,
) -> Iterator[list[Row]]:
    """Rows in shards of similar length, longest first.

    Longest first: what costs most memory fails at once if at all, and the work left at the end of a window
    is in small pieces. Equal lengths keep their order.

    Args:
        shard_rows: Most rows of a shard.
        shard_chars: Most characters the model reads in a shard; a single row may have more.
        blob_bytes: Room for keys and texts in a slot, UTF-8.
        read_chars: Characters of a text beyond which the model reads nothing.
    """
    shard: list[Row] = []
    chars = size = 0
    for row in sorted(rows, key=lambda r: -len(r.record.content)):
        row_chars = effective_chars(row, read_chars)
        row_size = text_bytes(row)
        if shard and (len(shard) >= shard_rows or chars + row_chars > shard_chars or size + row_size > blob_bytes):
            yield shard
            shard, chars, size = [], 0, 0
        shard.append(row)
        chars += row_chars
        size += row_size
    if shard:
        yield shard


def text_bytes(row: Row) -> int:
    """Bytes of key and text of a row in a slot: at most, UTF-8 needs at most 4 for a character."""
    record = row.record
    if record.content.isascii() and record.record_id.isascii() and record.entity.isascii():
        return len(record.content) + len(record.record_id) + len(record.entity)
    return len(record.content.encode()) + 4 * (len(record.record_id) + len(record.entity))
