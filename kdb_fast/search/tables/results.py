"""What a search of a table gives back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..results import LeftOut


class Chunk(NamedTuple):
    """The piece of a long text that matched.

    Attributes:
        number: Its place among the pieces of the record, from 0.
        start: Of its first character in the record's text, from 0.
        end: Behind its last character.
    """

    number: int
    start: int
    end: int


@dataclass(frozen=True)
class TableResult:
    """One record found.

    Attributes:
        key: Its key: column → value, with the types that the driver gives them.
        score: Fused score as in :class:`~kdb_fast.search.results.SearchResult`: at most 2/61.
        similarity: Cosine of the angle between its vector and that of the query, -1 to 1; None for a record that was
            found by keyword only.
        matched_text: Its text as the table has it now, or that of the piece that matched.
        columns: The columns that were asked for: name → value.
        chunk: The piece that matched; None where texts are embedded whole.
    """

    key: Mapping[str, Any]
    score: float
    similarity: float | None
    matched_text: str
    columns: Mapping[str, Any] = field(default_factory=dict)
    chunk: Chunk | None = None


class Outcome(NamedTuple):
    """What a search has found, and how it has looked.

    Attributes:
        results: Best first.
        mode: ``hybrid``, ``vector`` or ``keyword``.
        left_out: Rows that could not be compared with the query.
        notes: What a person should know besides, in sentences.
    """

    results: list[TableResult]
    mode: str
    left_out: Sequence[LeftOut] = ()
    notes: Sequence[str] = ()
