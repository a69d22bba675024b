"""Every kind of target through PgBouncer, in both of its modes; another client has left its own settings there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import psycopg
import pytest
from commands import Commands, MakeJob
from pooler import pooler
from search_engines import Words
from servers import connect_as, execute
from table_commands import DESCRIBED, INTO, Table

from kdb_fast import DatabaseError, SearchEngine
from kdb_fast.db.address import DatabaseAddress

LEFT_BEHIND = (
    "SET DateStyle = 'SQL, DMY'; SET TimeZone = 'Asia/Kathmandu'; SET bytea_output = escape; "
    "SET extra_float_digits = -15; SET default_transaction_isolation = 'repeatable read'"
)

SESSIONS = {"transaction": 3, "session": 12}


@pytest.fixture(params=SESSIONS)
def pooled(request: pytest.FixtureRequest, database: DatabaseAddress) -> Iterator[DatabaseAddress]:
    """The database through a pooler."""
    with pooler(database, request.param, SESSIONS[request.param]) as address:
        with contextlib.ExitStack() as clients:
            for _ in range(3):
                clients.enter_context(psycopg.connect(address.conninfo)).execute(LEFT_BEHIND)
        yield address


@pytest.fixture
def table(commands: Commands, pooled: DatabaseAddress) -> Iterator[Table]:
    found = Table(commands, pooled)
    found.add(1, *(f"text {number}" for number in range(30)))
    yield found
    commands.clear()


TARGETS = {
    "column": (*DESCRIBED, "--keyword", "--vacuum"),
    "table": (*INTO, "--keyword", "--with-source"),
    "pieces": (*INTO, "--chunk", "40"),
    "query": ("--query", "SELECT id, body FROM articles", "--key", "id", "--into", "vectors"),
}


@pytest.mark.parametrize(
    ("pooled", "kind"),
    [
        *((mode, kind) for mode in SESSIONS for kind in ("column", "table")),
        ("transaction", "pieces"),
        ("transaction", "query"),
    ],
    indirect=["pooled"],
)
def test_a_table_through_a_pooler(table: Table, kind: str) -> None:
    name = "articles" if kind == "column" else "vectors"
    assert table.json("reindex", *TARGETS[kind])["stored"] == 30
    execute(table.address, f"CREATE INDEX near ON {name} USING hnsw (embedding vector_cosine_ops)")
    execute(table.address, "UPDATE articles SET body = body || ' and more' WHERE id < 20")
    execute(table.address, "DELETE FROM articles WHERE id > 28")
    execute(table.address, "ANALYZE")
    changed = table.json("reindex", name, "--index", "defer")
    assert (changed["stored"], changed["unchanged"]) == (19, 9)
    assert changed["index"].endswith("near")
    again = table.json("reindex", name, "--force", "--index", "concurrently")
    assert (again["stored"], again["index"][:4]) == (28, "kept")
    if "--keyword" in TARGETS[kind]:
        assert "text 7" in table.run("search", name, '"text 7 and more"', "--mode", "keyword", "--columns", "body")
    if kind == "column":
        table.check(*range(1, 29))
    assert execute(table.address, "SELECT indisvalid FROM pg_index WHERE indexrelid = 'near'::regclass") == [(True,)]
    assert "28" in table.run("targets", "list")
    assert "is forgotten" in table.run("targets", "drop", name, "--with-vectors")


@pytest.mark.parametrize("kind", ["query", "column"])
def test_one_session_is_enough(commands: Commands, database: DatabaseAddress, kind: str) -> None:
    """The transaction in which a query is read would keep it from all others for as long as the run goes on."""
    with pooler(database, "transaction", 1) as pooled:
        table = Table(commands, pooled)
        table.add(1, *(f"text {number}" for number in range(250)))
        for change, fates in (("", (250, 0)), ("UPDATE articles SET body = 'another' WHERE id = 7", (1, 249))):
            if change:
                execute(database, change)
            command = table.start("reindex", *TARGETS[kind], "--json", KDB_FAST_SILENCE="1")
            assert command.wait() == 0, command.err
            receipt = command.receipt
            told = [note for note in receipt["warnings"] if "has one session only" in note]
            assert ((receipt["stored"], receipt["unchanged"]), len(told)) == (fates, kind == "query")
        if kind == "column":
            assert "text 8" in table.run("search", "articles", '"text 8"', "--mode", "keyword", "--columns", "body")
        commands.clear()


def test_the_index_of_kameleondb_through_a_pooler(
    database: DatabaseAddress, pooled: DatabaseAddress, make_job: MakeJob
) -> None:
    job = make_job(pooled, [f"note {number}" for number in range(30)])
    receipt = job.run()
    # The pooler keeps its sessions with the server.
    execute(database, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'postgres' "
            "AND datname = current_database() AND pid <> pg_backend_pid()")  # fmt: skip
    job.database = database
    job.check(receipt)


def test_a_pooler_with_too_few_sessions_is_named(database: DatabaseAddress, make_job: MakeJob) -> None:
    """It lets a client in, and then says nothing for two minutes."""
    with pooler(database, "session", 1) as address:
        job = make_job(address, ["note"])
        run = job.start(KDB_FAST_SILENCE="0.5", KDB_FAST_PATIENCE="1")
        assert run.wait() == 5
        assert "a pooler in front of it has none left" in run.err


def test_a_pooler_with_too_few_sessions_for_a_search_is_named(
    database: DatabaseAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KDB_FAST_SILENCE", "0.5")
    execute(database, "CREATE EXTENSION vector")
    with pooler(database, "session", 2) as address, SearchEngine(address, Words()) as engine:
        engine.index_record("Note", "1", "one two")
        with pytest.raises(DatabaseError, match="a pooler in front of it has none left"):
            engine.search("two")


def test_a_pooler_takes_no_options(database: DatabaseAddress, make_job: MakeJob) -> None:
    with pooler(database, "transaction", 1) as address:
        run = make_job(connect_as(address, options="-csearch_path=public"), ["note"]).start()
        assert run.wait() == 5
        assert "unsupported startup parameter" in run.err
        assert "ALTER ROLE" in run.err
