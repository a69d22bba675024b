"""What a search gives back: records, the state of an index, and rows that could not be compared with the query."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

from ..origins import Origin
from ..records import number_of


@dataclass(frozen=True)
class SearchResult:
    """One record found.

    Attributes:
        entity: Name of its entity.
        id: Its record id.
        score: Fused score; higher is better, at most 2/61.
        data: Its active fields by logical name, None where it has no value; {} if KameleonDB does not define
            the entity.
        matched_text: The text in the index.
    """

    entity: str
    id: str
    score: float
    data: dict[str, Any]
    matched_text: str


@dataclass(frozen=True)
class IndexStatus:
    """State of one entity's index. The first four are KameleonDB's.

    Attributes:
        entity: Its name.
        indexed: Rows with a vector.
        pending: Live records without a vector, or changed since theirs was made.
        last_updated: When the index last changed, as an aware datetime.
        stale: Rows whose vector was made by another model or another program.
        rejected: Records that could not be stored.
    """

    entity: str
    indexed: int
    pending: int
    last_updated: datetime | None
    stale: int = 0
    rejected: int = 0


class LeftOut(NamedTuple):
    """Rows that a ranking by vector could not compare with the query.

    Attributes:
        entities: Names of their entities.
        model: Name of the model that made their vectors; None if nothing tells it.
        rows: Their number in the index.
        reason: Why, as the end of a sentence.
    """

    entities: list[str]
    model: str | None
    rows: int
    reason: str

    def __str__(self) -> str:
        names = ", ".join(self.entities[:3]) + (", …" if len(self.entities) > 3 else "")
        made = f"the model {self.model}" if self.model else "an unknown model"
        counted = f"{number_of(self.rows, 'row')} of {names}"
        return f"left out of the ranking by meaning: {counted}, embedded by {made}: {self.reason}"


def left_out(counts: Mapping[tuple[str, Origin], int], why: Callable[[Origin], str]) -> list[LeftOut]:
    """What of an index was not compared, by model and reason; ``why`` gives '' for an origin that was."""
    found: dict[tuple[str | None, str], dict[str, int]] = {}
    for (entity, origin), rows in sorted(counts.items(), key=lambda item: item[0][0]):
        if reason := why(origin):
            entities = found.setdefault((origin.model, reason), {})
            entities[entity] = entities.get(entity, 0) + rows
    return [LeftOut(list(rows), model, sum(rows.values()), reason) for (model, reason), rows in found.items()]
