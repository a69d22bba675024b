"""Rankings: what they consist of, and the order in which texts are found by keyword, whatever is searched."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Generic, NamedTuple, TypeVar

from ...records import Key
from ..query import Query, Term

S = TypeVar("S")
"""What says which rows may be found."""


class Hit(NamedTuple):
    """One place in a ranking. ``similarity`` orders it (higher is better); its scale depends on the ranking.

    ``exact`` marks a record that holds the identifiers of the query, see :meth:`KeywordRanking.keyword`.
    """

    key: Key
    similarity: float
    exact: bool = False


class KeywordRanking(ABC, Generic[S]):
    """Finds rows by keyword."""

    def keyword(self, query: Query, scope: S, limit: int) -> list[Hit]:
        """Up to ``limit`` rows by keyword, best first: those with all terms, then those with any.

        Where the query holds identifiers and rows have all its terms, or else all identifiers that tell much, only
        these are there, marked as exact: a text about another error code is no answer.
        """
        if query.identifiers:
            exact = self._with_all(query, scope, limit) or self._with_identifiers(query, scope, limit)
            if exact:
                return [hit._replace(exact=True) for hit in exact]
            return self._with_any(query, scope, limit)[:limit] if len(query.alternatives()) > 1 else []
        hits, others = self._all_then_any(query, scope, limit)
        seen = {hit.key for hit in hits}
        return (hits + [hit for hit in others if hit.key not in seen])[:limit]

    def _all_then_any(self, query: Query, scope: S, limit: int) -> tuple[list[Hit], list[Hit]]:
        """:meth:`_with_all`, and where these are fewer than ``limit``, :meth:`_with_any`."""
        hits = self._with_all(query, scope, limit)
        more = len(hits) < limit and len(query.alternatives()) > 1
        return hits, self._with_any(query, scope, limit) if more else []

    def _with_identifiers(self, query: Query, scope: S, limit: int) -> list[Hit]:
        required = tuple(term for term in query.terms if term.telling)
        if not required or any(term.either for term in query.terms):
            return []
        return self._with_required(required, query, scope, limit)

    @abstractmethod
    def _with_all(self, query: Query, scope: S, limit: int) -> list[Hit]:
        """Rows that hold all terms of the query; ``or`` between terms means either side."""

    @abstractmethod
    def _with_required(self, required: Sequence[Term], query: Query, scope: S, limit: int) -> list[Hit]:
        """Rows that hold all of ``required``, those first that hold more of the query's other terms."""

    @abstractmethod
    def _with_any(self, query: Query, scope: S, limit: int) -> list[Hit]:
        """Rows that hold any of the query's alternatives."""


def in_order(hits: Iterable[Hit]) -> list[Hit]:
    """The hits by similarity, then key, without those that have none (NaN: the vector is all zeros)."""
    return sorted((h for h in hits if not math.isnan(h.similarity)), key=lambda h: (-h.similarity, h.key))
