"""``kdb-fast insert``: new records as KameleonDB itself stores them, and indexed in the same go."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from kameleon import Kameleon, close_kameleon, open_kameleon
from servers import Oracle, Server, index_rows, kept_rejects

from kdb_fast import cli, faults
from kdb_fast.db.address import DatabaseAddress
from kdb_fast.errors import SchemaError
from kdb_fast.records import Record
from kdb_fast.settings import RejectLimit
from kdb_fast.sources import kameleondb
from kdb_fast.sources.insert import source as inserting
from kdb_fast.sources.insert.source import InsertingSource, open_inserter

pytest.importorskip("kameleondb")

# KameleonDB hands datetimes to sqlite3 as they are, which Python 3.12 deprecates.
pytestmark = [
    pytest.mark.usefixtures("loaded_once"),
    pytest.mark.filterwarnings("ignore:The default datetime adapter is deprecated:DeprecationWarning"),
]

FIELDS: list[dict[str, Any]] = [
    {"name": "title", "type": "string", "required": True},
    {"name": "price", "type": "float"},
    {"name": "stock", "type": "int"},
    {"name": "active", "type": "bool"},
    {"name": "since", "type": "datetime"},
    {"name": "owner", "type": "uuid"},
    {"name": "extra", "type": "json"},
    {"name": "body", "type": "text"},
]
OWNER = "6f1c2f0e-3b1a-4c65-9d57-0d7f0a6d0f11"
RECORDS: list[dict[str, Any]] = [
    {
        "title": "Lamp \N{GREEK SMALL LETTER ALPHA} \\ \t \"'",
        "price": 3,
        "stock": 4.0,
        "active": True,
        "since": "2026-01-02T03:04:05+02:00",
        "owner": OWNER,
        "extra": {"deep": [1, None, "x\ty"], "": "\N{GRINNING FACE}"},
        "body": "line one\nline two | 100% \\N \\.",
    },
    {"title": "", "extra": [1.5], "since": "20260102", "active": False},
    {"body": "", "title": "only a title", "extra": "text", "stock": None},
    {"title": "\\N", "price": 1e300, "stock": -7, "extra": 7},
]
TEXTS = {
    "title: Lamp \N{GREEK SMALL LETTER ALPHA} \\ \t \"' | body: line one\nline two | 100% \\N \\.",
    "title: only a title",
    "title: \\N",
}
COLUMNS = ["title", "price", "stock", "active", "since", "owner", "extra", "body", "is_deleted", "created_by"]


@pytest.fixture(params=["sqlite", "postgresql"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def database(
    kind: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Iterator[Kameleon]:
    opened = open_kameleon(kind, request, capsys, tmp_path)
    yield opened
    close_kameleon(opened, request)


@pytest.fixture
def note(database: Kameleon) -> Kameleon:
    """An entity Note with a text, in shared storage."""
    database.client.create_entity("Note", fields=[{"name": "text", "type": "text"}, {"name": "n", "type": "int"}])
    return database


@pytest.fixture(params=["shared", "dedicated"])
def notes(request: pytest.FixtureRequest, note: Kameleon) -> Kameleon:
    """An entity Note with a text, in either storage."""
    if request.param == "dedicated":
        assert note.client.materialize_entity("Note")["success"]
    return note


ONLY_POSTGRESQL = pytest.mark.parametrize("kind", ["postgresql"], indirect=True)
ONLY_SQLITE = pytest.mark.parametrize("kind", ["sqlite"], indirect=True)


def note_texts(database: Kameleon) -> list[str]:
    """Content of each live record of Note, as a reindex reads it."""
    with closing(kameleondb.KameleonDBSource(database.address, ["Note"])) as source:
        found = [item for page in source.pages() for item in page]
    assert all(isinstance(item, Record) for item in found)
    return sorted(item.content for item in found if isinstance(item, Record))


# -- what is stored ----------------------------------------------------------------------------------------


def test_shared_records_are_stored_as_kameleondb_stores_them(database: Kameleon) -> None:
    for name in ("Own", "Ours"):
        database.client.create_entity(name, fields=FIELDS)
    database.client.entity("Own").insert_many(RECORDS)
    before = datetime.now(UTC)
    answer = database.insert("Ours", RECORDS)
    assert answer.code == 0, answer
    assert sorted(map(str, database.shared("Ours").values())) == sorted(map(str, database.shared("Own").values()))
    for record_id in database.shared("Ours"):
        record = database.client.entity("Ours").find_by_id(record_id)
        assert record is not None
        assert len(record_id) == 36
        assert record["created_at"] == record["updated_at"]
        created = datetime.fromisoformat(record["created_at"])
        assert before <= (created if created.tzinfo else created.replace(tzinfo=UTC)) <= datetime.now(UTC)
    kinds = database.execute(
        "SELECT DISTINCT typeof(created_at), length(created_at), typeof(is_deleted) FROM kdb_records"
        if not database.is_postgresql
        else "SELECT 1"
    )
    assert len(kinds) == 1, "both write their times in one form"


def test_dedicated_records_are_stored_as_kameleondb_moves_them(database: Kameleon) -> None:
    client = database.client
    for name in ("Own", "Ours"):
        client.create_entity(name, fields=FIELDS)
    # KameleonDB leaves times without a zone to the server's own; ours are UTC as everywhere else.
    if database.is_postgresql:
        (name,) = database.execute("SELECT current_database()")[0]
        database.execute(f"ALTER DATABASE {name} SET timezone = 'UTC'")
        client.close()
    # KameleonDB cannot move a text of eight digits; SQLite would make a number of it.
    records = [{**record, "since": "2026-01-02T00:00:00"} if record.get("since") == "20260102" else record
               for record in RECORDS]  # fmt: skip
    client.entity("Own").insert_many(records)
    assert client.materialize_entity("Own")["success"]
    assert client.materialize_entity("Ours")["success"]
    answer = database.insert("Ours", RECORDS)
    assert answer.code == 0, answer
    assert database.columns("kdb_ours", COLUMNS) == database.columns("kdb_own", COLUMNS)
    assert database.shared("Ours") == {}
    (same,) = database.execute("SELECT count(*) FROM kdb_ours WHERE created_at = updated_at")[0]
    assert same == len(RECORDS)


@pytest.mark.parametrize("storage", ["shared", "dedicated"])
def test_what_is_inserted_is_indexed_and_needs_no_reindex(database: Kameleon, oracle: Oracle, storage: str) -> None:
    database.client.create_entity("Product", fields=FIELDS)
    if storage == "dedicated":
        assert database.client.materialize_entity("Product")["success"]
    receipt = database.insert("Product", RECORDS).json
    parts = {key: receipt[key] for key in ("inserted", "read", "stored", "empty", "rejected", "pending", "warnings")}
    assert parts == {
        "inserted": 4, "read": 3, "stored": 3, "empty": 1, "rejected": 0, "pending": 0, "warnings": [],
    }  # fmt: skip
    assert receipt["rejects"] == []
    rows = index_rows(database.address)
    assert {row.content for row in rows.values()} == TEXTS
    oracle.check(rows, [Record((entity, record_id), row.content) for (entity, record_id), row in rows.items()])
    (entity,) = database.kdb_fast("status", "--json").json["entities"]
    assert (entity["indexed"], entity["pending"], entity["stale"]) == (3, 0, 0)
    again = database.reindex("Product")
    assert (again["unchanged"], again["stored"], again["empty"], again["deleted"]) == (3, 0, 1, 0)


def test_a_renamed_field_is_given_by_its_new_name_and_stored_under_its_old_one(database: Kameleon) -> None:
    note = database.client.create_entity("Note", fields=[{"name": "old", "type": "text"}])
    note.rename_field("old", "new")
    assert database.insert("Note", [{"new": "a"}]).code == 0
    (record_id,) = database.shared("Note")
    assert note.find_by_id(record_id)["new"] == "a"
    assert database.index() == {record_id: "new: a"}
    # A new field of the old name shares the stored value, in KameleonDB itself too.
    note.add_field("old", "text")
    assert database.insert("Note", [{"new": "b", "old": "c"}]).code == 0
    assert note_texts(database) == ["new: a | old: a", "new: c | old: c"]
    assert set(database.index().values()) == {"new: a", "new: c | old: c"}


def test_what_kameleondb_gives_itself_is_not_taken_from_the_input(note: Kameleon) -> None:
    given = {"id": OWNER, "created_at": "1999-01-01", "created_by": "me", "text": "a"}
    answer = note.insert("Note", [given, {"id": "2", "text": "b"}])
    assert answer.code == 0
    assert len(note.index()) == 2
    assert OWNER not in note.index()
    assert [warning.split(", ")[0] for warning in answer.json["warnings"]] == [
        "1 record has a value for 'created_at'",
        "1 record has a value for 'created_by'",
        "2 records have a value for 'id'",
    ]


def test_defaults_are_a_note_that_is_not_applied_as_in_kameleondb(database: Kameleon) -> None:
    fields = [{"name": "text", "type": "text"}, {"name": "n", "type": "int", "default": 7}]
    own = database.client.create_entity("Note", fields=fields)
    own.insert({"text": "a"})
    assert database.insert("Note", [{"text": "a"}]).code == 0
    first, second = database.shared("Note").values()
    assert first == second


def test_records_without_text_are_inserted_and_not_indexed(database: Kameleon) -> None:
    database.client.create_entity("Measure", fields=[{"name": "value", "type": "float"}])
    answer = database.insert("Measure", [{"value": i} for i in range(300)] + [{"value": "x"}] * 3)
    assert answer.code == 3, answer
    receipt = answer.json
    assert (receipt["inserted"], receipt["empty"], receipt["read"], receipt["rejected"]) == (300, 300, 3, 3)
    assert len(database.shared("Measure")) == 300
    assert database.index() == {}


def test_equal_records_are_all_inserted(note: Kameleon) -> None:
    receipt = note.insert("Note", [{"text": "same"}] * 5).json
    assert (receipt["inserted"], receipt["stored"], receipt["reused"]) == (5, 1, 4)
    assert note_texts(note) == ["text: same"] * 5


# -- where it comes from -----------------------------------------------------------------------------------


def test_a_json_array_is_inserted_too(note: Kameleon) -> None:
    answer = note.insert("Note", b'[\n{"text": "a"},\n{"text": 1},\n{"text": "c"}]')
    assert answer.code == 3
    assert [reject["line"] for reject in answer.json["rejects"]] == [3]
    assert note_texts(note) == ["text: a", "text: c"]


@pytest.mark.parametrize("arguments", [(), ("-",)])
def test_standard_input_is_read(note: Kameleon, arguments: tuple[str, ...]) -> None:
    answer = note.kdb_fast("insert", "Note", *arguments, "--json", stdin=b'{"text": "a"}\n{"text": "b"}')
    assert answer.code == 0, answer
    assert answer.json["inserted"] == 2
    assert note_texts(note) == ["text: a", "text: b"]


def test_an_empty_input_inserts_nothing_and_is_no_error(note: Kameleon) -> None:
    answer = note.kdb_fast("insert", "Note", "--no-progress", stdin=b"\n\n")
    assert (answer.code, answer.err) == (0, "")
    assert "0 records inserted into Note" in answer.out


@ONLY_SQLITE
def test_a_terminal_is_not_waited_for(database: Kameleon, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert cli.run(["insert", "Note", "--db", database.url]) == 2
    assert "Name a FILE" in capsys.readouterr().err


@ONLY_SQLITE
def test_what_cannot_be_read_is_a_usage_error_and_inserts_nothing(database: Kameleon, tmp_path: Path) -> None:
    database.client.create_entity("Note", fields=[{"name": "text", "type": "text"}])
    missing = database.kdb_fast("insert", "Note", str(tmp_path / "missing.jsonl"))
    assert missing.code == 2
    assert "missing.jsonl" in missing.err
    assert database.kdb_fast("insert", "Note", stdin=b"\x1f\x8b\x08\x00 packed").code == 2
    assert database.kdb_fast("insert", "Note", "--batch-size", "0", stdin=b"").code == 2
    assert database.kdb_fast("insert", "Note", "--max-rejects", "many", stdin=b"").code == 2
    assert database.shared("Note") == {}


def test_an_unknown_entity_is_refused_with_near_names(note: Kameleon) -> None:
    answer = note.insert("note", [{"text": "a"}])
    assert answer.code == 4
    assert answer.json["error"]["remedy"] == "Did you mean Note?"
    assert note.insert("Nothing", [{"text": "a"}]).code == 4
    note.client.drop_entity("Note")
    assert "was dropped" in note.insert("Note", [{"text": "a"}]).json["error"]["message"]


def test_a_database_without_kameleondb_is_refused(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    if kind == "sqlite":
        path = tmp_path / "plain.db"
        path.touch()
        address = DatabaseAddress("sqlite", str(path), f"sqlite:///{path}")
    else:
        server: Server = request.getfixturevalue("postgres")
        address = server.create_database()
    with pytest.raises(SchemaError, match="no KameleonDB tables"):
        open_inserter(address, "Note")
    if kind == "postgresql":
        server.drop_database(address)


# -- what is rejected --------------------------------------------------------------------------------------


def test_unfit_records_are_rejected_with_their_lines_and_the_others_inserted(notes: Kameleon) -> None:
    lines = [
        b'{"text": "good 1"}',
        b"",
        b'{"txt": "a"}',
        b'{"text": 7}',
        b'{"n": "seven", "text": "b"}',
        b'{"text": "nul \\u0000"}',
        b'{"text": "half \\ud800"}',
        b'{"text": "broken',
        b'["no object"]',
        b'{"text": "twice", "text": "twice"}',
        b'{"text": "good 2", "n": null}',
    ]
    answer = notes.insert("Note", b"\n".join(lines), "--max-rejects", "8")
    assert answer.code == 3, answer
    assert [(reject["line"], reject["reason"]) for reject in answer.json["rejects"]] == [
        (3, "unknown_field"), (4, "wrong_type"), (5, "wrong_type"), (6, "nul_byte"), (7, "lone_surrogate"),
        (8, "invalid_json"), (9, "not_an_object"), (10, "duplicate_key"),
    ]  # fmt: skip
    assert (answer.json["inserted"], answer.json["rejected"], answer.json["read"]) == (2, 8, 10)
    assert answer.json["rejects"][0]["detail"] == "'txt' is no field of the entity; did you mean 'text'?"
    assert note_texts(notes) == ["text: good 1", "text: good 2"]
    assert kept_rejects(notes.address) == [
        ("Note", "", reject["reason"], reject["line"]) for reject in answer.json["rejects"]
    ]


def test_the_first_ten_rejects_are_printed_and_a_hundred_given_as_json(note: Kameleon) -> None:
    lines = b'{"bad": 1}\n' * 120
    answer = note.kdb_fast("insert", "Note", "--no-progress", "--max-rejects", "200", stdin=lines + b'{"text": "a"}')
    assert answer.code == 3
    printed = answer.err.splitlines()
    assert printed[0].startswith("line 1: unknown_field: 'bad' is no field of the entity")
    assert [line.split(":")[0] for line in printed] == [*(f"line {n}" for n in range(1, 11)), "and 110 more"]
    assert "1 record inserted into Note" in answer.out
    again = note.kdb_fast("insert", "Note", "--json", "--no-progress", "--max-rejects", "200", stdin=lines)
    assert again.code == 3
    assert len(again.json["rejects"]) == 100
    assert again.err == ""


def test_a_required_field_must_be_given(database: Kameleon) -> None:
    fields = [{"name": "text", "type": "text"}, {"name": "code", "type": "string", "required": True, "default": "x"}]
    database.client.create_entity("Note", fields=fields)
    records = [{"text": "a", "code": "1"}, {"text": "b"}, {"text": "c", "code": None}]
    answer = database.insert("Note", records, "--max-rejects", "5")
    assert [reject["detail"] for reject in answer.json["rejects"]] == [
        "the required field 'code' is missing",
        "the required field 'code' is null",
    ]
    assert note_texts(database) == ["text: a | code: 1"]


def test_a_limit_of_rejects_stops_before_the_page_is_inserted(note: Kameleon) -> None:
    answer = note.insert("Note", [{"text": "a"}] * 5 + [{"wrong": 1}] * 3)
    assert answer.code == 8
    assert answer.json["inserted"] == 0
    assert len(answer.json["rejects"]) == 3
    assert answer.json["error"]["message"] == ("3 of the first 8 records were rejected; --max-rejects allows 1%.")
    assert note_texts(note) == []
    # The rejects are kept: they say what to correct.
    assert note.kdb_fast("rejects", "list", "--json").json["total"] == 3
    assert note.insert("Note", [{"text": "a"}] * 5 + [{"wrong": 1}] * 3, "--max-rejects", "2").code == 8
    assert note.insert("Note", [{"text": "a"}] * 5 + [{"wrong": 1}] * 3, "--max-rejects", "50%").code == 3
    assert len(note_texts(note)) == 5


def test_pages_before_the_limit_stay_and_are_completed_by_a_reindex(
    note: Kameleon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inserting, "PAGE_ROWS", 50)
    records = [{"text": f"good {i}"} for i in range(150)] + [{"wrong": 1}] * 50
    answer = note.insert("Note", records)
    assert answer.code == 8
    assert answer.json["inserted"] == 150
    assert "up to line 150" in answer.json["error"]["remedy"]
    assert "kdb-fast reindex Note" in answer.err
    receipt = note.reindex("Note")
    assert receipt["stored"] + receipt["unchanged"] == 150


@pytest.mark.parametrize("page_rows", [1000, 3])
def test_unique_fields_of_a_dedicated_table_reject_only_the_second_one(
    database: Kameleon, monkeypatch: pytest.MonkeyPatch, page_rows: int
) -> None:
    monkeypatch.setattr(inserting, "PAGE_ROWS", page_rows)
    fields = [{"name": "email", "type": "string", "unique": True}, {"name": "text", "type": "text"}]
    contact = database.client.create_entity("Contact", fields=fields)
    contact.insert({"email": "there@x", "text": "before"})
    assert database.client.materialize_entity("Contact")["success"]
    emails = ["a@x", "there@x", "b@x", "a@x", None, None, "c@x", "c@x"]
    answer = database.insert("Contact", [{"email": e, "text": f"t{i}"} for i, e in enumerate(emails)],
                             "--max-rejects", "5")  # fmt: skip
    assert answer.code == 3, answer
    assert [(reject["line"], reject["reason"]) for reject in answer.json["rejects"]] == [
        (2, "unique"), (4, "unique"), (8, "unique"),
    ]  # fmt: skip
    assert "email" in answer.json["rejects"][0]["detail"]
    assert "there@x" not in answer.out, "a value of a record is in no message"
    assert answer.json["inserted"] == answer.json["stored"] == 5
    stored = database.columns("kdb_contact", ["text"])
    assert stored == [("before",), ("t0",), ("t2",), ("t4",), ("t5",), ("t6",)]
    assert set(database.index().values()) == {
        "email: a@x | text: t0", "email: b@x | text: t2", "text: t4", "text: t5", "email: c@x | text: t6",
    }  # fmt: skip


def test_unique_fields_in_shared_storage_are_not_enforced_as_in_kameleondb(database: Kameleon) -> None:
    contact = database.client.create_entity("Contact", fields=[{"name": "email", "type": "string", "unique": True}])
    contact.insert_many([{"email": "a"}, {"email": "a"}])
    assert database.insert("Contact", [{"email": "a"}]).code == 0
    assert len(database.shared("Contact")) == 3


def test_what_a_column_cannot_hold_is_rejected_by_name(database: Kameleon) -> None:
    database.client.create_entity("Note", fields=[{"name": "code", "type": "string"}, {"name": "n", "type": "int"}])
    assert database.client.materialize_entity("Note")["success"]
    records = [{"code": "x" * 255}, {"code": "x" * 256}, {"n": 2**31 - 1}, {"n": 2**31}, {"n": 2**63}]
    answer = database.insert("Note", records, "--max-rejects", "5")
    found = [(reject["line"], reject["reason"]) for reject in answer.json["rejects"]]
    # SQLite's columns hold texts of any length, and 64 bits.
    assert found == (
        [(2, "too_long"), (4, "out_of_range"), (5, "out_of_range")] if database.is_postgresql else [(5, "out_of_range")]
    )
    assert database.execute("SELECT count(*) FROM kdb_note") == [(5 - len(found),)]


def test_a_field_added_after_materialising_has_no_column(database: Kameleon) -> None:
    note = database.client.create_entity("Note", fields=[{"name": "text", "type": "text"}])
    assert database.client.materialize_entity("Note")["success"]
    note.add_field("late", "text")
    answer = database.insert("Note", [{"text": "a", "late": None}, {"text": "b", "late": "x"}])
    assert [(reject["line"], reject["reason"]) for reject in answer.json["rejects"]] == [(2, "no_column")]
    assert note_texts(database) == ["text: a"]


def test_a_column_that_must_be_filled_but_is_no_field_is_refused_before_the_start(database: Kameleon) -> None:
    fields = [{"name": "text", "type": "text"}, {"name": "gone", "type": "string", "required": True}]
    note = database.client.create_entity("Note", fields=fields)
    assert database.client.materialize_entity("Note")["success"]
    note.drop_field("gone")
    answer = database.insert("Note", [{"text": "a"}])
    assert answer.code == 4
    assert "needs a value in gone" in answer.json["error"]["message"]


@ONLY_POSTGRESQL
def test_a_foreign_key_is_left_out_or_must_exist(database: Kameleon) -> None:
    client = database.client
    person = client.create_entity("Person", fields=[{"name": "name", "type": "string"}])
    owner = person.insert({"name": "Ann"})
    client.create_entity("Pet", fields=[{"name": "name", "type": "string"}])
    client._schema_engine.add_relationship("Pet", "owner", "Person")
    assert client.materialize_entity("Person")["success"]
    assert client.materialize_entity("Pet")["success"]
    database.execute(
        "ALTER TABLE kdb_pet ADD CONSTRAINT fk_owner FOREIGN KEY (owner_id) REFERENCES kdb_person (id) "
        "DEFERRABLE INITIALLY DEFERRED"
    )
    answer = database.insert("Pet", [{"name": "Rex"}, {"name": "Tom", "owner_id": owner},
                                     {"name": "Ghost", "owner_id": OWNER}])  # fmt: skip
    assert [(reject["line"], reject["reason"]) for reject in answer.json["rejects"]] == [(3, "foreign_key")]
    assert database.columns("kdb_pet", ["name", "owner_id"]) == [("Rex", None), ("Tom", owner)]


@ONLY_POSTGRESQL
def test_a_row_that_a_trigger_drops_is_rejected(notes: Kameleon) -> None:
    table = notes.execute("SELECT coalesce(dedicated_table_name, 'kdb_records') FROM kdb_entity_definitions")[0][0]
    notes.execute(
        "CREATE FUNCTION drop_some() RETURNS trigger LANGUAGE plpgsql AS "
        "$$BEGIN IF NEW::text LIKE '%drop me%' THEN RETURN NULL; END IF; RETURN NEW; END$$"
    )
    notes.execute(f"CREATE TRIGGER t BEFORE INSERT ON {table} FOR EACH ROW EXECUTE FUNCTION drop_some()")
    answer = notes.insert("Note", [{"text": "a"}, {"text": "drop me"}, {"text": "c"}])
    assert [(reject["line"], reject["reason"]) for reject in answer.json["rejects"]] == [(2, "database_refused")]
    assert note_texts(notes) == ["text: a", "text: c"]


def test_a_record_that_the_index_refuses_is_inserted_and_named(notes: Kameleon) -> None:
    notes.insert("Note", [{"text": "first"}])
    refuse_in_index(notes)
    answer = notes.insert("Note", [{"text": "fine"}, {"text": "forbidden"}])
    assert answer.code == 3, answer
    (reject,) = answer.json["rejects"]
    assert (answer.json["inserted"], answer.json["stored"], answer.json["pending"]) == (2, 1, 0)
    assert reject["record_id"] in notes.kdb_fast("rejects", "list").out
    assert note_texts(notes) == ["text: fine", "text: first", "text: forbidden"]


def refuse_in_index(database: Kameleon) -> None:
    """From now on the search table takes no row with the word ``forbidden``."""
    if database.is_postgresql:
        database.execute("ALTER TABLE kdb_search ADD CONSTRAINT no_word CHECK (content NOT LIKE '%forbidden%')")
        return
    for event in ("INSERT", "UPDATE"):
        database.execute(
            f"CREATE TRIGGER no_word_{event} BEFORE {event} ON kdb_search WHEN NEW.content LIKE '%forbidden%' "
            "BEGIN SELECT RAISE(ABORT, 'no such word'); END"
        )


# -- when something goes wrong -----------------------------------------------------------------------------


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inserting, "PAGE_ROWS", 10)


def numbered(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [{"text": f"text {i}"} for i in range(first, first + count)]


@pytest.mark.usefixtures("small_pages")
def test_after_a_crash_a_reindex_completes_what_was_inserted(notes: Kameleon) -> None:
    faults.load_plan("source.page:3:raise")
    try:
        answer = notes.insert("Note", numbered(50))
    finally:
        faults.load_plan(None)
    assert answer.code == 70
    assert "Unexpected RuntimeError: fault at source.page" in answer.err
    assert "30 records were inserted, all of the input up to line 30" in answer.err
    assert "To carry on: kdb-fast reindex Note" in answer.err
    assert len(note_texts(notes)) == 30
    (entity,) = notes.kdb_fast("status", "--json").json["entities"]
    assert entity["pending"] == 30
    assert notes.reindex()["stored"] == 30
    assert sorted(notes.index().values()) == note_texts(notes)


@pytest.mark.usefixtures("small_pages")
def test_a_stopped_insert_says_how_to_complete_it_and_from_where_to_go_on(
    notes: Kameleon, monkeypatch: pytest.MonkeyPatch
) -> None:
    insert = InsertingSource._insert

    def stopped(source: InsertingSource, items: Any) -> Any:
        page = insert(source, items)
        if source.inserted == 20:
            os.kill(os.getpid(), signal.SIGINT)
        return page

    monkeypatch.setattr(InsertingSource, "_insert", stopped)
    answer = notes.insert("Note", numbered(50))
    assert answer.code == 130
    receipt = answer.json
    assert (receipt["inserted"], receipt["state"]) == (20, "stopped")
    assert receipt["pending"] == 20 - receipt["stored"]
    assert receipt["error"]["remedy"].startswith("20 records were inserted, all of the input up to line 20")
    url = notes.url.replace("+psycopg", "")
    again = shlex.quote(url)
    assert answer.err.rstrip().endswith(f"To carry on: kdb-fast reindex Note --db {again}")

    monkeypatch.undo()
    notes.reindex("Note")
    assert notes.insert("Note", numbered(30, 20)).code == 0
    assert note_texts(notes) == sorted(f"text: text {i}" for i in range(50))
    assert sorted(notes.index().values()) == note_texts(notes)


@pytest.mark.usefixtures("small_pages")
def test_an_entity_that_is_moved_or_dropped_meanwhile_stops_the_insert(
    notes: Kameleon, monkeypatch: pytest.MonkeyPatch
) -> None:
    insert = InsertingSource._insert

    def moved(source: InsertingSource, items: Any) -> Any:
        page = insert(source, items)
        if source.inserted == 10:
            notes.execute("UPDATE kdb_entity_definitions SET storage_mode = 'elsewhere'")
        return page

    monkeypatch.setattr(InsertingSource, "_insert", moved)
    answer = notes.insert("Note", numbered(30))
    assert answer.code == 4
    assert "moved to another table meanwhile" in answer.json["error"]["message"]
    assert "up to line 10" in answer.json["error"]["remedy"]
    assert answer.json["inserted"] == 10


def test_nothing_is_inserted_while_another_run_holds_the_index(note: Kameleon) -> None:
    note.insert("Note", [{"text": "first"}])
    now = "clock_timestamp()" if note.is_postgresql else "strftime('%Y-%m-%d %H:%M:%f', 'now')"
    note.execute(
        "INSERT INTO kdb_fast_runs (state, fingerprint, model, dimensions, host, pid, process_started, heartbeat_at) "
        f"VALUES ('running', 'f', 'm', 384, 'another host', 1, 0, {now})"
    )
    assert note.insert("Note", [{"text": "second"}]).code == 6
    assert note_texts(note) == ["text: first"]


@ONLY_POSTGRESQL
@pytest.mark.usefixtures("small_pages")
@pytest.mark.parametrize("committed", [True, False])
def test_a_lost_connection_inserts_no_page_twice_and_none_never(
    notes: Kameleon, monkeypatch: pytest.MonkeyPatch, committed: bool
) -> None:
    import psycopg

    from kdb_fast.sources.insert import postgresql as insert_postgresql

    once = insert_postgresql.PostgreSQLInserter._insert_once
    calls = 0

    def lost(self: Any, rows: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls != 2:
            return once(self, rows)
        if committed:
            once(self, rows)
        notes.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'kdb-fast/insert'"
        )
        if committed:
            raise psycopg.OperationalError("the answer to COMMIT was lost")
        return once(self, rows)

    monkeypatch.setattr(insert_postgresql.PostgreSQLInserter, "_insert_once", lost)
    answer = notes.insert("Note", numbered(30))
    assert (answer.code, calls) == (0, 4), answer
    assert answer.json["inserted"] == 30
    assert note_texts(notes) == sorted(f"text: text {i}" for i in range(30))
    assert sorted(notes.index().values()) == note_texts(notes)


@ONLY_POSTGRESQL
def test_a_role_that_may_not_insert_is_told_so(notes: Kameleon, postgres: Server) -> None:
    table = notes.execute("SELECT coalesce(dedicated_table_name, 'kdb_records') FROM kdb_entity_definitions")[0][0]
    tables = ("kdb_entity_definitions", "kdb_field_definitions", "kdb_records", *({table} - {"kdb_records"}))
    role = postgres.create_role(notes.address, *(f"SELECT ON {name}" for name in tables))
    with pytest.raises(SchemaError, match=f"may not insert into public.{table}") as refused:
        open_inserter(role, "Note")
    assert f"GRANT INSERT ON public.{table}" in refused.value.remedy


@ONLY_SQLITE
def test_a_full_disk_loses_no_page_that_was_counted(notes: Kameleon) -> None:
    from kdb_fast.errors import ResourceError

    path = Path(notes.address.conninfo).parent / "many.jsonl"
    path.write_text("".join(json.dumps({"text": "x" * 5000}) + "\n" for _ in range(3000)))
    with closing(InsertingSource(notes.address, "Note", path, RejectLimit())) as source:
        (pages,) = source._inserter._query("PRAGMA page_count")[0]
        source._inserter._query(f"PRAGMA max_page_count = {pages + 2500}")
        with pytest.raises(ResourceError, match="full"):
            for _ in source.pages():
                pass
        assert source.inserted == source.line == 1000
    assert len(note_texts(notes)) == 1000


def test_the_input_is_read_and_inserted_page_by_page(notes: Kameleon, tmp_path: Path) -> None:
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in numbered(2500)))
    with closing(InsertingSource(notes.address, "Note", path, RejectLimit())) as source:
        assert source.estimate() is not None
        assert (source.entities, source.complete, source.unique_keys) == (("Note",), False, True)
        sizes = []
        for page in source.pages():
            sizes.append(len(page))
            assert len(note_texts(notes)) == source.inserted == sum(sizes), "committed before it is given out"
            assert all(isinstance(item, Record) and item.source_at is not None for item in page)
    assert sizes == [1000, 1000, 500]
