"""``kdb-fast rejects``: what could not be stored is shown, tried again, and forgotten when it no longer holds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kameleon import Kameleon, close_kameleon, open_kameleon
from servers import ListSource

from kdb_fast.embedding.encoder import Encoder
from kdb_fast.embedding.models.lookup import Model, resolve
from kdb_fast.engine import inline
from kdb_fast.indexing import run_embedding
from kdb_fast.indexing.reindex import reindex
from kdb_fast.indexing.rejects import list_rejects
from kdb_fast.records import Reject
from kdb_fast.settings import DEFAULT_MODEL, ReindexOptions, RejectLimit
from kdb_fast.stores.past_runs import forget_older

pytest.importorskip("kameleondb")

# KameleonDB hands datetimes to sqlite3 as they are, which Python 3.12 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:The default datetime adapter is deprecated:DeprecationWarning")


@pytest.fixture(autouse=True)
def asked_models(monkeypatch: pytest.MonkeyPatch, minilm: Model, encoder: Encoder) -> list[str]:
    """Runs in this process share one loaded model; the names that they asked for."""
    names: list[str] = []

    def found(name: str, path: Path | None, report: Any) -> Model:
        names.append(name)
        return resolve(name, path, report=report) if path else minilm

    monkeypatch.setattr(run_embedding, "resolve", found)
    monkeypatch.setattr(inline, "Encoder", lambda spec: encoder)
    return names


@pytest.fixture(params=["sqlite", "postgresql"])
def empty(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Kameleon]:
    """A database in which nothing was ever indexed."""
    opened = open_kameleon(request.param, request, capsys, tmp_path)
    yield opened
    close_kameleon(opened, request)


@pytest.fixture
def database(empty: Kameleon) -> Kameleon:
    """Entity Note, with one record indexed; the search table refuses texts with the word ``forbidden``."""
    empty.client.create_entity("Note", fields=[{"name": "text", "type": "text"}]).insert({"text": "fine"})
    assert empty.reindex()["stored"] == 1
    refuse(empty)
    return empty


EVENTS = ("INSERT", "UPDATE")


def refuse(database: Kameleon) -> None:
    if database.is_postgresql:
        database.execute(
            "ALTER TABLE kdb_search ADD CONSTRAINT no_word CHECK (content NOT LIKE '%forbidden%') NOT VALID"
        )
        return
    for event in EVENTS:
        database.execute(
            f"CREATE TRIGGER no_word_{event} BEFORE {event} ON kdb_search WHEN NEW.content LIKE '%forbidden%' "
            "BEGIN SELECT RAISE(ABORT, 'no such word'); END"
        )


def allow(database: Kameleon) -> None:
    if database.is_postgresql:
        database.execute("ALTER TABLE kdb_search DROP CONSTRAINT no_word")
        return
    for event in EVENTS:
        database.execute(f"DROP TRIGGER no_word_{event}")


def rejected(database: Kameleon, entity: str | None = None) -> list[tuple[str, str]]:
    return sorted((row.entity, row.record_id) for row in list_rejects(database.address, entity))


def reject_from_file(database: Kameleon, *rejects: Reject) -> int:
    """A run over lines of a file; returns its number."""
    options = ReindexOptions(max_rejects=RejectLimit(share=1.0))
    return int(reindex(database.address, ListSource(rejects), options).run)


# -- nothing there -----------------------------------------------------------------------------------------


def test_where_nothing_was_indexed_there_are_none(empty: Kameleon) -> None:
    for command in (["list"], ["retry", "--no-progress"]):
        answer = empty.kdb_fast("rejects", *command)
        assert (answer.code, answer.out, answer.err) == (0, "There are no rejected records.\n", "")
    assert empty.kdb_fast("rejects", "list", "--json").json == {"total": 0, "rejects": []}
    assert empty.kdb_fast("rejects", "clear", "--json").json == {"cleared": 0}
    retried = empty.kdb_fast("rejects", "retry", "--json", "--no-progress").json
    assert retried == {
        "rejects_before": 0, "remaining": 0, "lines_of_inserts": {}, "lines_of_files": {}, "receipt": None,
    }  # fmt: skip


def test_a_database_without_kameleondb_can_have_rejects_of_files(empty: Kameleon) -> None:
    for table in ("kdb_field_definitions", "kdb_records", "kdb_relationship_definitions", "kdb_entity_definitions"):
        empty.execute(f"DROP TABLE {table}{' CASCADE' if empty.is_postgresql else ''}")
    reject_from_file(empty, Reject(("Log", "7"), "wrong_type", "not text", b"\1" * 32, 7))
    answer = empty.kdb_fast("rejects", "retry", "--json", "--no-progress")
    assert answer.code == 3
    assert answer.json["lines_of_files"] == {"Log": 1}
    assert answer.json["receipt"] is None


# -- list and clear ----------------------------------------------------------------------------------------


def test_the_list_shows_all_of_a_reject_and_the_newest_run_first(database: Kameleon) -> None:
    first = reject_from_file(database, Reject(("Log", ""), "invalid_json", "not valid JSON", b"\1" * 32, 17))
    second = reject_from_file(database, Reject(("Book", "b1"), "wrong_type", "expected text", b"\2" * 32))
    assert second > first
    answer = database.kdb_fast("rejects", "list")
    assert answer.code == 0
    newest, oldest = answer.out.splitlines()
    assert newest.startswith(f"Book/b1: wrong_type: expected text (run {second}, 20")
    assert oldest.startswith(f"Log line 17: invalid_json: not valid JSON (run {first}, 20")
    found = database.kdb_fast("rejects", "list", "--json").json
    assert found["total"] == 2
    rejected_at = [row.pop("rejected_at") for row in found["rejects"]]
    assert all(moment.endswith("+00:00") or database.is_postgresql for moment in rejected_at)
    assert found["rejects"] == [
        {"entity": "Book", "record_id": "b1", "reason": "wrong_type", "detail": "expected text", "line": 0,
         "run": second},
        {"entity": "Log", "record_id": "", "reason": "invalid_json", "detail": "not valid JSON", "line": 17,
         "run": first},
    ]  # fmt: skip


def test_the_list_can_be_of_one_entity_and_is_limited(database: Kameleon) -> None:
    lines = [Reject(("Log", ""), "invalid_json", "not JSON", bytes([n]) * 32, n) for n in range(1, 6)]
    reject_from_file(database, *lines, Reject(("Book", "b1"), "wrong_type", "expected text", b"\2" * 32))
    answer = database.kdb_fast("rejects", "list", "--entity", "Log", "--limit", "2")
    assert [line.split(":")[0] for line in answer.out.splitlines()] == ["Log line 1", "Log line 2", "and 3 more"]
    found = database.kdb_fast("rejects", "list", "--entity", "Log", "--limit", "2", "--json").json
    assert (found["total"], len(found["rejects"])) == (5, 2)
    assert database.kdb_fast("rejects", "list", "--entity", "Other", "--json").json["total"] == 0
    assert database.kdb_fast("rejects", "list", "--limit", "0").code == 2


def test_nothing_in_the_list_can_harm_a_terminal(database: Kameleon) -> None:
    reject_from_file(database, Reject(("L\x1b[2Jog", "\x07\u202e\n"), "wrong_type", "a\rb\x1b]0;x\x07", b"\1" * 32, 1))
    answer = database.kdb_fast("rejects", "list")
    assert answer.out.removesuffix("\n").isprintable()
    assert database.kdb_fast("rejects", "list", "--entity", "L\x1b[2Jog", "--json").json["total"] == 1
    assert database.kdb_fast("rejects", "clear", "--entity", "L\x1b[2Jog", "--json").json == {"cleared": 1}


def test_clear_forgets_one_entity_or_all_and_nothing_else(database: Kameleon) -> None:
    lines = [Reject(("Log", ""), "invalid_json", "not JSON", bytes([n]) * 32, n) for n in range(1, 6)]
    reject_from_file(database, *lines, Reject(("Book", "b1"), "wrong_type", "expected text", b"\2" * 32))
    assert database.kdb_fast("rejects", "clear", "--entity", "Log").out == "5 rejects forgotten\n"
    assert rejected(database) == [("Book", "b1")]
    assert database.kdb_fast("rejects", "clear", "--entity", "Log", "--json").json == {"cleared": 0}
    assert database.kdb_fast("rejects", "clear", "--json").json == {"cleared": 1}
    assert rejected(database) == []
    assert len(database.index()) == 1


# -- retry -------------------------------------------------------------------------------------------------


def retry(database: Kameleon, *options: str) -> tuple[int, dict[str, Any]]:
    answer = database.kdb_fast("rejects", "retry", "--json", "--no-progress", *options)
    return answer.code, answer.json


def test_retry_stores_what_can_be_stored_now(database: Kameleon) -> None:
    note = database.client.entity("Note")
    ids = note.insert_many([{"text": "forbidden"}, {"text": "also forbidden"}])
    assert database.reindex()["rejected"] == 2
    assert rejected(database) == sorted(("Note", record_id) for record_id in ids)

    code, result = retry(database)
    assert (code, result["rejects_before"], result["remaining"]) == (3, 2, 2)
    assert (result["receipt"]["unchanged"], result["receipt"]["rejected"]) == (1, 2)
    assert {row.run for row in list_rejects(database.address)} == {result["receipt"]["run"]}

    allow(database)
    code, result = retry(database)
    assert (code, result["rejects_before"], result["remaining"], result["lines_of_files"]) == (0, 2, 0, {})
    assert (result["receipt"]["unchanged"], result["receipt"]["stored"]) == (1, 2)
    assert set(ids) <= database.index().keys()
    assert rejected(database) == []
    assert database.kdb_fast("rejects", "retry", "--no-progress").out == "There are no rejected records.\n"


def test_an_ordinary_reindex_forgets_what_it_stores(database: Kameleon) -> None:
    ids = database.client.entity("Note").insert_many([{"text": "forbidden"}, {"text": "also forbidden"}])
    database.reindex()
    database.client.entity("Note").update(ids[0], {"text": "allowed"})
    assert database.reindex()["stored"] == 1
    assert rejected(database) == [("Note", ids[1])]


def test_retry_forgets_records_that_are_gone_empty_or_as_they_were(database: Kameleon) -> None:
    note = database.client.entity("Note")
    deleted, removed, emptied, changed, stays = note.insert_many([{"text": f"forbidden {i}"} for i in range(5)])
    (indexed,) = database.index()
    note.update(indexed, {"text": "forbidden for a while"})
    assert database.reindex()["rejected"] == 6
    note.delete(deleted)
    database.execute("DELETE FROM kdb_records WHERE id = %s", removed)
    note.update(emptied, {"text": ""})
    note.update(changed, {"text": "allowed"})
    # Back to the text that is in the index all the time: nothing is written for it.
    note.update(indexed, {"text": "fine"})
    code, result = retry(database)
    assert (code, result["rejects_before"], result["remaining"]) == (3, 6, 1)
    assert (result["receipt"]["unchanged"], result["receipt"]["stored"]) == (1, 1)
    assert rejected(database) == [("Note", stays)]


def test_a_record_whose_text_changed_and_is_refused_again_is_one_reject(database: Kameleon) -> None:
    note = database.client.entity("Note")
    record_id = note.insert({"text": "forbidden"})
    database.reindex()
    note.update(record_id, {"text": "another forbidden"})
    _, result = retry(database)
    assert result["remaining"] == 1
    assert rejected(database) == [("Note", record_id)]


def test_retry_reads_only_entities_that_have_rejects(database: Kameleon) -> None:
    database.client.create_entity("Other", fields=[{"name": "text", "type": "text"}]).insert({"text": "not yet"})
    database.client.entity("Note").insert({"text": "forbidden"})
    database.reindex("Note")
    assert retry(database)[1]["receipt"]["read"] == 2
    assert "text: not yet" not in database.index().values()


def test_retry_uses_the_model_of_the_newest_run_unless_another_is_named(
    database: Kameleon, asked_models: list[str]
) -> None:
    database.client.entity("Note").insert({"text": "forbidden"})
    database.reindex()
    database.execute("UPDATE kdb_fast_runs SET model = 'the/other'")
    asked_models.clear()
    retry(database)
    retry(database, "--model", DEFAULT_MODEL)
    assert asked_models == ["the/other", DEFAULT_MODEL]


def test_lines_of_files_cannot_be_retried_and_say_so(database: Kameleon) -> None:
    reject_from_file(database, Reject(("Log", "7"), "wrong_type", "not text", b"\1" * 32, 7))
    assert database.insert("Note", [{"wrong": 1}]).code == 3
    answer = database.kdb_fast("rejects", "retry", "--no-progress")
    assert answer.code == 3
    assert "1 rejected lines of Log are of a file and not in the database" in answer.out
    assert "kdb-fast reindex --from FILE --entity Log again" in answer.out
    assert "1 rejected lines for Note became no record" in answer.out
    assert "kdb-fast insert Note FILE" in answer.out
    assert rejected(database) == [("Log", "7"), ("Note", "")]


def test_retry_forgets_a_line_whose_key_is_no_record_of_the_entity(database: Kameleon) -> None:
    reject_from_file(database, Reject(("Note", "never there"), "wrong_type", "not text", b"\1" * 32, 3))
    code, result = retry(database)
    assert (code, result["rejects_before"], result["remaining"]) == (0, 1, 0)
    assert rejected(database) == []


def test_forgetting_leaves_what_the_run_itself_or_a_later_one_rejected(database: Kameleon) -> None:
    runs = [
        reject_from_file(database, Reject(("Note", f"r{n}"), "wrong_type", "not text", b"\1" * 32)) for n in range(3)
    ]
    reject_from_file(database, Reject(("Other", "r0"), "wrong_type", "not text", b"\1" * 32))
    assert forget_older(database.address, ["Note"], runs[1]) == 1
    assert rejected(database) == [("Note", "r1"), ("Note", "r2"), ("Other", "r0")]
