"""A session that sees only a part of the records: row level security, views. What is hidden must not look deleted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from kameleon import Answer, Kameleon, close_kameleon, open_kameleon
from search_engines import Hashes
from servers import Server, connect_as, role_name

from kdb_fast import SearchEngine
from kdb_fast.catalog.records import live_rows
from kdb_fast.errors import SchemaError
from kdb_fast.stores import open_store
from kdb_fast.stores.postgresql.index_store import PostgreSQLIndexStore
from kdb_fast.tables.hidden_rows import HiddenRowsError

pytest.importorskip("kameleondb")
pytestmark = [
    pytest.mark.usefixtures("loaded_once"),
    pytest.mark.filterwarnings("ignore:The default datetime adapter is deprecated:DeprecationWarning"),
]

RECORDS = 6
KAMELEON_TABLES = ("kdb_entity_definitions", "kdb_field_definitions", "kdb_records")
INDEX_TABLES = ("kdb_search", "kdb_fast_runs", "kdb_fast_rejects", "kdb_fast_state", "kdb_fast_migrations")


@pytest.fixture(params=["postgresql"])
def notes(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Kameleon]:
    """Six indexed records of Note and one of Other."""
    opened = open_kameleon(request.param, request, capsys, tmp_path)
    for name, count in (("Note", RECORDS), ("Other", 1)):
        entity = opened.client.create_entity(name, fields=[{"name": "title", "type": "string"}])
        entity.insert_many([{"title": f"{name} number {i}"} for i in range(count)])
    assert opened.reindex()["stored"] == RECORDS + 1
    yield opened
    close_kameleon(opened, request)


def move_to_a_table(notes: Kameleon) -> None:
    assert notes.client.materialize_entity("Note")["success"]
    assert notes.reindex()["unchanged"] == RECORDS + 1


def limited_role(postgres: Server, notes: Kameleon) -> str:
    """Name of a new role with all rights on the tables but ownership."""
    tables = [row[0] for row in notes.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")]
    address = postgres.create_role(
        notes.address,
        "ALL ON SCHEMA public",
        *(f"ALL ON {table}" for table in tables),
        "ALL ON ALL SEQUENCES IN SCHEMA public",
    )
    return role_name(address)


def reindex_as(notes: Kameleon, role: str, *options: str) -> Answer:
    notes.url = notes.url.replace("postgres@/", f"{role}@/")
    try:
        return notes.kdb_fast("reindex", "--no-progress", *options)
    finally:
        notes.url = notes.url.replace(f"{role}@/", "postgres@/")


def hide(notes: Kameleon, table: str, seen: str) -> None:
    notes.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY; CREATE POLICY part ON {table} USING ({seen})")


def index_keys(notes: Kameleon) -> set[str]:
    return {row[0] for row in notes.execute("SELECT record_id FROM kdb_search")}


HIDING = {
    "definitions": ("kdb_entity_definitions", "name = 'Note'"),
    "shared": ("kdb_records", "data ->> 'title' NOT LIKE '%1'"),
    "dedicated": ("kdb_note", "title NOT LIKE '%1'"),
}


@pytest.mark.parametrize("where", HIDING)
def test_what_row_level_security_hides_is_not_removed(notes: Kameleon, postgres: Server, where: str) -> None:
    if where == "dedicated":
        move_to_a_table(notes)
    table, seen = HIDING[where]
    hide(notes, table, seen)
    notes.execute(
        "INSERT INTO kdb_fast_rejects (key, key_hash, content_hash, reason, detail, run) "
        "SELECT json_build_array('Note', record_id), sha256(record_id::bytea), '', 'test', 'test', 1 FROM kdb_search"
    )
    rejects = notes.execute("SELECT count(*) FROM kdb_fast_rejects")
    before = index_keys(notes)
    answer = reindex_as(notes, limited_role(postgres, notes))
    assert answer.code == 0, answer
    assert "Nothing was removed from the index for Note" in answer.out
    assert f"see only a part of public.{table}" in answer.out
    assert index_keys(notes) == before
    assert notes.execute("SELECT count(*) FROM kdb_fast_rejects") == rejects
    # Whoever sees everything removes what is gone, and forgets old rejects.
    notes.execute("UPDATE kdb_records SET is_deleted = true WHERE data ->> 'title' LIKE 'Other%'")
    receipt = notes.reindex()
    assert (receipt["deleted"], receipt["warnings"]) == (1, [])
    assert notes.execute("SELECT count(*) FROM kdb_fast_rejects") == [(0,)]


def test_the_rest_of_such_a_run_goes_on(notes: Kameleon, postgres: Server) -> None:
    hide(notes, "kdb_records", "data ->> 'title' NOT LIKE '%1'")
    notes.execute("UPDATE kdb_records SET data = '{\"title\": \"changed\"}' WHERE data ->> 'title' = 'Note number 2'")
    answer = reindex_as(notes, limited_role(postgres, notes), "--json")
    receipt = answer.json
    assert (receipt["stored"], receipt["unchanged"], receipt["deleted"]) == (1, RECORDS - 1, 0)
    assert "row level security" in receipt["warnings"][0]
    assert len(index_keys(notes)) == RECORDS + 1


def test_who_sees_everything_removes_what_is_gone(notes: Kameleon, postgres: Server) -> None:
    hide(notes, "kdb_records", "false")
    role = limited_role(postgres, notes)

    def remove_one(role: str, number: int) -> tuple[int, list[str]]:
        notes.execute(f"UPDATE kdb_records SET is_deleted = true WHERE data ->> 'title' = 'Note number {number}'")
        receipt = reindex_as(notes, role, "--json").json
        return receipt["deleted"], receipt["warnings"]

    notes.execute("ALTER TABLE kdb_records FORCE ROW LEVEL SECURITY")
    assert remove_one("postgres", 0) == (1, [])
    notes.execute(f"ALTER ROLE {role} BYPASSRLS")
    assert remove_one(role, 1) == (1, [])
    notes.execute(f"ALTER ROLE {role} NOBYPASSRLS; ALTER TABLE kdb_records OWNER TO {role}")
    try:
        deleted, warnings = remove_one(role, 2)
        assert (deleted, "row level security" in warnings[0]) == (0, True)
        notes.execute("ALTER TABLE kdb_records NO FORCE ROW LEVEL SECURITY")
        assert remove_one(role, 3) == (2, [])
    finally:
        notes.execute("ALTER TABLE kdb_records OWNER TO postgres")


@pytest.mark.parametrize("notes", ["postgresql", "sqlite"], indirect=True)
@pytest.mark.parametrize("table", ["kdb_records", "kdb_note"])
def test_a_view_as_source_removes_nothing(notes: Kameleon, table: str) -> None:
    if table == "kdb_note":
        move_to_a_table(notes)
    condition = "title NOT LIKE '%1'" if table == "kdb_note" else "CAST(data AS text) NOT LIKE '%1\"}'"
    for statement in (
        f"ALTER TABLE {table} RENAME TO everything",
        f"CREATE VIEW {table} AS SELECT * FROM everything WHERE {condition}",
    ):
        notes.execute(statement)
    before = index_keys(notes)
    answer = notes.kdb_fast("reindex", "--no-progress")
    assert answer.code == 0, answer
    assert "Nothing was removed from the index for Note" in answer.out
    assert f"{table} is a view" in answer.out
    assert index_keys(notes) == before
    # An entity whose own records are all seen is not kept back.
    assert ("for Note, Other," in answer.out) == (table == "kdb_records")


@pytest.mark.parametrize("notes", ["postgresql", "sqlite"], indirect=True)
def test_an_entity_whose_table_is_gone_keeps_its_rows(notes: Kameleon) -> None:
    move_to_a_table(notes)
    notes.execute("ALTER TABLE kdb_note RENAME TO elsewhere")
    with closing(open_store(notes.address, "test")) as store:
        with pytest.raises(SchemaError, match="kdb_note', which does not exist"):
            store.prune("Note", live_rows)
        notes.execute("UPDATE kdb_entity_definitions SET is_active = false WHERE name = 'Note'")
        assert store.prune("Note", live_rows) == 0
        assert store.prune("Other", live_rows) == 0
        notes.execute("ALTER TABLE kdb_entity_definitions RENAME TO definitions")
        assert store.prune("Other", live_rows) == 0
    assert len(index_keys(notes)) == RECORDS + 1


def test_a_policy_that_comes_in_between_removes_nothing(notes: Kameleon, postgres: Server) -> None:
    role = limited_role(postgres, notes)
    store = PostgreSQLIndexStore(replace(connect_as(notes.address, user=role), schema="public"), "test")
    try:
        hide(notes, "kdb_records", "false")
        with pytest.raises(HiddenRowsError, match="row level security"):
            store.prune("Note", live_rows)
    finally:
        store.close()
    assert len(index_keys(notes)) == RECORDS + 1


def test_a_run_that_would_see_a_part_of_the_index_is_refused_first(notes: Kameleon, postgres: Server) -> None:
    role = limited_role(postgres, notes)
    for table in INDEX_TABLES:
        hide(notes, table, "true")
        answer = reindex_as(notes, role)
        assert answer.code == 4
        assert f"Row level security on public.{table} lets the role {role} see only a part of it" in answer.err
        notes.execute(f"ALTER TABLE {table} DISABLE ROW LEVEL SECURITY")
    assert reindex_as(notes, role, "--json").json["unchanged"] == RECORDS + 1


def test_a_run_that_would_not_see_every_field_is_refused_first(notes: Kameleon, postgres: Server) -> None:
    role = limited_role(postgres, notes)
    before = notes.execute("SELECT record_id, content FROM kdb_search ORDER BY 1")
    hide(notes, "kdb_field_definitions", "false")
    answer = reindex_as(notes, role)
    assert answer.code == 4
    assert f"Row level security on public.kdb_field_definitions lets the role {role} see only a part" in answer.err
    assert notes.execute("SELECT record_id, content FROM kdb_search ORDER BY 1") == before
    assert notes.reindex()["unchanged"] == RECORDS + 1


@pytest.mark.parametrize("table", ["kdb_records", "kdb_note"])
def test_insert_under_row_level_security_is_refused_first(
    notes: Kameleon, postgres: Server, tmp_path: Path, table: str
) -> None:
    if table == "kdb_note":
        move_to_a_table(notes)
    role = limited_role(postgres, notes)
    hide(notes, table, "true")
    path = tmp_path / "new.jsonl"
    path.write_text('{"title": "new"}\n')
    notes.url = notes.url.replace("postgres@/", f"{role}@/")
    answer = notes.kdb_fast("insert", "Note", str(path))
    assert (answer.code, f"active for the role {role} on public.{table}" in answer.err) == (4, True)


def test_rules_that_no_merge_can_heed_are_refused_first(notes: Kameleon) -> None:
    for event in ("INSERT", "UPDATE"):
        notes.execute(f"CREATE RULE quietly AS ON {event} TO kdb_search DO INSTEAD NOTHING")
        answer = notes.kdb_fast("reindex", "--no-progress")
        assert (answer.code, "has rules for INSERT or UPDATE (quietly)" in answer.err) == (4, True)
        notes.execute("DROP RULE quietly ON kdb_search")
    assert notes.reindex()["unchanged"] == RECORDS + 1


def test_a_search_shows_what_its_role_may_see(notes: Kameleon, postgres: Server) -> None:
    role = limited_role(postgres, notes)
    hide(notes, "kdb_search", "content NOT LIKE '%1'")
    names: Sequence[str] = ("postgres", role)
    found = []
    for name in names:
        notes.url = notes.url.replace("postgres@/", f"{name}@/")
        found.append(len(notes.kdb_fast("search", "number", "--limit", "50", "--json").json["results"]))
        notes.url = notes.url.replace(f"{name}@/", "postgres@/")
    assert found == [RECORDS + 1, RECORDS]


def test_the_library_keeps_to_the_policies(notes: Kameleon, postgres: Server) -> None:
    role = limited_role(postgres, notes)
    hide(notes, "kdb_search", "content NOT LIKE '%secret%'")
    notes.execute("UPDATE kdb_search SET content = 'a secret' WHERE content LIKE '%number 1'")
    ((hidden,),) = notes.execute("SELECT record_id FROM kdb_search WHERE content = 'a secret'")
    with SearchEngine(notes.url.replace("+psycopg", "").replace("postgres@/", f"{role}@/"), Hashes(384)) as search:
        search.index_record("Extra", "1", "a new text")
        search.index_record("Extra", "1", "a newer text")
        with pytest.raises(SchemaError, match="row-level security"):
            search.index_record("Note", hidden, "a text over what is hidden")
    assert notes.execute("SELECT content FROM kdb_search WHERE entity_name = 'Extra'") == [("a newer text",)]
    assert notes.execute("SELECT content FROM kdb_search WHERE record_id = %s", hidden) == [("a secret",)]
