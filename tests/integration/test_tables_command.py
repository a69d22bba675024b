"""Tables of any kind on the command line, on both databases: real processes with a stub for the model."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from commands import Commands
from servers import Server, eventually, execute
from table_commands import DESCRIBED, INTO, Table

from kdb_fast.cli.demo import sqlalchemy_url
from kdb_fast.db.address import DatabaseAddress

in_a_file = pytest.mark.parametrize("index", ["sqlite"], indirect=True)
"""What is alike on both databases."""


@pytest.fixture
def table(empty_table: Table) -> Table:
    return empty_table


def test_a_column_is_filled_and_the_second_command_is_short(table: Table) -> None:
    table.add(1, "a bicycle for rain", "bread at home", "")
    first = table.run("reindex", *DESCRIBED)
    assert "3 of 3 records written" in first
    assert "target   articles: column embedding of" in first
    assert "rows by id" in first
    table.check(1, 2, 3)
    second = table.run("reindex", "articles")
    assert "nothing changed: 3 records are up to date" in second
    table.add(4, "a fourth")
    execute(table.address, "UPDATE articles SET body = 'another' WHERE id = 2")
    receipt = table.json("reindex", "articles")
    assert (receipt["read"], receipt["stored"], receipt["unchanged"]) == (4, 2, 2)
    shown = "public.articles" if table.is_postgresql else "articles"
    assert receipt["target"] == {"name": "articles", "table": shown, "column": "embedding", "key": ["id"]}
    table.check(1, 2, 3, 4)


@in_a_file
def test_options_of_one_run(table: Table) -> None:
    table.add(1, *(f"text {n}" for n in range(20)))
    assert table.json("reindex", *DESCRIBED, "--limit", "5")["read"] == 5
    assert table.json("reindex", "articles", "--expect-count", "20")["stored"] == 15
    assert table.json("reindex", "articles", "--force")["stored"] == 20
    missed = table.json("reindex", "articles", "--expect-count", "21+", code=3)
    assert missed["warnings"] == ["20 records were read, expected at least 21."]
    assert "kdb-fast: --limit is 0" in table.run("reindex", "articles", "--limit", "0", code=2)
    shown = table.json("targets", "show", "articles")
    assert (shown["rows"], shown["state"], shown["precision"]) == (20, "done", "fp32"), "none of these is kept"


@in_a_file
def test_only_some_rows_and_a_text_of_their_own(table: Table) -> None:
    table.add(1, "one", "two", "three")
    execute(table.address, "UPDATE articles SET lang = 'en' WHERE id > 1")
    given = ("--table", "articles", "--template", "{title}: {body}", "--filter", "lang = 'en'", "--vector", "embedding")
    assert table.json("reindex", *given)["stored"] == 2
    assert table.vectors().keys() == {2, 3}
    assert table.json("reindex", "articles", "--filter", "")["stored"] == 1
    assert table.json("targets", "show", "articles")["template"] == "{title}: {body}"


@pytest.mark.parametrize(
    ("given", "code", "says"),
    [
        (("--table", "articles"), 2, "Nothing says where the vectors of"),
        (("--table", "articles", "--text", "title", "--template", "{title}", "--vector", "v"), 2, "exclude each other"),
        (("--text", "title"), 2, "--text belongs to a table"),
        (("--filter", "true", "--from", "x.jsonl", "--entity", "X"), 2, "--entity and --filter exclude each other"),
        (("--filter", "true", "--from", "x.csv", "--into", "X"), 2, "--from and --filter exclude each other"),
        (("--format", "csv", "--into", "X"), 2, "--format belongs to --from with --into"),
        (("--table", "articles", "--name", "x", "y"), 2, "--name and a NAME exclude each other"),
        (("articels", "--text", "title"), 4, "There is no target articels"),
        (("--name", "nothing"), 4, "There is no target nothing"),
        (("--table", "artikles", "--text", "title", "--vector", "embedding"), 4, "nearest: "),
        (("--table", "articles", "--text", "titel", "--vector", "embedding"), 4, "has no column titel; nearest: title"),
        (("--table", "articles", "--vector", "embeding"), 4, "has no column embeding; nearest: embedding"),
        (
            ("--table", "articles", "--vector", "emb2"),
            4,
            "has no column emb2; there are: id, title, body, lang, embedding. To add it for the vectors: --create.",
        ),
        (("--table", "articles", "--key", "idd", "--vector", "embedding"), 4, "has no column idd"),
        (("--table", "articles", "--text", "id", "--vector", "embedding"), 4, "expected text"),
        (("--table", "articles", "--filter", "lang ==", "--vector", "embedding"), 4, "--filter of"),
        (("--table", "articles", "--filter", "true) OR (true", "--vector", "embedding"), 4, "--filter of"),
        (("--table", "kdb_fast_runs", "--vector", "embedding"), 4, "kdb_fast_runs"),
        (("--table", "articles", "--into", "elsewhere.v"), 4, "Leave the schema out: --into v"),
        (("--table", "articles", "--into", ""), 4, "'' is no name of a table."),
    ],
)
def test_a_mistake_gets_one_line_and_nothing_is_kept(
    commands: Commands, sqlite_database: DatabaseAddress, given: tuple[str, ...], code: int, says: str
) -> None:
    table = Table(commands, sqlite_database)
    table.add(1, "one")
    assert says in table.run("reindex", *given, code=code)
    assert table.json("targets", "list") == {"targets": []}
    assert table.vectors() == {}


def test_what_is_refused_later_is_not_kept_either(commands: Commands, database: DatabaseAddress) -> None:
    table = Table(commands, database)
    table.add(1, "one")
    execute(database, "ALTER TABLE articles ADD short vector(8), ADD number integer")
    line = table.run("reindex", *DESCRIBED[:-1], "short", code=4)
    assert "holds vectors of 8 dimensions; the model gives 384" in line
    assert "CREATE SCHEMA none;" in table.run("reindex", *DESCRIBED[:-2], "--into", "none.v", code=4)
    assert "expected vector or halfvec" in table.run("reindex", *DESCRIBED[:-1], "number", code=4)
    assert table.json("targets", "list") == {"targets": []}


def test_two_runs_exclude_each_other_and_another_column_is_free(table: Table, tmp_path: Path) -> None:
    kind = "vector(384)" if table.is_postgresql else "BLOB"
    execute(table.address, f"ALTER TABLE articles ADD COLUMN second {kind}")
    table.add(1, *(f"text {n}" for n in range(30)), "gated")
    gate = str(tmp_path)
    running = table.start("reindex", *DESCRIBED, KDB_FAST_FAULT_DIR=gate)
    eventually(lambda: table.json("targets", "list")["targets"] or running.poll() is not None)
    assert table.json("targets", "show", "articles")["state"] == "running"
    assert "holds the index" in table.run("reindex", "articles", code=6)
    assert "holds the index" in table.run("targets", "drop", "articles", code=6)
    execute(table.address, "UPDATE articles SET body = 'open' WHERE body = 'gated'")
    other = table.json("reindex", *DESCRIBED[:-1], "second", "--name", "second")
    assert (other["stored"], other["target"]["column"]) == (31, "second")
    (tmp_path / "go").touch()
    assert running.wait() == 0, running.err
    table.check(*range(1, 32))


@in_a_file
def test_ctrl_c_and_carry_on(table: Table, tmp_path: Path) -> None:
    table.add(1, *(f"text {n}" for n in range(300)), "gated")
    gate = str(tmp_path)
    running = table.start("reindex", *DESCRIBED, "--workers", "2", LC_SECONDS='{"drain": 0.5}', KDB_FAST_FAULT_DIR=gate)
    eventually(lambda: table.vectors() or running.poll() is not None)
    running.send(signal.SIGINT)
    assert running.wait() == 130, running.err
    assert "To carry on: kdb-fast reindex --table articles" in running.err
    written = len(table.vectors())
    assert 0 < written <= 300
    (tmp_path / "go").touch()
    command = table.start("reindex", "articles", "--json", KDB_FAST_FAULT_DIR=gate)
    assert command.wait() == 0, command.err
    assert (command.receipt["unchanged"], command.receipt["stored"]) == (written, 301 - written)
    table.check(*range(1, 302))


def test_a_row_that_is_refused_is_listed_until_it_is_stored(table: Table) -> None:
    if table.is_postgresql:
        execute(table.address, "ALTER TABLE articles ADD CHECK (id <> 2 OR embedding IS NULL)")
    table.add(1, "one", "two", "three")
    if not table.is_postgresql:
        execute(table.address, "UPDATE articles SET body = CAST(x'61ff62' AS TEXT) WHERE id = 2")
    summary = table.run("reindex", *DESCRIBED, code=3)
    assert "See the rejected records: kdb-fast rejects list --db" in summary
    assert "--target articles" in summary
    listed = table.json("rejects", "list", "--target", "articles")["rejects"]
    assert [(row["target"], row["record_id"]) for row in listed] == [("articles", "2")]
    assert "articles/2: " in table.run("rejects", "list")
    assert table.json("status", "articles")["rejected"] == 1
    if table.is_postgresql:
        execute(table.address, "ALTER TABLE articles DROP CONSTRAINT articles_check")
    else:
        execute(table.address, "UPDATE articles SET body = 'two' WHERE id = 2")
    assert table.json("reindex", "articles")["stored"] == 1
    assert table.json("rejects", "list") == {"total": 0, "rejects": []}
    assert "There is no target none" in table.run("rejects", "clear", "--target", "none", code=4)


@in_a_file
def test_what_a_person_sees_and_what_a_program_reads(table: Table) -> None:
    table.add(1, "one")
    table.run("reindex", *DESCRIBED, "--no-progress")
    shown = table.run("status")
    assert "no index of KameleonDB" in shown
    assert "articles.embedding" in shown
    assert [line.split()[0] for line in table.run("targets", "list").splitlines()] == ["target", "articles"]
    lines = table.run("targets", "show", "articles").splitlines()
    names = [line[:11].strip() for line in lines]
    assert names == ["target", "reads", "text", "key", "vectors in", "model", "rows", "last run"]
    table.run("reindex", *INTO)
    assert table.run("targets", "list").splitlines()[2].split()[1].endswith("vectors.embedding")
    table.run("targets", "drop", "vectors")
    assert table.json("status")["targets"] == table.json("targets", "list")["targets"]
    assert table.run("status", "articles") == table.run("targets", "show", "articles")
    quiet = table.start("reindex", "articles", "--json", "--no-progress")
    assert (quiet.wait(), quiet.err) == (0, "")
    assert json.loads(quiet.out)["unchanged"] == 1


def test_help_lists_options_by_what_they_are_for(commands: Commands) -> None:
    command = commands.start("reindex", "--help")
    assert command.wait() == 0
    titles = [line for line in command.out.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert titles == ["Database:", "Any table:", "A file:", "Model:", "Run:"]


def test_uninstall_says_what_it_would_leave(table: Table) -> None:
    table.add(1, "one")
    table.run("reindex", *DESCRIBED)
    looked = table.json("uninstall")
    assert not looked["done"]
    assert {name.rpartition(".")[2] for name in looked["removed"]} >= {"kdb_fast_runs", "kdb_fast_articles_state"}
    assert "embedding: the vectors of the target articles" in looked["left"][0]
    assert "Nothing was done" in table.run("uninstall")
    assert table.json("uninstall", "--yes")["removed"] == looked["removed"]
    assert table.json("uninstall")["removed"] == []
    assert table.vectors().keys() == {1}
    again = table.json("reindex", *DESCRIBED)
    assert again["read"] == 1
    assert sqlalchemy_url(table.address)


def test_a_column_that_is_made_is_removed_with_its_target(table: Table) -> None:
    table.add(1, "one")
    described = (*DESCRIBED[:-1], "made")
    assert "has no column made" in table.run("reindex", *described, code=4)
    assert table.json("reindex", *described, "--create")["stored"] == 1
    assert table.vectors("made").keys() == {1}
    assert table.json("reindex", "articles")["unchanged"] == 1
    removed = table.json("targets", "drop", "articles", "--with-vectors")["removed"]
    assert [name.rpartition(".")[2] for name in removed] == ["kdb_fast_articles_state", "made"]
    assert "has no column made" in table.run("reindex", *described, code=4)


def test_vectors_of_another_program_are_kept_unless_replaced(table: Table) -> None:
    table.add(1, "one", "two")
    vector = "array_fill(1, ARRAY[384])::vector" if table.is_postgresql else "zeroblob(1536)"
    execute(table.address, f"UPDATE articles SET embedding = {vector} WHERE id = 1")
    summary = table.run("reindex", *DESCRIBED)
    assert "1 with a vector of another program, left alone (--replace overwrites)" in summary
    receipt = table.json("reindex", "articles", "--replace")
    assert (receipt["stored"], receipt["unchanged"], receipt["foreign"]) == (1, 1, 0)
    table.check(1, 2)


BESIDE = (*DESCRIBED[:-2], "--into", "article_vectors")


def test_a_table_of_vectors_beside_the_table(table: Table) -> None:
    table.add(1, "one", "two", "three")
    first = table.run("reindex", *BESIDE, "--with-source")
    assert "3 of 3 records written" in first
    assert "target   article_vectors: column embedding of" in first
    assert execute(table.address, "SELECT id FROM article_vectors ORDER BY 1") == [(1,), (2,), (3,)]
    assert execute(table.address, "SELECT body FROM article_vectors_with_source WHERE id = 2") == [("two",)]
    execute(table.address, "DELETE FROM articles WHERE id = 2")
    execute(table.address, "UPDATE articles SET body = 'other' WHERE id = 3")
    receipt = table.json("reindex", "article_vectors")
    assert (receipt["stored"], receipt["unchanged"], receipt["read"]) == (1, 1, 2)
    assert execute(table.address, "SELECT id FROM article_vectors ORDER BY 1") == [(1,), (3,)]
    assert table.json("status", "article_vectors")["rows"] == 2
    assert table.json("reindex", *DESCRIBED)["stored"] == 2, "a column of the same table is another target"
    line = table.run("reindex", "--table", "articles", "--into", "article_vectors", "--name", "more", code=4)
    assert "is written by the target article_vectors already" in line
    line = table.run("reindex", "--table", "articles", "--into", "articles", "--name", "more", code=4)
    assert "is the table that is read" in line
    kind = "bigint" if table.is_postgresql else "INTEGER"
    execute(table.address, f"CREATE TABLE others (id {kind} PRIMARY KEY, body text)")
    line = table.run("reindex", "--table", "others", "--into", "article_vectors", code=4)
    assert "others does not have would be removed" in line
    line = table.run("reindex", "--query", "SELECT 1", "--key", "id", "--into", "article_vectors", code=4)
    assert "those that this query does not have would be removed" in line
    line = table.run("reindex", "--table", "others", "--into", "articles", code=4)
    assert "There is a target articles: " in line, "a column of that table, which is no table of vectors"
    if table.is_postgresql:
        line = table.run("reindex", "article_vectors", "--table", "others", "--text", "body", code=4)
        assert "DROP CONSTRAINT" in line
    assert table.json("reindex", *BESIDE)["unchanged"] == 2
    removed = table.json("targets", "drop", "article_vectors", "--with-vectors")["removed"]
    assert [name.rpartition(".")[2] for name in removed] == ["article_vectors_with_source", "article_vectors"]
    assert [t["name"] for t in table.json("targets", "list")["targets"]] == ["articles"]
    assert len(execute(table.address, "SELECT id FROM articles")) == 2


def test_a_query_is_read_into_a_table(table: Table) -> None:
    table.add(1, "one", "two", "three")
    query = ("--query", "SELECT id, title, body FROM articles WHERE id > 1")
    assert "--query has no column that could be written" in table.run("reindex", *query, "--key", "id", code=2)
    assert "--query needs --key" in table.run("reindex", *query, "--into", "chosen", code=2)
    assert "exclude each other" in table.run("reindex", *query, *BESIDE, "--key", "id", code=2)
    described = (*query, "--key", "id", "--into", "chosen")
    line = table.run("reindex", *described, "--with-source", code=2)
    assert "--with-source belongs to --into, and to a table" in line
    assert table.json("targets", "list") == {"targets": []}
    assert table.json("reindex", *described)["stored"] == 2
    assert execute(table.address, "SELECT id, content FROM chosen ORDER BY 1")[1] == (3, "Title\n\nthree")
    assert table.json("reindex", "chosen")["unchanged"] == 2
    changed = table.json("reindex", "chosen", "--query", query[1].replace("> 1", "> 2"))
    assert (changed["unchanged"], changed["deleted"]) == (1, 1)


def test_another_database_is_read(
    table: Table, postgres: Server, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    table.add(1, "one", "two")
    if table.is_postgresql:
        other = postgres.create_database()
        execute(other, "CREATE EXTENSION vector")
        request.addfinalizer(lambda: postgres.drop_database(other))
    else:
        other = replace(table.address, conninfo=str(tmp_path / "other.db"), display="other.db")
    execute(other, "CREATE TABLE written (id integer)")
    source = sqlalchemy_url(table.address)
    command = table.start("reindex", *BESIDE, "--source", source, "--json", db=other)
    assert command.wait() == 0, command.err
    assert command.receipt["stored"] == 2
    again = table.start("reindex", "article_vectors", "--json", db=other)
    assert (again.wait(), again.receipt["unchanged"]) == (0, 2), again.err
    assert execute(table.address, "SELECT 1 FROM articles WHERE embedding IS NOT NULL") == []
    assert execute(other, "SELECT count(*) FROM article_vectors") == [(2,)]


def test_what_belongs_to_a_target_is_kept_with_it(table: Table) -> None:
    table.add(1, "one", "two")
    given = ("--document-prefix", "passage: ", "--query-prefix", "query: ", "--keyword", "--index", "none")
    assert table.json("reindex", *DESCRIBED, *given)["stored"] == 2
    shown = table.json("targets", "show", "articles")
    assert (shown["document_prefix"], shown["query_prefix"], shown["index"]) == ("passage: ", "query: ", "none")
    assert shown["keyword"] == ("pg_catalog.english" if table.is_postgresql else "unicode61")
    again = table.json("reindex", "articles")
    assert (again["unchanged"], again["document_prefix"]) == (2, "passage: ")
    assert table.json("reindex", "articles", "--document-prefix", "")["stored"] == 2, "another fingerprint"
    assert table.json("reindex", "articles", "--no-keyword")["unchanged"] == 2
    assert table.json("targets", "show", "articles")["keyword"] == ""
    line = table.run("reindex", "articles", "--no-keyword", "--language", "x", code=2)
    assert "--language belongs to --keyword" in line
    assert "klingon" in table.run("reindex", "articles", "--language", "klingon", code=4)
    assert "--chunk has no place" in table.run("reindex", "articles", "--chunk", "200", code=2)
    assert len(table.json("targets", "drop", "articles")["removed"]) >= 1
    left = "sqlite_master" if not table.is_postgresql else "(SELECT relname AS name FROM pg_class) c"
    assert execute(table.address, f"SELECT name FROM {left} WHERE name LIKE 'kdb_fast_articles_state%'") == []


@in_a_file
def test_prefixes_that_a_model_asks_for_are_those_of_new_targets(table: Table) -> None:
    table.add(1, "one")
    model = ("--model", "intfloat/multilingual-e5-large")
    first = table.start("reindex", *DESCRIBED, *model, "--json")
    assert first.wait() == 0, first.err
    assert "reads 'passage: ' before each text" in first.err
    assert first.receipt["document_prefix"] == "passage: "
    table.run("targets", "drop", "articles")
    full = table.json("reindex", *DESCRIBED, *model, "--replace")
    assert full["document_prefix"] == "", "another program may embed its queries for what is there"


@in_a_file
def test_a_table_of_another_package_takes_no_prefix_by_itself(table: Table) -> None:
    execute(
        table.address,
        "CREATE TABLE embeddings (collection_id INTEGER, id TEXT, embedding BLOB, content TEXT, content_blob BLOB, "
        "content_hash BLOB, metadata TEXT, updated INTEGER, PRIMARY KEY (collection_id, id))",
    )
    execute(table.address, "INSERT INTO embeddings (collection_id, id, content) VALUES (1, 'a', 'one')")
    described = ("--table", "embeddings", "--text", "content", "--vector", "embedding")
    job = table.start("reindex", *described, "--model", "intfloat/multilingual-e5-large", "--json")
    assert job.wait() == 0, job.err
    assert "embeddings is a table of llm, which embeds its queries" in job.err
    assert (job.receipt["stored"], job.receipt["document_prefix"]) == (1, "")


@in_a_file
def test_a_file_is_read_into_a_table_of_vectors(table: Table, tmp_path: Path) -> None:
    file = tmp_path / "notes.csv"
    file.write_text('id,title,body\n1,One,first\n2,Two,"second, line"\nx,Bad,third\n')
    given = ("--from", str(file), "--into", "notes", "--key", "id:bigint", "--text", "title", "--text", "body")
    first = table.json("reindex", *given, "--max-rejects", "5", code=3)
    assert (first["stored"], first["rejected"], first["target"]["key"]) == (2, 1, ["id"])
    (reject,) = table.json("rejects", "list", "--target", "notes")["rejects"]
    assert reject["line"] == 4
    file.write_text('id,title,body\n1,One,first\n2,Two,"another"\n3,Three,third\n')
    second = table.json("reindex", "notes", "--from", str(file))
    assert (second["stored"], second["unchanged"], second["rejected"]) == (2, 1, 0)
    assert table.json("rejects", "list")["rejects"] == []
    assert execute(table.address, "SELECT id, content FROM notes ORDER BY 1")[1] == (2, "Two\n\nanother")
    line = table.run("reindex", "notes", code=2)
    assert "The target notes is filled from files. Name one: kdb-fast reindex --db" in line
    assert "--from needs --entity NAME, or --into TABLE" in table.run("reindex", "--from", str(file), code=2)
    table.add(1, "one")
    table.run("reindex", *DESCRIBED)
    assert "not a file" in table.run("reindex", "articles", "--from", str(file), code=2)
