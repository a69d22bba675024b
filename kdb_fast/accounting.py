"""Where every record of a run went."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Fate(Enum):
    """How a record ends. The values are the fields of :class:`Counts`."""

    STORED = "stored"
    """Embedded and written."""
    UNCHANGED = "unchanged"
    REUSED = "reused"
    """Written with the vector of an equal text."""
    SUPERSEDED = "superseded"
    """A newer record of its key was read, or another program wrote the row after we had read it."""
    REJECTED = "rejected"


@dataclass
class Counts:
    """Where every record went, so far. ``read`` is always :attr:`accounted` once a run has ended.

    ``foreign`` are among the unchanged: their rows hold vectors of another program, which are left alone.
    """

    read: int = 0
    stored: int = 0
    unchanged: int = 0
    foreign: int = 0
    reused: int = 0
    superseded: int = 0
    rejected: int = 0
    empty: int = 0
    deleted: int = 0
    truncated: int = 0
    lost_chars: int = 0
    chunks: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    flushes: int = 0
    embed_seconds: float = 0.0
    write_seconds: float = 0.0
    index_seconds: float = 0.0
    bytes_written: int = 0

    @property
    def accounted(self) -> int:
        """Records whose fate is settled."""
        return self.stored + self.unchanged + self.reused + self.superseded + self.rejected

    @property
    def written(self) -> int:
        """Records whose vector is in the index since this run."""
        return self.stored + self.reused

    @property
    def to_write(self) -> int:
        """Records whose vector is in the index since this run, or will be."""
        return self.read - self.unchanged - self.rejected - self.superseded

    def gone(self, records: int) -> None:
        """Count records that were not there any more when they were read again."""
        self.read += records
        self.superseded += records

    def add(self, fate: Fate, records: int = 1) -> None:
        """Count records whose fate is settled."""
        setattr(self, fate.value, getattr(self, fate.value) + records)

    def embedded(self, tokens: int, padded_tokens: int, truncated: int, lost_chars: int, seconds: float) -> None:
        """Count what it took to embed a slot."""
        self.tokens += tokens
        self.padded_tokens += padded_tokens
        self.truncated += truncated
        self.lost_chars += lost_chars
        self.embed_seconds += seconds

    def supersede(self, earlier: Fate) -> None:
        """A record that was counted as ``earlier`` is outdated by a newer one of its key."""
        self.add(earlier, -1)
        self.superseded += 1


def clock(seconds: float) -> str:
    """``75`` → ``1:15``, ``4000`` → ``1:06:40``."""
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
