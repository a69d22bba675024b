"""Fixtures of the fault tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import Commands, FileJob, MakeJob

from kdb_fast.database import DatabaseAddress


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    """Commands with a stub for the model; none of their processes outlives the module."""
    found = Commands(tmp_path_factory.mktemp("commands"))
    yield found
    found.close()


@pytest.fixture
def sqlite_database(tmp_path: Path) -> DatabaseAddress:
    return DatabaseAddress("sqlite", str(tmp_path / "index.db"), f"sqlite:///{tmp_path / 'index.db'}")


@pytest.fixture(params=["postgresql", "sqlite"])
def index(request: pytest.FixtureRequest) -> DatabaseAddress:
    """An empty database of each kind."""
    name = "database" if request.param == "postgresql" else "sqlite_database"
    address: DatabaseAddress = request.getfixturevalue(name)
    return address


@pytest.fixture
def make_job(commands: Commands, tmp_path: Path) -> Iterator[MakeJob]:
    yield lambda database, texts: FileJob(commands, database, tmp_path, texts)
    commands.clear()
