"""kdb-fast's command line as a process under limits: closed streams, resource limits, a small disk of its own.

A script of the shell sets the limit and runs the command as ``"$@"``; what it prints between two runs is kept apart.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from kameleon import Answer

STUBBED = "import stub_command; stub_command.use_stubs(); from kdb_fast.cli import main; main()"
"""The command with a stub for the model; all else is real, and not warmed up by anything."""

TESTS = Path(__file__).parents[1]


class Result(Answer):
    """What a command gave: exit code, standard output and standard error."""

    @property
    def complaint(self) -> str:
        """The one line that says what is wrong; there is no traceback."""
        assert "Traceback" not in self.err + self.out
        assert 'File "' not in self.err
        (line,) = [line for line in self.err.splitlines() if line.startswith("kdb-fast: ")]
        return line


def run(
    *arguments: str | Path,
    script: str = '"$@"',
    stub: bool = True,
    private_mounts: bool = False,
    stdin: Any = subprocess.DEVNULL,
    unset: tuple[str, ...] = (),
    **environment: str | Path,
) -> Result:
    """Run a command to its end.

    Args:
        arguments: Of ``kdb-fast``.
        script: Shell script that runs it; ``$1`` and all that follow are the command.
        stub: Whether to put a stub in the model's place.
        private_mounts: File systems that the script mounts are seen by nobody else, and are gone with it.
        unset: Variables of the environment to leave out, beside those that name databases.
        environment: Variables to set.
    """
    words = ["-c", STUBBED] if stub else ["-m", "kdb_fast"]
    command = ["sh", "-c", script, "sh", sys.executable, *words, *map(str, arguments)]
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PG", "KDB_FAST_DB")) and k not in unset}
    path = os.pathsep.join([str(TESTS), str(TESTS / "faults"), clean.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    done = subprocess.run(
        [*(_namespace() if private_mounts else ()), *command],
        stdin=stdin,
        capture_output=True,
        timeout=100,
        env={**clean, "PYTHONPATH": path, **{name: str(value) for name, value in environment.items()}},
        check=False,
    )
    return Result(done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace"))


def needs_private_mounts() -> None:
    """Skip the test where this user cannot mount a file system of its own."""
    if not _namespace():
        pytest.skip("needs mount namespaces: root, or a kernel that lets users have them (unshare --mount)")


@functools.cache
def _namespace() -> tuple[str, ...]:
    """The command that gives a script mounts of its own; () where there is none."""
    unshare = shutil.which("unshare")
    if unshare is None:
        return ()
    for options in (("--mount",), ("--map-root-user", "--mount")):
        probe = [unshare, *options, "sh", "-c", "mount -t tmpfs tmpfs /mnt"]
        if subprocess.run(probe, capture_output=True, check=False).returncode == 0:
            return (unshare, *options)
    return ()
