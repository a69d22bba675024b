"""A run that updates a column of a table: its indexes, whatever is killed, and another run at once."""

from __future__ import annotations

import json
import os
from typing import Any

import poison_worker
import pytest
from articles import Articles
from commands import Command, Commands
from servers import eventually, execute

from kdb_fast.cli.demo import sqlalchemy_url
from kdb_fast.db.address import DatabaseAddress
from kdb_fast.tables.index_policy import DEFER_FLOOR

FULL = os.environ.get("KDB_FAST_FAULT_LOOP") == "full"

KILLED, LOCKED, DEFECT = -9, 6, 70
"""Exit codes."""

ROWS = 110
"""So that most flushes have more than one part."""


def start(commands: Commands, articles: Articles, *options: str, **environment: str) -> Command:
    return commands.start("articles", sqlalchemy_url(articles.address), "2", *options, **environment)


def finished(commands: Commands, articles: Articles, *options: str) -> dict[str, Any]:
    command = start(commands, articles, *options)
    assert command.wait() == 0, command.out + command.err
    return command.receipt


@pytest.mark.timeout(240)
def test_indexes_that_a_killed_run_has_dropped_are_built_by_the_next(
    database: DatabaseAddress, commands: Commands
) -> None:
    articles = Articles(database)
    articles.add(*(f"article {number}" for number in range(DEFER_FLOOR)))
    finished(commands, articles)
    execute(
        database,
        "CREATE INDEX near ON shop.articles USING hnsw ((embedding::vector(384)) vector_cosine_ops) WITH (m = 7); "
        "CREATE INDEX lists ON shop.articles USING ivfflat ((embedding::vector(384)) vector_l2_ops) WITH (lists = 2); "
        "COMMENT ON INDEX shop.near IS 'tuned'",
    )
    indexes = (
        "SELECT pg_get_indexdef(indexrelid), indisvalid, obj_description(indexrelid, 'pg_class') FROM pg_index "
        "WHERE indrelid = 'shop.articles'::regclass ORDER BY 1"
    )
    before = execute(database, indexes)
    execute(database, "UPDATE shop.articles SET body = body || '!'")
    command = start(commands, articles, "--index", "defer", KDB_FAST_FAULT="pipeline.finish:1:kill")
    assert command.wait() == KILLED, command.out + command.err
    eventually(lambda: not commands.processes())
    assert len(execute(database, indexes)) == 1
    assert finished(commands, articles)["stored"] == 0
    assert execute(database, indexes) == before
    articles.check(poison_worker.vector_of)
    assert execute(database, "SELECT key FROM kdb_fast_state WHERE key LIKE 'dropped%'") == []
    eventually(lambda: not commands.processes())


@pytest.mark.timeout(240)
def test_two_runs_at_once(index: DatabaseAddress, commands: Commands) -> None:
    articles = Articles(index)
    articles.add(*(f"article {number}" for number in range(ROWS)))
    slowly = {poison_worker.EACH_SECONDS: "0.01"}
    first = start(commands, articles, **slowly)
    eventually(lambda: "kdb_fast_runs" in _tables(index) and execute(index, "SELECT run FROM kdb_fast_runs"))
    second = start(commands, articles)
    assert second.wait() == LOCKED
    assert "holds the index" in second.out
    assert first.wait() == 0, first.out + first.err
    assert json.loads(first.out)["stored"] == ROWS
    articles.check(poison_worker.vector_of)


def _tables(address: DatabaseAddress) -> list[str]:
    names = "SELECT name FROM sqlite_master" if address.dialect == "sqlite" else "SELECT relname FROM pg_class"
    return [name for (name,) in execute(address, names)]
