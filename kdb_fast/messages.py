"""Everything that crosses a process boundary, and nothing else.

All are small: texts, keys and vectors stay in the slab. A message names a slot with its generation, so
that an answer about an earlier use of the slot is recognised.
"""

from __future__ import annotations

from typing import NamedTuple

from .records import Reject


class Embed(NamedTuple):
    """Parent → worker: embed rows ``start`` to ``stop`` (exclusive) of a slot."""

    slot: int
    generation: int
    start: int
    stop: int


class Embedded(NamedTuple):
    """Worker → parent: the rows are in the slab.

    ``tokens`` are real tokens, ``padded_tokens`` what the model computed, both with the special ones;
    ``truncated`` rows had more tokens than the model reads; ``crc`` is of rows start to stop.
    """

    slot: int
    generation: int
    start: int
    stop: int
    tokens: int
    padded_tokens: int
    truncated: int
    seconds: float
    crc: int


class Ready(NamedTuple):
    """Child → parent: started, after ``seconds``."""

    seconds: float


class Failed(NamedTuple):
    """Child → parent: cannot go on. ``kind`` names the exception class of kdb_fast.errors that fits."""

    kind: str
    message: str
    remedy: str = ""
    traceback: str = ""


class SlotRows(NamedTuple):
    """Rows of one slot to flush; ``skip`` are the row numbers that are not to be written.

    ``crcs`` are the (start, stop, crc) that the workers gave.
    """

    slot: int
    generation: int
    skip: tuple[int, ...]
    crcs: tuple[tuple[int, int, int], ...]


class Flush(NamedTuple):
    """Parent → writer: write these slots, deletions and rejects in one transaction, as flush ``number``."""

    number: int
    slots: tuple[SlotRows, ...]
    rejects: tuple[Reject, ...] = ()
    deletes: tuple[tuple[str, str], ...] = ()


class Flushed(NamedTuple):
    """Writer → parent: flush ``number`` is committed.

    ``lost`` are (slot, row) whose row in the index had been changed by another program since it was
    read: the newer one stays. ``rejected`` are (slot, row, reason, detail) that the database refused.
    """

    number: int
    rows: int
    bytes: int
    deleted: int
    seconds: float
    lost: tuple[tuple[int, int], ...] = ()
    rejected: tuple[tuple[int, int, str, str], ...] = ()


class PrepareIndex(NamedTuple):
    """Parent → writer: drop the vector index before a large load (``drop``), or leave it."""

    drop: bool


class Finish(NamedTuple):
    """Parent → writer: prune, then build whatever index is missing."""

    prune: tuple[str, ...]
    build_index: bool


class Finished(NamedTuple):
    """Writer → parent: the answer to Finish or PrepareIndex; ``outcome`` says what became of the index."""

    deleted: int
    outcome: str
    seconds: float
    warnings: tuple[str, ...] = ()


class Stop(NamedTuple):
    """Parent → child: end now."""


class Busy(NamedTuple):
    """Writer → parent: still alive while something takes long (waiting for the database, building an index)."""

    doing: str
