"""PostgreSQL: targets whose state is kept in a schema of its own are found without naming that schema again."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from commands import Commands
from servers import Server, execute, role_name
from table_commands import DESCRIBED, Table, stub_model

import kdb_fast
from kdb_fast.db.address import DatabaseAddress


@pytest.fixture
def table(commands: Commands, database: DatabaseAddress) -> Iterator[Table]:
    """With a target that is kept in the schema ``ours``."""
    table = Table(commands, database)
    table.add(1, "one")
    execute(database, "CREATE SCHEMA ours")
    table.run("reindex", *DESCRIBED, "--state-schema", "ours")
    yield table
    commands.clear()


def _schemas(table: Table) -> list[str]:
    found = execute(
        table.address,
        "SELECT DISTINCT nspname FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace "
        "WHERE relname LIKE 'kdb\\_fast%' ORDER BY 1",
    )
    return [schema for (schema,) in found]


def test_its_name_is_enough_in_each_command(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    assert table.json("reindex", "articles")["unchanged"] == 1
    assert table.json("reindex", "articles", "--text", "body")["stored"] == 1
    assert table.json("reindex", "--name", "articles", "--table", "articles")["unchanged"] == 1
    assert [(t["name"], t["state_schema"]) for t in table.json("targets", "list")["targets"]] == [("articles", "ours")]
    assert "kept in     ours" in table.run("targets", "show", "articles")
    assert table.json("status", "articles")["rows"] == 1
    assert [target["name"] for target in table.json("status")["targets"]] == ["articles"]
    assert table.json("rejects", "list", "--target", "articles")["total"] == 0
    assert table.json("rejects", "clear", "--target", "articles")["cleared"] == 0
    line = table.run("search", "articles", "one", "--mode", "keyword", code=4)
    assert "articles has no keyword search" in line
    with pytest.raises(kdb_fast.SchemaError, match="has no keyword search"):
        kdb_fast.search_table(table.address, "articles", "one", mode="keyword")
    stub_model(monkeypatch)
    assert kdb_fast.reindex_table(table.address, name="articles", limit=1).unchanged == 1
    assert all(name.startswith("ours.kdb_fast_") for name in table.json("uninstall")["removed"])
    assert table.json("targets", "drop", "articles")["removed"] == ["ours.kdb_fast_articles_state"]
    assert _schemas(table) == ["ours"], "no command has made tables elsewhere"
    assert table.json("uninstall", "--yes")["done"]
    assert _schemas(table) == []


def test_a_place_has_one_target_in_whatever_schema_it_is_kept(table: Table) -> None:
    for more in ((), ("--name", "other"), ("--state-schema", "public")):
        line = table.run("reindex", *DESCRIBED, *more, code=4)
        assert "embedding is written by the target articles, which is kept in the schema ours, already" in line
        assert "Run: kdb-fast reindex --db" in line
    assert _schemas(table) == ["ours"]


def test_the_search_path_decides_between_two_and_else_the_option(table: Table) -> None:
    database = table.address
    execute(database, "CREATE SCHEMA shop")
    execute(database, "CREATE TABLE shop.articles (LIKE articles INCLUDING ALL)")
    execute(database, "INSERT INTO shop.articles (id, body) VALUES (1, 'a'), (2, 'b')")
    described = ("--table", "shop.articles", "--vector", "embedding")
    table.run("reindex", *described, "--state-schema", "shop")
    for command in (("reindex", "articles"), ("targets", "show", "articles"), ("search", "articles", "a")):
        line = table.run(*command, code=4)
        assert "There are targets articles in the schemas ours, shop. Say which is meant: --state-schema ours" in line
    assert table.json("targets", "show", "articles", "--state-schema", "shop")["rows"] == 2
    assert len(table.json("targets", "list")["targets"]) == 2
    assert "There are tables of kdb-fast in the schemas ours, shop." in table.run("uninstall", code=4)
    left = table.json("uninstall", "--state-schema", "ours")["left"]
    assert "the tables of kdb-fast in the schema shop: --state-schema shop" in left
    line = table.run("targets", "show", "article", code=4)
    assert "There is no target article; nearest: articles." in line
    execute(database, "ALTER ROLE CURRENT_USER SET search_path = shop, public")
    try:
        assert table.json("targets", "show", "articles")["rows"] == 2
    finally:
        execute(database, "ALTER ROLE CURRENT_USER RESET search_path")


def test_targets_that_may_not_be_read_are_named_with_the_grants(table: Table, postgres: Server) -> None:
    role = postgres.create_role(table.address, "SELECT ON articles")
    name = role_name(role)
    needed = f"The role {name} may not read the targets in the schema ours; let its owner run: "
    for command in (
        ("reindex", "articles"),
        ("reindex", "articles", "--text", "body"),
        ("targets", "show", "articles"),
        ("search", "articles", "one"),
        ("rejects", "list", "--target", "articles"),
    ):
        line = table.run(*command, db=role, code=4)
        assert "There is no target articles." in line
        assert needed in line
        assert "KameleonDB" not in line
    for listing in ("targets", "list"), ("status",):
        listed = table.start(*listing, db=role)
        assert listed.wait() == 0
        assert needed in listed.err
    grants = line.partition(needed)[2].partition(" Describe it")[0]
    assert grants.startswith(f"GRANT USAGE ON SCHEMA ours TO {name}; GRANT SELECT ON ours.kdb_fast_articles_state, ")
    for grant in filter(None, grants.split(";")):
        execute(table.address, grant)
    listed = table.start("targets", "list", "--json", db=role)
    assert (listed.wait(), listed.err) == (0, "")
    assert table.start("targets", "show", "articles", db=role).wait() == 0
