"""Whatever goes wrong, no output, no table and no file holds the password, a piece of it, or one of its forms."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import limited
import psutil
import pytest
from commands import Command, Commands
from psycopg.conninfo import conninfo_to_dict
from servers import Server, eventually, execute

import kdb_fast
from kdb_fast.cli.console import unexpected
from kdb_fast.db.address import DatabaseAddress, parse_address, unverified_server

PIECES = ("hunterOne", "hunterTwo", "hunterThree", "hunterFour")
PASSWORD = "{}%{}@{}/{}".format(*PIECES)
"""With all characters at which an address or a message may be taken apart wrongly."""
ENCODED = quote(PASSWORD, safe="")


def check_secret(*texts: str) -> None:
    """No piece of the password is in the texts: that holds for all its forms, and for what is left of a cut one."""
    for text in texts:
        for piece in PIECES:
            assert piece not in text, text


def url(address: DatabaseAddress, password: str = ENCODED, **changed: str) -> str:
    """The address as a user types it, with the password, which a server that trusts everybody does not ask for."""
    parts: dict[str, Any] = {**conninfo_to_dict(address.conninfo), **changed}
    where = f"host={quote(str(parts['host']), safe='')}&port={parts['port']}"
    return f"postgresql://{parts['user']}:{password}@/{parts['dbname']}?{where}"


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("input") / "notes.jsonl"
    lines = [json.dumps({"id": i, "text": f"{i} about lamps"}) for i in range(40)]
    file.write_text("\n".join([*lines, "[1]", ""]))
    return file


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The user's home and current directory of the commands: a leak may be a file."""
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def run(commands: Commands, home: Path, *arguments: str | Path, **environment: str) -> Command:
    """Run a command to its end; nothing that it prints or leaves in its home holds a piece of the password."""
    command = commands.start(*map(str, arguments), HOME=str(home), KDB_FAST_HOME=str(home / "data"), **environment)
    command.wait()
    check_secret(command.out, command.err)
    for file in home.rglob("*"):
        check_secret(str(file), file.read_text(errors="replace") if file.is_file() else "")
    return command


def check_database(address: DatabaseAddress) -> None:
    """No row of any table of the database holds a piece of the password."""
    tables = execute(address, "SELECT oid::regclass::text FROM pg_class WHERE relkind = 'r' AND relname LIKE 'kdb%%'")
    assert tables
    for (table,) in tables:
        check_secret(*(row for (row,) in execute(address, f"SELECT t::text FROM {table} t")))


# -- addresses that are wrong ----------------------------------------------------------------------------------------

BAD = {
    "nobody listens": f"postgresql://u:{ENCODED}@127.0.0.1:1/db",
    "unknown host": f"postgresql://u:{ENCODED}@no-such-host.invalid/db",
    "bad percent escape": f"postgresql://u:{PIECES[0]}%zz{PIECES[1]}@127.0.0.1:1/db",
    "percent at the end": f"postgresql://u:{PIECES[0]}%@127.0.0.1:1/db",
    "nothing escaped": f"postgresql://u:{PASSWORD}@127.0.0.1:1/db",
    "at not escaped": f"postgresql://u:{PIECES[0]}@{PIECES[1]}@127.0.0.1:1/db",
    "slash not escaped": f"postgresql://u:{PIECES[0]}/{PIECES[1]}@127.0.0.1:1/db",
    "question mark not escaped": f"postgresql://u:{PIECES[0]}?{PIECES[1]}@127.0.0.1:1/db",
    "hash not escaped": f"postgresql://u:{PIECES[0]}#{PIECES[1]}@127.0.0.1:1/db",
    "bracket not escaped": f"postgresql://u:[{PIECES[0]}@127.0.0.1:1/db",
    "space": f"postgresql://u:{PIECES[0]} {PIECES[1]}@127.0.0.1:1/db",
    "port is a word": f"postgresql://u:{ENCODED}@127.0.0.1:port/db",
    "port is too large": f"postgresql://u:{ENCODED}@127.0.0.1:99999/db",
    "unknown option": f"postgresql://u:{ENCODED}@127.0.0.1:1/db?nonsense=1",
    "unknown sslmode": f"postgresql://u:{ENCODED}@127.0.0.1:1/db?sslmode=bogus",
    "certificate that is not there": f"postgresql://u:{ENCODED}@127.0.0.1:1/db?sslmode=verify-full&sslrootcert=/none",
    "password as an option": f"postgresql://127.0.0.1:1/db?user=u&password={ENCODED}",
    "password of a key": f"postgresql://u@127.0.0.1:1/db?sslpassword={ENCODED}",
    "two hosts": f"postgresql://u:{ENCODED}@127.0.0.1:1,127.0.0.1:2/db",
    "of a driver": f"postgresql+psycopg2://u:{ENCODED}@127.0.0.1:1/db",
    "another database": f"mysql://u:{ENCODED}@127.0.0.1:1/db",
    "no scheme": f"u:{ENCODED}@127.0.0.1:1/db",
    "words": f"host=127.0.0.1 port=1 password={PASSWORD}",
    "sqlite with a password": f"sqlite://u:{ENCODED}@/db",
}


@pytest.mark.parametrize("address", BAD.values(), ids=BAD)
def test_no_message_about_an_address_holds_the_password(commands: Commands, home: Path, address: str) -> None:
    for arguments in (("reindex", "--json"), ("insert", "E", os.devnull), ("search", "x", "--mode", "keyword")):
        command = run(commands, home, *arguments, "--db", address)
        assert command.wait() in (2, 4, 5), command.err
        assert "kdb-fast: " in command.err
    command = run(commands, home, "rejects", "list", KDB_FAST_DB=address)
    assert command.wait() in (2, 5)
    assert run(commands, home, "status", f"--db={address}").wait() in (2, 5)


# -- servers that are odd --------------------------------------------------------------------------------------------

Answer = Callable[[socket.socket], None]


def message(kind: bytes, body: bytes) -> bytes:
    """A message of PostgreSQL's protocol."""
    return kind + struct.pack(">i", 4 + len(body)) + body


def startup(connection: socket.socket) -> None:
    """Refuse TLS, then read the client's first message."""
    while True:
        (size,) = struct.unpack(">i", connection.recv(4))
        body = connection.recv(size - 4)
        if body[:4] not in (struct.pack(">i", 80877103), struct.pack(">i", 80877104)):
            return
        connection.sendall(b"N")


def refuses_and_quotes(connection: socket.socket) -> None:
    startup(connection)
    connection.sendall(message(b"R", struct.pack(">i", 3)))
    given = connection.recv(1000)[5:].rstrip(b"\0")
    assert given == PASSWORD.encode()
    said = b"SFATAL\0VFATAL\0C28P01\0Mwrong password " + given + b" or " + ENCODED.encode() + b"\0\0"
    connection.sendall(message(b"E", said))


def speaks_http(connection: socket.socket) -> None:
    connection.recv(1000)
    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")


def hangs_up(connection: socket.socket) -> None:
    connection.recv(1)


def asks_for_a_method_that_nobody_knows(connection: socket.socket) -> None:
    startup(connection)
    connection.sendall(message(b"R", struct.pack(">i", 99)))


ODD: dict[str, tuple[Answer, str]] = {
    "wrong password, quoted": (refuses_and_quotes, ""),
    "no TLS": (refuses_and_quotes, "?sslmode=require"),
    "HTTP": (speaks_http, ""),
    "hangs up": (hangs_up, ""),
    "unknown method": (asks_for_a_method_that_nobody_knows, ""),
}


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


@pytest.mark.parametrize(("answer", "options"), ODD.values(), ids=ODD)
def test_no_answer_of_a_server_brings_the_password_to_light(
    commands: Commands, home: Path, listener: socket.socket, answer: Answer, options: str
) -> None:
    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError, struct.error):
                answer(connection)

    threading.Thread(target=serve, daemon=True).start()
    address = f"postgresql://u:{ENCODED}@127.0.0.1:{listener.getsockname()[1]}/db{options}"
    command = run(commands, home, "reindex", "--json", "--db", address)
    assert command.wait() == 5
    assert "Cannot connect to postgresql://127.0.0.1:" in command.receipt["error"]["message"]
    by_environment = run(commands, home, "status", "--db", address.replace(f":{ENCODED}", ""), PGPASSWORD=PASSWORD)
    assert by_environment.wait() == 5
    listener.shutdown(socket.SHUT_RDWR)


# -- runs that fail --------------------------------------------------------------------------------------------------

CHANGED = {
    "missing database": {"dbname": "nowhere"},
    "missing role": {"user": "nobody_at_all"},
    "missing socket": {"port": "1"},
}


@pytest.mark.parametrize("changed", CHANGED.values(), ids=CHANGED)
def test_what_the_server_refuses_is_told_without_the_password(
    commands: Commands, home: Path, notes: Path, database: DatabaseAddress, changed: dict[str, str]
) -> None:
    command = run(commands, home, "reindex", "--from", notes, "--entity", "N", "--db", url(database, **changed))
    assert command.wait() == 5
    assert "Cannot connect to postgresql://" in command.err


FAULTS = {
    "": 3,
    "source.page:1:enospc": 7,
    "pipeline.flush:1:raise": 70,
    "store.before_commit:1:raise": 7,
    "store.before_commit:1:kill": 7,
    "worker.start:1:raise": 7,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_run_that_fails_leaves_no_password_in_output_or_database(
    home: Path, notes: Path, database: DatabaseAddress, fault: str
) -> None:
    job = ("reindex", "--from", notes, "--entity", "N", "--json", "--workers", "1", "--max-rejects", "5")
    done = limited.run(*job, "--db", url(database), unset=("KDB_FAST_FAULT_DIR",), KDB_FAST_FAULT=fault, HOME=home)
    assert done.code == FAULTS[fault], done
    check_secret(done.out, done.err, *(file.read_text(errors="replace") for file in home.rglob("*") if file.is_file()))
    assert ("To carry on: kdb-fast reindex" in done.err) == bool(fault)
    assert ('--db "${KDB_FAST_DB:?}"' in done.err) == bool(fault)
    check_database(database)


def test_a_held_lock_and_missing_rights_are_told_without_the_password(
    commands: Commands, home: Path, notes: Path, database: DatabaseAddress, postgres: Server
) -> None:
    job = ("reindex", "--from", notes, "--entity", "N", "--max-rejects", "5")
    commands.fired()
    holder = commands.start(*map(str, job), "--db", url(database), KDB_FAST_FAULT="pipeline.flush:1:hang")
    holder.wait_until_stopped()
    command = run(commands, home, *job, "--db", url(database))
    assert command.wait() == 6
    assert "holds the index" in command.err
    holder.kill()
    role = postgres.create_role(database, "SELECT ON kdb_search")
    command = run(commands, home, *job, "--db", url(role))
    assert command.wait() == 4, command.err
    assert "GRANT" in command.err
    command = run(commands, home, "reindex", "--db", url(database))
    assert command.wait() == 4
    assert "no KameleonDB tables" in command.err


def test_no_process_shows_the_password_in_its_arguments_or_name(
    commands: Commands, home: Path, notes: Path, database: DatabaseAddress
) -> None:
    job = ("reindex", "--from", str(notes), "--entity", "N", "--workers", "2", "--max-rejects", "5")
    commands.fired()
    command = commands.start(*job, HOME=str(home), KDB_FAST_DB=url(database), KDB_FAST_FAULT="pipeline.flush:1:hang")
    command.wait_until_stopped()
    parent = psutil.Process(command.pid)
    children = [p for p in parent.children(recursive=True) if "spawn_main" in " ".join(p.cmdline())]
    assert len(children) == 3
    for process in children:
        check_secret(" ".join(process.cmdline()), process.name())
    workers = [p for p in children if "KDB_FAST_DB" not in p.environ()]
    assert len(workers) == 2
    for process in workers:
        check_secret(*process.environ().values())
    names = execute(database, "SELECT application_name FROM pg_stat_activity WHERE datname = current_database()")
    check_secret(*(name for (name,) in names))
    assert {name for (name,) in names if name.startswith("kdb-fast/")} >= {"kdb-fast/parent", "kdb-fast/writer"}
    if sys.platform == "linux":  # a core dump would hold texts and the password
        limits = [Path(f"/proc/{process.pid}/limits").read_text() for process in children]
        assert all(re.search(r"Max core file size +0 +0 ", text) for text in limits)
    command.kill()
    eventually(lambda: not any(child.is_running() for child in children))


# -- what is said about it -------------------------------------------------------------------------------------------


def test_an_unexpected_error_is_told_without_its_secrets(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-hunterFour")
    monkeypatch.setenv("KDB_FAST_DB", f"postgresql://u:{ENCODED}@h/d")
    for text in (PASSWORD, ENCODED, f"postgresql://u:{ENCODED}@h/d", "key sk-hunterFour"):
        try:
            raise ValueError(f"something about {text}")
        except ValueError as error:
            told = unexpected(error, ["reindex", f"--db=postgresql://u:{ENCODED}@h/d"])
        assert told.exit_code == 70
        check_secret(str(told), capsys.readouterr().err)
    assert "Unexpected ValueError: something about" in str(told)


@pytest.mark.parametrize(
    ("address", "host"),
    [
        ("postgresql://u@db.example/d", "db.example"),
        ("postgresql://u@db.example/d?sslmode=require", "db.example"),
        ("postgresql://u@db.example/d?sslmode=verify-full", ""),
        ("postgresql://u@localhost,db.example/d", "db.example"),
        ("postgresql://u@localhost/d", ""),
        ("postgresql://u@127.0.0.1/d", ""),
        ("postgresql://u@[::1]/d", ""),
        ("postgresql:///d?host=/tmp", ""),
        ("sqlite:///a.db", ""),
    ],
)
def test_a_remote_server_without_a_checked_certificate_is_pointed_out(
    monkeypatch: pytest.MonkeyPatch, address: str, host: str
) -> None:
    monkeypatch.delenv("PGSSLMODE", raising=False)
    monkeypatch.delenv("PGHOST", raising=False)
    assert unverified_server(parse_address(address)) == host


def test_a_password_on_the_command_line_is_warned_about() -> None:
    done = limited.run("status", "--db", BAD["nobody listens"])
    assert "can be read by other users" in done.err
    check_secret(done.out, done.err)


# -- what the code never does ------------------------------------------------------------------------------------------


def nodes() -> Iterator[tuple[Path, ast.AST]]:
    """Every node of the syntax trees of the package."""
    for file in sorted(Path(kdb_fast.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            yield file, node


def test_nothing_of_an_input_can_become_code_or_an_archive() -> None:
    """No input is unpickled, evaluated, given to a shell or unpacked as a tar archive.

    A child unpickles what its parent hands it through their own pipe.
    """
    modules = {"pickle", "marshal", "shelve", "yaml", "tarfile", "dill", "cloudpickle"}
    calls = {"eval", "exec", "os.system", "os.popen", "subprocess.getoutput", "compile"}
    for file, node in nodes():
        if isinstance(node, ast.Import):
            found = {name.name.split(".")[0] for name in node.names} & modules
            assert not found or (file.match("ipc/child.py") and found == {"pickle"}), file
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in modules, file
        elif isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in calls, file
            shell = [k for k in node.keywords if k.arg == "shell" and ast.unparse(k.value) != "False"]
            assert not shell, file


def test_the_server_is_never_asked_to_read_or_write_files_of_its_own() -> None:
    for file, node in nodes():
        text = node.value if isinstance(node, ast.Constant) else None
        if isinstance(text, str) and re.match(r"\s*COPY [a-z{]", text):
            assert "FROM STDIN" in text, (file, text)


def test_only_own_children_are_killed() -> None:
    """A process is ended through the handle that started it, whose number cannot have gone to another meanwhile."""
    for file, node in nodes():
        name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        assert name not in ("os.kill", "os.killpg") or file.name == "faults.py", file
