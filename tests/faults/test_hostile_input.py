"""Records, names and models that mean harm or are merely odd: stored exactly or rejected alone, and shown safely."""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
import subprocess
import sys
import threading
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import limited
import numpy as np
import onnx
import pytest
from kameleon import Answer, Kameleon, close_kameleon, open_kameleon
from onnx import TensorProto, helper
from poison_worker import StubEncoder
from servers import ListSource, Server, execute, index_rows, kept_rejects, records_of

from kdb_fast.db.address import DatabaseAddress, parse_address
from kdb_fast.embedding.encoder import Encoder, EncoderSpec
from kdb_fast.embedding.models import lookup as models
from kdb_fast.embedding.models.lookup import Model
from kdb_fast.engine import inline, worker
from kdb_fast.errors import ModelError, ResourceError
from kdb_fast.indexing import run_embedding
from kdb_fast.indexing.reindex import reindex
from kdb_fast.ipc.messages import Embed
from kdb_fast.ipc.slab import Row, Slab, SlabShape
from kdb_fast.receipt import Receipt
from kdb_fast.records import MAX_CONTENT_BYTES, Record, Reject, cut_content, was_cut
from kdb_fast.settings import ReindexOptions, RejectLimit
from kdb_fast.sources.jsonl import JsonlSource

# KameleonDB hands datetimes to sqlite3 as they are, which Python 3.12 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:The default datetime adapter is deprecated:DeprecationWarning")

STUB = Model("stub", Path(), "stub.onnx", 384, 512, "mean", True, ())
ALL_REJECTS = RejectLimit(share=1.0)


@pytest.fixture
def stubbed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in this process need no model."""
    monkeypatch.setattr(run_embedding, "resolve", lambda *args, **options: STUB)
    monkeypatch.setattr(inline, "Encoder", StubEncoder)


@pytest.fixture(params=["sqlite", "postgresql"])
def database(
    request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str], tmp_path: Path, stubbed: None
) -> Iterator[Kameleon]:
    """A database with KameleonDB's tables, and kdb-fast's commands on it."""
    opened = open_kameleon(request.param, request, capsys, tmp_path)
    yield opened
    close_kameleon(opened, request)


def run(address: DatabaseAddress, *records: Record | Reject) -> Receipt:
    return reindex(address, ListSource(records, unique_keys=False), ReindexOptions(max_rejects=ALL_REJECTS))


def feed(write: Callable[[Any], None], *command: str | Path, **how: Any) -> limited.Result:
    """Run a command whose standard input ``write`` fills through a pipe, so that nothing of it lies on a disk."""
    from os import fdopen, pipe

    reader, writer = pipe()

    def fill() -> None:
        with contextlib.suppress(BrokenPipeError), fdopen(writer, "wb") as file:
            write(file)

    thread = threading.Thread(target=fill)
    thread.start()
    with fdopen(reader, "rb") as stdin:
        done = limited.run(*command, stdin=stdin, **how)
    thread.join(20)
    return done


# -- too much of one record ------------------------------------------------------------------------------------------

MEGABYTE = 1 << 20


@pytest.mark.usefixtures("minilm")
def test_texts_of_ten_megabytes_are_cut_counted_once_and_cost_little_memory(tmp_path: Path) -> None:
    def write(file: Any) -> None:
        for number in range(4):
            # The model reads a text of one word to its end, however long: it is one unknown token.
            text = "lamp orbit river " * 590_000 if number % 2 else "x" * 10_000_000
            file.write(json.dumps({"id": number, "text": f"{number} {text}"}).encode() + b"\n")

    command = ("reindex", "--from", "-", "--entity", "N", "--db", f"sqlite:///{tmp_path}/a.db", "--json")
    done = feed(write, *command, "--workers", "1", stub=False)
    receipt = done.json
    assert (done.code, receipt["stored"], receipt["truncated"]) == (0, 4, 4)
    assert receipt["peak_rss_by_process"]["parent"] < 300e6
    rows = index_rows(parse_address(f"sqlite:///{tmp_path}/a.db"))
    assert {len(row.content.encode()) for row in rows.values()} == {MAX_CONTENT_BYTES}
    again = feed(write, *command, stub=False).json
    assert (again["unchanged"], again["truncated"]) == (4, 0)


def test_line_of_a_gigabyte_without_an_end_is_one_reject_and_memory_stays_flat(tmp_path: Path) -> None:
    block = b"x" * MEGABYTE

    def write(file: Any) -> None:
        file.write(b'{"id": 1, "text": "first"}\n{"id": 2, "text": "')
        for _ in range(1024):
            file.write(block)
        file.write(b'"}\n{"id": 3, "text": "last"}\n')

    done = feed(write, "reindex", "--from", "-", "--entity", "N", "--db", f"sqlite:///{tmp_path}/a.db", "--json")
    receipt = done.json
    assert (done.code, receipt["read"], receipt["stored"], receipt["rejected"]) == (3, 3, 2, 1)
    assert receipt["peak_rss_bytes"] < 250e6
    with contextlib.closing(sqlite3.connect(tmp_path / "a.db")) as connection:
        (reject,) = connection.execute("SELECT reason, position, detail FROM kdb_fast_rejects").fetchall()
    assert reject[:2] == ("line_too_long", 2)
    assert f"{(1 << 30) + 21:,} bytes" in reject[2]


@pytest.mark.parametrize("character", ["x", "é", "日", "🙂"])
def test_a_cut_text_is_told_by_its_length(character: str) -> None:
    long = cut_content(character * MAX_CONTENT_BYTES)
    assert was_cut(long)
    assert not was_cut(long[:-8])
    assert not was_cut("short")
    assert not was_cut(character * (MAX_CONTENT_BYTES + 1)), "a longer text is not what the cut leaves"


def test_what_the_model_leaves_unread_counts_once_by_the_encoder(minilm: Model) -> None:
    encoder = Encoder(EncoderSpec(minilm, 100))
    # With its two marks, a text of 510 words fills the window of 512 tokens exactly.
    exact = " ".join(["lamp"] * 510)
    texts = ["short", exact, f"{exact} lamp", exact + " " * 20_000 + "lamp", cut_content("lamp " * MAX_CONTENT_BYTES)]
    out = np.empty((len(texts), 384), np.float32)
    tally = encoder.encode(texts, out)
    assert tally.truncated == 2
    # A word; what is behind the characters that are looked at; all but the first 510 of a million.
    assert abs(tally.lost_chars - (5 + 10_265 + 997_450)) < 5


# -- one record, one fate --------------------------------------------------------------------------------------------


def test_ids_are_compared_as_bytes(database: Kameleon) -> None:
    ids = ["é", unicodedata.normalize("NFD", "é"), "a", "A", "a ", " a", "ａ", "01", "1", "1.0", "ß", "ss", "İ", "i"]
    receipt = run(database.address, *(Record(("E", key), f"text {n}") for n, key in enumerate(ids)))
    assert (receipt.stored, receipt.superseded, receipt.rejected) == (len(ids), 0, 0)
    assert {key[1]: row.content for key, row in index_rows(database.address).items()} == {
        key: f"text {n}" for n, key in enumerate(ids)
    }


BLANK = ["", " \t\u3000", "\u200b\ufeff", "\u2060\u00ad \n", None]


def lines(*records: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def test_a_text_that_was_emptied_leaves_the_index_with_every_way_in(database: Kameleon) -> None:
    read = ("reindex", "--from", "-", "--entity", "N", "--json")
    records = [{"id": i, "text": f"secret address {i}"} for i in range(len(BLANK))]
    assert database.kdb_fast(*read, stdin=lines(*records, {"id": "kept", "text": "stays"})).code == 0
    emptied = [{"id": i, "text": text, "price": 5} for i, text in enumerate(BLANK)]
    answer = database.kdb_fast(*read, stdin=lines(*emptied, {"id": "kept", "text": "stays"}))
    found = [answer.json[key] for key in ("read", "unchanged", "rejected", "empty", "deleted")]
    assert (answer.code, found) == (0, [1, 1, 0, len(BLANK), len(BLANK)])
    assert {key[1] for key in index_rows(database.address)} == {"kept"}
    assert "secret" not in database.kdb_fast("search", "secret address", "--mode", "keyword").out
    # The same through KameleonDB's tables, and for records that are new.
    note = database.client.create_entity("Note", fields=[{"name": "text", "type": "string"}])
    for text in BLANK:
        note.insert({"text": text})
    assert database.kdb_fast("insert", "Note", "-", stdin=lines(*({"text": text} for text in BLANK))).code == 0
    receipt = database.kdb_fast("reindex", "Note", "--json").json
    assert (receipt["read"], receipt["empty"], receipt["rejected"]) == (0, 2 * len(BLANK), 0)
    (status,) = (row for row in database.kdb_fast("status", "--json").json["entities"] if row["entity"] == "Note")
    assert status["indexed"] == 0


def test_the_last_of_two_records_decides_whether_its_key_has_a_text(database: Kameleon) -> None:
    text, empty = {"id": "a", "text": "first"}, {"id": "a", "text": ""}
    again, others = {"id": "a", "text": "again"}, [{"id": f"o{i}", "text": f"other {i}"} for i in range(3)]
    cases = [
        ([text, empty], None),
        ([empty, text], "first"),
        ([text, empty, again], "again"),
        ([text, empty, text], "first"),
        ([empty, text, empty], None),
        ([text, *others, empty], None),
        ([empty, empty, again], "again"),
    ]
    for given, left in cases:
        for _ in range(2):  # a second reading changes nothing
            receipt = database.kdb_fast("reindex", "--from", "-", "--entity", "N", "--json", stdin=lines(*given)).json
            rows = {key[1]: row.content for key, row in index_rows(database.address).items()}
            assert rows.get("a") == (left and f"text: {left}"), given
            assert receipt["empty"] == given.count(empty)
            assert receipt["read"] == len(given) - receipt["empty"]
            assert receipt["read"] == sum(
                receipt[key] for key in ("stored", "unchanged", "reused", "superseded", "rejected")
            )


@pytest.mark.parametrize("value", [5, 0, True, ["x"], {"a": "b"}])
def test_what_is_no_text_is_of_the_wrong_type_and_leaves_the_record_as_it_was(
    tmp_path: Path, stubbed: None, capsys: pytest.CaptureFixture[str], value: Any
) -> None:
    from kdb_fast.cli import run as command

    file = tmp_path / "n.jsonl"
    arguments = ["reindex", "--from", str(file), "--entity", "N", "--db", f"sqlite:///{tmp_path}/a.db", "--json"]
    file.write_bytes(lines({"id": 1, "text": "before"}))
    assert command(arguments) == 0
    file.write_bytes(lines({"id": 1, "text": value}))
    capsys.readouterr()
    assert command(arguments) == 3
    assert command(["rejects", "list", "--db", f"sqlite:///{tmp_path}/a.db"]) == 0
    assert "wrong_type: the field 'text' is" in capsys.readouterr().out
    assert len(index_rows(parse_address(f"sqlite:///{tmp_path}/a.db"))) == 1
    # Beside a text it is left out, which is said once.
    file.write_bytes(lines(*({"id": i, "text": "after", "price": value} for i in range(4))))
    assert command(arguments) == 0
    told = [w for w in json.loads(capsys.readouterr().out)["warnings"] if "left out" in w]
    assert told == ["Fields that do not hold text were left out: 'price' (4 records)."]


def test_a_field_that_is_mistyped_empties_no_index(
    tmp_path: Path, stubbed: None, capsys: pytest.CaptureFixture[str]
) -> None:
    from kdb_fast.cli import run as command

    file = tmp_path / "n.jsonl"
    arguments = ["reindex", "--from", str(file), "--entity", "N", "--db", f"sqlite:///{tmp_path}/a.db"]
    file.write_bytes(lines(*({"id": i, "text": f"t{i}"} for i in range(10))))
    assert command([*arguments, "--field", "text"]) == 0
    assert command([*arguments, "--field", "txet"]) == 8
    assert len(index_rows(parse_address(f"sqlite:///{tmp_path}/a.db"))) == 10
    capsys.readouterr()
    assert command([*arguments, "--field", "text", "--field", "txet"]) == 0
    assert "No record has the field 'txet'." in capsys.readouterr().out


def test_a_number_and_its_text_are_one_key_of_which_the_later_wins_and_it_is_told(tmp_path: Path) -> None:
    db = f"sqlite:///{tmp_path}/a.db"
    file = tmp_path / "n.jsonl"
    file.write_text('{"id": 1, "text": "number"}\n{"id": "1", "text": "text"}\n')
    done = limited.run("reindex", "--from", file, "--entity", "N", "--db", db, "--json")
    assert (done.json["stored"], done.json["superseded"]) == (1, 1)
    assert [row.content for row in index_rows(parse_address(db)).values()] == ["text: text"]
    assert "1 superseded" in limited.run("reindex", "--from", file, "--entity", "N", "--db", db).out


def test_each_kind_of_unfit_record_costs_itself_alone(database: Kameleon) -> None:
    good = records_of([f"good {i}" for i in range(40)], "E")
    unfit: list[Record | Reject] = [
        Record(("E", "nul"), "a\0b"),
        Record(("E", "surrogate"), "a\ud800b"),
        Record(("E", "empty"), ""),
        Record(("E", "spaces"), " \t\u3000"),
        Record(("E", "\0"), "key"),
        Record(("E", "\udfff"), "key"),
        Record(("E", "x" * 37), "too long a key"),
        Record(("E", ""), "no key"),
        Record(("", "a"), "no entity"),
        Record(("E" * 256, "a"), "too long an entity"),
        Record(("E", "none"), None),  # type: ignore[arg-type]
        Record(("E", "list"), ["x"]),  # type: ignore[arg-type]
        Record(("E", 7), "a number as key"),
        Reject(("E", ""), "invalid_json", "not JSON", b"\1" * 32, 9),
    ]
    mixed: list[Record | Reject] = list(good)
    for position, record in enumerate(unfit):
        mixed.insert(3 * position, record)
    receipt = run(database.address, *mixed)
    assert (receipt.stored, receipt.rejected) == (len(good), len(unfit))
    assert {key[1] for key in index_rows(database.address)} == {record.key[1] for record in good}
    reasons = dict(execute(database.address, "SELECT reason, count(*) FROM kdb_fast_rejects GROUP BY reason"))
    assert reasons == {
        "nul_byte": 2, "lone_surrogate": 2, "empty_text": 2, "id_too_long": 1, "missing_id": 1, "bad_entity": 2,
        "wrong_type": 3, "invalid_json": 1,
    }  # fmt: skip
    assert execute(database.address, "SELECT count(*) FROM kdb_fast_rejects WHERE detail LIKE '%too long a%'") == [(0,)]


# -- the end of an input ---------------------------------------------------------------------------------------------


def test_an_input_that_is_cut_or_changes_meanwhile_is_not_a_success(
    tmp_path: Path, stubbed: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from kdb_fast.cli import run as command

    file = tmp_path / "n.jsonl"
    arguments = ["reindex", "--from", str(file), "--entity", "N", "--db", f"sqlite:///{tmp_path}/a.db", "--json"]
    file.write_text('{"id": 1, "text": "whole"}\n{"id": 2, "te')
    assert command(arguments) == 3
    assert json.loads(capsys.readouterr().out)["rejected"] == 1
    file.write_text('{"id": 1, "text": "whole"}\n')
    assert command(arguments) == 0
    assert json.loads(capsys.readouterr().out)["input_changed"] is False
    pages = JsonlSource.pages

    def growing(self: JsonlSource) -> Iterator[list[Record | Reject]]:
        yield from pages(self)
        file.write_text(file.read_text() + '{"id": 2, "text": "later"}\n')

    with monkeypatch.context() as patch:
        patch.setattr(JsonlSource, "pages", growing)
        assert command(arguments) == 3
    receipt = json.loads(capsys.readouterr().out)
    assert (receipt["unchanged"], receipt["rejected"], receipt["input_changed"]) == (1, 0, True)
    assert "changed its size" in receipt["warnings"][0]
    assert command(arguments) == 0
    assert json.loads(capsys.readouterr().out)["stored"] == 1


def test_the_number_of_records_can_be_asked_for(
    tmp_path: Path, stubbed: None, capsys: pytest.CaptureFixture[str]
) -> None:
    from kdb_fast.cli import run as command

    file = tmp_path / "n.jsonl"
    arguments = ["reindex", "--from", str(file), "--entity", "N", "--db", f"sqlite:///{tmp_path}/a.db"]
    file.write_text("")
    assert command(arguments) == 0
    assert "there were no records to read" in capsys.readouterr().out
    for count, lines, code in (("1+", 0, 3), ("1+", 2, 0), ("3", 2, 3), ("2", 2, 0), ("0", 0, 0)):
        file.write_text("".join(f'{{"id": {i}, "text": "t"}}\n' for i in range(lines)))
        assert command([*arguments, "--expect-count", count]) == code
        shown = capsys.readouterr().out
        assert ("records were read, expected" in shown) == (code == 3)
    assert command([*arguments, "--expect-count", "many"]) == 2


# -- names, keys and texts that mean harm ----------------------------------------------------------------------------

HOSTILE = [
    "\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "\x9b31m", "a\r\x1b[2Kb", "line\nbreak", "tab\tand\x0bfeed",
    "back\\slash", "\\.", "\\N", "quote'", 'double"quote', "'); DROP TABLE kdb_search; --",
    'x"; DROP TABLE kdb_search; --', "%s %(a)s",
    "100%", "$1 ${HOME} `id`", "{0} {x}", ":name ?1 @p", "=1+1", "+1", "-1", "@SUM(A1)", "=cmd|' /C calc'!A0", "select",
    "NULL", "null", "None", "true", "../../etc/passwd", "a/b", "a.b", "\u202egnp.exe", "\u200bzero width", "раураl",
    "ﬁ", "🙂👨‍👩‍👧", "\ufeffbom", "\uffff", "x" * 36, "<b>&amp;", "a,b;c|d", "\x7f", "\x80", "[red]rich[/red]", "::",
]  # fmt: skip
"""At most 36 characters each, so that they can be keys."""


def printable(answer: Answer) -> None:
    """Neither output can move a cursor, change a colour or reorder letters; a table has line breaks of its own."""
    for line in (answer.out + answer.err).split("\n"):
        assert line.isprintable(), line


def test_hostile_names_keys_and_texts_are_stored_exactly_and_shown_safely(database: Kameleon) -> None:
    records = [Record((text, text), f"lamp {text} lamp") for text in HOSTILE]
    rejects = [Reject((text, text), "wrong_type", f"found {text}", b"\1" * 32, 1) for text in HOSTILE]
    receipt = run(database.address, *records, *rejects)
    assert (receipt.stored, receipt.rejected) == (len(HOSTILE), len(HOSTILE))
    rows = index_rows(database.address)
    assert {key: row.content for key, row in rows.items()} == {r.key: r.content for r in records}
    again = run(database.address, *records)
    assert (again.unchanged, again.stored) == (len(HOSTILE), 0)

    status = database.kdb_fast("status")
    printable(status)
    assert status.code == 0
    entities = database.kdb_fast("status", "--json")
    assert entities.out.isascii()
    assert {row["entity"] for row in entities.json["entities"]} == set(HOSTILE)
    listed = database.kdb_fast("rejects", "list")
    printable(listed)
    assert len(listed.out.splitlines()) == len(HOSTILE), "one line each"
    found = database.kdb_fast("search", "lamp", "--mode", "keyword", "--limit", "100")
    printable(found)
    assert len(found.out.splitlines()) == 2 * len(HOSTILE)
    as_json = database.kdb_fast("search", "lamp", "--mode", "keyword", "--limit", "100", "--json")
    assert as_json.out.isascii()
    assert {(r["entity"], r["id"]) for r in as_json.json["results"]} == {(text, text) for text in HOSTILE}
    for text in HOSTILE:
        one = database.kdb_fast("search", "lamp", "--mode", "keyword", "--json", "--entity", text).json["results"]
        assert [(r["id"], r["matched_text"]) for r in one] == [(text, f"lamp {text} lamp")]
    retried = database.kdb_fast("rejects", "retry", "--no-progress")
    printable(retried)
    assert database.kdb_fast("rejects", "clear", "--json").json == {"cleared": len(HOSTILE)}


@pytest.mark.parametrize(
    "text", ["\x1b[31mred\x1b[0m", "a\r\x1b[2Kb\n", "\u202egnp.exe", "%s %(a)s {0}", "[red]rich[/red]", "\x80"]
)
def test_hostile_arguments_are_shown_safely_in_errors(tmp_path: Path, text: str, capsys: Any) -> None:
    from kdb_fast.cli import run as command

    database = f"sqlite:///{tmp_path}/a.db"
    sqlite3.connect(tmp_path / "a.db").close()
    for arguments in (
        ["reindex", text, "--db", database],
        ["reindex", "--db", f"sqlite:///{tmp_path}/{text}/none.db"],
        ["reindex", "--from", f"{tmp_path}/{text}", "--entity", text, "--db", database],
        ["reindex", "--model", text, "--from", __file__, "--entity", "N", "--db", database],
        ["reindex", "--model-path", text, "--from", __file__, "--entity", "N", "--db", database],
        ["search", "x", "--mode", text, "--db", database],
        ["search", text, "--where", text, "--db", database],
        ["models", "path", text],
        [text],
    ):
        code = command(arguments)
        out, err = capsys.readouterr()
        assert code in (2, 4, 5), err
        assert out == ""
        for line in err.split("\n"):
            assert line.isprintable(), line
        assert len([line for line in err.splitlines() if line.startswith("kdb-fast: ")]) == 1
        if arguments[0] != "models":
            assert command([*arguments, "--json"]) == code
            out, _ = capsys.readouterr()
            assert out.isascii()
            assert json.loads(out)["error"]["exit_code"] == code


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_the_command_that_carries_on_can_be_typed_again(capsys: pytest.CaptureFixture[str]) -> None:
    from kdb_fast.cli.console import command_line

    arguments = ["reindex", *HOSTILE, "sqlite:///a b.db"]
    printed = command_line(arguments)
    assert printed.isprintable()
    script = printed.replace("kdb-fast", "printf '%s\\0'", 1)
    done = subprocess.run(["bash", "-c", script], capture_output=True, env={"LC_ALL": "C.UTF-8"}, check=True)
    assert done.stdout.decode().split("\0")[:-1] == arguments
    secret = command_line(["reindex", "--db=postgresql://u:pw@h/d", "--db", "postgresql://u:pw@h/d"])
    assert secret == 'kdb-fast reindex --db "${KDB_FAST_DB:?}" --db "${KDB_FAST_DB:?}"'
    source = command_line(["reindex", "a", "--source=postgresql://u:pw@h/d", "--source", "postgresql://u:pw@h/d"])
    assert source == 'kdb-fast reindex a --source "${SOURCE:?}" --source "${SOURCE:?}"', "not the other database"
    unset = subprocess.run(["bash", "-c", secret], capture_output=True, text=True, env={}, check=False)
    assert unset.returncode
    assert "KDB_FAST_DB" in unset.stderr, "the default database is not taken instead"


TABLES = [
    "t" * 63,
    "t" * 64,
    "é" * 40,
    "select",
    'a"b; DROP TABLE kdb_search; --',
    "a.b",
    "100% {}",
    "'; --",
    "Ünïcode",
]
"""PostgreSQL cuts a name at 63 bytes, SQLite nowhere."""


@pytest.mark.parametrize("table", TABLES)
def test_tables_of_any_name_are_read_written_and_searched(database: Kameleon, table: str) -> None:
    note = database.client.create_entity("Note", fields=[{"name": "text", "type": "text"}])
    kept, deleted = note.insert_many([{"text": "lamp kept"}, {"text": "lamp deleted"}])
    assert database.client.materialize_entity("Note")["success"]
    quoted = '"' + table.replace('"', '""') + '"'
    database.execute(f"ALTER TABLE kdb_note RENAME TO {quoted}")
    database.execute("UPDATE kdb_entity_definitions SET dedicated_table_name = %s", table)
    assert database.reindex()["stored"] == 2
    database.execute(f"UPDATE {quoted} SET is_deleted = true WHERE id = '{deleted}'")
    assert database.reindex()["deleted"] == 1
    inserted = database.insert("Note", [{"text": "lamp new"}])
    assert (inserted.code, inserted.json["inserted"]) == (0, 1)
    status = database.kdb_fast("status", "--json").json
    assert (status["indexed"], status["pending"]) == (2, 0)
    where = ("--where", '{"text": "lamp kept"}')
    found = database.kdb_fast("search", "lamp", "--mode", "keyword", "--json", *where).json["results"]
    assert [result["id"] for result in found] == [kept]
    database.execute(f"UPDATE {quoted} SET text = 'lamp changed', updated_at = '2099-01-01' WHERE id = '{kept}'")
    assert database.kdb_fast("status", "--json").json["pending"] == 1


# -- models that mean harm or are broken -----------------------------------------------------------------------------

SIZE = 30_522
"""Words of the tokenizer."""


def lookup_model(directory: Path, minilm: Model, table: np.ndarray, *, reduce: tuple[int, ...] = ()) -> Path:
    """A directory with a model for ``--model-path``: a vector for each token, from a table (words × dimensions)."""
    directory.mkdir(exist_ok=True)
    for name, _ in minilm.files:
        if name != minilm.model_file:
            shutil.copy(minilm.path / name, directory)
    inputs = [helper.make_tensor_value_info(n, TensorProto.INT64, ["b", "s"]) for n in ("input_ids", "attention_mask")]
    weights = helper.make_tensor("table", TensorProto.FLOAT, table.shape, table.astype("<f4").tobytes(), raw=True)
    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["vectors"])]
    if reduce:
        nodes.append(helper.make_node("ReduceMean", ["vectors"], ["last"], axes=list(reduce), keepdims=1))
    output = helper.make_tensor_value_info("last" if reduce else "vectors", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "g", inputs, [output], [weights])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(made, directory / minilm.model_file)
    return directory


def words(minilm: Model, *texts: str) -> list[int]:
    """Number of each word in the tokenizer's list."""
    vocabulary = json.loads((minilm.path / "tokenizer.json").read_text())["model"]["vocab"]
    return [vocabulary[text] for text in texts]


@pytest.fixture
def table() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((SIZE, 384)).astype(np.float32)


def encoder_of(path: Path, minilm: Model) -> Encoder:
    return Encoder(EncoderSpec(models.resolve(minilm.name, path), 100))


MIXED_UP = "another vector for the same text in another batch|gives a matrix of|fails on a probe"


@pytest.mark.parametrize(
    ("shape", "change", "reduce", "fault"),
    [
        ((SIZE, 8), lambda t: t, (), r"gives a matrix of \(1, 8\) for 1 texts; expected \(1, 384\)"),
        ((SIZE, 384), lambda t: t * np.nan, (), "a vector of NaN or infinity for a plain sentence"),
        ((SIZE, 384), lambda t: t * np.inf, (), "a vector of NaN or infinity for a plain sentence"),
        ((SIZE, 384), lambda t: t * 0, (), "a vector of zeros for a plain sentence"),
        (
            (SIZE, 384),
            lambda t: t,
            (0,),
            MIXED_UP,
        ),
        (
            (SIZE, 384),
            lambda t: t,
            (0, 1),
            MIXED_UP,
        ),
        ((9, 384), lambda t: t, (), "fails on a probe"),
    ],
    ids=["dimensions", "nan", "infinity", "zeros", "one row for all", "mixed up", "too few words"],
)
def test_a_model_that_does_not_do_what_it_promises_is_refused_before_anything_is_stored(
    tmp_path: Path, minilm: Model, shape: tuple[int, int], change: Callable[[Any], Any], reduce: Any, fault: str
) -> None:
    random = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    path = lookup_model(tmp_path / "model", minilm, change(random), reduce=reduce)
    with pytest.raises(ModelError, match=fault):
        encoder_of(path, minilm).self_test()


def test_fewer_vectors_than_texts_are_never_spread_over_all(
    tmp_path: Path, minilm: Model, table: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = encoder_of(lookup_model(tmp_path / "model", minilm, table), minilm)
    run_model = encoder._backend._run  # type: ignore[attr-defined]
    monkeypatch.setattr(encoder._backend, "_run", lambda *args: run_model(*args)[:1])
    slab = Slab.local(SlabShape(1, 4, 384))
    slab.slots[0].put(1, [Row(Record(("E", str(i)), "lamp")) for i in range(4)], [0] * 4)
    with pytest.raises(ModelError, match=r"a matrix of \(1, 384\) for 4 texts"):
        worker.embed_rows(slab.slots[0], Embed(0, 1, 0, 4), encoder)
    assert not slab.slots[0].code.any(), "no record is to blame"


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("Failed to allocate memory for requested buffer")])
def test_want_of_memory_is_no_fault_of_a_text(
    tmp_path: Path, minilm: Model, table: np.ndarray, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    encoder = encoder_of(lookup_model(tmp_path / "model", minilm, table), minilm)

    def fail(*args: Any) -> Any:
        raise error

    monkeypatch.setattr(encoder._backend, "_run", fail)
    slab = Slab.local(SlabShape(1, 4, 384))
    slab.slots[0].put(1, [Row(Record(("E", str(i)), "lamp")) for i in range(4)], [0] * 4)
    with pytest.raises(ResourceError, match="Memory ran out"):
        worker.embed_rows(slab.slots[0], Embed(0, 1, 0, 4), encoder)
    assert not slab.slots[0].code.any()


def test_a_text_without_a_direction_or_with_nan_is_rejected_alone(
    tmp_path: Path, minilm: Model, table: np.ndarray, database: Kameleon, monkeypatch: pytest.MonkeyPatch
) -> None:
    marks = words(minilm, "[CLS]", "[SEP]")
    nan, infinite, nothing = words(minilm, "nan", "infinite", "nothing")
    table[[*marks, nothing]] = 0
    table[nan, 3], table[infinite, 5] = np.nan, np.inf
    path = lookup_model(tmp_path / "model", minilm, table)
    monkeypatch.setattr(run_embedding, "resolve", models.resolve)
    monkeypatch.setattr(inline, "Encoder", Encoder)
    texts = ["lamp", "nan", "river", "infinite", "nothing", "nothing nothing", "orbit nan lamp", "stone"]
    options = ReindexOptions(max_rejects=ALL_REJECTS, model_path=path)
    receipt = reindex(database.address, ListSource(records_of(texts)), options)
    assert (receipt.stored, receipt.rejected) == (3, 5)
    rejects = dict(row[1:3] for row in kept_rejects(database.address))
    assert rejects == {
        "r1": "not_finite", "r3": "not_finite", "r4": "zero_vector", "r5": "zero_vector", "r6": "not_finite",
    }  # fmt: skip
    for row in index_rows(database.address).values():
        assert row.vector is not None
        assert np.linalg.norm(row.vector) == pytest.approx(1, abs=1e-5)


def test_a_text_has_its_vector_whatever_its_place_in_a_slot(tmp_path: Path, minilm: Model, table: np.ndarray) -> None:
    encoder = encoder_of(lookup_model(tmp_path / "model", minilm, table), minilm)
    rows = 32
    slab = Slab.local(SlabShape(2, rows, 384))
    wanted = encoder.embed(["the canary lamp"])[0]
    for place in range(rows):
        slot = slab.slots[place % 2]
        texts = [f"{i} {'river ' * (7 * i % 40)}" for i in range(rows)]
        texts[place] = "the canary lamp"
        slot.put(place, [Row(Record(("E", str(i)), text)) for i, text in enumerate(texts)], [0] * rows)
        worker.embed_rows(slot, Embed(slot.number, place, 0, rows), encoder)
        np.testing.assert_allclose(slot.vectors[place], wanted, atol=1e-5)
        others = np.delete(np.arange(rows), place)
        assert np.abs(slot.vectors[others] - wanted).max(axis=1).min() > 0.01


def test_a_model_file_that_changes_under_its_name_is_another_model(
    tmp_path: Path, minilm: Model, table: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = parse_address(f"sqlite:///{tmp_path}/a.db")
    sqlite3.connect(tmp_path / "a.db").close()
    records = records_of([f"lamp {i}" for i in range(20)])
    path = lookup_model(tmp_path / "model", minilm, table)
    options = ReindexOptions(model_path=path)
    first = reindex(address, ListSource(records), options)
    assert reindex(address, ListSource(records), options).unchanged == 20
    size = (path / minilm.model_file).stat().st_size
    lookup_model(path, minilm, np.roll(table, 1, axis=1))
    assert (path / minilm.model_file).stat().st_size == size
    assert models.resolve(minilm.name, path).fingerprint() != first.fingerprint
    # Half of it now, the rest later: never are two models mixed under one fingerprint.
    half = reindex(address, ListSource(records[:10]), options)
    assert (half.stored, half.unchanged) == (10, 0)
    prints = [row.fingerprint for row in index_rows(address).values()]
    assert sorted(map(prints.count, set(prints))) == [10, 10]
    rest = reindex(address, ListSource(records), options)
    assert (rest.stored, rest.unchanged) == (10, 10)
    assert {row.fingerprint for row in index_rows(address).values()} == {half.fingerprint}


def test_a_verified_model_that_is_changed_is_refused(tmp_path: Path, minilm: Model) -> None:
    copied = replace(minilm, path=tmp_path / "copy")
    shutil.copytree(minilm.path, copied.path)
    with (copied.path / minilm.model_file).open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    with pytest.raises(ModelError, match="is damaged: found SHA-256"):
        models.resolve(minilm.name, copied.path)
    db = f"sqlite:///{tmp_path}/a.db"
    (tmp_path / "n.jsonl").write_text('{"id": 1, "text": "a"}\n')
    done = limited.run("reindex", "--from", tmp_path / "n.jsonl", "--entity", "N", "--db", db, "--model-path",
                       copied.path, stub=False)  # fmt: skip
    assert done.code == 4
    assert "is damaged" in done.complaint
    assert execute(parse_address(db), "SELECT count(*) FROM sqlite_master") == [(0,)], "nothing was begun"


def test_a_model_is_never_named_by_a_record_or_a_path_of_one(database: Kameleon, tmp_path: Path) -> None:
    """A path in an input is text: it is not opened, and a field of the input chooses no model."""
    secret = tmp_path / "secret"
    secret.write_text("SENTINEL")
    receipt = run(database.address, Record(("E", "a"), f"file://{secret}"), Record(("E", "b"), str(secret)))
    assert receipt.stored == 2
    assert all("SENTINEL" not in row.content for row in index_rows(database.address).values())


def test_telemetry_of_the_runtime_is_off(tmp_path: Path, minilm: Model) -> None:
    code = (
        "from kdb_fast.embedding.encoder import Encoder, EncoderSpec; "
        "from kdb_fast.embedding.models.lookup import resolve; "
        f"Encoder(EncoderSpec(resolve({minilm.name!r}), 1)).self_test()"
    )
    environment = {
        "HOME": str(tmp_path),
        "PATH": "/usr/bin:/bin",
        "KDB_FAST_HOME": str(models.model_cache_dir().parent),
    }
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=60, capture_output=True)
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.usefixtures("stubbed")
def test_a_hostile_server_cannot_write_to_the_terminal(postgres: Server, capsys: pytest.CaptureFixture[str]) -> None:
    """What a server says in an error or a notice is text of somebody else."""
    address = postgres.create_database()
    try:
        run(address, Record(("E", "a"), "text"))
        execute(
            address,
            "CREATE FUNCTION shout() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
            "RAISE EXCEPTION E'\\x1b[2J\\x07 boo' USING ERRCODE = '42501'; END $$",
        )
        execute(address, "CREATE TRIGGER shout BEFORE INSERT ON kdb_search FOR EACH ROW EXECUTE FUNCTION shout()")
        from kdb_fast.cli.console import complain
        from kdb_fast.errors import KdbFastError

        with pytest.raises(KdbFastError) as caught:
            run(address, Record(("E", "b"), "text"))
        complain(str(caught.value))
        assert all(line.isprintable() for line in capsys.readouterr().err.split("\n"))
    finally:
        postgres.drop_database(address)


# -- what was rejected, and what a message tells to type -------------------------------------------------------------

FAULTY = b'{"id": "1", "text": "one"}\nbroken\n{"text": "no id"}\n{"id": "2", "text": 3}\n'
CORRECTED = lines(*({"id": str(i), "text": f"t{i}"} for i in range(4)))


def test_rejected_lines_are_listed_until_their_input_was_read_without_them(database: Kameleon, tmp_path: Path) -> None:
    one, other = tmp_path / "one.jsonl", tmp_path / "other.jsonl"

    def read(file: Path | None, content: bytes, *options: str) -> list[tuple[Any, ...]]:
        if file is not None:
            file.write_bytes(content)
        source = ("reindex", "--from", str(file or "-"), "--entity", "N", "--max-rejects", "9", *options)
        assert database.kdb_fast(*source, stdin=content).code in (0, 3)
        return sorted((position, *row) for *row, position in (row[1:] for row in kept_rejects(database.address)))

    first = [(2, "", "invalid_json"), (3, "", "missing_id"), (4, "2", "wrong_type")]
    assert read(one, FAULTY) == first
    assert read(other, b'{"id": "7", "text": "x"}\nbroken too\n') == [first[0], first[0], *first[1:]]
    assert read(one, b'{"id": "1", "text": "one"}\nbroken\n', "--limit", "1") == [first[0], first[0], *first[1:]]
    assert read(one, b'{"id": "1", "text": "one"}\nbroken\n') == [first[0], first[0]], "what is still wrong stays"
    assert read(one, CORRECTED) == [first[0]], "and so does what was wrong in another file"
    assert read(other, CORRECTED) == []
    assert read(None, FAULTY) == first
    assert read(None, CORRECTED) == []


@pytest.mark.parametrize("form", ["--db {}", "--db={}"])
def test_a_hint_names_the_database_that_the_command_was_given(
    tmp_path: Path, stubbed: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    import re
    import shlex

    from kdb_fast.cli import run as command

    (tmp_path / "n.jsonl").write_bytes(FAULTY)
    url = f"sqlite:///{tmp_path}/it's here.db"
    option = [part.format(url) for part in form.split(" ")]
    job = ["reindex", "--from", str(tmp_path / "n.jsonl"), "--entity", "N", "--no-progress"]
    for limit, code, stream in (("0", 8, 1), ("9", 3, 0)):
        assert command([*job, *option, "--max-rejects", limit]) == code
        hint = re.search(r"kdb-fast (rejects list [^`\n]*)", capsys.readouterr()[stream])
        assert hint
        assert command(shlex.split(hint[1])) == 0, "as it can be typed in a shell"
        assert "invalid_json" in capsys.readouterr().out
    monkeypatch.setenv("KDB_FAST_DB", url)
    assert command([*job, "--max-rejects", "9"]) == 3
    assert "kdb-fast rejects list\n" in capsys.readouterr().out, "what the environment names needs no naming"


def test_a_hint_names_no_password(capsys: pytest.CaptureFixture[str]) -> None:
    from kdb_fast.cli import console

    console.remember(["status", "--db", "postgresql://u:pw@h/d"])
    assert (
        console.with_database("See `kdb-fast rejects list`.") == 'See `kdb-fast rejects list --db "${KDB_FAST_DB:?}"`.'
    )
    console.remember(["status", "--db", "postgresql://u@h/d"])
    assert console.with_database("Run: kdb-fast reindex --db …") == "Run: kdb-fast reindex --db postgresql://u@h/d"
    console.remember(["search", "--", "--db", "x"])
    assert console.with_database("kdb-fast status") == "kdb-fast status"


@pytest.mark.parametrize("command", [["search", "x"], ["status"], ["rejects", "list"], ["rejects", "retry"],
                                     ["rejects", "clear"], ["models", "list"]])  # fmt: skip
def test_commands_that_only_read_make_no_database(tmp_path: Path, command: list[str]) -> None:
    for db in (f"sqlite:///{tmp_path}/none.db", f"embedded:{tmp_path}/none", None):
        option = ["--db", db] if db and command[0] != "models" else []
        done = limited.run(*command, *option, stub=False, KDB_FAST_HOME=tmp_path / "home")
        if command[0] != "models":
            assert done.code == 5, done
            assert done.complaint.startswith("kdb-fast: There is no ")
        assert list(tmp_path.iterdir()) == []


# -- files of another form ---------------------------------------------------------------------------------------------

QUOTED = b'\xef\xbb\xbfid,text,note\r\n1,"a, ""b""\nc",x\r\n2,two,\r\n'
FILES: dict[str, tuple[str, bytes, dict[str, str]]] = {
    "a.csv": ("CSV", QUOTED, {"1": 'text: a, "b"\nc | note: x', "2": "text: two"}),
    "it's b.tsv": ("TSV", b"id\ttext\n1\tone, two\n", {"1": "text: one, two"}),
    "c.txt": ("CSV with semicolons", "id;Überschrift 1\n1;zwei\n".encode(), {"1": "Überschrift 1: zwei"}),
    "one column.csv": ("CSV", b"id\n1\n", {}),
}


@pytest.mark.parametrize("name", FILES)
def test_a_table_is_told_with_a_command_that_reads_it(tmp_path: Path, name: str) -> None:
    what, content, expected = FILES[name]
    (tmp_path / name).write_bytes(content)
    db = f"sqlite:///{tmp_path}/a.db"
    refused = limited.run("reindex", "--from", tmp_path / name, "--entity", "N", "--db", db, "--json")
    assert refused.code == 2
    assert f"The input is {what}, by its first line" in refused.complaint
    (tmp_path / "kdb-fast").write_text(f"#!{sys.executable}\n{limited.STUBBED}\n")
    (tmp_path / "kdb-fast").chmod(0o755)
    command = json.loads(refused.out)["error"]["remedy"].partition("on the way: ")[2]
    done = limited.run(script=command, PATH=f"{tmp_path}:{Path(sys.executable).parent}:/usr/bin:/bin")
    assert done.code == (0 if expected else 3), done  # a record without a text is a reject
    rows = index_rows(parse_address(db))
    assert {key[1]: row.content for key, row in rows.items()} == expected


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"PAR1\x15\x04", "is Parquet.*pip install pyarrow.*ParquetFile"),
        (b"ARROW1\0\0", "is Arrow"),
        (b"PK\x03\x04\x14\0\x06\0\x08\0\0\0!\0[Content_Types].xml", "is an Excel workbook.*openpyxl"),
        (b"PK\x03\x04\x14\0notes.jsonl", r"compressed \(zip\).*unzip -p"),
        (b"SQLite format 3\0", "is an SQLite database.*--db sqlite:///"),
        (b"%PDF-1.7", "is a PDF"),
        (None, r"it is a directory.*cat .*/\*.jsonl \| kdb-fast insert N - --db"),
    ],
)
def test_what_is_no_json_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, says: str
) -> None:
    import re

    from kdb_fast.cli import run as command

    path = tmp_path / "given"
    path.mkdir() if content is None else path.write_bytes(content)
    assert command(["insert", "N", str(path), "--db", f"sqlite:///{tmp_path}/a.db", "--no-progress"]) == 2
    assert re.search(says, capsys.readouterr().err)


@pytest.mark.parametrize("line", [b"hello, world", b"not json", b"null", b'"a"', b"Dear Sir, or Madam; I write", b"-"])
def test_a_first_line_that_is_no_table_is_a_reject(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "n.jsonl"
    path.write_bytes(line + b"\n" + b'{"id": 1, "text": "x"}\n')
    source = JsonlSource(path, "N")
    (page,) = source.pages()
    source.close()
    assert [type(item) for item in page] == [Reject, Record]
