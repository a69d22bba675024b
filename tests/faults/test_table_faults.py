"""A run that fills a table of vectors is killed, stopped or fails at any point; the same run then does the rest."""

from __future__ import annotations

import json
from typing import Any

import poison_worker
import pytest
from articles import Articles
from commands import Command, Commands
from oracle import check_nothing_left
from servers import eventually, execute
from test_column_faults import DEFECT, FULL, KILLED, LOCKED

from kdb_fast.cli.demo import sqlalchemy_url
from kdb_fast.db.address import DatabaseAddress

FAULTS = (
    "store.before_commit:1:kill", "store.after_copy:2:hang", "store.after_commit:1:kill", "pipeline.finish:1:kill",
)  # fmt: skip
"""In the writer, and before the foreign key is there."""

ROWS = 60


def start(commands: Commands, articles: Articles, **environment: str) -> Command:
    return commands.start("articles", sqlalchemy_url(articles.address), "2", "article_vectors", **environment)


def finished(commands: Commands, articles: Articles) -> dict[str, Any]:
    command = start(commands, articles)
    assert command.wait() == 0, command.out + command.err
    return command.receipt


def check(articles: Articles) -> None:
    """Each article that has a text has its vector, and nothing else is there."""
    texts = {number: text for number, (text, _) in articles.rows().items() if text is not None}
    found = articles.vectors_beside("article_vectors")
    assert sorted(found) == sorted(texts)
    for number, text in texts.items():
        assert (abs(found[number] - poison_worker.vector_of(text)) < 1e-6).all(), number


@pytest.mark.timeout(240)
def test_fault_in_a_first_load(index: DatabaseAddress, commands: Commands) -> None:
    """As yet without its foreign key; ``test_target_faults.py`` has all points in a later run."""
    articles = Articles(index)
    for fault in FAULTS if FULL else FAULTS[index.dialect == "sqlite" :: 2]:
        execute(index, f"DELETE FROM {articles.name}")
        execute(index, "DROP TABLE IF EXISTS article_vectors")
        articles.add(*(f"article {number}" for number in range(ROWS)), None)
        command = start(commands, articles, KDB_FAST_FAULT=fault)
        assert command.wait() in (0, KILLED, DEFECT), f"{fault}: {command.out}{command.err}"
        assert commands.fired(), fault
        if command.wait() != 0:
            eventually(lambda: not commands.processes())
            finished(commands, articles)
        check(articles)
    assert finished(commands, articles)["unchanged"] == ROWS
    eventually(lambda: not commands.processes())
    check_nothing_left(index)


PIECE_FAULTS = (
    "store.before_commit:2:kill", "pipeline.flushed:3:kill", "store.after_copy:2:kill", "worker.encoded:3:kill",
)  # fmt: skip
"""After some pieces of a record were put aside, before they are visible, and when they just are."""


@pytest.mark.timeout(240)
def test_a_record_in_pieces_is_whole_whenever_a_run_is_killed(index: DatabaseAddress, commands: Commands) -> None:
    articles = Articles(index)
    texts = {number: f"article {number} " * 12 for number in range(12)}
    articles.add(*texts.values())
    old: dict[int, str] = {}
    for fault in PIECE_FAULTS if FULL else PIECE_FAULTS[index.dialect == "sqlite" :: 2]:
        command = start_pieces(commands, articles, KDB_FAST_FAULT=fault)
        assert command.wait() in (0, KILLED), f"{fault}: {command.out}{command.err}"
        assert commands.fired(), fault
        eventually(lambda: not commands.processes())
        for number, text in pieces_of(articles).items():
            assert text in (texts[number], old.get(number)), fault
        again = start_pieces(commands, articles)
        assert again.wait() == 0, again.out + again.err
        assert pieces_of(articles) == texts
        assert execute(index, "SELECT count(*) FROM kdb_fast_articles_pieces") == [(0,)]
        old = dict(texts)
        texts = {number: f"{text[:60]} again " * 3 for number, text in texts.items()}
        for number, text in texts.items():
            articles.set(number, text)
    eventually(lambda: not commands.processes())
    check_nothing_left(index)


def start_pieces(commands: Commands, articles: Articles, **environment: str) -> Command:
    url = sqlalchemy_url(articles.address)
    return commands.start("articles", url, "2", "article_vectors", "pieces", **environment)


def pieces_of(articles: Articles) -> dict[int, str]:
    """The text of each record, from its pieces, whose vectors are those of their texts."""
    found: dict[int, str] = {}
    vectors = articles.vectors_beside("article_vectors", "CAST(id AS text) || '/' || chunk")
    columns = "id, chunk, kdb_fast_chunks, content"
    rows = execute(articles.address, f"SELECT {columns} FROM article_vectors ORDER BY id, chunk")
    for number, chunk, count, content in rows:
        assert chunk < count
        assert sum(row[0] == number for row in rows) == count
        assert (abs(vectors[f"{number}/{chunk}"] - poison_worker.vector_of(content)) < 1e-6).all()
        found[number] = found.get(number, "") + content
    return found


@pytest.mark.timeout(240)
def test_two_runs_at_once(index: DatabaseAddress, commands: Commands) -> None:
    articles = Articles(index)
    articles.add(*(f"article {number}" for number in range(ROWS)))
    first = start(commands, articles, **{poison_worker.EACH_SECONDS: "0.01"})
    eventually(lambda: commands.processes() and _running(index))
    second = start(commands, articles)
    assert second.wait() == LOCKED
    assert "holds the index" in second.out
    assert first.wait() == 0, first.out + first.err
    assert json.loads(first.out)["stored"] == ROWS
    check(articles)


def _running(address: DatabaseAddress) -> bool:
    names = "SELECT name FROM sqlite_master" if address.dialect == "sqlite" else "SELECT relname FROM pg_class"
    there = ("kdb_fast_runs",) in execute(address, names)
    return there and bool(execute(address, "SELECT run FROM kdb_fast_runs"))
