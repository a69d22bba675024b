"""What can be known before a run is refused before anything is written, and the corrected command then works."""

from __future__ import annotations

import re
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from commands import Commands
from servers import execute
from table_commands import DESCRIBED, INTO, Table

import kdb_fast
from kdb_fast.embedding.models.files import Model


def _tables(table: Table) -> list[str]:
    """All but the application's own."""
    listed = "SELECT name FROM sqlite_master WHERE type = 'table'"
    if table.is_postgresql:
        listed = "SELECT relname FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace"
    return [name for (name,) in execute(table.address, listed) if name != "articles"]


def _refused(table: Table, *arguments: str, code: int = 2) -> str:
    line = table.run("reindex", *arguments, code=code)
    assert _tables(table) == [], "nothing was written"
    assert table.json("targets", "list")["targets"] == []
    return line


def test_sizes_of_pieces_that_leave_no_room(table: Table, minilm: Model) -> None:
    def run(**options: Any) -> kdb_fast.Receipt:
        return kdb_fast.reindex_table(
            table.address, "articles", text="body", into="vectors", model_path=minilm.path, **options
        )

    for sizes, said in (((32, 16), "twice the overlap"), ((100_000, 0), "reads at most")):
        with pytest.raises(kdb_fast.UsageError, match=said):
            run(chunk=sizes[0], overlap=sizes[1])
        assert _tables(table) == [], "nothing was written"
    assert run(chunk=32, overlap=4).stored == 2
    with pytest.raises(kdb_fast.UsageError, match="twice the overlap"):
        run(overlap=16)
    assert table.json("targets", "show", "vectors")["overlap"] == 4
    assert run().unchanged == 2


def test_sql_that_fails_on_a_row(table: Table) -> None:
    execute(table.address, 'UPDATE articles SET lang = \'{"a": "x"}\'')
    execute(table.address, "UPDATE articles SET lang = '{' WHERE id = 2")
    text = "CAST(lang AS json)->>'a'" if table.is_postgresql else "json_extract(lang, '$.a')"
    described = ("--table", "articles", "--text", text)
    for place in (("--into", "vectors"), ("--vector", "embedding")):
        line = _refused(table, *described, *place, code=4)
        assert "A row of " in line
        assert "articles cannot be read by " in line
        assert "CASE WHEN" in line
    line = _refused(table, *INTO, "--filter", f"{text} = 'x'", code=4)
    assert "articles cannot be read by " in line
    read = f"SELECT id, {text} AS text FROM articles"
    _refused(table, "--query", read, "--key", "id", "--into", "vectors", code=4)
    assert table.json("reindex", *described, "--into", "vectors", "--filter", "id = 1")["stored"] == 1


def test_a_view_of_what_is_no_table_of_vectors(table: Table) -> None:
    line = _refused(table, *DESCRIBED, "--with-source")
    assert "--with-source belongs to --into" in line


@pytest.mark.parametrize("index", ["postgresql"], indirect=True)
def test_a_column_that_could_not_be_written_is_not_made(table: Table) -> None:
    execute(table.address, "CREATE RULE kept AS ON UPDATE TO articles DO INSTEAD NOTHING")
    line = _refused(table, *DESCRIBED[:-1], "made", "--create", code=4)
    assert "The rule kept of public.articles rewrites its updates" in line
    columns = "SELECT 1 FROM pg_attribute WHERE attrelid = 'articles'::regclass AND attname = 'made'"
    assert execute(table.address, columns) == []
    execute(table.address, "DROP RULE kept ON articles")
    assert table.json("reindex", *DESCRIBED[:-1], "made", "--create")["stored"] == 2


def test_a_table_of_sqlite_vec_in_postgresql(table: Table) -> None:
    if table.is_postgresql:  # it was made as a plain table, and then no search could read it
        assert "--vec0 makes a table of sqlite-vec" in _refused(table, *INTO, "--vec0")


def test_words_of_ours_are_not_in_what_is_said_of_sql(table: Table) -> None:
    line = _refused(table, *INTO, "--filter", "lang = ", code=4)
    assert "syntax error at its end" in line
    line = _refused(table, *INTO[:2], "--text", "nosuch || 'x'", *INTO[4:], code=4)
    assert r"\n" not in line
    line = _refused(table, "--query", "SELECT id, body FROM articles", "--key", "idd", "--into", "v", code=4)
    assert line.startswith("kdb-fast: The query has no column idd; nearest: id.")


def test_a_change_that_is_refused_is_not_said_to_be_one(table: Table) -> None:
    assert table.json("reindex", *INTO)["stored"] == 2
    command = table.start("reindex", "vectors", "--text", "nosuch")
    assert command.wait() == 4
    assert "is changed" not in command.err


def test_a_query_without_quotes(table: Table) -> None:
    line = table.run("search", "angry", "customer", code=4)
    assert "put them in quotes: kdb-fast search" in line
    assert "'angry customer'" in line


def test_values_are_shown_as_sql_writes_them(table: Table) -> None:
    assert table.json("reindex", *INTO, "--keyword")["stored"] == 2
    out = table.run("search", "vectors", "one", "--mode", "keyword", "--columns", "lang")
    assert "lang: NULL" in out


def test_vectors_of_another_program_are_not_called_up_to_date(table: Table) -> None:
    table.run("reindex", *DESCRIBED)
    table.run("targets", "drop", "articles")
    assert "nothing changed: 0 records are up to date, 2 left alone." in table.run("reindex", *DESCRIBED, "--keyword")
    found = table.start("search", "articles", "one")
    assert found.wait() == 0, found.err
    assert "note: By keyword only. Of " in found.err
    assert "no vector is known to be of any model" in found.err


def test_what_is_wrong_with_another_database_names_it(table: Table, tmp_path: Path) -> None:
    """And not the one that is written."""
    if table.is_postgresql:
        empty = "postgresql://nobody@127.0.0.1:1/none"
        missing = {
            empty: "Cannot connect to postgresql://127.0.0.1:1/none: .*Check host and port in --source, and",
            "postgresql://h/d?shema=x": "--source has 'shema' after the [?], which is no option",
            f"embedded:{tmp_path}/none": "There is no database in embedded:.*Name one with --source",
        }
    else:
        sqlite3.connect(tmp_path / "empty.db").execute("CREATE TABLE other (id INTEGER PRIMARY KEY, title TEXT)")
        empty = f"sqlite:///{tmp_path}/empty.db"
        missing = {
            f"sqlite:///{tmp_path}/none.db": r"There is no SQLite file .*Check the path after sqlite:/// in --source",
            "sqlite:///": "--source is not a complete SQLite address",
            "mysql://h/d": "--source starts with 'mysql:'",
        }
    for source, said in missing.items():
        for command in (*INTO, "--source", source), (*DESCRIBED, f"--source={source}"):
            code = 2 if said.startswith("--source") else 5
            assert re.search(said, _refused(table, *command, code=code))
    assert not (tmp_path / "none").exists()
    if not table.is_postgresql:
        line = _refused(table, *INTO, "--source", empty, code=4)
        assert f"kdb-fast: --source {empty}: There is no table articles; there is: other." in line
        line = _refused(table, "--table", "other", "--text", "nope", "--into", "v", "--source", empty, code=4)
        assert f"kdb-fast: --source {empty}: other has no column nope" in line
        query = ("--query", "SELECT id, nope FROM other", "--key", "id", "--into", "v", "--source", empty)
        assert f"kdb-fast: --source {empty}: The query cannot be read: no such column: nope" in _refused(
            table, *query, code=4
        )


def test_an_address_of_the_environment_is_named_so(tmp_path: Path, commands: Commands) -> None:
    command = commands.start("status", KDB_FAST_DB=f"sqlite:///{tmp_path}/none.db")
    assert command.wait() == 5
    assert "Check the path after sqlite:/// in KDB_FAST_DB" in command.err
    with pytest.raises(kdb_fast.DatabaseError, match="sqlite:/// in url"):
        kdb_fast.reindex_table(f"sqlite:///{tmp_path}/none.db", "articles", text="body", into="vectors")
