"""Triggers of the search table that set ``updated_at`` or change what is written: the next run embeds nothing all the
same, says why, and still sees what other programs write."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import poison_worker
import pytest
import stub_command
from search_engines import Hashes, new_database, sqlalchemy_url
from servers import Server, connect_as, database_name, execute

from kdb_fast import cli
from kdb_fast.db.address import DatabaseAddress
from kdb_fast.engine import inline
from kdb_fast.indexing import run_embedding
from kdb_fast.ipc.row_block import NO_VALUE
from kdb_fast.ipc.slab import Row, Slab, SlabShape
from kdb_fast.records import Record
from kdb_fast.search.commands import run_status
from kdb_fast.search.engine import SearchEngine
from kdb_fast.stores import open_store
from kdb_fast.stores.base import FlushResult, FlushSlot

N = 12

Receipt = dict[str, Any]
Job = Callable[..., Receipt]

POSTGRESQL = {
    "clock, before": "BEGIN NEW.updated_at := clock_timestamp(); RETURN NEW; END",
    "whole seconds": "BEGIN NEW.updated_at := date_trunc('second', clock_timestamp()); RETURN NEW; END",
    "constant": "BEGIN NEW.updated_at := '2020-01-01'; RETURN NEW; END",
    "null": "BEGIN NEW.updated_at := NULL; RETURN NEW; END",
    "infinity": "BEGIN NEW.updated_at := 'infinity'; RETURN NEW; END",
}
BEFORE = (
    "CREATE FUNCTION touch() RETURNS trigger LANGUAGE plpgsql AS $$ {body} $$; "
    "CREATE TRIGGER touch BEFORE {events} ON kdb_search FOR EACH ROW {when} EXECUTE FUNCTION touch()"
)
AFTER = (
    "CREATE FUNCTION touch() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN IF pg_trigger_depth() = 1 THEN "
    "UPDATE kdb_search SET updated_at = clock_timestamp() WHERE id = NEW.id; END IF; RETURN NULL; END $$; "
    "CREATE TRIGGER touch AFTER INSERT OR UPDATE ON kdb_search FOR EACH ROW EXECUTE FUNCTION touch()"
)
SQLITE = {
    "now": "strftime('%Y-%m-%d %H:%M:%f', 'now', '+1 second')",
    "whole seconds": "CURRENT_TIMESTAMP",
    "julian day": "julianday('now')",
    "null": "NULL",
}
SCRIPTS = {
    **{("postgresql", name): BEFORE.format(body=body, events="INSERT OR UPDATE", when="")
       for name, body in POSTGRESQL.items()},
    ("postgresql", "insert only"): BEFORE.format(body=POSTGRESQL["clock, before"], events="INSERT", when=""),
    ("postgresql", "update only"): BEFORE.format(body=POSTGRESQL["clock, before"], events="UPDATE", when=""),
    ("postgresql", "where changed"): BEFORE.format(
        body=POSTGRESQL["clock, before"], events="UPDATE", when="WHEN (OLD.content <> NEW.content)"),
    ("postgresql", "after"): AFTER,
    ("postgresql", "type"): "ALTER TABLE kdb_search ALTER COLUMN updated_at TYPE timestamptz(0)",
    **{("sqlite", name): "".join(
        f"CREATE TRIGGER touch_{event} AFTER {event} ON kdb_search BEGIN "
        f"UPDATE kdb_search SET updated_at = {value} WHERE rowid = NEW.rowid; END;" for event in ("INSERT", "UPDATE"))
       for name, value in SQLITE.items()},
}  # fmt: skip
"""Ways in which ``updated_at`` is not what was written."""


@pytest.fixture(autouse=True)
def stubs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stub for the model."""
    monkeypatch.setattr(run_embedding, "resolve", lambda *args, **options: stub_command.MODEL)
    monkeypatch.setattr(inline, "Encoder", poison_worker.StubEncoder)


@pytest.fixture
def index(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> DatabaseAddress:
    address = new_database(kind, request, tmp_path)
    execute(address, "CREATE EXTENSION vector" if kind == "postgresql" else "CREATE TABLE other (a)")
    with contextlib.closing(open_store(address, "test")) as store:
        store.prepare(384)
    return address


@pytest.fixture
def run(index: DatabaseAddress, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Job:
    """Reindexes a file of N notes; a text may be given for some of them."""

    def job(address: DatabaseAddress = index, **texts: str) -> Receipt:
        lines = [{"id": f"r{i}", "text": texts.get(f"r{i}", f"copper kettle number {i}")} for i in range(N)]
        file = tmp_path / "notes.jsonl"
        file.write_text("\n".join(map(json.dumps, lines)))
        capfd.readouterr()
        command = ["reindex", "--db", sqlalchemy_url(address), "--from", str(file), "--entity", "Note", "--json"]
        code = cli.run(command)
        shown = capfd.readouterr()
        assert code == 0, shown.err
        receipt: Receipt = json.loads(shown.out)
        receipt["shown"] = shown.err
        return receipt

    return job


def counts(receipt: Receipt) -> tuple[int, int, int]:
    return receipt["stored"] + receipt["reused"], receipt["unchanged"], receipt["superseded"]


def install(index: DatabaseAddress, script: str) -> None:
    for statement in script.split("END;") if index.dialect == "sqlite" else [script]:
        if statement.strip():
            execute(index, statement + ("END" if index.dialect == "sqlite" else ""))


@pytest.mark.parametrize(("kind", "trigger"), SCRIPTS)
def test_the_next_run_embeds_nothing_where_a_trigger_sets_the_time(
    kind: str, trigger: str, index: DatabaseAddress, run: Job
) -> None:
    install(index, SCRIPTS[kind, trigger])
    first = run()
    assert counts(first) == (N, 0, 0)
    if trigger not in {"update only", "where changed"}:
        (warning,) = first["warnings"]
        assert "updated_at of" in warning
        assert ("touch" in warning) == (trigger != "type")
        assert warning in first["shown"]
    for _ in range(2):
        again = run()
        assert counts(again) == (0, N, 0)
        assert again["warnings"] == []
    # An update, and the run after it.
    changed = run(r1="silver spoon")
    assert counts(changed) == (1, N - 1, 0)
    assert counts(run(r1="silver spoon")) == (0, N, 0)
    state = run_status(index)
    assert (state.indexed, state.stale) == (N, 0)


OTHERS = {
    "content": "UPDATE kdb_search SET content = 'theirs' WHERE record_id = 'r3'",
    "embedding": "UPDATE kdb_search SET embedding = (SELECT embedding FROM kdb_search WHERE record_id = 'r4') "
    "WHERE record_id = 'r3'",
    "model": "UPDATE kdb_search SET model = 'theirs' WHERE record_id = 'r3'",
    "no embedding": "UPDATE kdb_search SET embedding = NULL WHERE record_id = 'r3'",
}


@pytest.mark.parametrize(
    ("kind", "trigger"), [("postgresql", "clock, before"), ("postgresql", "constant"), ("sqlite", "whole seconds")]
)
def test_what_another_program_writes_is_seen_beside_such_a_trigger(
    kind: str, trigger: str, index: DatabaseAddress, run: Job
) -> None:
    """Also within the second in which the row was written."""
    install(index, SCRIPTS[kind, trigger])
    assert counts(run()) == (N, 0, 0)
    for statement in OTHERS.values():
        execute(index, statement)
        if "NULL" not in statement:
            assert run_status(index).stale == 1
        assert counts(run()) == (1, N - 1, 0), statement
        assert counts(run()) == (0, N, 0)


@pytest.mark.parametrize(("kind", "trigger"), [("postgresql", "clock, before"), ("sqlite", "now")])
def test_a_row_of_this_run_is_known_beside_such_a_trigger(kind: str, trigger: str, index: DatabaseAddress) -> None:
    """A later record of its key is written; not over what another program has written in between."""
    install(index, SCRIPTS[kind, trigger])
    with contextlib.closing(open_store(index, "test")) as store:
        store.prepare(384)
        spec = store.begin_run(fingerprint="f", model="m", dimensions=384, wait=0)
        slab = Slab.local(SlabShape(slots=1, rows=4, dimensions=384))

        def write(number: int, text: str) -> FlushResult:
            slab.slots[0].put(number, [Row(Record(("Note", "a"), text), True, 1)], [NO_VALUE])
            slab.slots[0].vectors[:] = number / 8
            return store.flush(spec, number, [FlushSlot(slab.slots[0], frozenset())], [], [])

        assert [write(1, "first").rows, write(2, "second").rows] == [1, 1]
        execute(index, "UPDATE kdb_search SET content = 'theirs'")
        assert write(3, "third").superseded == ((0, 0),)
    assert execute(index, "SELECT content FROM kdb_search") == [("theirs",)]


@pytest.mark.parametrize("kind", ["postgresql", "sqlite"])
def test_a_trigger_that_changes_texts_is_named(kind: str, index: DatabaseAddress, run: Job) -> None:
    if kind == "postgresql":
        body = "BEGIN NEW.content := upper(NEW.content); RETURN NEW; END"
        install(index, BEFORE.format(body=body, events="INSERT OR UPDATE", when=""))
    else:
        install(index, "CREATE TRIGGER touch AFTER INSERT ON kdb_search BEGIN UPDATE kdb_search "
                       "SET content = upper(NEW.content) WHERE rowid = NEW.rowid; END;")  # fmt: skip
    (warning,) = run()["warnings"]
    assert "do not hold the text" in warning
    assert "trigger touch" in warning


@pytest.mark.parametrize("kind", ["postgresql", "sqlite"])
def test_a_trigger_that_changes_nothing_is_not_spoken_of(kind: str, index: DatabaseAddress, run: Job) -> None:
    if kind == "postgresql":
        install(index, BEFORE.format(body="BEGIN RETURN NEW; END", events="INSERT OR UPDATE", when=""))
    else:
        install(index, "CREATE TRIGGER touch AFTER INSERT ON kdb_search BEGIN SELECT 1; END;")
    for expected in ((N, 0, 0), (0, N, 0)):
        receipt = run()
        assert (counts(receipt), receipt["warnings"]) == (expected, [])


@pytest.mark.parametrize("kind", ["postgresql", "sqlite"])
def test_a_trigger_that_comes_or_goes_later_costs_nothing(kind: str, index: DatabaseAddress, run: Job) -> None:
    assert counts(run()) == (N, 0, 0)
    assert execute(index, "SELECT * FROM kdb_search LIMIT 1")
    install(index, SCRIPTS[kind, "clock, before" if kind == "postgresql" else "now"])
    assert counts(run()) == (0, N, 0)
    assert counts(run(r1="silver spoon")) == (1, N - 1, 0)
    assert counts(run(r1="silver spoon")) == (0, N, 0)
    for name in ["touch ON kdb_search"] if kind == "postgresql" else ["touch_INSERT", "touch_UPDATE"]:
        execute(index, f"DROP TRIGGER {name}")
    assert counts(run(r1="silver spoon")) == (0, N, 0)
    assert counts(run(r1="golden spoon")) == (1, N - 1, 0)
    assert counts(run(r1="golden spoon")) == (0, N, 0)


@pytest.mark.parametrize("kind", ["postgresql"])
def test_a_copy_of_the_database_is_as_unchanged_as_the_original(
    kind: str, index: DatabaseAddress, run: Job, postgres: Server
) -> None:
    """As a dump and restore: other transaction numbers, places and object numbers."""
    install(index, SCRIPTS[kind, "clock, before"])
    run()
    execute(
        index,
        "CREATE TABLE copy AS SELECT * FROM kdb_search ORDER BY record_id DESC; ALTER TABLE kdb_search DISABLE TRIGGER "
        "touch; ALTER TABLE kdb_search DROP COLUMN tsv; DELETE FROM kdb_search; ALTER TABLE copy DROP COLUMN tsv; "
        "INSERT INTO kdb_search SELECT * FROM copy; ALTER TABLE kdb_search ADD COLUMN tsv tsvector "
        "GENERATED ALWAYS AS (to_tsvector('english', content)) STORED; ALTER TABLE kdb_search ENABLE TRIGGER touch",
    )
    assert counts(run()) == (0, N, 0)
    copy = postgres.create_database(index)
    try:
        assert database_name(copy) != database_name(index)
        assert counts(run(copy)) == (0, N, 0)
    finally:
        postgres.drop_database(copy)


@pytest.mark.parametrize("kind", ["sqlite"])
def test_a_copy_of_an_sqlite_file_is_as_unchanged_as_the_original(
    kind: str, index: DatabaseAddress, run: Job, tmp_path: Path
) -> None:
    import sqlite3

    install(index, SCRIPTS[kind, "now"])
    run()
    execute(index, "DELETE FROM kdb_search WHERE record_id = 'r0'")
    run()
    execute(index, "VACUUM")
    assert counts(run()) == (0, N, 0)
    execute(index, "DROP TABLE kdb_search_fts")  # sqlite3's dump cannot restore it; the next run builds it
    with contextlib.closing(sqlite3.connect(index.conninfo)) as source:
        script = "\n".join(source.iterdump())
    copy = DatabaseAddress("sqlite", str(tmp_path / "copy.db"), "copy")
    with contextlib.closing(sqlite3.connect(copy.conninfo)) as target:
        target.executescript(script)
    assert counts(run(copy)) == (0, N, 0)


@pytest.mark.parametrize("kind", ["postgresql"])
def test_a_role_that_may_not_add_the_column_is_told_what_the_owner_must_run(
    kind: str, index: DatabaseAddress, run: Job, postgres: Server
) -> None:
    install(index, SCRIPTS[kind, "clock, before"])
    tables = ("kdb_search", "kdb_fast_runs", "kdb_fast_rejects", "kdb_fast_state")
    rights = [f"SELECT, INSERT, UPDATE, DELETE ON {table}" for table in tables]
    role = postgres.create_role(index, *rights, "SELECT ON kdb_fast_migrations")
    address = connect_as(index, user=role.conninfo.partition("user=")[2].split()[0])
    for _ in range(2):
        receipt = run(address)
        (warning,) = receipt["warnings"]
        assert (counts(receipt), "embedded again in every run" in warning) == ((N, 0, 0), True)
    execute(index, warning.rpartition("Let the owner run: ")[2])
    assert counts(run(address)) == (N, 0, 0)
    assert counts(run(address)) == (0, N, 0)


@pytest.mark.parametrize(("kind", "trigger"), [("postgresql", "clock, before"), ("sqlite", "now")])
def test_the_library_writes_seals_and_searches_find_its_vectors(
    kind: str, trigger: str, index: DatabaseAddress
) -> None:
    install(index, SCRIPTS[kind, trigger])
    if kind == "postgresql":
        execute(index, "ALTER TABLE kdb_search ALTER COLUMN embedding TYPE vector")
    with SearchEngine(sqlalchemy_url(index), Hashes(384)) as search:
        search.index_records_batch([("Note", f"r{i}", f"copper kettle {i}") for i in range(N)])
        search.index_record("Note", "r0", "silver spoon")
        assert [(row.indexed, row.stale) for row in search.get_status()] == [(N, 0)]
        assert search.search("silver spoon", limit=1)[0].id == "r0"
    if kind == "sqlite":
        join = "kdb_search s JOIN kdb_fast_vectors v ON v.search_id = s.id AND v.at = s.updated_at"
        assert execute(index, f"SELECT count(*) FROM {join}") == [(N,)]
