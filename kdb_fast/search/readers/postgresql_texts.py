"""PostgreSQL: what is looked for in texts, as tsquery, and how the texts that match are ranked."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...tables.target import Params
from ..query import Query, Term

RANKED_TEXTS = """
ranked_{number} AS MATERIALIZED (
  SELECT m.entity_name, m.record_id, {rank} AS rank FROM (
    SELECT s.entity_name, s.record_id, s.tsv FROM {index} s
    WHERE {few} AND s.tsv @@ {text} AND {named} AND {without} LIMIT {most}
  ) m
),
best_{number} AS MATERIALIZED (
  SELECT s.* FROM (
    SELECT * FROM ranked_{number} ORDER BY rank DESC, entity_name, record_id OFFSET 0
  ) s WHERE {living} ORDER BY rank DESC, entity_name, record_id LIMIT {limit}
)"""
FEW = "(SELECT count(*) FROM best_{before}) < {limit}"
BEST_TEXTS = """
SELECT {number}, entity_name, record_id, rank FROM best_{number}
UNION ALL SELECT {number}, NULL, NULL, count(*) FROM ranked_{number}"""

TextQuery = Callable[[Params], str]
"""A tsquery as SQL, whose values it puts into the parameters."""


def first_of(query: Query) -> list[TextQuery]:
    """What a ranking by keyword begins with, each for where those before it find too little."""
    # What is asked after identifiers depends on their answer.
    return [every(query)] if query.identifiers or len(query.alternatives()) < 2 else [every(query), any_of(query)]


def every(query: Query) -> TextQuery:
    """All terms; ``or`` between terms means either side."""
    return lambda params: f"websearch_to_tsquery('english', {params(query.websearch())})"


def required_of(required: Sequence[Term], query: Query) -> TextQuery:
    """All that are required, ranked by all terms."""
    return lambda params: (
        f"({' && '.join(tsquery(term, params) for term in required)} && "
        f"({' || '.join(tsquery(term, params) for term in query.terms)}))"
    )


def any_of(query: Query) -> TextQuery:
    """Any of the query's alternatives."""
    # Ranked so that a word's repetitions count less and less: texts with more of the words come first.
    terms = query.alternatives()
    return lambda params: f"({' || '.join(tsquery(term, params, term.phrase) for term in terms)})"


def rank_of(tsv: str, tsquery: str) -> str:
    """The rank of a text that matches, as SQL: higher where the words of the query are near each other.

    ``ts_rank``, not ``ts_rank_cd``: 1.4 instead of 8.6 µs for a text that holds ten words, and the record that is meant
    is found as often (``bench relevance``). A tenth of the default weights: with these, texts in which the words stand
    16 times all have the same rank, the highest that there is.
    """
    return f"ts_rank('{{0.01,0.02,0.04,0.1}}'::real[], {tsv}, {tsquery})"


def tsquery(term: Term, params: Params, together: bool = True, configuration: str = "'english'") -> str:
    """A term as a tsquery; its words one behind the other, or (``together`` False) anywhere in the text."""
    return f"{'phraseto' if together else 'plainto'}_tsquery({configuration}, {params(term.text)})"
