"""What only PostgreSQLIndexStore does: roles and rights, late words of a dead run, search indexes, lost connections.

What every store does is in ``test_store_contract.py``.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from servers import Server, connect_as, cosine, eventually, execute, role_name
from store_harness import (
    DIMENSIONS,
    FINGERPRINT,
    PostgreSQLHarness,
    begin,
    contents,
    flush,
    fresh,
    looked_up,
    lookup,
    slot_of,
    vector_of,
)

from kdb_fast.db.address import DatabaseAddress
from kdb_fast.errors import DatabaseError, LockedError, SchemaError
from kdb_fast.ipc.row_block import NO_VALUE
from kdb_fast.stores.base import FlushResult, RunSpec
from kdb_fast.stores.postgresql import runs as pg_runs
from kdb_fast.stores.postgresql.index_store import PostgreSQLIndexStore

OpenStore = Callable[..., PostgreSQLIndexStore]


@pytest.fixture
def open_store() -> Iterator[OpenStore]:
    """Opens stores that are closed after the test."""
    with contextlib.ExitStack() as stack:

        def open_one(address: DatabaseAddress, **arguments: Any) -> PostgreSQLIndexStore:
            store = PostgreSQLIndexStore(address, "test", **arguments)
            stack.callback(store.close)
            return store

        yield open_one


@pytest.fixture
def store(database: DatabaseAddress, open_store: OpenStore) -> PostgreSQLIndexStore:
    """A store on a new database, prepared."""
    store = open_store(database)
    store.prepare(DIMENSIONS)
    return store


@pytest.fixture
def run(store: PostgreSQLIndexStore) -> RunSpec:
    return begin(store)


def index_definitions(address: DatabaseAddress) -> dict[str, str]:
    return dict(execute(address, "SELECT indexname, indexdef FROM pg_indexes WHERE tablename = 'kdb_search'"))


# -- prepare -----------------------------------------------------------------------------------------------


def test_prepare_creates_the_table_that_kameleondb_creates(
    database: DatabaseAddress, store: PostgreSQLIndexStore
) -> None:
    made = execute(database, PostgreSQLHarness.shape)
    script = PostgreSQLHarness.table.replace("WITH (m=8, ef_construction=32)", "")
    execute(database, f"DROP TABLE kdb_search; {script}")
    assert made == execute(database, PostgreSQLHarness.shape)
    assert ("embedding", f"vector({DIMENSIONS})", False, "", None) in made
    indexes = index_definitions(database)
    assert indexes["ix_kdb_search_vector"].endswith("USING hnsw (embedding vector_cosine_ops)")
    assert indexes["ix_kdb_search_fts"].endswith("USING gin (tsv)")


def test_refuses_another_dimension(
    database: DatabaseAddress, store: PostgreSQLIndexStore, open_store: OpenStore
) -> None:
    with pytest.raises(SchemaError, match=f"holds vectors of {DIMENSIONS} dimensions; the model gives 12"):
        open_store(database).prepare(12)
    assert execute(database, "SELECT count(*) FROM kdb_fast_runs") == [(0,)]


def test_refuses_more_dimensions_than_an_index_can_hold(database: DatabaseAddress, open_store: OpenStore) -> None:
    with pytest.raises(SchemaError, match="3000 dimensions; a pgvector HNSW index holds at most 2000"):
        open_store(database).prepare(3000)
    assert execute(
        database, "SELECT to_regclass('kdb_search'), count(*) FROM pg_extension WHERE extname = 'vector'"
    ) == [(None, 0)]


def test_refuses_a_table_without_the_unique_constraint(database: DatabaseAddress, open_store: OpenStore) -> None:
    execute(database, PostgreSQLHarness.table)
    execute(database, "ALTER TABLE kdb_search DROP CONSTRAINT kdb_search_entity_name_record_id_key")
    with pytest.raises(SchemaError, match="no unique constraint") as caught:
        open_store(database).prepare(DIMENSIONS)
    execute(database, caught.value.remedy.removeprefix("Run: "))
    open_store(database).prepare(DIMENSIONS)


@pytest.mark.parametrize(("size", "fits"), [(DIMENSIONS, True), (5, False)])
def test_column_without_a_dimension_is_judged_by_its_rows(
    database: DatabaseAddress, open_store: OpenStore, size: int, fits: bool
) -> None:
    script = PostgreSQLHarness.any_table.replace("vector({size})", "vector")
    execute(database, script[: script.index("CREATE INDEX ix_kdb_search_vector")])
    execute(
        database,
        "INSERT INTO kdb_search (id, entity_name, record_id, content, embedding) VALUES ('1', 'Note', 'x', 'x', %s)",
        str([0.5] * size),
    )
    if fits:
        store = open_store(database)
        store.prepare(DIMENSIONS)
        assert flush(store, begin(store), slot_of(fresh(("a", "text")))).rows == 1
        assert store.finish_index(lambda what: None).text == "kept"
    else:
        with pytest.raises(SchemaError, match=f"holds vectors of 5 dimensions; the model gives {DIMENSIONS}"):
            open_store(database).prepare(DIMENSIONS)


def test_missing_extension_and_no_right_to_create_it(
    postgres: Server, database: DatabaseAddress, open_store: OpenStore
) -> None:
    role = postgres.create_role(database, "ALL ON SCHEMA public")
    with pytest.raises(SchemaError, match="pgvector is not installed in this database") as caught:
        open_store(role).prepare(DIMENSIONS)
    assert "CREATE EXTENSION vector" in caught.value.remedy


def test_extension_outside_the_search_path(postgres: Server, database: DatabaseAddress, open_store: OpenStore) -> None:
    execute(database, "CREATE SCHEMA elsewhere; CREATE EXTENSION vector SCHEMA elsewhere")
    role = postgres.create_role(database, "ALL ON SCHEMA public")
    with pytest.raises(SchemaError, match="installed in the schema elsewhere, which the role") as caught:
        open_store(role).prepare(DIMENSIONS)
    execute(database, caught.value.remedy.removeprefix("Let its owner run: "))
    open_store(role).prepare(DIMENSIONS)


def test_role_that_may_not_create_tables(postgres: Server, database: DatabaseAddress, open_store: OpenStore) -> None:
    execute(database, "CREATE EXTENSION vector")
    role = postgres.create_role(database)
    with pytest.raises(
        SchemaError, match=f"'{role_name(role)}' may not prepare the index: permission denied"
    ) as caught:
        open_store(role).prepare(DIMENSIONS)
    assert "GRANT CREATE ON SCHEMA" in caught.value.remedy


ALL_RIGHTS = [
    f"SELECT, INSERT, UPDATE, DELETE ON {table}"
    for table in ("kdb_search", "kdb_fast_runs", "kdb_fast_rejects", "kdb_fast_state")
] + ["SELECT ON kdb_fast_migrations"]


def test_role_that_lacks_rights_is_told_the_grants(
    postgres: Server, database: DatabaseAddress, store: PostgreSQLIndexStore, open_store: OpenStore
) -> None:
    role = postgres.create_role(database, "SELECT, INSERT, UPDATE ON kdb_search", *ALL_RIGHTS[1:])
    with pytest.raises(SchemaError, match=r"lacks rights: DELETE ON public\.kdb_search") as caught:
        open_store(role).prepare(DIMENSIONS)
    assert caught.value.remedy == f"Let the owner run: GRANT DELETE ON public.kdb_search TO {role_name(role)};"
    execute(database, caught.value.remedy.removeprefix("Let the owner run: "))
    open_store(role).prepare(DIMENSIONS)


def test_role_that_only_writes_leaves_the_index_to_the_owner(
    postgres: Server, database: DatabaseAddress, store: PostgreSQLIndexStore, open_store: OpenStore
) -> None:
    writer = open_store(postgres.create_role(database, *ALL_RIGHTS))
    writer.prepare(DIMENSIONS)
    run = begin(writer)
    assert flush(writer, run, slot_of(fresh(("a", "one"), ("b", "two")))).rows == 2
    assert flush(writer, run, slot_of(looked_up(writer, ("a", "three")))).rows == 1
    assert contents(database) == {"a": "three", "b": "two"}
    before = index_definitions(database)
    assert writer.drop_index().text.startswith("kept: this role does not own public.kdb_search")
    assert index_definitions(database) == before
    execute(database, "DROP INDEX ix_kdb_search_vector")
    outcome = writer.finish_index(lambda what: None)
    assert outcome.text == "not built: this role does not own public.kdb_search"
    assert "USING hnsw" in outcome.warnings[0]


# -- the lock ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gone", "late", "states"),
    [
        (True, "heartbeat_at = clock_timestamp()", [("abandoned",), ("running",)]),
        (True, "state = 'failed'", [("failed",), ("running",)]),
        (False, "state = 'failed'", [("failed",), ("running",)]),
        (False, "heartbeat_at = clock_timestamp()", [("running",)]),
    ],
)
def test_late_words_of_a_dead_run(
    database: DatabaseAddress,
    store: PostgreSQLIndexStore,
    run: RunSpec,
    monkeypatch: pytest.MonkeyPatch,
    gone: bool,
    late: str,
    states: list[tuple[str]],
) -> None:
    execute(database, "UPDATE kdb_fast_runs SET host = 'elsewhere', heartbeat_at = now() - interval '1 hour'")

    def look(host: str, pid: int, started: float) -> bool:
        """Between the look at the run and its end, what a network held back arrives."""
        execute(database, f"UPDATE kdb_fast_runs SET {late} WHERE run = %s", run.number)
        return gone

    monkeypatch.setattr(pg_runs, "process_is_gone", look)
    if len(states) == 2:
        assert begin(store).number > run.number
    else:
        with pytest.raises(LockedError, match=f"Run {run.number} holds the index"):
            begin(store)
    assert execute(database, "SELECT state FROM kdb_fast_runs ORDER BY run") == states


# -- rows --------------------------------------------------------------------------------------------------


def test_row_that_was_never_updated_has_no_version(database: DatabaseAddress, store: PostgreSQLIndexStore) -> None:
    execute(database, "INSERT INTO kdb_search (id, entity_name, record_id, content) VALUES ('1', 'Note', 'a', 'x')")
    assert lookup(store, "a")["a"].row_version == NO_VALUE


def test_text_with_too_many_words_for_full_text_search_is_rejected(
    database: DatabaseAddress, store: PostgreSQLIndexStore, run: RunSpec
) -> None:
    words = " ".join(f"w{i:05x}" for i in range(130_000))
    assert 900_000 < len(words) < 1_000_000
    result = flush(store, run, slot_of(fresh(("a", "one"), ("big", words), ("b", "two"))))
    assert result.rows == 2
    assert result.rejected == ((0, 1, "too_large", "the database refused the row with SQLSTATE 54000"),)
    assert contents(database) == {"a": "one", "b": "two"}


# -- the indexes -------------------------------------------------------------------------------------------


def no_beat(what: str) -> None:
    pass


def test_index_is_built_again_exactly_as_it_was_even_after_a_crash(
    database: DatabaseAddress, open_store: OpenStore
) -> None:
    execute(database, PostgreSQLHarness.table)
    execute(
        database, "CREATE INDEX my_words ON kdb_search USING gin (to_tsvector('simple', content)) WITH (fastupdate=off)"
    )
    first = open_store(database)
    first.prepare(DIMENSIONS)
    before = index_definitions(database)
    assert "m='8', ef_construction='32'" in before["ix_kdb_search_vector"]
    run = begin(first)
    assert first.drop_index().text == "dropped for the load"
    assert set(before) - set(index_definitions(database)) == {"ix_kdb_search_vector", "ix_kdb_search_fts", "my_words"}
    flush(first, run, slot_of(fresh(*((f"k{i}", f"text {i}") for i in range(50)))))
    first.close()  # as a crash does: nothing was said to the database

    second = open_store(database)
    second.prepare(DIMENSIONS)
    assert second.drop_index().text == "dropped for the load"
    beats: list[str] = []
    outcome = second.finish_index(beats.append)
    assert outcome.text.startswith("built ")
    assert beats[-1] == "building ix_kdb_search_vector"
    assert index_definitions(database) == before
    assert second.finish_index(no_beat).text == "kept"
    assert execute(database, "SELECT count(*) FROM kdb_fast_state") == [(0,)]


def test_missing_index_is_built_as_kameleondb_creates_it(
    database: DatabaseAddress, store: PostgreSQLIndexStore
) -> None:
    before = index_definitions(database)
    execute(database, "DROP INDEX ix_kdb_search_vector, ix_kdb_search_fts")
    assert store.finish_index(no_beat).text == "built ix_kdb_search_fts, ix_kdb_search_vector"
    assert index_definitions(database) == before


def test_users_own_vector_index_is_enough(database: DatabaseAddress, store: PostgreSQLIndexStore) -> None:
    execute(
        database,
        "DROP INDEX ix_kdb_search_vector; CREATE INDEX mine ON kdb_search USING hnsw (embedding vector_l2_ops)",
    )
    before = index_definitions(database)
    assert store.finish_index(no_beat).text == "kept"
    assert index_definitions(database) == before


@pytest.mark.parametrize("name", ["ix_kdb_search_vector", "mine"])
def test_invalid_index_is_built_again_as_it_was(database: DatabaseAddress, open_store: OpenStore, name: str) -> None:
    execute(database, PostgreSQLHarness.table.replace("ix_kdb_search_vector", name))
    store = open_store(database)
    store.prepare(DIMENSIONS)
    before = index_definitions(database)
    # What CREATE INDEX CONCURRENTLY leaves behind when it is interrupted.
    execute(database, "UPDATE pg_index SET indisvalid = false WHERE indexrelid = %s::regclass", name)
    assert store.finish_index(no_beat).text == f"built {name}"
    assert index_definitions(database) == before
    assert execute(database, "SELECT bool_and(indisvalid) FROM pg_index") == [(True,)]


def test_invalid_copy_beside_a_valid_index_is_left_alone(
    database: DatabaseAddress, store: PostgreSQLIndexStore
) -> None:
    execute(
        database,
        "CREATE INDEX ix_kdb_search_vector_ccnew ON kdb_search USING hnsw (embedding vector_cosine_ops); "
        "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'ix_kdb_search_vector_ccnew'::regclass",
    )
    before = execute(database, "SELECT indexrelid, indisvalid FROM pg_index ORDER BY 1")
    assert store.finish_index(no_beat).text == "kept"
    assert execute(database, "SELECT indexrelid, indisvalid FROM pg_index ORDER BY 1") == before


def test_nearest_rows_are_found_by_the_rebuilt_index(
    database: DatabaseAddress, store: PostgreSQLIndexStore, run: RunSpec
) -> None:
    store.drop_index()
    texts = [f"text {i}" for i in range(100)]
    flush(store, run, slot_of(fresh(*((f"k{i}", text) for i, text in enumerate(texts)))))
    store.finish_index(no_beat)
    query = vector_of("a question")
    with psycopg.connect(database.conninfo) as connection:
        connection.execute("SET LOCAL enable_seqscan = off")
        statement = "SELECT content FROM kdb_search ORDER BY embedding <=> %s::vector LIMIT 5"
        plan = connection.execute("EXPLAIN " + statement, (str(query.tolist()),)).fetchall()
        found = [r[0] for r in connection.execute(statement, (str(query.tolist()),))]
    assert "ix_kdb_search_vector" in str(plan)
    assert found == sorted(texts, key=lambda text: -cosine(vector_of(text), query))[:5]


# -- time-outs and lost connections ------------------------------------------------------------------------

GATE = 4711
"""Advisory lock at which a flush is held up inside its transaction."""


def add_gate(address: DatabaseAddress) -> None:
    execute(
        address,
        "CREATE FUNCTION gate() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        f"PERFORM pg_advisory_xact_lock_shared({GATE}); RETURN NULL; END $$; "
        "CREATE TRIGGER gate AFTER INSERT OR UPDATE ON kdb_search FOR EACH STATEMENT EXECUTE FUNCTION gate()",
    )


def waiting_backends(address: DatabaseAddress) -> list[int]:
    rows = execute(address, "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND objid = %s AND NOT granted", GATE)
    return [r[0] for r in rows]


@contextlib.contextmanager
def flushing_in_background(work: Callable[[], FlushResult]) -> Iterator[list[Any]]:
    """Run ``work`` in a thread; the list holds its result or error after the block."""
    outcome: list[Any] = []

    def target() -> None:
        try:
            outcome.append(work())
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=target)
    thread.start()
    yield outcome
    thread.join(60)
    assert not thread.is_alive()


@pytest.mark.parametrize("way", ["backend terminated", "server restarted"])
@pytest.mark.parametrize("kind", ["fresh", "known"])
def test_flush_is_repeated_when_the_connection_is_lost(
    postgres: Server, database: DatabaseAddress, store: PostgreSQLIndexStore, run: RunSpec, way: str, kind: str
) -> None:
    pairs = [(f"k{i}", f"text {i}") for i in range(30)]
    if kind == "known":
        flush(store, run, slot_of(fresh(*pairs)))
        pairs = [(key, f"{text} again") for key, text in pairs]
        rows = looked_up(store, *pairs)
    else:
        rows = fresh(*pairs)
    add_gate(database)
    waits: list[str] = []
    store.on_wait = waits.append
    gate = psycopg.connect(database.conninfo, autocommit=True)
    with contextlib.closing(gate):
        gate.execute("SELECT pg_advisory_lock(%s)", (GATE,))
        with flushing_in_background(lambda: flush(store, run, slot_of(rows))) as outcome:
            (pid,) = eventually(lambda: waiting_backends(database))
            if way == "backend terminated":
                gate.execute("SELECT pg_terminate_backend(%s)", (pid,))
                gate.execute("SELECT pg_advisory_unlock(%s)", (GATE,))
            else:
                postgres.restart()
    (result,) = outcome
    assert isinstance(result, FlushResult), result
    assert (result.rows, result.superseded, result.rejected) == (30, (), ())
    assert contents(database) == dict(pairs)
    assert waits
    assert set(waits) == {"waiting for the database (writing)"}


def test_lookups_survive_a_restart(postgres: Server, store: PostgreSQLIndexStore, run: RunSpec) -> None:
    flush(store, run, slot_of(fresh(("a", "one"))))
    postgres.restart()
    assert lookup(store, "a")["a"].fingerprint == FINGERPRINT
    assert store.count() == 1


def test_database_that_stays_away_ends_in_an_error_that_says_so(
    database: DatabaseAddress, open_store: OpenStore, store: PostgreSQLIndexStore, run: RunSpec
) -> None:
    impatient = open_store(database, retry_seconds=0.5)
    impatient.session.address = connect_as(database, host="/nonexistent")
    impatient.close()
    with pytest.raises(DatabaseError, match="Cannot connect to"):
        flush(impatient, run, slot_of(fresh(("a", "one"))))


def test_short_statement_timeout_is_named(
    database: DatabaseAddress, store: PostgreSQLIndexStore, run: RunSpec, open_store: OpenStore
) -> None:
    execute(
        database,
        "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN PERFORM pg_sleep(10); RETURN NULL; END $$; "
        "CREATE TRIGGER slow AFTER INSERT ON kdb_search FOR EACH STATEMENT EXECUTE FUNCTION slow()",
    )
    hurried = open_store(connect_as(database, options="-c statement_timeout=100ms"))
    with pytest.raises(DatabaseError, match="cancelled each time") as caught:
        flush(hurried, run, slot_of(fresh(("a", "one"))))
    assert "statement_timeout" in caught.value.remedy
    assert contents(database) == {}


def test_index_build_is_not_bound_by_the_statement_timeout(
    database: DatabaseAddress, store: PostgreSQLIndexStore, run: RunSpec, open_store: OpenStore
) -> None:
    flush(store, run, slot_of(fresh(*((f"k{i}", f"text {i}") for i in range(2000)))))
    hurried = open_store(connect_as(database, options="-c statement_timeout=20ms"))
    hurried.drop_index()
    assert hurried.finish_index(no_beat).text == "built ix_kdb_search_fts, ix_kdb_search_vector"


def test_no_transaction_is_left_open(database: DatabaseAddress, store: PostgreSQLIndexStore, run: RunSpec) -> None:
    flush(store, run, slot_of(fresh(("a", "one"))))
    lookup(store, "a")
    store.heartbeat(run.number, "embed")
    states = execute(
        database,
        "SELECT state, application_name FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid <> pg_backend_pid()",
    )
    assert states == [("idle", "kdb-fast/test")]
