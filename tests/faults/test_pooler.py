"""Every kind of target through PgBouncer, in both of its modes; another client of it has changed its sessions' settings."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import psycopg
import pytest
from commands import Commands, MakeJob
from pooler import pooler
from servers import connect_as, execute
from table_commands import DESCRIBED, INTO, Table

from kdb_fast.db.address import DatabaseAddress

LEFT_BEHIND = "SET DateStyle = 'SQL, DMY'; SET bytea_output = escape; SET extra_float_digits = -15; SET TimeZone = 'Asia/Kathmandu'"


@pytest.fixture(params=["transaction", "session"])
def pooled(request: pytest.FixtureRequest, database: DatabaseAddress) -> Iterator[DatabaseAddress]:
    with pooler(database, request.param) as address:
        with contextlib.ExitStack() as clients:
            for _ in range(3):
                client = clients.enter_context(psycopg.connect(address.conninfo))
                client.execute(LEFT_BEHIND)
                client.commit()
        yield address


@pytest.fixture
def table(commands: Commands, pooled: DatabaseAddress) -> Iterator[Table]:
    found = Table(commands, pooled)
    found.add(1, *(f"text {number}" for number in range(30)))
    yield found
    commands.clear()


QUERY = ("--query", "SELECT id, body FROM articles", "--key", "id", "--into", "vectors")
INDEXED = "CREATE INDEX near ON {} USING hnsw (embedding vector_cosine_ops)"


@pytest.mark.parametrize(
    ("described", "name"),
    [
        ((*DESCRIBED, "--keyword", "--vacuum"), "articles"),
        ((*INTO, "--keyword", "--with-source"), "vectors"),
        ((*INTO, "--chunk", "40"), "vectors"),
        (QUERY, "vectors"),
    ],
    ids=["column", "table", "pieces", "query"],
)
def test_table_through_a_pooler(table: Table, described: tuple[str, ...], name: str) -> None:
    assert table.json("reindex", *described)["stored"] == 30
    execute(table.address, INDEXED.format(name))
    assert table.json("reindex", name)["unchanged"] == 30
    execute(table.address, "UPDATE articles SET body = body || ' and more' WHERE id < 20")
    execute(table.address, "DELETE FROM articles WHERE id > 28")
    for index in ("defer", "concurrently"):
        counts = table.json("reindex", name, "--index", index)
        print({k:v for k,v in counts.items() if v and k in ("stored","unchanged","removed","warnings","index","superseded","reused")})
        execute(table.address, "UPDATE articles SET body = body || ' and more' WHERE id < 20")
    print(table.run("reindex", name, "--force", "--index", "concurrently"))
    c = table.start("search", name, "text 7 and more", "--mode", "keyword"); print(c.wait(), c.out[:300], c.err)
    print(table.run("status", name))
    print(table.run("targets", "list"))
    print(table.run("targets", "show", name))
    print(table.run("rejects", "list", "--target", name))
    print(table.run("targets", "drop", name))
    print(table.run("uninstall", "--yes"))
