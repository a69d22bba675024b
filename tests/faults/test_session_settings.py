"""What a role, an address, the environment or a lent connection may set changes nothing that is stored or found."""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy
from commands import Commands, FileJob, MakeJob
from kameleon import Answer, Kameleon, close_kameleon, open_kameleon
from proxy import FORWARD, Proxy
from search_engines import Words, sqlalchemy_url
from servers import Server, database_name, eventually, execute, index_rows, role_name
from sqlalchemy.orm import Session

from kdb_fast.db import pg_settings
from kdb_fast.db.address import DatabaseAddress
from kdb_fast.db.pg_connection import connect_postgresql
from kdb_fast.db.pg_settings import PINNED, at_once, pinned
from kdb_fast.errors import LockedError
from kdb_fast.search.engine import SearchEngine
from kdb_fast.stores import open_store
from kdb_fast.stores.postgresql.locks import DDL_LOCK

ODD = {
    "DateStyle": "German, DMY",
    "IntervalStyle": "sql_standard",
    "TimeZone": "Asia/Kathmandu",
    "client_encoding": "LATIN1",
    "extra_float_digits": "-15",
    "bytea_output": "escape",
    "standard_conforming_strings": "off",
    "backslash_quote": "off",
    "escape_string_warning": "off",
    "quote_all_identifiers": "on",
    "gin_fuzzy_search_limit": "1",
    "client_min_messages": "error",
    "exit_on_error": "on",
    "array_nulls": "off",
    "transform_null_equals": "on",
    "xmloption": "document",
    "default_transaction_isolation": "serializable",
    "default_transaction_deferrable": "on",
    "default_text_search_config": "simple",
    "default_tablespace": "elsewhere",
    "default_statistics_target": "1",
    "check_function_bodies": "off",
    "synchronous_commit": "off",
    "enable_nestloop": "off",
    "enable_indexscan": "off",
    "enable_bitmapscan": "off",
    "enable_seqscan": "off",
    "enable_hashagg": "off",
    "enable_sort": "off",
    "jit": "on",
    "jit_above_cost": "0",
    "plan_cache_mode": "force_generic_plan",
    "cursor_tuple_fraction": "1",
    "from_collapse_limit": "1",
    "join_collapse_limit": "1",
    "geqo_threshold": "2",
    "constraint_exclusion": "on",
    "work_mem": "64kB",
    "maintenance_work_mem": "1MB",
    "max_parallel_maintenance_workers": "0",
    "idle_session_timeout": "1s",
    "lock_timeout": "1s",
    "row_security": "on",
    "vacuum_cost_delay": "1ms",
    "track_activities": "off",
    "hnsw.ef_search": "1",
    "hnsw.iterative_scan": "off",
    "hnsw.max_scan_tuples": "1",
    "ivfflat.probes": "1",
    "application_name": "somebody",
    "statement_timeout": "100s",
}
"""Each far from its default."""

ENVIRONMENT = {
    "PGCLIENTENCODING": "LATIN1",
    "PGTZ": "Asia/Kathmandu",
    "PGDATESTYLE": "SQL, DMY",
    "PGGEQO": "off",
    "PGOPTIONS": "-c gin_fuzzy_search_limit=1 -c client_encoding=latin1",
}

SINCE_17 = {"transaction_timeout": "1s"}


def odd_settings(address: DatabaseAddress) -> dict[str, str]:
    with closing(psycopg.connect(address.conninfo)) as connection:
        return {**ODD, **SINCE_17} if connection.info.server_version >= 170_000 else dict(ODD)


def set_for_role(address: DatabaseAddress, role: str, settings: Mapping[str, str]) -> None:
    for name, value in settings.items():
        execute(address, f"ALTER ROLE {role} SET {name} = '{value}'")


def odd_role(server: Server, address: DatabaseAddress) -> DatabaseAddress:
    """The address for a role with ODD settings that owns all tables of a database that has them already."""
    if not execute(address, "SELECT 1 FROM pg_extension WHERE extname = 'vector'"):
        execute(address, "CREATE EXTENSION vector")
    odd = server.create_role(address, "CREATE, USAGE ON SCHEMA public", f"TEMP ON DATABASE {database_name(address)}")
    for (table,) in execute(address, "SELECT tablename FROM pg_tables WHERE schemaname = 'public'"):
        execute(address, f'ALTER TABLE "{table}" OWNER TO {role_name(odd)}')
    if not execute(address, "SELECT 1 FROM pg_tablespace WHERE spcname = 'elsewhere'"):
        with closing(psycopg.connect(address.conninfo, autocommit=True)) as connection:
            connection.execute("SET allow_in_place_tablespaces = on")
            connection.execute("CREATE TABLESPACE elsewhere LOCATION ''")
            connection.execute("GRANT CREATE ON TABLESPACE elsewhere TO PUBLIC")
    set_for_role(address, role_name(odd), odd_settings(address))
    return odd


@pytest.fixture
def pair(
    request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Iterator[tuple[Kameleon, Kameleon]]:
    """Two databases with the same records."""
    pytest.importorskip("kameleondb")
    plain = open_kameleon("postgresql", request, capsys, tmp_path)
    seed(plain)
    plain.client.close()
    server: Server = request.getfixturevalue("postgres")
    copy = server.create_database(plain.address)
    odd = Kameleon(copy, sqlalchemy_url(copy), capsys, tmp_path)
    yield plain, odd
    for kameleon in (plain, odd):
        close_kameleon(kameleon, request)


WORDS = ["river", "stone", "lamp", "café", "Zürich", "orbit", "кот", "東京"]


def seed(kameleon: Kameleon) -> None:
    fields = [{"name": "title", "type": "string"}, {"name": "due", "type": "datetime"},
              {"name": "price", "type": "float"}]  # fmt: skip
    for entity in ("Shared", "Own"):
        kameleon.client.create_entity(entity, fields=fields).insert_many(
            [
                {
                    "title": f"{entity} {i} {WORDS[i % 8]} near the {WORDS[i // 8 % 8]}",
                    "due": f"2024-03-{1 + i % 28:02}T01:30:00",
                    "price": i / 3 + 0.1,
                }
                for i in range(120)
            ]
        )
    kameleon.client.materialize_entity("Own")


COUNTS = ("read", "stored", "unchanged", "reused", "superseded", "rejected", "empty", "deleted", "index", "warnings")

CHANGES = (  # a text, a record that goes, indexes of the user's own
    """UPDATE kdb_records SET data = data || '{"title": "a red kettle"}' WHERE data->>'title' LIKE 'Shared 7 %'""",
    "UPDATE kdb_records SET is_deleted = true WHERE data->>'title' LIKE 'Shared 8 %'",
    "DROP INDEX ix_kdb_search_vector, ix_kdb_search_fts",
    "CREATE INDEX own_vectors ON kdb_search USING hnsw (embedding vector_cosine_ops) "
    "WHERE updated_at > '2000-01-02 03:04:05.25+00' AND entity_name <> 'a\\b'",
    "CREATE INDEX own_words ON kdb_search USING gin (tsv)",
)
SEARCHES = (
    ["café near the river"],
    ["stone", "--mode", "keyword", "--limit", "100"],
    ["東京", "--mode", "keyword"],
    ["lamp", "--mode", "vector", "--limit", "30"],
    ["orbit", "--where", '{"price": 1.4333333333333333}'],
    ["orbit", "--where", '{"due": "2024-03-05T01:30:00"}', "--entity", "Own"],
    ["lamp", "--entity", "Own", "--limit", "3"],
)


def main_job(kameleon: Kameleon) -> list[Any]:
    """Load, unchanged, change, index built again, searches, status, rejects: what a user sees of each."""
    seen: list[Any] = []

    def reindex(*options: str) -> None:
        answer = kameleon.kdb_fast("reindex", "--json", "--no-progress", "--max-rejects", "100", *options)
        assert answer.code in (0, 3), answer
        seen.append({name: answer.json[name] for name in COUNTS})
        rows = index_rows(kameleon.address).values()
        seen.append(sorted((row.content, row.vector.tobytes()) for row in rows if row.vector is not None))

    reindex()
    reindex()
    for statement in CHANGES:
        kameleon.execute(statement)
    reindex()
    reindex("--force")
    kameleon.execute("UPDATE kdb_search SET content = 'edited' WHERE content LIKE '%Own 5 %'")
    indexes = "SELECT indexdef, tablespace FROM pg_indexes WHERE tablename = 'kdb_search' AND indexname LIKE 'own%'"
    seen.append(sorted(kameleon.execute(indexes)))
    assert len(seen[-1]) == 2
    for query, *options in SEARCHES:
        found = kameleon.kdb_fast("search", query, "--json", *options).json["results"]
        assert found
        seen.append((query, found))
    status = kameleon.kdb_fast("status", "--json").json
    now = datetime.now(UTC)
    for entity in status["entities"]:
        assert abs(now - datetime.fromisoformat(entity.pop("last_updated"))).total_seconds() < 600
    seen.append(status["entities"])
    lines = b'{"id": "1", "text": "a"}\n{"id": "", "text": "b"}\n{"id": "3", "text": "\\u0000"}\n'
    command = ["reindex", "--from", "-", "--entity", "File", "--max-rejects", "90%", "--no-progress"]
    assert kameleon.kdb_fast(*command, stdin=lines).code == 3
    rejects = kameleon.kdb_fast("rejects", "list", "--json").json["rejects"]
    assert all(abs(now - datetime.fromisoformat(r["rejected_at"])).total_seconds() < 600 for r in rejects)
    seen.append([(r["entity"], r["record_id"], r["reason"], r["detail"], r["line"]) for r in rejects])
    assert len(rejects) == 2
    assert kameleon.kdb_fast("status").code == kameleon.kdb_fast("rejects", "list").code == 0
    return seen


def test_the_main_job_is_the_same_whatever_a_role_has_set(
    pair: tuple[Kameleon, Kameleon], postgres: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, odd = pair
    role = odd_role(postgres, odd.address)
    wanted = main_job(plain)
    odd.url = sqlalchemy_url(role) + "&client_encoding=latin1"
    with closing(psycopg.connect(role.conninfo, client_encoding="LATIN1")) as connection:
        assert connection.execute("SHOW extra_float_digits").fetchone() == ("-15",)  # they are really there
    command = odd.kdb_fast

    def kdb_fast(*arguments: str, stdin: bytes | None = None) -> Answer:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in ENVIRONMENT.items():
                patch.setenv(name, value)
            return command(*arguments, stdin=stdin)

    monkeypatch.setattr(odd, "kdb_fast", kdb_fast)
    for expected, got in zip(wanted, main_job(odd), strict=True):
        assert got == expected


def test_every_pin_is_odd_in_the_test() -> None:
    not_by_role = {"default_table_access_method"}  # there is one only
    assert set(pinned(170_000)) - not_by_role <= {*ODD, *SINCE_17}
    assert all(PINNED.get(name) != value for name, value in ODD.items())


def test_every_statement_has_the_pins_and_the_session_keeps_its_own(
    postgres: Server, database: DatabaseAddress
) -> None:
    role = odd_role(postgres, database)
    names = list(pinned(180_000 if "transaction_timeout" in odd_settings(database) else 160_000))
    show = "SELECT current_setting(n) FROM unnest(%s::text[]) WITH ORDINALITY AS t(n, i) ORDER BY i"
    with closing(psycopg.connect(role.conninfo, autocommit=True)) as plain:
        before = plain.execute(show, (names,)).fetchall()
    connection = connect_postgresql(role, role="test")
    with closing(connection):
        wanted = list(pinned(connection.info.server_version).values())
        settings = [row[0] for row in connection.execute(show, (names,)).fetchall()]
        assert [s.partition(",")[0] for s in settings] == wanted
        assert connection.execute("SHOW transaction_isolation").fetchone() == ("read committed",)
        assert connection.execute("SELECT 0.1::float8 + 0.2").fetchone() == (0.1 + 0.2,)
        with pg_settings.transaction(connection, "SET LOCAL lock_timeout = '7s'"):
            settings = [row[0] for row in connection.execute(show, (names,)).fetchall()]
            assert [s.partition(",")[0] for s in settings] == wanted
            assert connection.execute("SHOW transaction_isolation").fetchone() == ("read committed",)
            assert connection.execute("SHOW lock_timeout").fetchone() == ("7s",)
            assert connection.execute("SHOW synchronous_commit").fetchone() == ("off",)  # the user's own choice
        # Nothing is left for whoever a pooler gives this session to; the encoding is asked for at the start.
        raw = [row[0] for row in psycopg.Cursor(connection).execute(show, (names,)).fetchall()]
        assert raw == ["UTF8", *(value for (value,) in before[1:])]


def test_an_error_of_a_statement_is_that_error_and_the_connection_goes_on(
    database: DatabaseAddress, capfd: pytest.CaptureFixture[str]
) -> None:
    with closing(connect_postgresql(database, role="test")) as connection:
        for statement, error in (
            ("SELECT 1 / 0", psycopg.errors.DivisionByZero),
            ("SELECT nothing", psycopg.errors.UndefinedColumn),
            ("SELEKT", psycopg.errors.SyntaxError),
        ):
            with pytest.raises(error):
                connection.execute(statement)
            assert connection.execute("SELECT 1").fetchone() == (1,)
        pid = connection.info.backend_pid
        execute(database, "SELECT pg_terminate_backend(%s)", pid)
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT pg_sleep(5)")
        assert connection.closed
    assert capfd.readouterr().err == ""


def test_a_run_that_waits_for_the_lock_sees_who_has_taken_it(postgres: Server, database: DatabaseAddress) -> None:
    """In a snapshot of its transaction's beginning it would not, and there would be two."""
    role = odd_role(postgres, database)
    with closing(open_store(role, "parent")) as first, closing(open_store(role, "parent")) as second:
        first.prepare(16)
        outcome: list[Any] = []

        def begin() -> None:
            try:
                outcome.append(second.begin_run(fingerprint="f", model="m", dimensions=16, wait=0))
            except LockedError as error:
                outcome.append(error)

        with closing(psycopg.connect(database.conninfo)) as holder:
            holder.execute("SELECT pg_advisory_xact_lock(%s)", (DDL_LOCK,))
            thread = threading.Thread(target=begin)
            thread.start()
            waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
            eventually(lambda: execute(database, waiting) == [(1,)])
            holder.execute(
                "INSERT INTO kdb_fast_runs (state, fingerprint, model, dimensions, host, pid, process_started) "
                "VALUES ('running', 'f', 'm', 16, 'elsewhere', 1, 1)"
            )
            holder.commit()
        thread.join(20)
        assert isinstance(outcome[0], LockedError)


def test_a_living_run_is_not_taken_for_dead_by_a_rounded_time(postgres: Server, database: DatabaseAddress) -> None:
    role = odd_role(postgres, database)
    with closing(open_store(role, "parent")) as first, closing(open_store(role, "parent")) as second:
        first.prepare(16)
        first.begin_run(fingerprint="f", model="m", dimensions=16, wait=0)
        with pytest.raises(LockedError, match="Run 1 holds the index"):
            second.begin_run(fingerprint="f", model="m", dimensions=16, wait=0)


def test_a_reader_does_not_wait_for_a_safe_snapshot(postgres: Server, database: DatabaseAddress) -> None:
    """A role that reads only, serializable and deferrable, would wait for other transactions to end."""
    role = postgres.create_role(database)
    safe = {"default_transaction_isolation": "serializable", "default_transaction_deferrable": "on"}
    set_for_role(database, role_name(role), {**safe, "default_transaction_read_only": "on"})
    execute(database, "CREATE TABLE other (n int)")
    with (
        closing(psycopg.connect(database.conninfo)) as writer,
        closing(connect_postgresql(role, role="test")) as reader,
    ):
        writer.isolation_level = psycopg.IsolationLevel.SERIALIZABLE
        writer.execute("INSERT INTO other VALUES (1)")
        psycopg.Cursor(reader).execute("SET statement_timeout = '5s'")
        assert reader.execute("SELECT 1").fetchone() == (1,)
        with pg_settings.transaction(reader):
            assert reader.execute("SHOW transaction_read_only").fetchone() == ("on",)  # that is somebody's wish


def test_a_role_that_must_not_write_searches_and_is_refused_a_run(
    make_job: MakeJob, commands: Commands, postgres: Server, database: DatabaseAddress
) -> None:
    job = make_job(database, ["a red kettle", "a boat"])
    job.run()
    role = postgres.create_role(database, "SELECT ON ALL TABLES IN SCHEMA public")
    set_for_role(database, role_name(role), {"default_transaction_read_only": "on"})
    reading = FileJob(commands, role, commands.mark.parent, ["a red kettle"])
    command = reading.start()
    assert command.wait() == 4
    assert "read-only" in command.err
    search = commands.start(
        "search", "kettle", "--mode", "keyword", "--json", "--db", sqlalchemy_url(role).replace("+psycopg", "")
    )
    assert search.wait() == 0, search.err
    assert [r["matched_text"] for r in search.receipt["results"]] == ["text: a red kettle"]


@pytest.mark.parametrize("tracked", ["on", "off"])
def test_a_long_statement_is_waited_for_where_the_server_does_not_say_what_it_does(
    postgres: Server, database: DatabaseAddress, monkeypatch: pytest.MonkeyPatch, tracked: str
) -> None:
    role = postgres.create_role(database)
    set_for_role(database, role_name(role), {"track_activities": tracked})
    monkeypatch.setenv("KDB_FAST_SILENCE", "0.1")
    with closing(connect_postgresql(role, role="test")) as connection:
        assert connection.execute("SELECT pg_sleep(2.5) IS NOT NULL").fetchone() == (True,)


def test_an_engine_of_the_callers_with_odd_settings(postgres: Server, database: DatabaseAddress) -> None:
    execute(database, "CREATE EXTENSION vector")
    options = " ".join(f"-c {name}={value.replace(' ', '')}" for name, value in odd_settings(database).items()
                       if name not in ("default_transaction_deferrable", "idle_session_timeout"))  # fmt: skip
    engine = sqlalchemy.create_engine(
        sqlalchemy_url(database), isolation_level="REPEATABLE READ", pool_size=1, max_overflow=4,
        connect_args={"client_encoding": "latin1", "options": options},
    )  # fmt: skip
    records = [("Note", str(i), f"{WORDS[i % 5]} number {i}") for i in range(40)]
    names = [
        *pinned(170_000 if "transaction_timeout" in options else 160_000),
        "enable_hashjoin",
        "enable_mergejoin",
        "lock_timeout",
    ]
    show = sqlalchemy.text(
        "SELECT string_agg(n || '=' || current_setting(n), ';' ORDER BY n) FROM unnest(CAST(:n AS text[])) n"
    )
    with SearchEngine(engine, Words()) as search:
        search.index_records_batch(records)
        keywords = search.search("café", limit=20)
        assert {r.matched_text for r in keywords if "café" in r.matched_text} == {
            c for _, _, c in records if "café" in c
        }
        with Session(engine) as session:
            before = session.execute(show, {"n": names}).scalar()
            connection = session.connection().connection.driver_connection
            assert connection is not None
            assert connection.info.encoding == "iso8859-1"
            batch = search.for_session(session)
            batch.index_record("Note", "é1", "Zürich am See")
            batch.index_record("Note", "é2", "日本 Zürich")
            search._write_on(connection, batch._operations)
            assert session.execute(show, {"n": names}).scalar() == before
            assert connection.info.encoding == "iso8859-1"
            session.commit()
        # What fails leaves the caller's transaction and its settings as they were.
        with Session(engine) as session:
            before = session.execute(show, {"n": names}).scalar()
            connection = session.connection().connection.driver_connection
            assert connection is not None
            with pytest.raises(ZeroDivisionError), search._connections.borrowed(connection):
                raise ZeroDivisionError
            assert session.execute(show, {"n": names}).scalar() == before
            assert connection.info.encoding == "iso8859-1"
        assert [r.id for r in search.search("See")][:1] == ["é1"]
    with closing(psycopg.connect(database.conninfo)) as plain:
        stored = plain.execute("SELECT record_id, content FROM kdb_search WHERE record_id LIKE 'é%'").fetchall()
    assert dict(stored) == {"é1": "Zürich am See", "é2": "日本 Zürich"}
    engine.dispose()


def test_a_round_trip_is_one_sync_and_no_flush(database: DatabaseAddress) -> None:
    """Behind a Flush a pooler keeps a session for the client until its next statement."""
    with Proxy(database) as proxy, closing(connect_postgresql(proxy.address, role="test")) as connection:
        sent: list[bytes] = []

        def request(data: bytes) -> str:
            sent.append(data)
            return FORWARD

        proxy.on_request = request
        assert connection.execute("SELECT 1").fetchall() == [(1,)]
        assert at_once(connection, [(b"SELECT 2", {}), (b"SELECT 3", {})]) == [[(2,)], [(3,)]]
        rows = pg_settings.send(connection, [(b"SELECT 4", [])])
        assert rows
        assert rows() == [[(4,)]]
        with pytest.raises(psycopg.errors.DivisionByZero):
            connection.execute("SELECT 1 / 0")
        assert connection.execute("SELECT 5").fetchall() == [(5,)]
    kinds = list(_kinds(b"".join(sent)))
    # That of a transaction that has failed is followed by its ROLLBACK.
    assert (kinds.count(b"S"), kinds.count(b"H")) == (5, 0)


def _kinds(data: bytes) -> Iterator[bytes]:
    """The kind of each of a client's messages."""
    while data:
        (length,) = struct.unpack_from(">i", data, 1)
        yield data[:1]
        data = data[1 + length :]
