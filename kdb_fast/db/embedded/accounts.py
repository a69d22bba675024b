"""Who the embedded server runs as, and that this user reaches what it needs."""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
from pathlib import Path
from typing import NamedTuple

from ...errors import RefusedError

SYSTEM_USER = "pgserver"
"""Created where root has none; the package's own name for it, so that older directories go on working."""


class Account(NamedTuple):
    """The user that a server runs as."""

    uid: int
    gid: int


def name_of(uid: int) -> str:
    """The name of a user; his number where he has none."""
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def system_account() -> Account:
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
        remedy="Run kdb-fast as an ordinary user, or use postgresql://… or sqlite:///file.db.",
    )


def let_pass(path: Path, account: Account) -> None:
    """Let a user through the directories above ``path``: execute, not read, and only where that is missing."""
    for parent in path.resolve().parents:
        status = parent.stat()
        if status.st_uid != account.uid and not status.st_mode & stat.S_IXOTH:
            parent.chmod(stat.S_IMODE(status.st_mode) | stat.S_IXOTH)


def let_read(programs: Path) -> None:
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
