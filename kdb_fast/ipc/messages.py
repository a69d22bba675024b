"""Everything that crosses a process boundary, and nothing else.

All are small, so that none blocks its sender or arrives in pieces: texts, keys and vectors stay in the slab. A
message names a slot with its lease, so that an answer about an earlier use of the slot is recognised.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from ..errors import KdbFastError
from ..records import Key, Reject

if TYPE_CHECKING:
    from ..tables.index_policy import IndexOutcome
    from ..tables.target import LiveRows

FAILED_CHARS = 2000
"""Of a message to the parent about an error."""


class Embed(NamedTuple):
    """Parent → worker: embed rows ``start`` to ``stop`` (exclusive) of a slot."""

    slot: int
    lease: int
    start: int
    stop: int


class Embedded(NamedTuple):
    """Worker → parent: the rows are in the slab.

    ``tokens`` are real tokens, ``padded_tokens`` what the model computed, both with the special ones;
    ``truncated`` rows had more tokens than the model reads, of which it leaves out about ``lost_chars`` characters;
    ``crc`` is of rows start to stop.
    """

    slot: int
    lease: int
    start: int
    stop: int
    tokens: int
    padded_tokens: int
    truncated: int
    seconds: float
    crc: int
    lost_chars: int = 0


class Ready(NamedTuple):
    """Child → parent: started, after ``seconds``."""

    seconds: float


class Failed(NamedTuple):
    """Child → parent: cannot go on. ``kind`` names the exception class of kdb_fast.errors that fits."""

    @classmethod
    def of(cls, error: BaseException) -> Failed:
        """For an exception; its text is cut, since it may quote a record."""
        if isinstance(error, KdbFastError):
            return cls(type(error).__name__, error.message[:FAILED_CHARS], error.remedy[:FAILED_CHARS])
        return cls(type(error).__name__, f"{type(error).__name__}: {error}"[:FAILED_CHARS])

    kind: str
    message: str
    remedy: str = ""


class SlotRows(NamedTuple):
    """Rows of one slot to flush; ``skip`` are the row numbers that are not to be written.

    ``crcs`` are the (start, stop, crc) that the workers gave.
    """

    slot: int
    lease: int
    skip: tuple[int, ...]
    crcs: tuple[tuple[int, int, int], ...]


class Flush(NamedTuple):
    """Parent → writer: write these slots, deletions and rejects in one transaction, as flush ``number``."""

    number: int
    slots: tuple[SlotRows, ...]
    rejects: tuple[Reject, ...] = ()
    deletes: tuple[Key, ...] = ()


class Flushed(NamedTuple):
    """Writer → parent: flush ``number`` is committed.

    ``superseded`` are the rows whose row in the index had been changed by another program since it was read: the newer
    one stays. ``rejected`` are those that the database refused. Both as given by :func:`row_bits`.
    """

    number: int
    rows: int
    bytes: int
    deleted: int
    seconds: float
    superseded: tuple[tuple[int, int], ...] = ()
    rejected: tuple[tuple[int, int], ...] = ()


def row_bits(rows: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """(slot, row) pairs as one pair a slot, with its rows as the bits of a number: thousands fit a small message."""
    bits: dict[int, int] = {}
    for slot, row in rows:
        bits[slot] = bits.get(slot, 0) | 1 << row
    return tuple(bits.items())


def rows_of_bits(bits: Iterable[tuple[int, int]]) -> set[tuple[int, int]]:
    """The (slot, row) pairs that were given to :func:`row_bits`."""
    return {(slot, row) for slot, number in bits for row in range(number.bit_length()) if number >> row & 1}


class PrepareIndex(NamedTuple):
    """Parent → writer: drop the search indexes before a large load."""


class IndexPrepared(NamedTuple):
    """Writer → parent: the answer to PrepareIndex."""

    outcome: IndexOutcome


class Finish(NamedTuple):
    """Parent → writer: prune, then build whatever index is missing.

    ``live_rows`` says which rows of the entities in ``prune`` have a live record; it travels by its name.
    """

    prune: tuple[str, ...]
    build_index: bool
    live_rows: LiveRows | None = None


class Finished(NamedTuple):
    """Writer → parent: the answer to Finish; ``outcome`` says what became of the indexes."""

    deleted: int
    outcome: IndexOutcome
    seconds: float
    warnings: tuple[str, ...] = ()
    not_pruned: tuple[str, ...] = ()
    """Entities from whose rows none could be removed, since records may be hidden from this session."""


Request = Flush | PrepareIndex | Finish
"""What the writer is asked for."""

Answer = Flushed | IndexPrepared | Finished
"""What it answers."""


class Stop(NamedTuple):
    """Parent → child: end now."""


class Busy(NamedTuple):
    """Writer → parent: still alive while something takes long.

    ``doing`` says what that is, for a person (waiting for the database, building an index); '' for a flush.
    """

    doing: str
