"""A query that a person typed: its words and phrases, what it excludes, and whether it says anything. Pure."""

from __future__ import annotations

import math
import re
import unicodedata
from typing import NamedTuple

from ..errors import UsageError

MODES = ("hybrid", "vector", "keyword")

RRF_K = 60
"""The constant of reciprocal rank fusion; KameleonDB's, and that of the paper that introduced it."""

BEST = {"hybrid": 2 / (RRF_K + 1), "vector": 1 / (RRF_K + 1), "keyword": 1 / (RRF_K + 1)}
"""The highest score of each mode: that of a record which is first in every ranking."""

MAX_QUERY_CHARS = 2000
"""A longer query is cut: encoders read about this much, and a keyword query of more words finds nothing."""

MAX_TERMS = 64
"""Most words of one keyword query; SQLite limits the depth of an FTS5 expression to 256."""

WORD = re.compile(r"[^\W_]+")
"""A run of letters and digits of any script."""

EDGES = re.compile(r"^[\W_]+|[\W_]+$")
"""What stands around a word: brackets, commas, a question mark."""

IDENTIFYING = re.compile(r"\d.*[^\W_]|[^\W_].*\d|[^\W_][_.:@#]+[^\W_]|/.*/")
"""What makes a word an identifier: a digit beside another one or a letter, or one of these marks inside (``ERR_CONN``,
``nginx.conf``). ``1``, ``third-party`` and ``and/or`` are words like others."""

NUMBERED_WORD = re.compile(r"[^\W\d_]{3,}\d{1,3}")
"""A word with a short number behind it, such as ``Base64``, ``sha256`` and ``utf8``: texts of many kinds hold it."""

UNSTORABLE = re.compile("[\x00\ud800-\udfff]")
"""PostgreSQL and SQLite refuse NUL and lone surrogates."""

# websearch_to_tsquery() reads a dash between spaces as NOT the next word, and "--force" as NOT NOT force.
_DASHES = re.compile(r"(?<!\S)(?:-{2,}|-(?!\S))")
_TERM = re.compile(r'(-?)(?:"([^"]*)"|([^\s"]+))')
_SIGNED = re.compile(r"[^\w\s]?\d")  # -20, -.5, -$5: the dash is a sign


class Term(NamedTuple):
    """A word of a keyword query, or a phrase that was in quotes."""

    text: str
    phrase: bool

    @property
    def identifier(self) -> bool:
        """Whether it names one thing, so that a text without exactly this is no answer."""
        return self.phrase or IDENTIFYING.search(EDGES.sub("", self.text)) is not None

    @property
    def telling(self) -> bool:
        """Whether it is an identifier that a text about something else hardly holds: no bare number, ``sys.path`` or
        ``Base64``."""
        core = EDGES.sub("", self.text)
        if NUMBERED_WORD.fullmatch(core) and not self.phrase:
            return False
        size = sum(map(str.isalnum, core))
        digit, letter = re.search(r"\d", core), re.search(r"[^\W\d_]", core)
        mark = re.search(r"[_.:@#/-]", core) or self.text.startswith("#")
        known = (digit and mark) or (size >= 4 and ((digit and letter) or re.search(r"[_@]|/.*/", core)))
        return self.phrase or bool(known)

    @property
    def either(self) -> bool:
        """Whether it is a bare ``or``."""
        return not self.phrase and self.text.casefold() == "or"


class Query(NamedTuple):
    """A query, cleaned.

    Attributes:
        text: What is looked for; what is excluded is no part of it.
        terms: The words and phrases to find, a bare ``or`` among them.
        excluded: Those that no result may hold.
    """

    text: str
    terms: tuple[Term, ...]
    excluded: tuple[Term, ...]

    @property
    def identifiers(self) -> tuple[Term, ...]:
        """The terms that are identifiers."""
        return tuple(term for term in self.terms if term.identifier)

    def websearch(self) -> str:
        """The terms for ``websearch_to_tsquery()``, with identifiers in quotes.

        Without them it would take a sign for an exclusion, and a colon for a space: ``item:42`` would be found where
        both parts are, however far from each other.
        """
        if not self.excluded and not self.identifiers:
            return self.text
        return " ".join(f'"{term.text}"' if term.identifier else term.text for term in self.terms)

    def alternatives(self) -> tuple[Term, ...]:
        """The terms for a query that any one of them satisfies; compounds such as ``comma-separated`` also split."""
        found: dict[Term, None] = {}
        for term in self.terms:
            if term.either:
                continue
            found[term] = None
            words = WORD.findall(term.text)
            if not term.phrase and len(words) > 1:
                found.update((Term(word, False), None) for word in words)
        return tuple(found)[:MAX_TERMS]


def parse_query(query: str) -> Query:
    """Read a query a person typed. Any string is allowed; what has no letter or digit is no term."""
    text = _DASHES.sub(" ", UNSTORABLE.sub(" ", query[:MAX_QUERY_CHARS])).strip()
    terms: list[Term] = []
    excluded: list[Term] = []
    kept: list[str] = []
    done = 0
    for match in _TERM.finditer(text):
        dash, phrase, word = match.groups()
        # A dash inside a word (comma-separated) is part of it; only one after a space excludes.
        dash = dash if match.start() == 0 or text[match.start() - 1].isspace() else ""
        if dash and word and _SIGNED.match(word):
            dash, word = "", dash + word
        term = Term(word if phrase is None else phrase, phrase is not None)
        if WORD.search(term.text):
            (excluded if dash else terms).append(term)
        if dash:
            kept.append(text[done : match.start()])
            done = match.end()
    kept.append(text[done:])
    return Query("".join(kept).strip(), tuple(terms[:MAX_TERMS]), tuple(excluded[:MAX_TERMS]))


def meaning(query: str) -> str:
    """What of a query is embedded: all but what it excludes; '' if it says nothing."""
    words = parse_query(query)
    return "" if why_blank(words, "vector") else words.text


def why_blank(query: Query, mode: str) -> str:
    """Why nothing can be found by this query, in a sentence; '' if something can.

    A vector can be looked for by signs such as an emoji as well, a keyword only by letters and digits.
    """
    signs = mode != "keyword" and any(not c.isascii() and unicodedata.category(c)[0] in "MS" for c in query.text)
    if query.terms or signs:
        return ""
    if query.excluded:
        return "The query only excludes words; nothing in it says what to look for."
    return "The query is blank: it holds no word or number to look for."


def check_query(query: str, mode: str, min_score: float) -> None:
    """Raises UsageError for a query that says nothing, and for a least score that every result has or none can have."""
    if blank := why_blank(parse_query(query), mode):
        raise UsageError(blank, remedy='Give words to look for: kdb-fast search "angry customer"')
    if not 0 <= min_score <= BEST[mode]:
        best = math.floor(BEST[mode] * 1e5) / 1e5
        raise UsageError(
            f"--min-score is {min_score:g}; expected 0 to {best:.5f}, the score of a record that is first in "
            f"{'both rankings (2/61)' if mode == 'hybrid' else 'the ranking (1/61)'}.",
            remedy="A record at place n of a ranking gets 1/(60 + n) from it.",
        )


def holdable_words(words: Query, missing: frozenset[str]) -> Query:
    """The words as they can be looked for in a database that cannot hold some characters.

    A term with such a letter is in no text, so it is left out. Signs are no part of a term: they count as spaces.
    """
    if not missing:
        return words
    blank = {ord(character): " " for character in missing}
    letters = {character for character in missing if WORD.match(character)}

    def held(terms: tuple[Term, ...]) -> tuple[Term, ...]:
        return tuple(t._replace(text=t.text.translate(blank)) for t in terms if letters.isdisjoint(t.text))

    terms = held(words.terms)
    text = words.text.translate(blank)
    if len(terms) < len(words.terms):
        text = " ".join(f'"{term.text}"' if term.phrase else term.text for term in terms)
    return Query(text, terms, held(words.excluded))
