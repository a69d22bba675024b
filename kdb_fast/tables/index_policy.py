"""What is done with the search indexes around a load, and what became of them. Pure: no database.

A live HNSW index costs about 1 ms of a core for each row written; building it afterwards costs 0.28 ms for
each row of the table, on all builders together (30,000 × 384, pgvector 0.8.5). So the break-even is where the
rows to write are about a quarter of the rows that the table will hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

LIVE_SECONDS = 0.001
"""What a row that is written costs with a live HNSW index."""

BUILD_SECONDS = 0.00028
"""What a row of the table costs when the index is built."""

DEFER_SHARE = 0.25
"""Share of rows to write from which the index is dropped and rebuilt: BUILD_SECONDS ÷ LIVE_SECONDS, rounded down."""

DEFER_FLOOR = 200
"""Below this many rows to write the index is kept in any case: 0.2 s of work."""


def should_defer(to_write: int, rows_after: int) -> bool:
    """Whether ``to_write`` rows of ``rows_after`` are enough to drop the index and build it again."""
    return to_write >= DEFER_FLOOR and to_write >= DEFER_SHARE * rows_after


class IndexPolicy(Enum):
    """What may be done with the indexes of a table; the values are those of ``--index``."""

    KEEP = "keep"
    """They stay; an ivfflat index is built again after a change of the model: its lists are of the old vectors."""
    DEFER = "defer"
    """Dropped where most of the table is written (:func:`should_defer`), and built again exactly as they were."""
    CONCURRENTLY = "concurrently"
    """They stay; after a change of the model each is built anew beside itself, and takes its own place."""
    NONE = "none"
    """They stay; where there is none, none is made."""


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

    ``to_write`` are the rows that the whole run is expected to write, ``rows_after`` those that the table will have;
    ``policy`` is what was asked for.
    """

    action: IndexAction
    to_write: int
    rows_after: int
    policy: IndexPolicy = IndexPolicy.DEFER

    @property
    def is_last(self) -> bool:
        """Whether no later one can change it. What is kept in any case is told by the last count, not the first."""
        return self.policy is IndexPolicy.DEFER

    @property
    def saving(self) -> float:
        """Seconds for each HNSW index that dropping them would have saved; 0 where it would not have paid."""
        if not should_defer(self.to_write, self.rows_after):
            return 0.0
        return max(0.0, self.to_write * LIVE_SECONDS - self.rows_after * BUILD_SECONDS)

    @property
    def text(self) -> str:
        """For a person."""
        share = f"{self.action.value}: about {self.to_write:,} of {self.rows_after:,} rows change"
        if self.policy is not IndexPolicy.DEFER:
            return share
        if self.action is IndexAction.DEFERRED:
            return f"{share}, a quarter or more"
        if self.to_write * 4 < self.rows_after:
            return f"{share}, under a quarter"
        return f"{self.action.value}: only about {self.to_write:,} rows change"


@dataclass(frozen=True)
class IndexOutcome:
    """What a store has done with the search indexes.

    Attributes:
        action: What.
        detail: The names of the indexes that were built, or why the others were not dropped or built.
        invalid: Indexes that were built and are not valid, or not there.
        warnings: What a person should know besides.
        again: Indexes that were there and were built again, and why.
        live: How many HNSW indexes were kept while rows were written.
    """

    action: IndexAction
    detail: str = ""
    invalid: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    again: str = ""
    live: int = 0

    @property
    def text(self) -> str:
        """For a person."""
        if self.action is IndexAction.BUILT:
            parts = [f"built {self.detail}"] if self.detail else []
            parts += [f"built again {self.again}"] if self.again else []
            return "; ".join([*parts, f"not valid: {', '.join(self.invalid)}"] if self.invalid else parts)
        if self.action is IndexAction.NONE:
            return self.detail or self.action.value
        return f"{self.action.value}: {self.detail}" if self.detail else self.action.value


def decide(
    rows_in_index: int,
    estimate: int | None,
    read: int,
    to_write: int,
    written: int,
    policy: IndexPolicy = IndexPolicy.DEFER,
) -> IndexDecision:
    """Whether to drop the indexes now, from what a run has seen so far.

    Args:
        rows_in_index: Rows of the table when the run began.
        estimate: Records that will be read, as far as that is known.
        read: Records read so far.
        to_write: Those of them that are neither unchanged nor left out.
        written: Those of them that are written already: dropping the indexes saves nothing for them.
        policy: Only with DEFER are they ever dropped.
    """
    remaining = max(0, (estimate or 0) - read)
    expected = to_write + (remaining * to_write // read if read else 0)
    rows_after = max(rows_in_index, estimate or 0, to_write)
    drop = policy is IndexPolicy.DEFER and should_defer(expected - written, rows_after)
    return IndexDecision(IndexAction.DEFERRED if drop else IndexAction.KEPT, expected, rows_after, policy)


class IndexRecord:
    """What one run has decided about the indexes, and what came of it: for the receipt.

    Attributes:
        decision: The first to keep them, or the one to drop them, which is the last; the last where they are kept in
            any case.
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
        if self.decision is None or not decision.is_last or decision.action is IndexAction.DEFERRED:
            self.decision = decision

    @property
    def text(self) -> str:
        """For a person; '' where nothing was decided or done."""
        begun = self.decision.text if self.decision else ""
        if self.dropped is not None and self.dropped.action is IndexAction.KEPT:
            begun = self.dropped.text
        finished = self.finished
        if finished is None:
            return begun
        if finished.live and self.decision is not None and (saved := finished.live * self.decision.saving) >= 1:
            begun += f"; dropped and built again (--index defer) they would have cost about {saved:.0f} s less"
        if begun and finished.action is IndexAction.KEPT:
            return begun
        both = self.deferred or (self.decision is not None and not self.decision.is_last)
        return f"{begun}; {finished.text}" if both else finished.text
