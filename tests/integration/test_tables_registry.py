"""Targets that are kept: found by name, looked at again at each run, changed by what is given, and forgotten."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from commands import Commands
from kameleon import close_kameleon, open_kameleon
from openai_server import OpenAIServer
from servers import Server, execute, role_name
from table_commands import DESCRIBED, Table, stub_model

import kdb_fast
from kdb_fast.db.address import DatabaseAddress, parse_address, without_secrets
from kdb_fast.indexing.tables import reindex_table
from kdb_fast.receipt import TargetNames
from kdb_fast.stores import targets
from kdb_fast.tables.definition import Definition

in_a_file = pytest.mark.parametrize("index", ["sqlite"], indirect=True)
"""What is alike on both databases."""


@pytest.fixture
def table(empty_table: Table) -> Table:
    return empty_table


@pytest.fixture
def stubs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stub for the model, in the runs of this process."""
    stub_model(monkeypatch)


Reindex = Callable[..., kdb_fast.Receipt]


@pytest.fixture
def run(stubs: None, table: Table) -> Reindex:
    """The library's function on the table."""

    def reindexed(which: str | None = None, /, **options: Any) -> kdb_fast.Receipt:
        return reindex_table(table.address, which, **options)

    return reindexed


def test_the_library_does_what_the_command_does(run: Reindex, table: Table) -> None:
    table.add(1, "one", "two")
    receipt = run("articles", text=["title", "body"], vector="embedding")
    shown = "public.articles" if table.is_postgresql else "articles"
    assert (receipt.stored, receipt.target) == (2, TargetNames("articles", shown, "embedding", ("id",)))
    assert run(name="articles").unchanged == 2
    assert table.json("reindex", "articles")["unchanged"] == 2
    table.check(1, 2)
    ((_, definition),) = targets.kept_in(table.address).kept
    assert (definition.text, definition.model, definition.dimensions) == (("title", "body"), "stub", 384)
    assert kdb_fast.reindex_table is reindex_table
    with pytest.raises(kdb_fast.SchemaError, match="There is no target other"):
        run(name="other")
    with pytest.raises(kdb_fast.UsageError, match="Nothing says what is to be embedded"):
        run()
    assert run(name="articles", text="body", key="id").stored == 2, "one name is no sequence of letters"


def test_a_run_that_nobody_goes_on_with_is_not_called_running(table: Table) -> None:
    table.add(1, "one", "two")
    command = table.start("reindex", *DESCRIBED, KDB_FAST_FAULT="pipeline.flush:1:hang")
    command.wait_until_stopped()
    assert "running, began 20" in table.run("targets", "show", "articles")
    command.kill()
    assert "1, stopped without an end, began 20" in table.run("targets", "show", "articles")
    assert "  stopped without an end, began 20" in table.run("targets", "list")
    found = table.json("status")["targets"][0]
    assert (found["state"], found["run"]["state"], found["run"]["ended_at"]) == ("abandoned", "abandoned", None)
    ago = "now() - interval '{}'" if table.is_postgresql else "strftime('%Y-%m-%d %H:%M:%f', 'now', '-{}')"
    for silent, state in ("5 seconds", "running"), ("1 minute", "abandoned"):
        execute(table.address, f"UPDATE kdb_fast_runs SET host = 'elsewhere', heartbeat_at = {ago.format(silent)}")
        assert table.json("targets", "show", "articles")["state"] == state
    execute(table.address, "UPDATE kdb_fast_runs SET host = 'elsewhere'")
    assert table.json("reindex", "articles")["stored"] == 2
    found = table.json("targets", "show", "articles")
    assert (found["run"]["run"], found["state"]) == (2, "done")
    for moment in ("started_at", "heartbeat_at", "ended_at"):
        told = datetime.fromisoformat(found["run"][moment])
        assert (told.isoformat(), told.utcoffset()) == (found["run"][moment], timedelta())


@in_a_file
def test_all_columns_of_text_are_the_default_and_stay_those(run: Reindex, table: Table) -> None:
    table.add(1, "one")
    assert run("articles", vector="embedding").stored == 1
    execute(table.address, "ALTER TABLE articles ADD COLUMN more text")
    execute(table.address, "UPDATE articles SET more = 'more'")
    assert run(name="articles").unchanged == 1
    ((_, definition),) = targets.kept_in(table.address).kept
    assert definition.text == ("title", "body", "lang")


@in_a_file
def test_what_is_given_changes_what_is_kept(table: Table) -> None:
    table.add(1, "one")
    table.run("reindex", *DESCRIBED)
    command = table.start("reindex", "articles", "--text", "body")
    assert command.wait() == 0
    assert "The target articles is changed: text body instead of title, body." in command.err
    assert "1 of 1 record written" in command.out
    assert table.json("targets", "show", "articles")["text"] == ["body"]
    again = table.start("reindex", *DESCRIBED[:2], "--vector", "embedding")
    assert again.wait() == 0
    assert "changed" not in again.err, "what is not given stays as it is kept"
    assert "nothing changed" in again.out


@in_a_file
def test_a_column_has_one_target_and_a_name_one_place(table: Table) -> None:
    execute(table.address, "ALTER TABLE articles ADD COLUMN second " + ("vector" if table.is_postgresql else "BLOB"))
    table.add(1, "one")
    table.run("reindex", *DESCRIBED)
    line = table.run("reindex", *DESCRIBED, "--name", "other", code=4)
    assert "embedding is written by the target articles already. Run: kdb-fast reindex --db" in line
    line = table.run("reindex", *DESCRIBED[:-1], "second", code=4)
    assert "There is a target articles: the column embedding of" in line
    assert "--name NAME" in line
    assert table.json("reindex", *DESCRIBED[:-1], "second", "--name", "second")["stored"] == 1
    assert [t["name"] for t in table.json("targets", "list")["targets"]] == ["articles", "second"]
    line = table.run("reindex", "articles", "second", code=2)
    assert "is brought up to date alone" in line


def test_a_table_that_is_not_as_it_was_described(table: Table) -> None:
    table.add(1, "one", "two")
    table.run("reindex", *DESCRIBED)
    execute(table.address, "ALTER TABLE articles RENAME COLUMN body TO content")
    line = table.run("reindex", "articles", code=4)
    assert "The target articles is not as it was described: " in line
    assert "has no column body" in line
    assert "Or say what it is now, such as: kdb-fast reindex --db" in line
    receipt = table.json("reindex", "articles", "--text", "title", "--text", "content")
    assert receipt["unchanged"] == 2, "the same text, under another name"
    execute(table.address, "ALTER TABLE articles RENAME COLUMN embedding TO vec")
    assert "has no column embedding" in table.run("reindex", "articles", code=4)
    assert table.json("reindex", "articles", "--vector", "vec")["unchanged"] == 2
    execute(table.address, "ALTER TABLE articles RENAME TO posts")
    assert "There is no table" in table.run("reindex", "articles", code=4)
    assert table.json("status", "articles")["rows"] is None
    assert table.json("reindex", "articles", "--table", "posts")["unchanged"] == 2
    assert table.json("status", "articles")["rows"] == 2


@in_a_file
def test_a_key_that_is_another_one(run: Reindex, table: Table) -> None:
    table.add(1, "one")
    run("articles", text=["body"], vector="embedding")
    execute(table.address, "CREATE TABLE copied (uid text PRIMARY KEY, body text, embedding " + (
        "vector)" if table.is_postgresql else "BLOB)"))  # fmt: skip
    execute(table.address, "DROP TABLE articles")
    execute(table.address, "ALTER TABLE copied RENAME TO articles")
    with pytest.raises(kdb_fast.SchemaError, match=r"is not as it was described: .* has no column id"):
        run(name="articles")
    with pytest.raises(kdb_fast.SchemaError, match="was made for a key of the types"):
        run(name="articles", key=["uid"])


@in_a_file
def test_vectors_that_are_kept_as_text_are_no_text(table: Table) -> None:
    execute(table.address, "ALTER TABLE articles ADD COLUMN first TEXT")
    execute(table.address, "ALTER TABLE articles ADD COLUMN second TEXT")
    table.add(1, "one")
    table.run("reindex", *DESCRIBED[:-1], "first", "--name", "one")
    table.run("reindex", "--table", "articles", "--into", "two")
    assert table.json("targets", "show", "two")["text"] == ["title", "body", "lang", "second"]
    table.run("reindex", "--table", "articles", "--vector", "embedding", "--name", "three")
    line = table.run("reindex", "--table", "articles", "--vector", "second", "--name", "four", code=4)
    assert "articles.second is part of the text of the target t" in line


@in_a_file
def test_dropping_forgets_all_but_the_vectors(table: Table) -> None:
    table.add(1, "one", "two")
    table.run("reindex", *DESCRIBED)
    dropped = table.json("targets", "drop", "articles", "--with-vectors")
    assert dropped["dropped"] == "articles"
    assert [name.rpartition(".")[2] for name in dropped["removed"]] == ["kdb_fast_articles_state"]
    assert table.vectors().keys() == {1, 2}, "the column was there"
    assert table.json("targets", "list") == {"targets": []}
    assert execute(table.address, "SELECT count(*) FROM kdb_fast_runs") == [(0,)]
    assert "There is no target articles" in table.run("targets", "show", "articles", code=4)
    assert "There is no target articles" in table.run("targets", "drop", "articles", code=4)


def test_names_of_every_kind(table: Table) -> None:
    odd = 'Big "Table" 100% {x}'
    quoted = '"' + odd.replace('"', '""') + '"'
    kind = "vector" if table.is_postgresql else "BLOB"
    execute(table.address, f'CREATE TABLE {quoted} ("Key %" integer PRIMARY KEY, "te xt" text, "v%c" {kind})')
    execute(table.address, f'INSERT INTO {quoted} ("Key %", "te xt") VALUES (1, \'one\')')
    described = ("--table", quoted, "--text", "te xt", "--vector", "v%c")
    assert table.json("reindex", *described)["stored"] == 1
    assert table.json("reindex", odd)["unchanged"] == 1
    (shown,) = table.json("targets", "list")["targets"]
    assert (shown["name"], shown["rows"], shown["key"]) == (odd, 1, ["Key %"])
    assert "'Big \"Table\" 100% {x}' --keyword" in table.run("search", odd, "x", "--mode", "keyword", code=4)
    assert "stays: " in table.run("targets", "drop", odd)


@in_a_file
def test_definitions_of_a_newer_version_are_refused(run: Reindex, table: Table) -> None:
    table.add(1, "one")
    run("articles", vector="embedding")
    execute(
        table.address,
        'UPDATE kdb_fast_targets SET definition = replace(definition, \'"name"\', \'"of_later":1,"name"\')',
    )
    with pytest.raises(kdb_fast.SchemaError, match="was described by a newer kdb-fast, with of_later"):
        run(name="articles")


@in_a_file
def test_no_password_is_kept(run: Reindex, table: Table) -> None:
    table.add(1, "one")
    run("articles", vector="embedding")
    (text,) = execute(table.address, "SELECT definition FROM kdb_fast_targets")[0]
    assert Definition.from_json(text).name == "articles"
    assert "password" not in text


def test_every_missing_right_is_named_with_its_grant(
    postgres: Server, commands: Commands, database: DatabaseAddress
) -> None:
    table = Table(commands, database)
    table.add(1, "one")
    execute(database, "REVOKE ALL ON SCHEMA public FROM PUBLIC")
    role = postgres.create_role(database, "USAGE ON SCHEMA public")
    name = role_name(role)
    line = table.run("reindex", *DESCRIBED, db=role, code=4)
    assert f"The role {name} lacks rights for the target articles: " in line
    for grant in ("CREATE ON SCHEMA public", "SELECT, UPDATE (embedding) ON public.articles"):
        assert f"GRANT {grant} TO {name};" in line
    assert "--state-schema NAME" in line
    assert execute(database, "SELECT relname FROM pg_class WHERE relname LIKE 'kdb\\_fast%'") == []

    execute(database, f"CREATE SCHEMA ours AUTHORIZATION {name}")
    execute(database, f"GRANT SELECT, UPDATE (embedding) ON articles TO {name}")
    described = (*DESCRIBED, "--state-schema", "ours")
    first = table.start("reindex", *described, "--json", db=role)
    assert first.wait() == 0, first.err
    assert (first.receipt["stored"], first.receipt["schema"]) == (1, "ours")
    again = table.start("reindex", "articles", "--state-schema", "ours", "--json", db=role)
    assert (again.wait(), again.receipt["unchanged"]) == (0, 1)
    assert execute(database, "SELECT nspname FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace "
                             "WHERE relname LIKE 'kdb\\_fast%' GROUP BY 1") == [("ours",)]  # fmt: skip
    line = table.run("reindex", *DESCRIBED, "--state-schema", "nowhere", code=4)
    assert "There is no schema nowhere" in line
    assert "CREATE SCHEMA nowhere;" in line


def test_our_tables_are_where_they_are_already(commands: Commands, database: DatabaseAddress) -> None:
    table = Table(commands, database)
    table.add(1, "one")
    execute(database, "CREATE SCHEMA first")
    execute(database, "CREATE SCHEMA shop")
    execute(database, "CREATE TABLE shop.articles (LIKE public.articles INCLUDING ALL)")
    table.run("reindex", *DESCRIBED)
    path = replace(database, conninfo=f"{database.conninfo} options='-csearch_path=first,public'")
    other = table.start(
        "reindex", "--table", "shop.articles", "--vector", "embedding", "--name", "shop", "--json", db=path
    )
    assert other.wait() == 0, other.err
    assert other.receipt["schema"] == "public"
    line = table.run("reindex", "--table", "shop.articles", "--vector", "embedding", code=4)
    assert "There is a target articles: the column embedding of public.articles" in line


@pytest.mark.filterwarnings("ignore:The default datetime adapter is deprecated:DeprecationWarning")
@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_an_entity_of_the_same_name_keeps_its_meaning(
    kind: str, stubs: None, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("kameleondb")
    database = open_kameleon(kind, request, capsys, tmp_path)
    try:
        database.client.create_entity("Note", fields=[{"name": "text", "type": "text"}]).insert({"text": "fine"})
        if database.is_postgresql:
            database.execute("CREATE EXTENSION vector")
        kind = "vector(384)" if database.is_postgresql else "BLOB"
        database.execute(f"CREATE TABLE things (id integer PRIMARY KEY, body text, embedding {kind})")
        database.execute("INSERT INTO things (id, body) VALUES (1, 'one'), (2, 'two')")
        described = ("--table", "things", "--vector", "embedding", "--name", "Note", "--json", "--no-progress")
        assert database.kdb_fast("reindex", *described).json["stored"] == 2
        both = database.kdb_fast("reindex", "Note", "--json")
        assert (both.code, both.json["stored"], both.json["target"]) == (0, 1, None)
        assert "Note is an entity of KameleonDB, and that is brought up to date; for the target" in both.err
        assert database.kdb_fast("reindex", "--name", "Note", "--json").json["unchanged"] == 2
        status = database.kdb_fast("status")
        assert ("1 record indexed" in status.out, "things.embedding" in status.out) == (True, True)
        wrong = database.kdb_fast("reindex", "Nothing")
        assert (wrong.code, "There is no entity 'Nothing'; found: Note" in wrong.err) == (4, True)
    finally:
        close_kameleon(database, request)


def test_a_key_of_another_type_is_named_with_what_adapts_it(commands: Commands, database: DatabaseAddress) -> None:
    table = Table(commands, database)
    table.add(1, "one")
    table.run("reindex", *DESCRIBED)
    execute(database, "ALTER TABLE articles ALTER COLUMN id TYPE text")
    line = table.run("reindex", "articles", code=4)
    adapt = "ALTER TABLE public.kdb_fast_articles_state ALTER key_1 TYPE text;"
    assert adapt in line.replace('"', "")
    execute(database, adapt)
    assert table.json("reindex", "articles")["unchanged"] == 1


def test_another_database_is_remembered_without_its_password() -> None:
    kept = without_secrets("postgresql://me:s%40cret@db.example:5433/shop?sslmode=require")
    assert "s@cret" not in kept
    assert "s%40cret" not in kept
    again = parse_address(kept)
    assert again.display == "postgresql://db.example:5433/shop"
    assert "sslmode=require" in again.conninfo
    assert parse_address(without_secrets("sqlite:///a b.db?mode=ro")).read_only


def test_a_server_makes_the_vectors_and_is_remembered(table: Table) -> None:
    table.add(1, "one", "two")
    execute(table.address, f"ALTER TABLE articles ADD made {'vector(64)' if table.is_postgresql else 'BLOB'}")
    with OpenAIServer(key=None) as server:
        given: dict[str, Any] = {"vector": "made", "base_url": server.url, "model": "text-embedding-3-small"}
        with pytest.raises(kdb_fast.UsageError, match="several columns of text"):
            reindex_table(table.address, "articles", **given)
        assert reindex_table(table.address, "articles", text=["body"], **given).stored == 2
        assert reindex_table(table.address, name="articles").unchanged == 2
        table.add(3, "three")
        again = reindex_table(table.address, name="articles")
        assert (again.stored, again.model) == (1, "text-embedding-3-small")
        ((_, definition),) = targets.kept_in(table.address).kept
        assert (definition.provider, definition.base_url) == ("openai", server.url)
        assert definition.dimensions == 64


def test_who_reads_kameleondbs_index_needs_no_right_on_targets(
    postgres: Server, commands: Commands, database: DatabaseAddress
) -> None:
    table = Table(commands, database)
    table.add(1, "one")
    table.run("reindex", *DESCRIBED)
    role = postgres.create_role(
        database, "SELECT ON kdb_fast_runs, kdb_fast_rejects, kdb_fast_migrations, kdb_fast_state"
    )
    assert "0 records indexed" in table.run("status", db=role)
    line = table.run("targets", "list", db=role, code=4)
    assert f"GRANT SELECT ON public.kdb_fast_articles_state, public.kdb_fast_targets TO {role_name(role)};" in line
    line = table.run("reindex", *DESCRIBED, db=role, code=4)
    assert f"GRANT SELECT, INSERT, UPDATE, DELETE ON public.kdb_fast_targets TO {role_name(role)};" in line


def test_a_column_of_another_type_is_named(commands: Commands, database: DatabaseAddress) -> None:
    """Its vectors were rounded: by their hashes none is ours any more."""
    table = Table(commands, database)
    table.add(1, "one", "two")
    table.run("reindex", *DESCRIBED)
    execute(database, "ALTER TABLE articles ALTER embedding TYPE halfvec(384)")
    line = table.run("reindex", "articles", code=4)
    assert "articles.embedding was of type vector and is of type halfvec" in line
    assert re.search("kdb-fast reindex (--db [^ ]+ )?articles --replace", line)
    assert table.json("reindex", "articles", "--replace")["stored"] == 2
    assert table.json("reindex", "articles")["unchanged"] == 2
    execute(database, "ALTER TABLE articles ALTER embedding TYPE halfvec")
    assert table.json("reindex", "articles")["unchanged"] == 2, "without a length it holds the same"
    commands.clear()


def test_a_column_that_was_made_anew_may_be_of_another_type(commands: Commands, database: DatabaseAddress) -> None:
    table = Table(commands, database)
    table.add(1, "one", "two")
    table.run("reindex", *DESCRIBED)
    execute(database, "CREATE DOMAIN embedded AS vector; ALTER TABLE articles ALTER embedding TYPE embedded")
    assert table.json("reindex", "articles")["unchanged"] == 2, "a domain holds the same"
    execute(database, "ALTER TABLE articles DROP embedding, ADD embedding halfvec(384)")
    assert table.json("reindex", "articles")["stored"] == 2, "there are no vectors that were rounded"
    execute(database, "ALTER TABLE articles DROP embedding, ADD other vector(384)")
    execute(database, "UPDATE articles SET other = array_fill(1, ARRAY[384])::vector WHERE id = 1")
    found = table.json("reindex", "articles", "--vector", "other")
    assert (found["stored"], found["foreign"]) == (1, 1), "of another column only that type counts which it has"
    commands.clear()
