"""When the search indexes are dropped for a load, and what became of them. Pure: no database.

A live HNSW index costs about 1 ms of a core for each row written; building it afterwards costs 0.28 ms for
each row of the table, on all builders together (30,000 × 384, pgvector 0.8.5). So the break-even is where the
rows to write are about a quarter of the rows that the table will hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

DEFER_SHARE = 0.25
"""Share of rows to write from which the index is dropped and rebuilt: 0.28 ms ÷ 1 ms, rounded down."""

DEFER_FLOOR = 200
"""Below this many rows to write the index is kept in any case: 0.2 s of work."""


def should_defer(to_write: int, rows_after: int) -> bool:
    """Whether ``to_write`` rows of ``rows_after`` are enough to drop the index and build it again."""
    return to_write >= DEFER_FLOOR and to_write >= DEFER_SHARE * rows_after


class IndexAction(Enum):
    """What is done with the search indexes. The values are the words that a receipt begins with."""

    NONE = "none"
    """The store has no vector index."""
    KEPT = "kept"
    DEFERRED = "deferred"
    """To be dropped before the load, and built after it."""
    DROPPED = "dropped for the load"
    BUILT = "built"
    NOT_BUILT = "not built"


@dataclass(frozen=True)
class IndexDecision:
    """Whether a load drops the indexes (DEFERRED) or keeps them (KEPT), and the numbers that decided it.

    ``to_write`` are the rows that the whole run is expected to write, ``rows_after`` those that the table will have.
    """

    action: IndexAction
    to_write: int
    rows_after: int

    @property
    def text(self) -> str:
        """For a person."""
        share = f"{self.action.value}: about {self.to_write} of {self.rows_after} rows change"
        if self.action is IndexAction.DEFERRED:
            return f"{share}, a quarter or more"
        if self.to_write * 4 < self.rows_after:
            return f"{share}, under a quarter"
        return f"{self.action.value}: only about {self.to_write} rows change"


@dataclass(frozen=True)
class IndexOutcome:
    """What a store has done with the search indexes.

    Attributes:
        action: What.
        detail: The names of the indexes that were built, or why the others were not dropped or built.
        invalid: Indexes that were built and are not valid, or not there.
        warnings: What a person should know besides.
    """

    action: IndexAction
    detail: str = ""
    invalid: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """For a person."""
        if self.action is IndexAction.BUILT:
            parts = [f"built {self.detail}"] if self.detail else []
            return "; ".join([*parts, f"not valid: {', '.join(self.invalid)}"] if self.invalid else parts)
        if self.action is IndexAction.NONE:
            return self.detail or self.action.value
        return f"{self.action.value}: {self.detail}" if self.detail else self.action.value


def decide(*, rows_in_index: int, estimate: int | None, read: int, to_write: int, written: int) -> IndexDecision:
    """Whether to drop the indexes now, from what a run has seen so far.

    Args:
        rows_in_index: Rows of the table when the run began.
        estimate: Records that will be read, as far as that is known.
        read: Records read so far.
        to_write: Those of them that are neither unchanged nor left out.
        written: Those of them that are written already: dropping the indexes saves nothing for them.
    """
    remaining = max(0, (estimate or 0) - read)
    expected = to_write + (remaining * to_write // read if read else 0)
    rows_after = max(rows_in_index, estimate or 0, to_write)
    drop = should_defer(expected - written, rows_after)
    return IndexDecision(IndexAction.DEFERRED if drop else IndexAction.KEPT, expected, rows_after)


class IndexRecord:
    """What one run has decided about the indexes, and what came of it: for the receipt.

    Attributes:
        decision: The first to keep them, or the one to drop them, which is the last.
        dropped: The answer to that one.
        finished: What became of them at the end of the run.
    """

    def __init__(self) -> None:
        self.decision: IndexDecision | None = None
        self.dropped: IndexOutcome | None = None
        self.finished: IndexOutcome | None = None

    @property
    def deferred(self) -> bool:
        """Whether the writer has been asked to drop them, which is done once."""
        return self.decision is not None and self.decision.action is IndexAction.DEFERRED

    def decided(self, decision: IndexDecision) -> None:
        """Take note of a decision."""
        if self.decision is None or decision.action is IndexAction.DEFERRED:
            self.decision = decision

    @property
    def text(self) -> str:
        """For a person; '' where nothing was decided or done."""
        begun = self.decision.text if self.decision else ""
        if self.dropped is not None and self.dropped.action is IndexAction.KEPT:
            begun = self.dropped.text
        finished = self.finished
        if finished is None or (begun and finished.action is IndexAction.KEPT):
            return begun
        return f"{begun}; {finished.text}" if self.deferred else finished.text
