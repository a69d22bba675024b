"""The data directory of the embedded server: who may enter it, which server works in it, where its socket is."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import tempfile
from pathlib import Path
from typing import NamedTuple

import psutil

from ...errors import RefusedError
from .accounts import Account, let_pass, let_read, name_of, system_account

SOCKET_NAME = ".s.PGSQL.5432"
SOCKET_PATH_BYTES = 103
"""The shortest limit of an address in the file system: macOS; on Linux it is 107."""

PLAIN_PATH = re.compile(r"[A-Za-z0-9/._+~-]+")
"""A path that libpq, PostgreSQL and SQLAlchemy all take for one host: no comma, colon, space or quote."""


class Postmaster(NamedTuple):
    """What ``postmaster.pid`` says of a server that is ready."""

    pid: int
    port: int
    socket_dir: str


class DataDirectory:
    """The directory of one server.

    Attributes:
        path: Where it is.
        account: The user that the server runs as; None for this process' own.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.account: Account | None = None
        self._made: str | None = None

    # -- who may enter it --------------------------------------------------------------------------------

    def enter(self) -> None:
        """Make the directory and find whom its server runs as.

        Raises:
            RefusedError: It is another user's.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.mkdir(mode=0o700, exist_ok=True)
        status = self.path.stat()
        if os.geteuid() not in (0, status.st_uid):
            why = f"the directory belongs to user {name_of(status.st_uid)}"
            raise self.refused(why, remedy="Give a directory of your own: embedded:DIR.")
        if os.geteuid() == 0:
            self.account = system_account() if status.st_uid == 0 else Account(status.st_uid, status.st_gid)

    def let_in(self, programs: Path) -> None:
        """Let the user that root's server runs as reach the directory and the programs."""
        if self.account is not None:
            let_pass(self.path, self.account)
            let_pass(programs / "postgres", self.account)
            let_read(programs)

    # -- the server that works in it ---------------------------------------------------------------------

    def pid_file(self) -> list[str]:
        """The lines of ``postmaster.pid``; none without one."""
        try:
            text = (self.path / "postmaster.pid").read_text(errors="surrogateescape")
        except FileNotFoundError:
            return []
        # A name may end in a space, and hold what Python takes for the end of a line.
        return text.split("\n")

    def postmaster(self) -> Postmaster | None:
        """The server of this directory, if it is ready and its socket is open."""
        import socket

        # Its lines: process, directory, time of the start, port, directory of the socket, address, memory, status.
        lines = self.pid_file()
        if len(lines) < 8 or lines[7].strip() != "ready":
            return None
        with contextlib.suppress(OSError):
            # The directory may be a copy of one whose server runs.
            if os.path.samefile(lines[1], self.path):
                with socket.socket(socket.AF_UNIX) as probe:
                    probe.settimeout(5)
                    probe.connect(os.path.join(lines[4], f".s.PGSQL.{lines[3].strip()}"))
                return Postmaster(int(lines[0]), int(lines[3]), lines[4])
        return None

    def is_server(self, pid: list[str]) -> bool:
        """Whether the process of this number is PostgreSQL's in this directory, which is where it works."""
        try:
            return bool(pid) and os.path.samefile(psutil.Process(int(pid[0])).cwd(), self.path)
        except psutil.AccessDenied:  # root in a container may not look at another user's process: it may be ours
            return True
        except (psutil.Error, OSError, ValueError):
            return False

    def remove_leftovers(self) -> None:
        """Remove the files of a server that has died: the number in its ``postmaster.pid`` may be another process' now
        (after a crash, in a new container), which PostgreSQL would take for the server."""
        lines = self.pid_file()
        if not lines or self.is_server(lines[:1]):
            return
        if len(lines) >= 5 and lines[4] != self._made:
            self.remove_socket_dir(lines[4])
        for name in ("postmaster.pid", SOCKET_NAME, f"{SOCKET_NAME}.lock"):
            (self.path / name).unlink(missing_ok=True)

    # -- its socket --------------------------------------------------------------------------------------

    def socket_dir(self) -> str:
        """The data directory, or where its path does not fit into an address a new one that is as private."""
        if _fits(self.path):
            return str(self.path)
        if self._made is not None and os.path.isdir(self._made):
            return self._made
        for parent in dict.fromkeys((tempfile.gettempdir(), "/tmp")):  # noqa: S108
            made = Path(tempfile.mkdtemp(prefix="kdb-fast-pg-", dir=parent))
            if _fits(made):
                if self.account is not None:
                    os.chown(made, *self.account)
                    let_pass(made, self.account)
                self._made = str(made)
                return self._made
            made.rmdir()
        raise self.refused("the paths of the directory and of the temporary directory are too long for a socket")

    def remove_socket_dir(self, path: str) -> None:
        """Remove a directory that :meth:`socket_dir` made, and nothing else."""
        owner = os.geteuid() if self.account is None else self.account.uid
        with contextlib.suppress(OSError):
            status = os.lstat(path)
            made_here = os.path.basename(path).startswith("kdb-fast-pg-") and stat.S_ISDIR(status.st_mode)
            if made_here and status.st_uid == owner:
                shutil.rmtree(path, ignore_errors=True)

    # -- what goes wrong ---------------------------------------------------------------------------------

    def refused(self, why: str, *, remedy: str = "") -> RefusedError:
        """The error that says why the server did not start, with the last error of its log."""
        said = ""
        with contextlib.suppress(OSError):
            log = (self.path / "log").read_text(errors="replace").splitlines()
            lines = [line for line in log if "FATAL" in line or "ERROR" in line]
            said = f" Its log says: {lines[-1]}" if lines else ""
        shown = str(self.path).encode(errors="backslashreplace").decode()
        return RefusedError(
            f"The embedded PostgreSQL in {shown} did not start: {why.rstrip('.')}.{said}",
            remedy=remedy or "Is the directory writable and the disk not full? Another directory: embedded:DIR.",
        )


def _fits(directory: Path) -> bool:
    path = str(directory / SOCKET_NAME)
    return len(os.fsencode(path)) <= SOCKET_PATH_BYTES and PLAIN_PATH.fullmatch(path) is not None
