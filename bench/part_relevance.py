"""Does the record that is meant come first?"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import random
import re
import sqlite3
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kdb_fast.cli.demo import read_documentation
from kdb_fast.db.reading import open_connection
from kdb_fast.embedding.encoder import Encoder, EncoderSpec
from kdb_fast.embedding.models.lookup import resolve
from kdb_fast.search.query import Query, meaning
from kdb_fast.search.readers import open_reader
from kdb_fast.search.readers.base import SearchReader
from kdb_fast.search.readers.ranking import Hit
from kdb_fast.search.retrieval import search
from kdb_fast.search.scope import Scope
from kdb_fast.settings import DEFAULT_MODEL
from kdb_fast.tables import kdb_search
from kdb_fast.tables.target import Target

from . import database
from .chart import Bar
from .measure import spread
from .options import Options, say
from .results import Requirement, Result, Table
from .session import session

LOG_RECORDS, LOG_QUERIES = 800, 40
"""Records of each kind of identifier, which differ in little more than the identifier, and those that are asked for."""

QUESTIONS = 300
DOCUMENTS = 2000
LIMIT = 10
BATCH = 32

TITLE_WORDS = (4, 14)
"""A title of fewer words fits many records; one of more is hardly typed by anybody."""

PEOPLE = ("Anna", "Ben", "Cleo", "Dan", "Eve")
DEVICES = ("boiler", "chiller", "dryer", "feeder", "grinder", "heater", "mixer")
VERBS = ("checks", "opens", "cleans", "replaces")
COLOURS = ("red", "blue", "green", "black", "white", "grey", "yellow", "brown", "pink", "orange")
METALS = ("iron", "steel", "brass", "copper", "zinc", "tin", "lead", "nickel", "silver", "gold")
PARTS = ("valve", "pipe", "hose", "gasket", "bolt", "flange", "spring", "lever")

IDENTIFIERS: dict[str, Callable[[int], str]] = {
    "error code": lambda n: f"ERR_CONN_{1000 + n}",
    "hyphenated code": lambda n: f"CVE-2024-{1000 + n}",
    "SKU": lambda n: f"AB{n % 7}-{1000 + n}-X",
    "e-mail address": lambda n: f"{PEOPLE[n % 5].lower()}.{1000 + n}@example.org",
    "path": lambda n: f"/srv/pumps/{1000 + n}/start.log",
    "dotted name": lambda n: f"plant.unit{1000 + n}.restart",
    "version": lambda n: f"3.{n // 40}.{n % 40}",
    "UUID": lambda n: str(uuid.uuid5(uuid.NAMESPACE_URL, str(n))),
    "phone number": lambda n: f"+49 30 555-{1000 + n}",
    "quoted phrase": lambda n: f'"{COLOURS[n % 10]} {METALS[n // 10 % 10]} {PARTS[n // 100]}"',
}
"""Kind → the n-th identifier, as it is asked for; a record holds it without quotes."""


class Case(NamedTuple):
    """A query, the entity that is searched and the record that is meant."""

    query: str
    entity: str
    record: str


class Collection(NamedTuple):
    """Records (entity, id, text), and questions by the name of their set."""

    records: list[tuple[str, str, str]]
    cases: dict[str, list[Case]]


def run(options: Options) -> Result:
    """Measure the part."""
    with session(options) as s:
        collection = _collect(options)
        say(f"  embedding {len(collection.records):,} records and their queries …")
        encoder = Encoder(EncoderSpec(resolve(DEFAULT_MODEL), batch_size=BATCH))
        stored = _embedded(encoder, [text for _, _, text in collection.records])
        addresses = {"PostgreSQL": s.conninfo, "SQLite": f"sqlite:///{s.work / 'relevance.db'}"}
        _fill_postgresql(s.conninfo, collection, stored)
        _fill_sqlite(s.work / "relevance.db", collection, stored)
        found: dict[tuple[str, str, str, str], dict[str, float]] = {}
        for name, cases in collection.cases.items():
            asked = _embedded(encoder, [meaning(case.query) for case in cases])
            for base, conninfo in addresses.items():
                for mode, (rule, reader_of) in itertools.product(("hybrid", "keyword"), RULES.items()):
                    with _reader(conninfo, reader_of) as reader:
                        found[name, base, mode, rule] = _scores(reader, cases, asked, mode)
            say(f"  {name}: {len(cases)} queries")
        count, lines = len(collection.records), s.lines
    sets = {
        "identifiers alone": [name for name in collection.cases if name.endswith(", alone")],
        "identifiers in words": [name for name in collection.cases if name.endswith(", in words")],
        **{name: [name] for name in collection.cases if name.startswith("question")},
    }
    mean: dict[tuple[str, str, str, str], dict[str, float]] = {
        (label, base, mode, rule): {
            key: float(np.mean([found[name, base, mode, rule][key] for name in names]))
            for key in ("mrr", "recall", "first")
        }
        for label, names in sets.items()
        for base, mode, rule in itertools.product(addresses, ("hybrid", "keyword"), RULES)
    }
    requirements = []
    for base in addresses:
        for label in sets:
            after, before = mean[label, base, "hybrid", "now"], mean[label, base, "hybrid", "before"]
            if label.startswith("identifiers"):
                text = f"{base}, {label}: share that is first, hybrid"
                requirements.append(Requirement(text, spread([after["first"]]), 0.99))
            else:
                for key in ("mrr", "recall"):
                    text = f"{base}, {label}: change of {NAMES[key]}, hybrid"
                    requirements.append(Requirement(text, spread([after[key] - before[key]]), 0.0))
    return Result(
        "relevance",
        f"Is the one record that is meant among the first {LIMIT} of {count:,}, and at which place?",
        lines,
        [
            f"Known-item search. For each kind of identifier {options.size(LOG_RECORDS, 80)} records that differ in "
            "speaker, device, verb and identifier; some are asked for, by the identifier alone and within words. "
            "Questions: the documentation of Python's standard library, indexed without its titles and asked for by "
            "them (the first sentence of a record), and indexed whole and asked for by name, taken apart into words.",
            "MRR is the mean of 1 ÷ place of the record (0 beyond the tenth), recall the share found among ten. "
            "`before` is the rule without identifiers: a keyword ranking of texts with all words, filled up with those "
            "that have any. Both were computed in this run, on the same index; no time is measured.",
        ],
        [
            Table(
                f"{mode.capitalize()} search: before → now",
                ("queries", "database", "first place", f"MRR@{LIMIT}", f"recall@{LIMIT}"),
                [
                    [label, base, *(_change(mean, label, base, mode, key) for key in ("first", "mrr", "recall"))]
                    for label in sets
                    for base in addresses
                ],
            )
            for mode in ("hybrid", "keyword")
        ]
        + [
            Table(
                "Hybrid search by kind of identifier: share at the first place, before → now",
                ("kind", *(f"{base}, {form}" for base in addresses for form in ("alone", "in words"))),
                [
                    [
                        kind,
                        *(
                            _change(found, f"{kind}, {form}", base, "hybrid", "first")
                            for base in addresses
                            for form in ("alone", "in words")
                        ),
                    ]
                    for kind in IDENTIFIERS
                ],
            )
        ],
        requirements=requirements,
        chart=(
            "Identifiers alone: share at the first place (hybrid)",
            "",
            [
                Bar(
                    f"{base}, {rule}", spread([mean["identifiers alone", base, "hybrid", rule]["first"]]), rule == "now"
                )
                for base in addresses
                for rule in RULES
            ],
        ),
        raw={" | ".join(key): value for key, value in found.items()},
    )


NAMES = {"first": "first place", "mrr": f"MRR@{LIMIT}", "recall": f"recall@{LIMIT}"}


def _change(values: dict[Any, dict[str, float]], label: str, base: str, mode: str, key: str) -> str:
    before, now = (values[label, base, mode, rule][key] for rule in RULES)
    return f"{before:.3f} → {now:.3f}"


# -- what is asked -----------------------------------------------------------------------------------------


def _collect(options: Options) -> Collection:
    chosen = random.Random(options.seed)
    records: list[tuple[str, str, str]] = []
    cases: dict[str, list[Case]] = {}
    size, asked = options.size(LOG_RECORDS, 80), options.size(LOG_QUERIES, 4)
    for kind, identifier in IDENTIFIERS.items():
        records += [(kind, str(n), _log(n, identifier(n).replace('"', ""))) for n in range(size)]
        numbers = sorted(chosen.sample(range(size), asked))
        cases[f"{kind}, alone"] = [Case(identifier(n), kind, str(n)) for n in numbers]
        cases[f"{kind}, in words"] = [
            Case(f"why does {identifier(n)} restart every hour", kind, str(n)) for n in numbers
        ]
    documents = read_documentation()
    chosen.shuffle(documents)
    documents = documents[: options.size(DOCUMENTS, 100)]
    titles, names = [], []
    seen: set[str] = set()
    for number, document in enumerate(documents):
        name, title, text = document["name"], " ".join(document["summary"].split()), document["text"].strip()
        records.append(("whole", str(number), f"name: {name} | summary: {title} | text: {text}"))
        words = " ".join(re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)).lower()
        names.append(Case(words, "whole", str(number)))
        if len(text) < 80:
            continue
        records.append(("untitled", str(number), f"name: {name} | text: {text}"))
        sentence = re.split(r"(?<=[.?!]) ", title)[0]
        if TITLE_WORDS[0] <= len(sentence.split()) <= TITLE_WORDS[1] and sentence not in seen:
            seen.add(sentence)
            titles.append(Case(sentence, "untitled", str(number)))
    cases["questions by title"] = titles[: options.size(QUESTIONS, 8)]
    cases["questions by name"] = names[: options.size(QUESTIONS, 8)]
    return Collection(records, cases)


def _log(number: int, identifier: str) -> str:
    who, device, verb = PEOPLE[number % 5], DEVICES[number % 7], VERBS[number % 4]
    return f"{who} {verb} the {device} and says the pump restarts every hour with code {identifier}"


# -- the index ---------------------------------------------------------------------------------------------


def _embedded(encoder: Encoder, texts: Sequence[str]) -> npt.NDArray[np.float32]:
    return np.concatenate([encoder.embed(texts[start : start + 512]) for start in range(0, len(texts), 512)])


def _rows(collection: Collection, vectors: npt.NDArray[np.float32]) -> Iterator[tuple[Any, ...]]:
    for number, ((entity, record, text), vector) in enumerate(zip(collection.records, vectors, strict=True)):
        yield str(number), entity, record, text, json.dumps(vector.tolist())


def _fill_postgresql(conninfo: str, collection: Collection, vectors: npt.NDArray[np.float32]) -> None:
    with contextlib.closing(database.connect(conninfo)) as connection:
        database.create_table(connection, search_indexes=False)
        columns = "kdb_search (id, entity_name, record_id, content, embedding)"
        with connection.cursor() as cursor, cursor.copy(f"COPY {columns} FROM STDIN".encode()) as copy:
            for row in _rows(collection, vectors):
                copy.write_row(row)
        database.create_search_indexes(connection)
        connection.execute("ANALYZE kdb_search")


def _fill_sqlite(path: Path, collection: Collection, vectors: npt.NDArray[np.float32]) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(Target().text(kdb_search.SQLITE_SEARCH))
        connection.execute(Target().text(kdb_search.SQLITE_FTS))
        columns = "id, entity_name, record_id, content"
        for row in _rows(collection, vectors):
            connection.execute(f"INSERT INTO kdb_search ({columns}, embedding) VALUES (?, ?, ?, ?, ?)", row)
            connection.execute(f"INSERT INTO kdb_search_fts ({columns}) VALUES (?, ?, ?, ?)", row[:4])


# -- the two rules -----------------------------------------------------------------------------------------


class _AsWritten(Query):
    """A query whose identifiers PostgreSQL reads like any other words."""

    def websearch(self) -> str:
        return self.text


def _by_all_then_any(reader: SearchReader, query: Query, scope: Scope, limit: int) -> list[Hit]:
    """The keyword ranking as it was before identifiers had a rule."""
    query = _AsWritten(*query)
    every = reader._with_all(query, scope, limit)
    if len(every) >= limit or len(query.alternatives()) < 2:
        return every
    seen = {hit.key for hit in every}
    return (every + [hit for hit in reader._with_any(query, scope, limit) if hit.key not in seen])[:limit]


def _before(reader: SearchReader) -> SearchReader:
    reader.keyword = functools.partial(_by_all_then_any, reader)  # type: ignore[method-assign]
    return reader


RULES: dict[str, Callable[[SearchReader], SearchReader]] = {"before": _before, "now": lambda reader: reader}


@contextlib.contextmanager
def _reader(conninfo: str, rule: Callable[[SearchReader], SearchReader]) -> Iterator[SearchReader]:
    address = database.address_of(conninfo)
    with contextlib.closing(open_connection(address)) as connection:
        yield rule(open_reader(connection, address.dialect))


def _scores(
    reader: SearchReader, cases: Sequence[Case], vectors: npt.NDArray[np.float32], mode: Any
) -> dict[str, float]:
    places = []
    for case, vector in zip(cases, vectors, strict=True):
        found = search(reader, case.query, query_vector=vector, mode=mode, entities=[case.entity], limit=LIMIT)
        ids = [result.id for result in found]
        places.append(ids.index(case.record) + 1 if case.record in ids else 0)
    return {
        "mrr": float(np.mean([1 / place if place else 0.0 for place in places])),
        "recall": float(np.mean([place > 0 for place in places])),
        "first": float(np.mean([place == 1 for place in places])),
        "queries": len(places),
    }
