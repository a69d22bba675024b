"""Tables of a database that has copies: hot standbys as what is read, logical replication, and a restored dump."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import Commands
from servers import Server, Standby, connect_as, database_name, eventually, execute
from table_commands import COLUMNS, DESCRIBED, Table

from kdb_fast.cli.demo import sqlalchemy_url
from kdb_fast.db.address import DatabaseAddress

BESIDE = ("--table", "articles", "--text", "title", "--text", "body", "--into", "article_vectors")


@pytest.fixture(scope="module")
def primary() -> Iterator[Server]:
    """A server that others may follow, in both ways."""
    server = Server()
    execute(server.address, "ALTER SYSTEM SET wal_level = logical")
    execute(server.address, "ALTER SYSTEM RESET synchronous_commit")  # what is committed can be followed
    server.restart()
    yield server
    server.stop()


@pytest.fixture
def table(primary: Server, commands: Commands) -> Iterator[Table]:
    database = primary.create_database()
    found = Table(commands, database)
    found.add(1, *(f"text {number}" for number in range(1, 7)))
    yield found
    commands.clear()
    primary.drop_database(database)


# -- hot standbys ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def standby(primary: Server) -> Iterator[Standby]:
    found = Standby(primary)
    yield found
    found.stop()


def counts(table: Table, *arguments: str) -> dict[str, Any]:
    """What a run says it did, without what it did not."""
    found = table.json("reindex", *arguments)
    names = ("stored", "reused", "unchanged", "superseded", "rejected")
    return {name: found[name] for name in names if found[name]}


def source(standby: Standby, table: Table) -> str:
    standby.catch_up()
    return str(sqlalchemy_url(standby.of(table.address)))


def test_column_is_filled_from_a_standby_that_lags(standby: Standby, table: Table) -> None:
    """No row gets the vector of a text that it has no more, or is tried for ever."""
    replica = source(standby, table)
    assert counts(table, *DESCRIBED, "--keyword", "--source", replica) == {"stored": 6}
    assert counts(table, "articles") == {"unchanged": 6}
    standby.lag(True)
    execute(table.address, "UPDATE articles SET body = 'newer' WHERE id = 3")
    execute(table.address, "DELETE FROM articles WHERE id = 5")
    table.add(7, "only on the primary")
    assert counts(table, "articles", "--force") == {"stored": 4, "superseded": 2}
    before = table.vectors()
    assert counts(table, "articles") == {"unchanged": 4, "superseded": 2}
    assert table.vectors()[3].tolist() == before[3].tolist()
    standby.lag(False)
    assert counts(table, "articles") == {"stored": 2, "unchanged": 4}
    table.check(1, 2, 3, 4, 6, 7)
    for address in (table.address, standby.of(table.address)):
        standby.catch_up()
        found = table.run("search", "articles", "newer", "--mode", "keyword", "--columns", "id", db=address)
        assert "newer" in found


def test_table_of_vectors_is_filled_from_a_standby_that_lags(standby: Standby, table: Table) -> None:
    replica = source(standby, table)
    standby.lag(True)
    execute(table.address, "UPDATE articles SET body = 'newer' WHERE id = 3")
    assert counts(table, *BESIDE, "--source", replica) == {"stored": 6}
    assert counts(table, "article_vectors") == {"unchanged": 6}
    standby.lag(False)
    assert counts(table, "article_vectors") == {"stored": 1, "unchanged": 5}


SLOW = "body || coalesce(nullif(pg_sleep(0.2)::text, ''), '')"


@pytest.mark.parametrize("kind", ["table", "query"])
def test_standby_that_ends_what_is_read(standby: Standby, table: Table, kind: str) -> None:
    """It does so where its primary removes what is read there, or locks the table."""
    replica = standby.of(table.address)
    what = ("--table", "articles", "--text", SLOW)
    if kind == "query":
        what = ("--query", f"SELECT id, {SLOW} AS body FROM articles", "--key", "id")
    run = table.start("reindex", *what, "--into", "v", "--source", source(standby, table), "--json")
    sleeps = "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'PgSleep'"
    if kind == "query":  # not as it is looked at before
        sleeps += " AND query LIKE 'FETCH%'"
    eventually(lambda: execute(replica, sleeps))
    execute(table.address, "ALTER TABLE articles ADD COLUMN more text")
    ended = "SELECT confl_lock FROM pg_stat_database_conflicts WHERE datname = current_database()"
    eventually(lambda: execute(replica, ended) != [(0,)])
    if kind == "query":  # is read in one go
        assert run.wait() == 5
        assert "conflict with recovery" in run.err
        assert "hot_standby_feedback" in run.err
        run = table.start("reindex", "v", "--source", source(standby, table), "--json")
    assert run.wait() == 0, run.err
    assert run.receipt["stored"] == 6


def test_standby_as_the_target(standby: Standby, table: Table) -> None:
    """It may be searched and asked, not written; until it is promoted."""
    table.run("reindex", *DESCRIBED)
    standby.catch_up()
    replica = standby.of(table.address)
    for arguments in (("articles",), DESCRIBED, BESIDE):
        assert "The server is read-only (a standby" in table.run("reindex", *arguments, code=4, db=replica)
    for command in (
        ("targets", "drop", "articles"),
        ("uninstall", "--yes"),
        ("rejects", "clear", "--target", "articles"),
    ):
        assert "The server is read-only (a standby" in table.run(*command, code=4, db=replica)
    assert "6" in table.run("targets", "list", db=replica)
    assert "articles" in table.run("status", db=replica)
    execute(replica, "SELECT pg_promote()")
    assert "nothing changed: 6 records" in table.run("reindex", "articles", db=replica)


# -- logical replication -----------------------------------------------------------------------------------


@pytest.fixture
def subscriber(primary: Server, table: Table) -> Iterator[DatabaseAddress]:
    """A database that follows the publication ``news`` of the table's, with tables of the same names."""
    database = primary.create_database()
    execute(database, "CREATE EXTENSION vector")
    execute(database, f"CREATE TABLE articles ({COLUMNS['postgresql']})")
    yield database
    execute(database, "ALTER SUBSCRIPTION news DISABLE")
    execute(database, "ALTER SUBSCRIPTION news SET (slot_name = NONE)")
    execute(database, "DROP SUBSCRIPTION news")
    primary.drop_database(database)
    execute(table.address, "SELECT pg_drop_replication_slot('news')")


def subscribe(table: Table, subscriber: DatabaseAddress) -> None:
    # In one server a subscription cannot make its own slot.
    execute(table.address, "SELECT pg_create_logical_replication_slot('news', 'pgoutput')")
    conninfo = table.address.conninfo.replace("'", "''")
    execute(
        subscriber,
        f"CREATE SUBSCRIPTION news CONNECTION '{conninfo}' PUBLICATION news "
        "WITH (create_slot = false, slot_name = news)",
    )


def arrived(subscriber: DatabaseAddress, name: str, vectors: Any) -> bool:
    rows = execute(subscriber, f"SELECT id, embedding::text FROM {name} WHERE embedding IS NOT NULL ORDER BY id")
    return bool(rows == vectors)


def test_updates_of_a_published_table_arrive(table: Table, subscriber: DatabaseAddress) -> None:
    all_vectors = "SELECT id, embedding::text FROM {} WHERE embedding IS NOT NULL ORDER BY id"
    execute(table.address, "CREATE PUBLICATION news FOR TABLE articles")
    subscribe(table, subscriber)
    table.run("reindex", *DESCRIBED)
    first = execute(table.address, all_vectors.format("articles"))
    eventually(lambda: arrived(subscriber, "articles", first))
    execute(table.address, "ALTER TABLE articles REPLICA IDENTITY FULL")
    execute(table.address, "UPDATE articles SET body = 'newer' WHERE id < 3")
    execute(table.address, "DELETE FROM articles WHERE id = 4")
    assert counts(table, "articles") == {"stored": 1, "reused": 1, "unchanged": 3}
    second = execute(table.address, all_vectors.format("articles"))
    assert first != second
    eventually(lambda: arrived(subscriber, "articles", second))


VECTORS = (
    "CREATE TABLE article_vectors (id bigint PRIMARY KEY, embedding vector, content text, kdb_fast_hash bytea, "
    "kdb_fast_seal bytea, kdb_fast_fingerprint varchar(64), kdb_fast_run bigint, kdb_fast_at timestamptz, "
    "kdb_fast_version xid)"
)


def test_a_published_table_of_vectors_arrives(table: Table, subscriber: DatabaseAddress) -> None:
    """As it is after the first load by COPY, and after a run that changed, added and removed rows."""
    execute(subscriber, VECTORS)
    table.run("reindex", *BESIDE)
    execute(table.address, "CREATE PUBLICATION news FOR TABLE article_vectors")
    subscribe(table, subscriber)
    all_vectors = "SELECT id, embedding::text FROM article_vectors WHERE embedding IS NOT NULL ORDER BY id"
    first = execute(table.address, all_vectors)
    assert len(first) == 6
    eventually(lambda: arrived(subscriber, "article_vectors", first))
    execute(table.address, "UPDATE articles SET body = 'newer' WHERE id = 2")
    execute(table.address, "DELETE FROM articles WHERE id = 4")
    execute(table.address, "UPDATE articles SET title = NULL, body = '' WHERE id = 5")
    table.add(7, "another one")
    assert counts(table, "article_vectors") == {"stored": 2, "unchanged": 3}
    second = execute(table.address, all_vectors)
    assert [number for number, _ in second] == [1, 2, 3, 6, 7]
    eventually(lambda: arrived(subscriber, "article_vectors", second))


def test_whole_database_is_published(table: Table) -> None:
    """Our own tables with it: each has what updates and deletions are published by."""
    execute(table.address, "CREATE PUBLICATION news FOR ALL TABLES")
    for number, arguments in enumerate(([*DESCRIBED, "--keyword"], BESIDE, [*BESIDE, "--into", "w", "--chunk", "40"])):
        assert counts(table, *arguments) == {"stored": 6 - number}
        execute(table.address, "DELETE FROM articles WHERE id = %s", number + 1)
        name = arguments[-1] if number else "articles"
        assert counts(table, {"40": "w"}.get(name, name), "--force") == {"stored": 5 - number}
    assert (
        execute(
            table.address,
            "SELECT relname FROM pg_class c WHERE relkind = 'r' AND relname LIKE 'kdb_fast%' AND relpersistence = 'p' "
            "AND NOT EXISTS (SELECT FROM pg_index i WHERE i.indrelid = c.oid AND i.indisprimary)",
        )
        == []
    )
    table.run("targets", "drop", "w", "--with-vectors")


@pytest.mark.parametrize(
    ("published", "identity", "why"),
    [
        ("", "NOTHING", "has no replica identity"),
        (" WHERE (lang = 'en')", "DEFAULT", "publication WHERE expression is not part of the replica identity"),
        (" (id, title)", "FULL", "Column list used by the publication does not cover the replica identity"),
    ],
)
def test_table_whose_updates_cannot_be_published(table: Table, published: str, identity: str, why: str) -> None:
    execute(table.address, f"CREATE PUBLICATION news FOR TABLE articles{published}")
    execute(table.address, f"ALTER TABLE articles REPLICA IDENTITY {identity}")
    assert why in table.run("reindex", *DESCRIBED, code=4)
    assert execute(table.address, "SELECT to_regclass('kdb_fast_articles_state')::text") == [(None,)]
    assert counts(table, *BESIDE) == {"stored": 6}


# -- dump and restore --------------------------------------------------------------------------------------


def test_restored_dump_of_every_kind_of_target_is_unchanged(primary: Server, table: Table, tmp_path: Path) -> None:
    """In a database of another name, with other numbers in its catalogue, of another owner."""
    file = tmp_path / "notes.csv"
    file.write_text("id,text\n1,one\n2,two\n")
    described = {
        "articles": (*DESCRIBED, "--keyword"),
        "article_vectors": (*BESIDE, "--keyword", "--with-source"),
        "pieces": ("--table", "articles", "--text", "body", "--into", "pieces", "--chunk", "40"),
        "chosen": ("--query", "SELECT id, body FROM articles WHERE id > 2", "--key", "id", "--into", "chosen"),
        "notes": ("--from", str(file), "--into", "notes"),
    }
    for arguments in described.values():
        table.run("reindex", *arguments)
    dump = primary.empty_folder("dump") / "all"
    primary.program("pg_dump", "-Fc", "-f", dump, table.address.conninfo)
    database = primary.create_database()
    role = primary.create_role(database)
    name, user = database_name(database), f"{database_name(database)}_role"
    ((owner,),) = execute(database, "SELECT rolname FROM pg_roles WHERE rolname LIKE %s", f"{user}%")
    execute(database, f"ALTER DATABASE {name} OWNER TO {owner}")
    execute(database, "CREATE EXTENSION vector")
    # The comment on an extension is its owner's to make.
    primary.program("pg_restore", "--no-owner", "--no-comments", "-d", role.conninfo, dump)
    for target, arguments in described.items():
        again = arguments[:2] if target == "notes" else ()
        receipt = table.start("reindex", target, *again, "--json", db=connect_as(role))
        assert receipt.wait() == 0, receipt.err
        assert receipt.receipt["stored"] == 0, target
        assert receipt.receipt["unchanged"] == {"chosen": 4, "notes": 2}.get(target, 6), target
    primary.drop_database(database)
