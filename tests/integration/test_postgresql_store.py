"""PostgreSQLStore on a real server: what it prepares and refuses, the lock, flushes, indexes, lost connections."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import psycopg
import pytest
from servers import (
    Server,
    connect_as,
    cosine,
    eventually,
    execute,
    index_rows,
    role_name,
)

from kdb_fast.db.address import DatabaseAddress
from kdb_fast.errors import DatabaseError, LockedError, RecordError, SchemaError
from kdb_fast.ipc.row_block import NO_VALUE
from kdb_fast.ipc.slab import Row, Slab, SlabShape
from kdb_fast.records import Record, Reject, content_hash
from kdb_fast.stores.base import FlushResult, FlushSlot, RunSpec
from kdb_fast.stores.postgresql import runs as pg_runs
from kdb_fast.stores.postgresql.store import PostgreSQLStore
from kdb_fast.stores.runs import STALE_SECONDS

DIMENSIONS = 8
FINGERPRINT = "0123456789abcdef"
MODEL = "test/model"

KAMELEONDB_TABLE = """
CREATE EXTENSION IF NOT EXISTS vector;
CREATE TABLE kdb_search (
  id varchar(36) PRIMARY KEY, entity_name varchar(255) NOT NULL, record_id varchar(36) NOT NULL,
  content text NOT NULL, embedding vector({size}), model varchar(100), dimensions integer,
  created_at timestamptz NOT NULL DEFAULT now(), updated_at timestamptz,
  tsv tsvector GENERATED ALWAYS AS (to_tsvector('english', content)) STORED,
  UNIQUE (entity_name, record_id)
);
CREATE INDEX ix_kdb_search_entity ON kdb_search (entity_name);
CREATE INDEX ix_kdb_search_record ON kdb_search (record_id);
CREATE INDEX ix_kdb_search_fts ON kdb_search USING gin (tsv);
CREATE INDEX ix_kdb_search_vector ON kdb_search USING hnsw (embedding vector_cosine_ops) WITH (m=8, ef_construction=32);
"""
"""The table as KameleonDB makes it, but for parameters of the vector index that no default gives."""

OpenStore = Callable[..., PostgreSQLStore]


@pytest.fixture
def open_store() -> Iterator[OpenStore]:
    """Opens stores that are closed after the test."""
    with contextlib.ExitStack() as stack:

        def open_one(address: DatabaseAddress, **arguments: Any) -> PostgreSQLStore:
            store = PostgreSQLStore(address, "test", **arguments)
            stack.callback(store.close)
            return store

        yield open_one


@pytest.fixture
def store(database: DatabaseAddress, open_store: OpenStore) -> PostgreSQLStore:
    """A store on a new database, prepared."""
    store = open_store(database)
    store.prepare(DIMENSIONS)
    return store


@pytest.fixture
def run(store: PostgreSQLStore) -> RunSpec:
    return begin(store)


def begin(store: PostgreSQLStore, wait: float = 0.0, fingerprint: str = FINGERPRINT) -> RunSpec:
    return store.begin_run(fingerprint=fingerprint, model=MODEL, dimensions=DIMENSIONS, wait=wait)


def end(store: PostgreSQLStore, run: RunSpec) -> None:
    store.end_run(run.number, "done", {})


_leases = itertools.count(1)


def slot_of(rows: Sequence[Row], skip: Sequence[int] = (), number: int = 0) -> FlushSlot:
    """A slot as a worker leaves it; the vectors are random, and the same for the same texts."""
    shape = SlabShape(number + 1, max(1, len(rows)), DIMENSIONS)
    slot = Slab.local(shape).slots[number]
    slot.put(next(_leases), rows, [NO_VALUE] * len(rows))
    for i, row in enumerate(rows):
        slot.vectors[i] = vector_of(row.record.content)
    return FlushSlot(slot, frozenset(skip))


def vector_of(text: str) -> Any:
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])
    return np.random.default_rng(seed).standard_normal(DIMENSIONS).astype(np.float32)


def fresh(*pairs: tuple[str, str], entity: str = "Note") -> list[Row]:
    return [Row(Record(entity, key, text)) for key, text in pairs]


def known(store: PostgreSQLStore, *pairs: tuple[str, str], entity: str = "Note") -> list[Row]:
    """Rows as the parent makes them: with the version of what is stored now."""
    stored = store.lookup(entity, [key for key, _ in pairs])
    return [Row(Record(entity, key, text), True, stored[key].row_version) for key, text in pairs]


_numbers = itertools.count(1)


def flush(
    store: PostgreSQLStore,
    run: RunSpec,
    *slots: FlushSlot,
    number: int | None = None,
    rejects: Sequence[Reject] = (),
    deletes: Sequence[tuple[str, str]] = (),
) -> FlushResult:
    return store.flush(run, next(_numbers) if number is None else number, slots, rejects, deletes)


def contents(address: DatabaseAddress) -> dict[str, str]:
    return {key: row.content for (_, key), row in index_rows(address).items()}


def index_definitions(address: DatabaseAddress) -> dict[str, str]:
    return dict(execute(address, "SELECT indexname, indexdef FROM pg_indexes WHERE tablename = 'kdb_search'"))


# -- prepare -----------------------------------------------------------------------------------------------


def columns(address: DatabaseAddress) -> list[tuple[Any, ...]]:
    return execute(
        address,
        "SELECT a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attgenerated, "
        "pg_get_expr(d.adbin, d.adrelid) FROM pg_attribute a LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid "
        "AND d.adnum = a.attnum WHERE a.attrelid = 'kdb_search'::regclass AND a.attnum > 0 AND NOT a.attisdropped "
        "AND a.attname NOT LIKE 'kdb_fast%%' ORDER BY a.attname",
    )


def test_prepare_creates_the_table_that_kameleondb_creates(database: DatabaseAddress, store: PostgreSQLStore) -> None:
    made = columns(database), index_definitions(database)
    execute(
        database,
        "DROP TABLE kdb_search; "
        + KAMELEONDB_TABLE.format(size=DIMENSIONS).replace("WITH (m=8, ef_construction=32)", ""),
    )
    assert made == (columns(database), index_definitions(database))
    assert ("embedding", f"vector({DIMENSIONS})", False, "", None) in made[0]
    assert made[1]["ix_kdb_search_vector"].endswith("USING hnsw (embedding vector_cosine_ops)")
    assert made[1]["ix_kdb_search_fts"].endswith("USING gin (tsv)")


def test_prepare_takes_kameleondbs_table_as_it_is(database: DatabaseAddress, open_store: OpenStore) -> None:
    execute(database, KAMELEONDB_TABLE.format(size=DIMENSIONS))
    before = columns(database), index_definitions(database)
    store = open_store(database)
    store.prepare(DIMENSIONS)
    assert (columns(database), index_definitions(database)) == before
    run = begin(store)
    assert flush(store, run, slot_of(fresh(("a", "text")))).rows == 1


def test_second_prepare_changes_nothing(database: DatabaseAddress, store: PostgreSQLStore) -> None:
    def catalog() -> list[tuple[Any, ...]]:
        return execute(
            database,
            "WITH ours AS (SELECT * , xmin AS version FROM pg_class WHERE relnamespace = 'public'::regnamespace) "
            "SELECT oid::text, relname::text, version::text FROM ours UNION ALL "
            "SELECT attrelid::text, attname::text, xmin::text FROM pg_attribute "
            "WHERE attrelid IN (SELECT oid FROM ours) ORDER BY 1, 2",
        )

    before = catalog()
    store.prepare(DIMENSIONS)
    assert catalog() == before


def test_two_first_runs_at_once_both_prepare(database: DatabaseAddress, open_store: OpenStore) -> None:
    stores = [open_store(database) for _ in range(4)]
    barrier, errors = threading.Barrier(4), []

    def prepare(store: PostgreSQLStore) -> None:
        try:
            barrier.wait(10)
            store.prepare(DIMENSIONS)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=prepare, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert errors == []
    assert stores[0].count() == 0


def test_refuses_another_dimension(database: DatabaseAddress, store: PostgreSQLStore, open_store: OpenStore) -> None:
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
    execute(database, KAMELEONDB_TABLE.format(size=DIMENSIONS))
    execute(database, "ALTER TABLE kdb_search DROP CONSTRAINT kdb_search_entity_name_record_id_key")
    with pytest.raises(SchemaError, match="no unique constraint") as caught:
        open_store(database).prepare(DIMENSIONS)
    execute(database, caught.value.remedy.removeprefix("Run: "))
    open_store(database).prepare(DIMENSIONS)


def test_a_partial_unique_index_is_not_the_unique_constraint(database: DatabaseAddress, open_store: OpenStore) -> None:
    execute(database, KAMELEONDB_TABLE.format(size=DIMENSIONS))
    execute(
        database,
        "ALTER TABLE kdb_search DROP CONSTRAINT kdb_search_entity_name_record_id_key; "
        "CREATE UNIQUE INDEX partial ON kdb_search (entity_name, record_id) WHERE model IS NOT NULL",
    )
    with pytest.raises(SchemaError, match="no unique constraint"):
        open_store(database).prepare(DIMENSIONS)


def test_refuses_another_programs_table(database: DatabaseAddress, open_store: OpenStore) -> None:
    execute(database, "CREATE EXTENSION vector; CREATE TABLE kdb_search (id int, content text, embedding vector(8))")
    with pytest.raises(
        SchemaError, match="no column entity_name, record_id, model, dimensions, created_at, updated_at"
    ):
        open_store(database).prepare(DIMENSIONS)
    assert [r[0] for r in columns(database)] == ["content", "embedding", "id"]


def test_refuses_an_embedding_that_is_no_vector(database: DatabaseAddress, open_store: OpenStore) -> None:
    execute(database, KAMELEONDB_TABLE.format(size=DIMENSIONS))
    execute(database, "ALTER TABLE kdb_search ALTER COLUMN embedding TYPE float4[] USING NULL") if False else None
    execute(
        database,
        "DROP INDEX ix_kdb_search_vector; ALTER TABLE kdb_search DROP COLUMN embedding, ADD COLUMN embedding float4[]",
    )
    with pytest.raises(SchemaError, match=rf"embedding is of type _float4; expected vector\({DIMENSIONS}\)"):
        open_store(database).prepare(DIMENSIONS)


@pytest.mark.parametrize(("size", "fits"), [(DIMENSIONS, True), (5, False)])
def test_column_without_a_dimension_is_judged_by_its_rows(
    database: DatabaseAddress, open_store: OpenStore, size: int, fits: bool
) -> None:
    script = KAMELEONDB_TABLE.replace("vector({size})", "vector")
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
]


def test_role_that_lacks_rights_is_told_the_grants(
    postgres: Server, database: DatabaseAddress, store: PostgreSQLStore, open_store: OpenStore
) -> None:
    role = postgres.create_role(database, "SELECT, INSERT, UPDATE ON kdb_search", *ALL_RIGHTS[1:])
    with pytest.raises(SchemaError, match=r"lacks rights: DELETE ON public\.kdb_search") as caught:
        open_store(role).prepare(DIMENSIONS)
    assert caught.value.remedy == f"Let the owner run: GRANT DELETE ON public.kdb_search TO {role_name(role)};"
    execute(database, caught.value.remedy.removeprefix("Let the owner run: "))
    open_store(role).prepare(DIMENSIONS)


def test_role_that_only_writes_leaves_the_index_to_the_owner(
    postgres: Server, database: DatabaseAddress, store: PostgreSQLStore, open_store: OpenStore
) -> None:
    writer = open_store(postgres.create_role(database, *ALL_RIGHTS))
    writer.prepare(DIMENSIONS)
    run = begin(writer)
    assert flush(writer, run, slot_of(fresh(("a", "one"), ("b", "two")))).rows == 2
    assert flush(writer, run, slot_of(known(writer, ("a", "three")))).rows == 1
    assert contents(database) == {"a": "three", "b": "two"}
    before = index_definitions(database)
    assert writer.drop_index().text.startswith("kept: this role does not own public.kdb_search")
    assert index_definitions(database) == before
    execute(database, "DROP INDEX ix_kdb_search_vector")
    outcome = writer.finish_index(lambda what: None)
    assert outcome.text == "not built: this role does not own public.kdb_search"
    assert "USING hnsw" in outcome.warnings[0]


READ_ONLY = {"options": "-c default_transaction_read_only=on"}


@pytest.mark.parametrize("prepared", [False, True])
def test_read_only_server_is_refused(database: DatabaseAddress, open_store: OpenStore, prepared: bool) -> None:
    if prepared:
        open_store(database).prepare(DIMENSIONS)
    with pytest.raises(SchemaError, match="read-only"):
        open_store(connect_as(database, **READ_ONLY)).prepare(DIMENSIONS)


# -- the lock ----------------------------------------------------------------------------------------------

HOLDER = """
import sys
from kdb_fast.db.address import DatabaseAddress
from kdb_fast.stores.postgresql import PostgreSQLStore
store = PostgreSQLStore(DatabaseAddress("postgresql", sys.argv[1], "holder"), "holder")
run = store.begin_run(fingerprint="f", model="m", dimensions=8, wait=0)
print(run.number, flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def holder(address: DatabaseAddress) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Another process that holds the index; yields it and the number of its run."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, address.conninfo], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        try:
            yield process, int(process.stdout.readline())
        finally:
            process.kill()


def test_second_run_is_refused_until_the_first_is_dead(database: DatabaseAddress, store: PostgreSQLStore) -> None:
    with holder(database) as (process, number):
        with pytest.raises(LockedError) as caught:
            begin(store)
        assert f"Run {number} holds the index: process {process.pid} on {socket.gethostname()}" in caught.value.message
        process.kill()
        process.wait(10)
        assert begin(store).number > number
    assert execute(database, "SELECT state, ended_at IS NULL FROM kdb_fast_runs ORDER BY run") == [
        ("abandoned", False),
        ("running", True),
    ]


def test_run_of_another_machine_is_taken_over_once_its_heartbeat_is_old(
    database: DatabaseAddress, store: PostgreSQLStore, run: RunSpec
) -> None:
    def set_age(seconds: float) -> None:
        execute(
            database,
            "UPDATE kdb_fast_runs SET host = 'elsewhere', heartbeat_at = now() - make_interval(secs => %s)",
            seconds,
        )

    set_age(STALE_SECONDS - 5)
    with pytest.raises(LockedError, match="on elsewhere"):
        begin(store)
    set_age(STALE_SECONDS + 1)
    assert begin(store).number > run.number


def test_hanging_run_of_this_machine_is_taken_over(database: DatabaseAddress, store: PostgreSQLStore) -> None:
    with holder(database) as (_, number):
        execute(database, "UPDATE kdb_fast_runs SET heartbeat_at = now() - interval '1 hour'")
        assert begin(store).number > number


def test_heartbeat_keeps_a_run_alive(database: DatabaseAddress, store: PostgreSQLStore, run: RunSpec) -> None:
    execute(database, "UPDATE kdb_fast_runs SET host = 'elsewhere', heartbeat_at = now() - interval '1 hour'")
    store.heartbeat(run.number, "embed")
    with pytest.raises(LockedError, match="last sign of life 0 s ago"):
        begin(store)
    assert execute(database, "SELECT phase FROM kdb_fast_runs") == [("embed",)]


def test_heartbeat_does_not_wait_for_a_busy_row(
    store: PostgreSQLStore, run: RunSpec, database: DatabaseAddress
) -> None:
    with psycopg.connect(database.conninfo) as other:
        other.execute("SELECT FROM kdb_fast_runs FOR UPDATE")
        store.heartbeat(run.number, "embed")
        other.rollback()
    assert execute(database, "SELECT phase FROM kdb_fast_runs") == [("start",)]


def test_run_that_was_replaced_cannot_write(
    database: DatabaseAddress, store: PostgreSQLStore, run: RunSpec, open_store: OpenStore
) -> None:
    flush(store, run, slot_of(fresh(("a", "before"))))
    execute(database, "UPDATE kdb_fast_runs SET host = 'elsewhere', heartbeat_at = now() - interval '1 hour'")
    begin(open_store(database))
    with pytest.raises(LockedError, match=f"Run {run.number} no longer holds the index"):
        flush(store, run, slot_of(fresh(("b", "after"))), deletes=[("Note", "a")])
    assert contents(database) == {"a": "before"}
    store.end_run(run.number, "done", {})
    assert execute(database, "SELECT state FROM kdb_fast_runs ORDER BY run") == [("abandoned",), ("running",)]


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
    store: PostgreSQLStore,
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


def test_wait_takes_the_lock_when_the_other_run_ends(
    database: DatabaseAddress, store: PostgreSQLStore, open_store: OpenStore
) -> None:
    first = begin(store)
    second = open_store(database)
    waited: list[str] = []

    def on_wait(what: str) -> None:
        waited.append(what)
        end(store, first)

    second.on_wait = on_wait
    assert begin(second, wait=30.0).number > first.number
    assert waited == [f"waiting for run {first.number} of process {os.getpid()} on {socket.gethostname()}"]


def test_receipt_is_kept(database: DatabaseAddress, store: PostgreSQLStore, run: RunSpec) -> None:
    store.end_run(run.number, "done", {"stored": 3, "model": "ü"})
    assert execute(database, "SELECT state, phase, receipt::json ->> 'model' FROM kdb_fast_runs") == [
        ("done", "end", "ü")
    ]


# -- look-ups ----------------------------------------------------------------------------------------------


def test_lookup_gives_hash_fingerprint_and_version(store: PostgreSQLStore, run: RunSpec) -> None:
    flush(store, run, slot_of(fresh(("a", "Grüße 你好"), ("b", "two"))))
    found = store.lookup("Note", ["a", "b", "c"])
    assert set(found) == {"a", "b"}
    assert found["a"].content_hash == content_hash("Grüße 你好")
    assert found["a"].fingerprint == FINGERPRINT
    assert store.lookup("Other", ["a"]) == {}
    assert (store.count(), store.count("Note"), store.count("Other")) == (2, 2, 0)


@pytest.mark.parametrize(
    "change",
    [
        "content = 'edited', updated_at = now()",
        "updated_at = updated_at + interval '1 microsecond'",
        "updated_at = NULL",
        "embedding = NULL",
    ],
)
def test_row_that_another_program_changed_has_no_fingerprint(
    database: DatabaseAddress, store: PostgreSQLStore, run: RunSpec, change: str
) -> None:
    flush(store, run, slot_of(fresh(("a", "one"), ("b", "two"))))
    execute(database, f"UPDATE kdb_search SET {change} WHERE record_id = 'a'")
    found = store.lookup("Note", ["a", "b"])
    assert found["a"].fingerprint is None
    assert found["b"].fingerprint == FINGERPRINT


def test_content_is_compared_even_if_an_editor_left_the_time(
    database: DatabaseAddress, store: PostgreSQLStore, run: RunSpec
) -> None:
    flush(store, run, slot_of(fresh(("a", "one"))))
    execute(database, "UPDATE kdb_search SET content = 'edited'")
    assert store.lookup("Note", ["a"])["a"].content_hash == content_hash("edited")


# -- flushes -----------------------------------------------------------------------------------------------

UNICODE = [
    "plain",
    "Grüße, naïve café",
    "你好，世界",
    "👩‍👩‍👧‍👦 family",
    "ע‎ברית",
    "tab\tnew\nline",
    "\\N \\. '\"",
    "a" * 100_000,
]


def test_fresh_rows_are_stored_as_they_are(database: DatabaseAddress, store: PostgreSQLStore, run: RunSpec) -> None:
    rows = fresh(*((f"k{i}", text) for i, text in enumerate(UNICODE)), entity="Ünïcode 实体")
    result = flush(store, run, slot_of(rows[:5]), slot_of(rows[5:], number=1))
    assert (result.rows, result.superseded, result.rejected, result.deleted) == (len(UNICODE), (), (), 0)
    assert result.bytes > 100_000
    stored = index_rows(database)
    for i, text in enumerate(UNICODE):
        row = stored["Ünïcode 实体", f"k{i}"]
        assert row.content == text
        np.testing.assert_array_equal(row.vector, vector_of(text))
        assert (row.model, row.dimensions, row.run, row.fingerprint) == (MODEL, DIMENSIONS, run.number, FINGERPRINT)
    assert execute(
        database,
        "SELECT count(DISTINCT id), bool_and(id::uuid::text = id), bool_and(updated_at = kdb_fast_at), "
        "bool_and(created_at = updated_at), bool_and(kdb_fast_source_at IS NULL) FROM kdb_search",
    ) == [(len(UNICODE), True, True, True, True)]


def test_skipped_rows_are_not_stored(database: DatabaseAddress, store: PostgreSQLStore, run: RunSpec) -> None:
    result = flush(store, run, slot_of(fresh(("a", "one"), ("b", "two"), ("c", "three")), skip=[0, 2]))
    assert result.rows == 1
    assert contents(database) == {"b": "two"}


def test_time_of_the_source_is_kept_to_the_microsecond(
    database: DatabaseAddress, store: PostgreSQLStore, run: RunSpec
) -> None:
    moments = [1_700_000_000_123_456, -1, NO_VALUE]
    slot = slot_of(fresh(("a", "one"), ("b", "two"), ("c", "three")))
    slot.slot.source_at[:3] = moments
    flush(store, run, slot)
    rows = execute(
        database,
        "SELECT (extract(epoch FROM kdb_fast_source_at) * 1000000)::bigint FROM kdb_search ORDER BY record_id",
    )
    assert [r[0] for r in rows] == [1_700_000_000_123_456, -1, None]


def test_known_rows_are_replaced_and_keep_their_id(
    database: DatabaseAddress, store: PostgreSQLStore, run: RunSpec
) -> None:
    flush(store, run, slot_of(fresh(("a", "one"), ("b", "two"))))
    ids = execute(database, "SELECT record_id, id, created_at FROM kdb_search ORDER BY 1")
    end(store, run)
    second = begin(store, fingerprint="other")
    result = flush(store, second, slot_of([*known(store, ("a", "changed")), *fresh(("c", "new"))]))
    assert (result.rows, result.superseded) == (2, ())
    assert contents(database) == {"a": "changed", "b": "two", "c": "new"}
    row = index_rows(database)["Note", "a"]
    np.testing.assert_array_equal(row.vector, vector_of("changed"))
    assert (row.run, row.fingerprint) == (second.number, "other")
    assert execute(database, "SELECT record_id, id, created_at FROM kdb_search ORDER BY 1")[:2] == ids


def test_same_text_new_text_and_new_rows_in_one_flush(
    database: DatabaseAddress, store: PostgreSQLStore, run: RunSpec
) -> None:
    flush(store, run, slot_of(fresh(("a", "cats purr"), ("b", "dogs bark"), ("d", "cows moo"))))
    end(store, run)
    second = begin(store, fingerprint="other")
    rows = [*known(store, ("a", "cats purr"), ("b", "birds sing")), *fresh(("c", "fish swim"))]
    slot = slot_of(rows)
    slot.slot.vectors[0] = vector_of("another model")
    result = flush(store, second, slot)
    assert (result.rows, result.superseded, result.rejected) == (3, (), ())
    stored = index_rows(database)
    # A row whose text is the same gets the new vector all the same, and counts as written by this run.
    np.testing.assert_array_equal(stored["Note", "a"].vector, vector_of("another model"))
    assert {key: stored["Note", key].run for key in "abcd"} == {
        **dict.fromkeys("abc", second.number), "d": run.number
    }  # fmt: skip
    words = dict(execute(database, "SELECT record_id, tsv::text FROM kdb_search"))
    assert words == {
        "a": "'cat':1 'purr':2",
        "b": "'bird':1 'sing':2",
        "c": "'fish':1 'swim':2",
        "d": "'cow':1 'moo':2",
    }


def test_row_that_was_never_updated_can_be_replaced(
    database: DatabaseAddress, store: PostgreSQLStore, run: RunSpec
) -> None:
    execute(
        database,
        "INSERT INTO kdb_search (id, entity_name, record_id, content) VALUES ('1', 'Note', 'a', 'theirs')",
    )
    assert store.lookup("Note", ["a"])["a"].row_version == NO_VALUE
    assert flush(store, run, slot_of(known(store, ("a", "ours")))).rows == 1
    assert contents(database) == {"a": "ours"}


def insert_as_another_program(address: DatabaseAddress, key: str, text: str = "theirs") -> None:
    execute(
        address,
        "INSERT INTO kdb_search (id, entity_name, record_id, content, updated_at) "
        "VALUES (gen_random_uuid(), 'Note', %s, %s, now())",
        key,
        text,
    )


def test_row_inserted_by_another_program_meanwhile_stays(
    database: DatabaseAddress, store: PostgreSQLStore, run: RunSpec
) -> None:
    rows = fresh(("a", "ours"), ("b", "ours"), ("c", "ours"))
    insert_as_another_program(database, "b")
    result = flush(store, run, slot_of(fresh(("z", "ours"))), slot_of(rows, number=1))
    assert (result.rows, result.superseded) == (3, ((1, 1),))
    assert contents(database) == {"a": "ours", "b": "theirs", "c": "ours", "z": "ours"}
    # The next flush goes the careful way at once, with the same outcome.
    insert_as_another_program(database, "e")
    result = flush(store, run, slot_of(fresh(("d", "ours"), ("e", "ours"))))
    assert (result.rows, result.superseded) == (1, ((0, 1),))
    assert contents(database)["e"] == "theirs"


def test_row_changed_by_another_program_meanwhile_stays(
    database: DatabaseAddress, store: PostgreSQLStore, run: RunSpec
) -> None:
    flush(store, run, slot_of(fresh(("a", "one"), ("b", "two"))))
    end(store, run)
    second = begin(store)
    rows = known(store, ("a", "ours"), ("b", "ours"))
    execute(database, "UPDATE kdb_search SET content = 'theirs', updated_at = now() WHERE record_id = 'b'")
    result = flush(store, second, slot_of(rows))
    assert (result.rows, result.superseded) == (1, ((0, 1),))
    assert contents(database) == {"a": "ours", "b": "theirs"}


def test_row_written_by_this_run_and_changed_by_another_program_stays(
    database: DatabaseAddress, store: PostgreSQLStore, run: RunSpec
) -> None:
    flush(store, run, slot_of(fresh(("a", "one"))))
    execute(database, "UPDATE kdb_search SET content = 'theirs', updated_at = clock_timestamp()")
    result = flush(store, run, slot_of(fresh(("a", "two"))))
    assert (result.rows, result.superseded) == (0, ((0, 0),))
    assert contents(database) == {"a": "theirs"}


def test_known_row_deleted_by_another_program_is_written_again(
    database: DatabaseAddress, store: PostgreSQLStore, run: RunSpec
) -> None:
    flush(store, run, slot_of(fresh(("a", "one"))))
    rows = known(store, ("a", "two"))
    execute(database, "DELETE FROM kdb_search")
    assert flush(store, run, slot_of(rows)).rows == 1
    assert contents(database) == {"a": "two"}


def test_run_overwrites_its_own_row(database: DatabaseAddress, store: PostgreSQLStore, run: RunSpec) -> None:
    flush(store, run, slot_of(fresh(("a", "earlier"))))
    result = flush(store, run, slot_of(fresh(("a", "later"))))
    assert (result.rows, result.superseded) == (1, ())
    assert contents(database) == {"a": "later"}


def test_repeated_flush_gives_the_first_result_and_writes_nothing(
    database: DatabaseAddress, store: PostgreSQLStore, run: RunSpec, open_store: OpenStore
) -> None:
    insert_as_another_program(database, "b")
    rows = fresh(("a", "ours"), ("b", "ours"))
    reject = Reject("Note", "r", "empty_text", "the text is empty", content_hash(""), 7)
    first = flush(store, run, slot_of(rows), number=5, rejects=[reject], deletes=[("Note", "gone")])
    before = execute(database, "SELECT ctid, xmin, * FROM kdb_search ORDER BY record_id")
    again = flush(open_store(database), run, slot_of(rows), number=5, rejects=[reject], deletes=[("Note", "a")])
    assert again == first
    assert first.superseded == ((0, 1),)
    assert execute(database, "SELECT ctid, xmin, * FROM kdb_search ORDER BY record_id") == before
    assert len(list(store.rejects())) == 1


def test_deletes_are_counted(database: DatabaseAddress, store: PostgreSQLStore, run: RunSpec) -> None:
    flush(store, run, slot_of(fresh(("a", "one"), ("b", "two"))))
    result = flush(store, run, deletes=[("Note", "a"), ("Note", "missing"), ("Other", "b")])
    assert (result.rows, result.deleted) == (0, 1)
    assert contents(database) == {"b": "two"}


def test_vectors_that_are_not_what_the_worker_wrote_are_never_stored(
    database: DatabaseAddress, store: PostgreSQLStore, run: RunSpec
) -> None:
    flush(store, run, slot_of(fresh(("r1", "one"))))
    good = slot_of(fresh(("r2", "two")))
    for rows in (fresh(("r3", "three")), known(store, ("r1", "changed"))):
        slot = slot_of(rows, number=1)
        written = slot._replace(crcs=((0, 1, slot.slot.checksum()),))
        slot.slot.vectors[0, 5] += 1
        with pytest.raises(RuntimeError, match="vectors 0:1 of slot 1 are not what the worker wrote"):
            flush(store, run, good, written)
    assert contents(database) == {"r1": "one"}
    slot = slot_of(fresh(("r3", "three")), number=1)
    flush(store, run, good, slot._replace(crcs=((0, 1, slot.slot.checksum()),)))
    assert contents(database) == {"r1": "one", "r2": "two", "r3": "three"}


# -- rows that the database refuses ------------------------------------------------------------------------

SECRET = "xyzzy"
"""A word of refused texts that must not turn up in any message or reject."""


def refuse_by(address: DatabaseAddress, how: str) -> None:
    rule = f"content NOT LIKE '%{SECRET}%'"
    function = (
        "CREATE FUNCTION judge() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        f"IF NOT (NEW.{rule}) THEN RAISE EXCEPTION 'not this one: %', NEW.content; END IF; RETURN NEW; END $$; "
    )
    execute(
        address,
        {
            "check": f"ALTER TABLE kdb_search ADD CONSTRAINT no_secrets CHECK ({rule})",
            "trigger": function + "CREATE TRIGGER judge BEFORE INSERT OR UPDATE ON kdb_search FOR EACH ROW "
            "EXECUTE FUNCTION judge()",
            "deferred trigger": function + "CREATE CONSTRAINT TRIGGER judge AFTER INSERT OR UPDATE ON kdb_search "
            "DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION judge()",
        }[how],
    )


@pytest.mark.parametrize(
    ("how", "reason", "detail"),
    [
        ("check", "check", "the database refused the row with SQLSTATE 23514, constraint no_secrets"),
        ("trigger", "database_refused", "the database refused the row with SQLSTATE P0001"),
        ("deferred trigger", "database_refused", "the database refused the row with SQLSTATE P0001"),
    ],
)
def test_refused_rows_are_found_and_the_others_stored(
    database: DatabaseAddress, store: PostgreSQLStore, run: RunSpec, how: str, reason: str, detail: str
) -> None:
    refuse_by(database, how)
    flush(store, run, slot_of(fresh(("old", "old text"))))
    pairs = [(f"k{i}", f"number {i}" + (f" {SECRET}" if i in (0, 11, 12) else "")) for i in range(20)]
    result = flush(
        store,
        run,
        slot_of([*fresh(*pairs[:10]), *known(store, ("old", f"{SECRET} again"))]),
        slot_of(fresh(*pairs[10:]), number=1),
    )
    assert result.rows == 17
    assert sorted(result.rejected) == [(s, r, reason, detail) for s, r in ((0, 0), (0, 10), (1, 1), (1, 2))]
    assert contents(database) == {"old": "old text"} | {k: t for k, t in pairs if SECRET not in t}
    rejects = {r["record_id"]: r for r in store.rejects()}
    assert set(rejects) == {"k0", "k11", "k12", "old"}
    assert rejects["k0"]["content_hash"] == content_hash(f"number 0 {SECRET}").hex()
    assert SECRET not in str(list(rejects.values()))


def test_text_with_too_many_words_for_full_text_search_is_rejected(
    database: DatabaseAddress, store: PostgreSQLStore, run: RunSpec
) -> None:
    words = " ".join(f"w{i:05x}" for i in range(130_000))
    assert 900_000 < len(words) < 1_000_000
    result = flush(store, run, slot_of(fresh(("a", "one"), ("big", words), ("b", "two"))))
    assert result.rows == 2
    assert result.rejected == ((0, 1, "too_large", "the database refused the row with SQLSTATE 54000"),)
    assert contents(database) == {"a": "one", "b": "two"}


def test_row_that_a_trigger_drops_is_not_counted_as_stored(
    database: DatabaseAddress, store: PostgreSQLStore, run: RunSpec
) -> None:
    execute(
        database,
        "CREATE FUNCTION drop_it() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        f"IF NEW.content LIKE '%{SECRET}%' THEN RETURN NULL; END IF; RETURN NEW; END $$; "
        "CREATE TRIGGER drop_it BEFORE INSERT ON kdb_search FOR EACH ROW EXECUTE FUNCTION drop_it()",
    )
    insert_as_another_program(database, "c")
    for rows in (fresh(("a", "one"), ("b", SECRET)), fresh(("c", "ours"), ("b", SECRET), ("d", "two"))):
        result = flush(store, run, slot_of(rows))
        assert [r[:3] for r in result.rejected] == [(0, 1, "database_refused")]
        assert result.rows == 1
    assert contents(database) == {"a": "one", "c": "theirs", "d": "two"}
    assert [r["record_id"] for r in store.rejects()] == ["b"]


def test_put_of_a_row_that_a_trigger_drops_fails_as_a_whole(database: DatabaseAddress, store: PostgreSQLStore) -> None:
    run = RunSpec(0, FINGERPRINT, MODEL, DIMENSIONS)
    execute(
        database,
        "CREATE FUNCTION drop_it() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$; "
        "CREATE TRIGGER drop_it BEFORE INSERT ON kdb_search FOR EACH ROW "
        f"WHEN (NEW.content = '{SECRET}') EXECUTE FUNCTION drop_it()",
    )
    with pytest.raises(RecordError, match="dropped") as caught, store.unit():
        store.put(run, [slot_of(fresh(("a", "one"), ("b", SECRET)))], [])
    assert SECRET not in str(caught.value)
    assert contents(database) == {}
    with store.unit():
        store.put(run, [slot_of(fresh(("a", "one"), ("c", "two")))], [])
    assert contents(database) == {"a": "one", "c": "two"}


def test_vector_that_pgvector_refuses_is_rejected_alone(
    database: DatabaseAddress, store: PostgreSQLStore, run: RunSpec
) -> None:
    flush(store, run, slot_of(fresh(("a", "one"))))
    slot = slot_of(fresh(("b", "two"), ("c", "three")))
    slot.slot.vectors[0] = np.nan
    result = flush(store, run, slot)
    assert result.rows == 1
    assert [r[:2] for r in result.rejected] == [(0, 0)]
    assert contents(database) == {"a": "one", "c": "three"}


def test_reject_is_forgotten_once_the_record_is_stored(
    database: DatabaseAddress, store: PostgreSQLStore, run: RunSpec
) -> None:
    rejects = [
        Reject("Note", "a", "empty_text", "the text is empty", content_hash(""), 1),
        Reject("Note", "b", "nul_byte", "a NUL", content_hash("\0"), 2),
        Reject("Note", "\x00odd\ud800" + "x" * 300, "bad", "d" * 900, b"", 3),
    ]
    flush(store, run, rejects=rejects)
    stored = list(store.rejects())
    assert [(r["record_id"][:12], r["reason"], r["position"]) for r in stored] == [
        ("a", "empty_text", 1),
        ("b", "nul_byte", 2),
        ("\\x00odd\\ud80"[:12], "bad", 3),
    ]
    end(store, run)
    second = begin(store)
    flush(store, second, slot_of(fresh(("a", "now it has a text"))))
    assert [r["record_id"][0] for r in store.rejects()] == ["b", "\\"]
    assert store.clear_rejects([("Note", "b")]) == 1
    assert store.clear_rejects() == 1


def test_the_same_reject_of_two_runs_is_one_row(store: PostgreSQLStore, run: RunSpec) -> None:
    reject = Reject("Note", "a", "empty_text", "the text is empty", content_hash(""), 1)
    flush(store, run, rejects=[reject])
    end(store, run)
    second = begin(store)
    flush(store, second, rejects=[reject])
    assert [r["run"] for r in store.rejects("Note")] == [second.number]
    assert list(store.rejects("Other")) == []


def test_rejects_are_found_by_the_name_of_an_entity_that_no_table_can_hold(
    store: PostgreSQLStore, run: RunSpec
) -> None:
    names = ("n\0", "b", "a")
    flush(store, run, rejects=[Reject(name, key, "bad", "", content_hash(""), 1) for key in "ba" for name in names])
    assert [(r["entity"], r["record_id"]) for r in store.rejects()] == [
        ("a", "a"), ("a", "b"), ("b", "a"), ("b", "b"), ("n\\x00", "a"), ("n\\x00", "b")
    ]  # fmt: skip
    assert [r["record_id"] for r in store.rejects("n\0")] == ["a", "b"]
    store.end_run(run.number, "done", {"input": "in"})
    assert store.clear_rejects([("n\0", "a")]) == 1
    assert store.forget_rejects_of_input("n\0", "in", run.number + 1) == 1
    assert store.forget_older_rejects(["b", "a", "n\0"], run.number + 1) == 4


# -- the indexes -------------------------------------------------------------------------------------------


def no_beat(what: str) -> None:
    pass


def test_index_is_built_again_exactly_as_it_was_even_after_a_crash(
    database: DatabaseAddress, open_store: OpenStore
) -> None:
    execute(database, KAMELEONDB_TABLE.format(size=DIMENSIONS))
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


def test_missing_index_is_built_as_kameleondb_creates_it(database: DatabaseAddress, store: PostgreSQLStore) -> None:
    before = index_definitions(database)
    execute(database, "DROP INDEX ix_kdb_search_vector, ix_kdb_search_fts")
    assert store.finish_index(no_beat).text == "built ix_kdb_search_fts, ix_kdb_search_vector"
    assert index_definitions(database) == before


def test_users_own_vector_index_is_enough(database: DatabaseAddress, store: PostgreSQLStore) -> None:
    execute(
        database,
        "DROP INDEX ix_kdb_search_vector; CREATE INDEX mine ON kdb_search USING hnsw (embedding vector_l2_ops)",
    )
    before = index_definitions(database)
    assert store.finish_index(no_beat).text == "kept"
    assert index_definitions(database) == before


@pytest.mark.parametrize("name", ["ix_kdb_search_vector", "mine"])
def test_invalid_index_is_built_again_as_it_was(database: DatabaseAddress, open_store: OpenStore, name: str) -> None:
    execute(database, KAMELEONDB_TABLE.format(size=DIMENSIONS).replace("ix_kdb_search_vector", name))
    store = open_store(database)
    store.prepare(DIMENSIONS)
    before = index_definitions(database)
    # What CREATE INDEX CONCURRENTLY leaves behind when it is interrupted.
    execute(database, "UPDATE pg_index SET indisvalid = false WHERE indexrelid = %s::regclass", name)
    assert store.finish_index(no_beat).text == f"built {name}"
    assert index_definitions(database) == before
    assert execute(database, "SELECT bool_and(indisvalid) FROM pg_index") == [(True,)]


def test_invalid_copy_beside_a_valid_index_is_left_alone(database: DatabaseAddress, store: PostgreSQLStore) -> None:
    execute(
        database,
        "CREATE INDEX ix_kdb_search_vector_ccnew ON kdb_search USING hnsw (embedding vector_cosine_ops); "
        "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'ix_kdb_search_vector_ccnew'::regclass",
    )
    before = execute(database, "SELECT indexrelid, indisvalid FROM pg_index ORDER BY 1")
    assert store.finish_index(no_beat).text == "kept"
    assert execute(database, "SELECT indexrelid, indisvalid FROM pg_index ORDER BY 1") == before


def test_nearest_rows_are_found_by_the_rebuilt_index(
    database: DatabaseAddress, store: PostgreSQLStore, run: RunSpec
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
    postgres: Server, database: DatabaseAddress, store: PostgreSQLStore, run: RunSpec, way: str, kind: str
) -> None:
    pairs = [(f"k{i}", f"text {i}") for i in range(30)]
    if kind == "known":
        flush(store, run, slot_of(fresh(*pairs)))
        pairs = [(key, f"{text} again") for key, text in pairs]
        rows = known(store, *pairs)
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


def test_lookups_survive_a_restart(postgres: Server, store: PostgreSQLStore, run: RunSpec) -> None:
    flush(store, run, slot_of(fresh(("a", "one"))))
    postgres.restart()
    assert store.lookup("Note", ["a"])["a"].fingerprint == FINGERPRINT
    assert store.count() == 1


def test_database_that_stays_away_ends_in_an_error_that_says_so(
    database: DatabaseAddress, open_store: OpenStore, store: PostgreSQLStore, run: RunSpec
) -> None:
    impatient = open_store(database, retry_seconds=0.5)
    impatient.session.address = connect_as(database, host="/nonexistent")
    impatient.close()
    with pytest.raises(DatabaseError, match="Cannot connect to"):
        flush(impatient, run, slot_of(fresh(("a", "one"))))


def test_short_statement_timeout_is_named(
    database: DatabaseAddress, store: PostgreSQLStore, run: RunSpec, open_store: OpenStore
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
    database: DatabaseAddress, store: PostgreSQLStore, run: RunSpec, open_store: OpenStore
) -> None:
    flush(store, run, slot_of(fresh(*((f"k{i}", f"text {i}") for i in range(2000)))))
    hurried = open_store(connect_as(database, options="-c statement_timeout=20ms"))
    hurried.drop_index()
    assert hurried.finish_index(no_beat).text == "built ix_kdb_search_fts, ix_kdb_search_vector"


def test_dropped_table_is_named(database: DatabaseAddress, store: PostgreSQLStore, run: RunSpec) -> None:
    execute(database, "DROP TABLE kdb_search")
    with pytest.raises(SchemaError, match="kdb_search"):
        flush(store, run, slot_of(fresh(("a", "one"))))


def test_no_transaction_is_left_open(database: DatabaseAddress, store: PostgreSQLStore, run: RunSpec) -> None:
    flush(store, run, slot_of(fresh(("a", "one"))))
    store.lookup("Note", ["a"])
    store.heartbeat(run.number, "embed")
    states = execute(
        database,
        "SELECT state, application_name FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid <> pg_backend_pid()",
    )
    assert states == [("idle", "kdb-fast/test")]
    assert time.monotonic() > 0
