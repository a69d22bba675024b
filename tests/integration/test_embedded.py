"""The embedded server, whatever its directory is called, whoever uses the machine, and however its last user ended."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import psutil
import pytest
from servers import eventually, execute

from kdb_fast.db.address import EMBEDDED_PATH_BYTES, DatabaseAddress, opened, parse_address
from kdb_fast.db.embedded import server as embedded
from kdb_fast.db.embedded.accounts import Account, let_pass, let_read, system_account
from kdb_fast.db.embedded.directory import DataDirectory, Postmaster
from kdb_fast.db.embedded.server import EmbeddedServer
from kdb_fast.errors import RefusedError, UsageError

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="what root has to do for PostgreSQL, which does not run as root")
"""Mark of a test that needs root; the rest runs as whoever runs the tests."""


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty directory that every user may pass, which is TMPDIR too; no server is left in it."""
    with tempfile.TemporaryDirectory(prefix="kdb-fast-tests-", ignore_cleanup_errors=True) as name:
        Path(name).chmod(0o755)
        (Path(name) / "tmp").mkdir(mode=0o755)
        monkeypatch.setattr(tempfile, "tempdir", str(Path(name) / "tmp"))
        # A power failure does not happen to a test.
        monkeypatch.setattr(embedded, "INITDB_OPTIONS", (*embedded.INITDB_OPTIONS, "--no-sync"))
        yield Path(name)
        assert os.listdir(Path(name) / "tmp") == []
        assert servers_in(Path(name)) == []


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a server that was prepared and has been stopped; to be copied, which is quicker."""
    path = tmp_path_factory.mktemp("prepared") / "pg"
    with opened(parse_address(f"embedded:{path}")):
        pass
    return path


def copy(prepared: Path, to: Path) -> Path:
    """Copy a server's directory with all owners and modes."""
    subprocess.run(["cp", "-a", prepared, to], check=True)
    return to


def servers_in(folder: Path) -> list[int]:
    """Processes of PostgreSQL that work in a directory or below it."""
    found = []
    for process in psutil.process_iter(["name", "cmdline", "status"]):
        words = process.info["cmdline"] or []
        if process.info["name"] == "postgres" and any(word.startswith(str(folder)) for word in words):
            found.append(process.pid)
    return found


def answers(address: DatabaseAddress) -> bool:
    return execute(address, "SELECT 1") == [(1,)]


# -- names of the directory ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "it's my dir",
        'a "quoted" $(touch made) `touch made` ; back\\slash',
        "Größe 日本, 100%20:\u2028 ",
        "long/" + "x" * 200,
        "bad \udcff byte",
    ],
)
def test_a_directory_of_any_name_works(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    with opened(parse_address(f"embedded:{name}")) as address:
        assert answers(address)
    with opened(parse_address(f"embedded:{folder / name}")) as address:
        assert answers(address), "what was made is started again"
    assert sorted(os.listdir(folder)) == sorted(["tmp", name.partition("/")[0]])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("new\nline", "control character"),
        ("nul\x00", "control character"),
        ("escape\x1b[2J", "control character"),
        ("/".join(["n" * 200] * 5), f"at most {EMBEDDED_PATH_BYTES} are possible"),
    ],
)
def test_a_directory_that_postgresql_cannot_use_is_refused_before_anything_is_made(
    folder: Path, name: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        parse_address(f"embedded:{folder}/{name}")
    assert "\n" not in str(caught.value)


def test_a_directory_with_something_else_in_it_is_left_as_it_is(folder: Path) -> None:
    (folder / "mine").mkdir()
    (folder / "mine" / "letter.txt").write_text("dear")
    before = (folder / "mine").stat()
    with (
        pytest.raises(RefusedError, match=r"is not PostgreSQL's, since 'letter\.txt' is in it"),
        opened(parse_address(f"embedded:{folder / 'mine'}")),
    ):
        pass
    after = (folder / "mine").stat()
    assert (after.st_uid, after.st_mode) == (before.st_uid, before.st_mode)
    with (
        pytest.raises(RefusedError, match="File exists"),
        opened(parse_address(f"embedded:{folder / 'mine' / 'letter.txt'}")),
    ):
        pass


GB = 1 << 30


@pytest.mark.parametrize(("memory", "limit", "buffers"), [(64, None, "1GB"), (8, None, "512MB"), (64, 1, "128MB")])
def test_the_cache_of_a_new_server_is_a_part_of_the_memory(
    folder: Path, monkeypatch: pytest.MonkeyPatch, memory: int, limit: int | None, buffers: str
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Mock(total=memory * GB))
    monkeypatch.setattr("kdb_fast.db.embedded.server.memory_limit", lambda: limit and limit * GB)
    server = EmbeddedServer(folder / "pg")
    server.start()
    assert execute(DatabaseAddress("postgresql", server.conninfo, ""), "SHOW shared_buffers") == [(buffers,)]
    server.leave()


# -- those who use it ------------------------------------------------------------------------------------------------


def test_the_last_of_its_users_stops_it(folder: Path, prepared: Path) -> None:
    copy(prepared, folder / "pg")
    first, second = EmbeddedServer(folder / "pg"), EmbeddedServer(folder / "pg")
    first.start()
    second.start()
    assert first.pid == second.pid
    first.leave()
    first.leave()
    assert answers(DatabaseAddress("postgresql", second.conninfo, ""))
    second.leave()
    assert servers_in(folder) == []


USE = """
import sys, time
from pathlib import Path
from kdb_fast.db.embedded.server import EmbeddedServer
server = EmbeddedServer(Path(sys.argv[1]))
server.start()
print(server.pid, flush=True)
sys.stdin.read()
"""


def user_process(directory: Path) -> subprocess.Popen[str]:
    """Another process that uses the server until its standard input ends."""
    return subprocess.Popen(
        [sys.executable, "-c", USE, str(directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def kill(process: subprocess.Popen[str]) -> None:
    with process:
        process.kill()


def said_pid(process: subprocess.Popen[str]) -> int:
    assert process.stdout is not None
    return int(process.stdout.readline())


def test_many_that_start_it_at_once_share_one(folder: Path) -> None:
    users = [user_process(folder / "a b") for _ in range(4)]
    pids = {said_pid(user) for user in users}
    assert len(pids) == 1
    for user in users:
        user.communicate(timeout=60)
    assert servers_in(folder) == []


def test_a_server_that_outlived_its_user_is_adopted_and_stopped(folder: Path, prepared: Path) -> None:
    copy(prepared, folder / "it's")
    user = user_process(folder / "it's")
    pid = said_pid(user)
    kill(user)
    assert servers_in(folder) != []
    server = EmbeddedServer(folder / "it's")
    server.start()
    assert server.pid == pid
    server.leave()


def test_a_killed_server_is_started_again(folder: Path, prepared: Path) -> None:
    copy(prepared, folder / "a b")
    user = user_process(folder / "a b")
    process = psutil.Process(said_pid(user))
    others = process.children(recursive=True)
    process.kill()
    kill(user)
    psutil.wait_procs([process, *others], timeout=20)
    with opened(parse_address(f"embedded:{folder / 'a b'}")) as address:
        assert answers(address)


def test_the_number_of_a_dead_server_may_belong_to_another_process(folder: Path, prepared: Path) -> None:
    copy(prepared, folder / "pg")
    server = EmbeddedServer(folder / "pg")
    server.start()
    file = folder / "pg" / "postmaster.pid"
    lines = file.read_text().split("\n")
    server.leave()
    # This process, as after the restart of a container, in which numbers begin at 1 again.
    file.write_text("\n".join([str(os.getpid()), *lines[1:]]))
    with opened(parse_address(f"embedded:{folder / 'pg'}")) as address:
        assert answers(address)


def test_a_copy_of_a_running_servers_directory_is_not_taken_for_it(folder: Path, prepared: Path) -> None:
    copy(prepared, folder / "pg")
    server = EmbeddedServer(folder / "pg")
    server.start()
    assert isinstance(DataDirectory(folder / "pg").postmaster(), Postmaster)
    assert DataDirectory(copy(folder / "pg", folder / "copy")).postmaster() is None
    server.leave()


def test_a_forked_child_does_not_stop_it(folder: Path, prepared: Path) -> None:
    copy(prepared, folder / "pg")
    server = EmbeddedServer(folder / "pg")
    server.start()
    child = os.fork()
    if not child:
        server.leave()
        os._exit(0)
    os.waitpid(child, 0)
    assert answers(DatabaseAddress("postgresql", server.conninfo, ""))
    server.leave()


# -- the environment -------------------------------------------------------------------------------------------------


def test_variables_for_another_server_and_another_language_change_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = {
        "PGHOST": "127.0.0.1",
        "PGHOSTADDR": "127.0.0.1",
        "PGPORT": "1",
        "PGUSER": "nobody",
        "PGDATABASE": "elsewhere",
        "PGDATA": "/nowhere",
        "PGTARGETSESSIONATTRS": "standby",
        "PGCHANNELBINDING": "require",
        "PGGSSENCMODE": "require",
        "LANG": "xx_XX.ISO-8859-1",
        "LC_ALL": "xx_XX.ISO-8859-1",
    }
    for name, value in others.items():
        monkeypatch.setenv(name, value)
    with opened(parse_address(f"embedded:{folder / 'pg'}")) as address:
        (row,) = execute(
            address,
            "SELECT current_setting('server_encoding'), current_setting('port'), current_setting('data_directory'), "
            "to_tsvector('simple', 'ÜBER—ich')::text",
        )
    assert row == ("UTF8", "5432", str(folder / "pg"), "'ich':2 'über':1")


def test_only_its_user_reaches_it(folder: Path, prepared: Path) -> None:
    for name in ("pg", "in another place"):
        server = EmbeddedServer(copy(prepared, folder / name))
        server.start()
        found = DataDirectory(server.directory).postmaster()
        assert found is not None
        for directory in {str(folder / name), found.socket_dir}:
            assert stat.S_IMODE(os.stat(directory).st_mode) == 0o700
        assert execute(DatabaseAddress("postgresql", server.conninfo, ""), "SHOW listen_addresses") == [("",)]
        server.leave()


# -- root and others -------------------------------------------------------------------------------------------------


@as_root
def test_after_root_an_ordinary_user_may_use_one_too(folder: Path, prepared: Path) -> None:
    """Nothing is kept for all users of a machine in one place."""
    with opened(parse_address(f"embedded:{copy(prepared, folder / 'roots')}")) as address:
        assert answers(address)
        (folder / "own").mkdir()
        os.chown(folder / "own", 65534, 65534)
        child = os.fork()
        if not child:
            code = 1
            try:
                server = EmbeddedServer(folder / "own")
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
                server.start()
                code = 0 if answers(DatabaseAddress("postgresql", server.conninfo, "")) else 2
                server.leave()
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@as_root
def test_root_runs_the_server_of_another_user_as_that_user(folder: Path) -> None:
    (folder / "theirs").mkdir(mode=0o700)
    os.chown(folder / "theirs", 65534, 65534)
    with opened(parse_address(f"embedded:{folder / 'theirs'}")) as address:
        assert answers(address)
    owners = {path.lstat().st_uid for path in [folder / "theirs", *(folder / "theirs").rglob("*")]}
    assert owners == {65534}


@as_root
def test_root_opens_no_more_than_the_way_to_the_directory(folder: Path) -> None:
    private = folder / "private"
    (private / "open").mkdir(parents=True)
    private.chmod(0o700)
    (private / "open").chmod(0o755)
    with opened(parse_address(f"embedded:{private / 'open' / 'pg'}")) as address:
        assert answers(address)
    assert stat.S_IMODE(private.stat().st_mode) == 0o701
    assert stat.S_IMODE((private / "open").stat().st_mode) == 0o755
    assert (private / "open" / "pg").stat().st_uid == system_account().uid


def test_programs_that_were_installed_under_a_strict_umask_are_opened(tmp_path: Path) -> None:
    programs = tmp_path / "pginstall18" / "bin"
    programs.mkdir(parents=True, mode=0o700)
    (programs / "postgres").write_text("")
    (programs / "postgres").chmod(0o711)
    (tmp_path / "pginstall18" / "share").mkdir(mode=0o700)
    (tmp_path / "pginstall18" / "share" / "words").write_text("")
    (tmp_path / "pginstall18" / "share" / "words").chmod(0o600)
    let_read(programs)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "pginstall18").rglob("*")}
    assert modes["postgres"] == 0o715
    assert modes["words"] == 0o604
    assert modes["bin"] & modes["share"] & 0o5 == 0o5


def test_another_users_directory_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "theirs").mkdir(mode=0o755)
    monkeypatch.setattr(os, "geteuid", lambda: (folder / "theirs").stat().st_uid + 1)
    with pytest.raises(RefusedError, match="the directory belongs to user"):
        EmbeddedServer(folder / "theirs").start()


def test_a_directory_that_is_closed_to_this_user_is_told(folder: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may enter every directory")
    (folder / "closed").mkdir(mode=0o000)
    with pytest.raises(RefusedError, match="Permission denied"):
        EmbeddedServer(folder / "closed" / "pg").start()
    (folder / "closed").chmod(0o700)


# -- when it does not start ------------------------------------------------------------------------------------------


def test_what_postgresql_says_is_told_and_nothing_is_left(folder: Path, prepared: Path) -> None:
    copy(prepared, folder / "a b")
    settings = folder / "a b" / "postgresql.conf"
    settings.write_text(settings.read_text() + "\nno_such_setting = 1\n")
    with (
        pytest.raises(RefusedError, match=r"it ended at once.*FATAL|it ended at once.*no_such_setting"),
        opened(parse_address(f"embedded:{folder / 'a b'}")),
    ):
        pass


def test_a_preparation_that_fails_leaves_the_directory_empty(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "LOCALES", ("no_such_locale", "nor_this"))
    with (
        pytest.raises(RefusedError, match=r"preparing it failed: .*locale"),
        opened(parse_address(f"embedded:{folder / 'pg'}")),
    ):
        pass
    assert os.listdir(folder / "pg") == []
    monkeypatch.setattr(embedded, "LOCALES", ("no_such_locale", "C"))
    with opened(parse_address(f"embedded:{folder / 'pg'}")) as address:
        assert answers(address)


def test_data_of_a_version_that_is_not_installed_is_told(folder: Path) -> None:
    (folder / "pg").mkdir()
    (folder / "pg" / "PG_VERSION").write_text("9\n")
    with pytest.raises(RefusedError, match=r"PostgreSQL 9's; installed is [0-9 and]+\."):
        EmbeddedServer(folder / "pg")


def test_a_signal_for_the_command_does_not_reach_it(folder: Path, prepared: Path) -> None:
    copy(prepared, folder / "pg")
    user = user_process(folder / "pg")
    pid = said_pid(user)
    assert os.getsid(pid) != os.getsid(user.pid)
    assert psutil.Process(pid).ppid() != user.pid
    user.send_signal(signal.SIGINT)
    user.communicate(timeout=60)
    eventually(lambda: servers_in(folder) == [])


def test_directories_are_opened_only_where_they_are_closed(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir(mode=0o750)
    (tmp_path / "a").chmod(0o750)
    owner = (tmp_path / "a").stat().st_uid
    let_pass(tmp_path / "a" / "b", Account(owner, owner))
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o750
