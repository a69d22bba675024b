"""SQLite files that are only read: read as they are, whoever may write them, and nothing is left beside them."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import limited
import pytest
from search_engines import Hashes
from servers import execute

from kdb_fast import cli
from kdb_fast.db import sqlite_reading
from kdb_fast.db.address import DatabaseAddress, parse_address
from kdb_fast.db.reading import read
from kdb_fast.db.sqlite_connection import connect_sqlite
from kdb_fast.errors import DatabaseError, RefusedError, SchemaError, UsageError
from kdb_fast.search.engine import SearchEngine

NOTES = [("Note", f"r{i}", f"copper kettle number {i}") for i in range(5)]


def url_of(path: Path) -> str:
    return f"sqlite:///{quote(str(path))}"


def make_index(path: Path, mode: str = "delete") -> DatabaseAddress:
    """An index of five notes; ``open`` and ``left``: in write-ahead mode with the last note in the log only."""
    address = parse_address(url_of(path))
    if mode != "delete":
        execute(address, "PRAGMA journal_mode = WAL")
    with SearchEngine(url_of(path), Hashes()) as search:
        search.index_records_batch(NOTES)
    if mode == "left":
        # A copy made while a program has it open: its log holds what is not in the file.
        with contextlib.closing(connect_sqlite(address)) as connection:
            connection.execute("UPDATE kdb_search SET content = 'silver spoon' WHERE record_id = 'r0'")
            connection.execute("UPDATE kdb_search_fts SET content = 'silver spoon' WHERE record_id = 'r0'")
            for suffix in ("", "-wal"):
                shutil.copy(f"{path}{suffix}", f"{path}{suffix}.copy")
        for suffix in ("", "-wal"):
            os.replace(f"{path}{suffix}.copy", f"{path}{suffix}")
    for file in path.parent.iterdir():
        os.utime(file, (1e9, 1e9))
    return address


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file with its size and when it was last written."""
    return {file.name: (file.stat().st_size, file.stat().st_mtime_ns) for file in folder.iterdir()}


def contents(connection: sqlite3.Connection) -> list[str]:
    return [row[0] for row in connection.execute("SELECT content FROM kdb_search ORDER BY record_id")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "my index #1 50%?"
    path.mkdir()
    return path


# -- a directory that cannot be written --------------------------------------------------------------------


@functools.cache
def _as_one_who_may_not() -> str | None:
    """How the shell runs a command whom modes of files bind; None where that cannot be had."""
    if os.geteuid() != 0:
        return '"$@"'
    without = "-dac_override,-dac_read_search"
    script = f'setpriv --bounding-set={without} --inh-caps={without} "$@"'
    done = subprocess.run(["sh", "-c", script, "sh", "true"], capture_output=True, check=False)
    return script if done.returncode == 0 else None


@pytest.fixture
def locked(folder: Path) -> Iterator[Callable[[], str]]:
    """Takes the right to write the folder and its files away; gives the script to run commands with."""
    script = _as_one_who_may_not()
    if script is None:
        pytest.skip("root may write everything here, and there is no setpriv to give that right up")

    def lock() -> str:
        for file in folder.iterdir():
            file.chmod(0o444)
        folder.chmod(0o555)
        return str(script)

    yield lock
    folder.chmod(0o755)


@pytest.mark.parametrize("mode", ["delete", "wal", "left"])
def test_an_index_in_a_directory_that_cannot_be_written_is_read_as_it_is(
    folder: Path, locked: Callable[[], str], mode: str
) -> None:
    make_index(folder / "f.db", mode)
    db = url_of(folder / "f.db")
    script = locked()
    before = listing(folder)
    word = "silver" if mode == "left" else "kettle"
    found = limited.run("search", word, "--mode", "keyword", "--db", db, "--json", script=script)
    assert (found.code, len(found.json["results"])) == (0, 1 if mode == "left" else 5), found
    assert limited.run("status", "--db", db, "--json", script=script).json["indexed"] == 5
    assert limited.run("rejects", "list", "--db", db, script=script).code == 0
    code = (
        "import sys; from kdb_fast import SearchEngine; from search_engines import Hashes\n"
        "search = SearchEngine(sys.argv[1], Hashes()); print(search.search(sys.argv[2], limit=1)[0].matched_text)\n"
        "try: search.index_record('Note', 'x', 'y')\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    done = subprocess.run(
        ["sh", "-c", script, "sh", sys.executable, "-c", code, db, word],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(limited.TESTS)}, check=True,
    )  # fmt: skip
    text, refused = done.stdout.splitlines()
    assert word in text
    assert "Error" in refused
    assert "director" in refused
    assert listing(folder) == before

    notes = folder.parent / "n.jsonl"
    notes.write_text('{"id": "1", "text": "new"}\n')
    done_ = limited.run("reindex", "--db", db, "--from", notes, "--entity", "Note", script=script)
    assert done_.code == 4, done_
    assert "writ" in done_.complaint
    assert listing(folder) == before


def test_what_a_program_that_was_cut_off_had_begun_is_not_read(folder: Path, locked: Callable[[], str]) -> None:
    address = make_index(folder / "f.db")
    # A transaction that is large enough to reach the file before its COMMIT, and ends with its process.
    code = (
        "import os, sqlite3, sys; c = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "c.execute('PRAGMA cache_size = 1'); c.execute('BEGIN')\n"
        "c.execute('UPDATE kdb_search SET content = hex(randomblob(20000))'); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", code, address.conninfo], check=True)
    script = locked()
    db = url_of(folder / "f.db")
    result = limited.run("search", "kettle", "--mode", "keyword", "--db", db, script=script)
    assert result.code == 4
    assert "cut off" in result.complaint
    folder.chmod(0o755)
    (folder / "f.db").chmod(0o644)
    assert contents(connect_sqlite(address)) == [text for _, _, text in NOTES]


# -- mode=ro -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["delete", "wal", "left"])
@pytest.mark.parametrize("option", ["mode=ro", "immutable=1"])
def test_reading_commands_leave_a_file_to_be_read_only_as_it_is(
    folder: Path, mode: str, option: str, capfd: pytest.CaptureFixture[str]
) -> None:
    make_index(folder / "f.db", mode)
    db = url_of(folder / "f.db") + f"?{option}"
    before = listing(folder)
    for command in (["search", "number", "--mode", "keyword"], ["status"], ["rejects", "list"]):
        assert cli.run([*command, "--db", db]) == 0
    assert "4" in capfd.readouterr().out
    with SearchEngine(db, Hashes()) as search:
        assert len(search.search("kettle", limit=9)) == 5
        with pytest.raises(RefusedError, match="mode=ro"):
            search.index_record("Note", "r9", "more")
    assert listing(folder) == before


@pytest.mark.parametrize(
    "command",
    [
        ["reindex"],
        ["reindex", "--from", "{notes}", "--entity", "Note"],
        ["insert", "Note", "{notes}"],
        ["rejects", "clear"],
    ],
)
def test_writing_commands_are_refused_where_the_address_says_mode_ro(
    tmp_path: Path, command: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    make_index(tmp_path / "f.db")
    notes = tmp_path / "n.jsonl"
    notes.write_text('{"id": "1", "text": "new"}\n')
    before = listing(tmp_path)
    words = [word.format(notes=notes) for word in command]
    assert cli.run([*words, "--db", f"sqlite:///{tmp_path}/f.db?mode=ro"]) == 4
    complaints = [line for line in capfd.readouterr().err.splitlines() if line.startswith("kdb-fast: ")]
    assert len(complaints) == 1
    assert "mode=ro" in complaints[0]
    assert listing(tmp_path) == before


@pytest.mark.parametrize("option", ["mode=ro", "mode=rw"])
def test_a_file_that_must_be_there_is_not_made(tmp_path: Path, option: str) -> None:
    notes = tmp_path / "n.jsonl"
    notes.write_text('{"id": "1", "text": "new"}\n')
    db = f"sqlite:///{tmp_path}/none.db?{option}"
    assert cli.run(["reindex", "--from", str(notes), "--entity", "Note", "--db", db]) == 5
    with pytest.raises(DatabaseError, match="no SQLite file"):
        SearchEngine(db, Hashes())
    assert not (tmp_path / "none.db").exists()


@pytest.mark.parametrize("query", ["mode=readonly", "cache=shared", "mode", "timeout=5&mode=ro", "x\x1b[2J=1"])
def test_an_unknown_option_of_an_sqlite_address_is_refused_with_what_is_known(query: str) -> None:
    with pytest.raises(UsageError, match="no option of an SQLite address") as caught:
        parse_address(f"sqlite:///f.db?{query}")
    assert "mode=ro|rw|rwc" in caught.value.remedy
    assert "\x1b" not in caught.value.message


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("sqlite:///file:/tmp/f.db?mode=ro&uri=true", "/tmp/f.db"),
        ("sqlite:///file:///tmp/f.db?uri=true&mode=ro", "/tmp/f.db"),
        ("sqlite:////tmp/f.db?mode=ro", "/tmp/f.db"),
        ("sqlite:///file:f.db?mode=ro&uri=true", str(Path.cwd() / "f.db")),
        ("sqlite:///file:f.db?mode=ro", str(Path.cwd() / "file:f.db")),
    ],
)
def test_a_file_uri_names_its_file(url: str, path: str) -> None:
    address = parse_address(url)
    assert (address.conninfo, address.read_only, address.may_create) == (path, True, False)


@pytest.mark.parametrize("mode", ["ro", "rw"])
def test_an_engine_with_a_file_uri_is_taken_at_its_word(tmp_path: Path, mode: str) -> None:
    from sqlalchemy import create_engine

    make_index(tmp_path / "f.db")
    engine = create_engine(f"sqlite:///file:{tmp_path}/f.db?mode={mode}&uri=true")
    with SearchEngine(engine, Hashes()) as search:
        assert len(search.search("kettle", limit=9)) == 5
        if mode == "ro":
            with pytest.raises(RefusedError, match="mode=ro"):
                search.index_record("Note", "r9", "more")
        else:
            search.index_record("Note", "r9", "more")
    engine.dispose()


def test_a_file_without_an_index_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    execute(parse_address(f"sqlite:///{tmp_path}/f.db"), "CREATE TABLE other (a)")
    with pytest.raises(SchemaError, match="no search index"):
        SearchEngine(f"sqlite:///{tmp_path}/f.db?mode=ro", Hashes())


@pytest.mark.parametrize("mode", ["delete", "wal", "left"])
def test_a_file_is_read_through_memory_only_under_its_locks(tmp_path: Path, mode: str) -> None:
    address = make_index(tmp_path / "f.db", mode)

    def mapped(connection: sqlite3.Connection) -> int:
        assert len(contents(connection)) == 5
        (size,) = connection.execute("PRAGMA mmap_size").fetchone() or (0,)  # nothing where SQLite was built without
        return int(size)

    locked = read(address, mapped, mapped=True) > 0
    with contextlib.closing(sqlite3.connect(":memory:")) as connection:
        possible = ("MAX_MMAP_SIZE=0",) not in connection.execute("PRAGMA compile_options").fetchall()
    assert locked == (possible and mode != "left")
    assert read(address, mapped) == 0
    assert read(parse_address(f"{address.display}?mode=ro"), mapped, mapped=True) == 0


# -- beside a program that writes --------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["delete", "wal", "left"])
def test_what_is_read_while_the_file_is_written_is_read_again(tmp_path: Path, mode: str) -> None:
    address = make_index(tmp_path / "f.db", mode)
    address = parse_address(f"{address.display}?mode=ro")
    seen: list[list[str]] = []

    def work(connection: sqlite3.Connection) -> list[str]:
        seen.append(contents(connection))
        if len(seen) == 1:
            with contextlib.closing(sqlite3.connect(address.conninfo)) as other, other:
                other.execute("UPDATE kdb_search SET content = 'written meanwhile'")
        return seen[-1]

    assert read(address, work) == ["written meanwhile"] * 5
    assert len(seen) == 2


def test_a_file_that_is_written_all_the_time_ends_in_an_error_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = parse_address(f"{make_index(tmp_path / 'f.db').display}?mode=ro")
    monkeypatch.setattr(sqlite_reading, "_is_quiet", lambda path: True)

    def work(connection: sqlite3.Connection) -> list[str]:
        with contextlib.closing(sqlite3.connect(address.conninfo)) as other, other:
            other.execute("UPDATE kdb_search SET content = content || '.'")
        return contents(connection)

    with pytest.raises(DatabaseError, match="written all the time"):
        read(address, work)


@pytest.mark.parametrize("mode", ["delete", "wal", "left"])
def test_the_library_sees_what_others_write_to_a_file_it_only_reads(tmp_path: Path, mode: str) -> None:
    address = make_index(tmp_path / "f.db", mode)
    with SearchEngine(f"{address.display}?mode=ro", Hashes()) as search, SearchEngine(address.display, Hashes()) as own:
        assert len(search.search("kettle", limit=9)) == 5
        for number in range(3):
            own.index_record("Note", f"new{number}", f"copper kettle and {number}")
            assert len(search.search("kettle", limit=9)) == 6 + number


def test_a_program_that_has_the_file_open_is_read_beside_it(tmp_path: Path) -> None:
    address = make_index(tmp_path / "f.db", "wal")
    with contextlib.closing(connect_sqlite(address)) as other:
        other.execute("UPDATE kdb_search SET content = 'in the log only'")
        before = listing(tmp_path)
        assert set(before) == {"f.db", "f.db-wal", "f.db-shm"}
        for url in (address.display, f"{address.display}?mode=ro"):
            assert read(parse_address(url), contents) == ["in the log only"] * 5
        after: dict[str, Any] = listing(tmp_path)
        assert (after["f.db"], after["f.db-wal"]) == (before["f.db"], before["f.db-wal"])
        assert set(after) == set(before)
