"""Queries as expressions of FTS5, SQLite's full-text search."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ..query import Query, Term

STOP_WORDS = frozenset(
    [
        "i",
        "me",
        "my",
        "myself",
        "we",
        "our",
        "ours",
        "ourselves",
        "you",
        "your",
        "yours",
        "yourself",
        "yourselves",
        "he",
        "him",
        "his",
        "himself",
        "she",
        "her",
        "hers",
        "herself",
        "it",
        "its",
        "itself",
        "they",
        "them",
        "their",
        "theirs",
        "themselves",
        "what",
        "which",
        "who",
        "whom",
        "this",
        "that",
        "these",
        "those",
        "am",
        "is",
        "are",
        "was",
        "were",
        "be",
        "been",
        "being",
        "have",
        "has",
        "had",
        "having",
        "do",
        "does",
        "did",
        "doing",
        "a",
        "an",
        "the",
        "and",
        "but",
        "if",
        "or",
        "because",
        "as",
        "until",
        "while",
        "of",
        "at",
        "by",
        "for",
        "with",
        "about",
        "against",
        "between",
        "into",
        "through",
        "during",
        "before",
        "after",
        "above",
        "below",
        "to",
        "from",
        "up",
        "down",
        "in",
        "out",
        "on",
        "off",
        "over",
        "under",
        "again",
        "further",
        "then",
        "once",
        "here",
        "there",
        "when",
        "where",
        "why",
        "how",
        "all",
        "any",
        "both",
        "each",
        "few",
        "more",
        "most",
        "other",
        "some",
        "such",
        "no",
        "nor",
        "not",
        "only",
        "own",
        "same",
        "so",
        "than",
        "too",
        "very",
        "s",
        "t",
        "can",
        "will",
        "just",
        "don",
        "should",
        "now",
    ]
)
"""PostgreSQL's English stop words. FTS5 has none: without this, "read a file" finds only texts with an "a"."""


def fts_string(term: Term) -> str:
    """A term as an FTS5 string: whatever is in it, the tokenizer and not the query parser reads it."""
    return '"' + term.text.replace('"', '""') + '"'


def any_of(terms: Sequence[Term]) -> str:
    """The FTS5 expression of texts that hold at least one of the terms."""
    return " OR ".join(map(fts_string, terms))


def excludable(terms: Sequence[Term], stop: Collection[str] = STOP_WORDS) -> list[Term]:
    """The terms without stop words: PostgreSQL, which does not store them, cannot exclude a text for one."""
    return [term for term in terms if term.phrase or term.text.casefold() not in stop]


def meaningful(terms: Sequence[Term], stop: Collection[str] = STOP_WORDS) -> list[Term]:
    """The terms without stop words; all of them if there is nothing else."""
    return excludable(terms, stop) or list(terms)


def all_of(query: Query, stop: Collection[str] = STOP_WORDS) -> str:
    """The FTS5 expression of all terms; a bare ``or`` binds less than the implicit AND, as in PostgreSQL."""
    groups: list[list[Term]] = [[]]
    for term in query.terms:
        if term.either:
            groups.append([])
        else:
            groups[-1].append(term)
    return " OR ".join(" ".join(map(fts_string, meaningful(group, stop))) for group in groups if group)
