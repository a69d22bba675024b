"""Fixtures of all tests. The model is fetched once for each machine and kept: ``~/.cache/kdb-fast-tests``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from servers import Oracle, Server

    from kdb_fast.database import DatabaseAddress
    from kdb_fast.encoder import Encoder
    from kdb_fast.models import Model


@pytest.fixture(scope="session", autouse=True)
def kdb_fast_home() -> Iterator[Path]:
    """``KDB_FAST_HOME`` of the environment, else the tests' own, so that no test sees the user's data."""
    home = Path(os.environ.get("KDB_FAST_HOME") or Path.home() / ".cache" / "kdb-fast-tests")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDB_FAST_HOME", str(home))
        yield home


@pytest.fixture(scope="session")
def minilm(kdb_fast_home: Path) -> Model:
    """all-MiniLM-L6-v2, fetched on first use."""
    from kdb_fast.models import resolve
    from kdb_fast.settings import DEFAULT_MODEL

    return resolve(DEFAULT_MODEL)


@pytest.fixture(scope="session")
def encoder(minilm: Model) -> Encoder:
    """all-MiniLM-L6-v2 in this process, loaded once."""
    from kdb_fast.encoder import Encoder, EncoderSpec

    return Encoder(EncoderSpec(minilm, 100))


@pytest.fixture
def loaded_once(monkeypatch: pytest.MonkeyPatch, minilm: Model, encoder: Encoder) -> None:
    """Runs in this process share one loaded model; one that is named by its directory is looked up as ever."""
    from kdb_fast import engine, reindex
    from kdb_fast.models import resolve

    def found(name: str, path: Path | None, report: Any) -> Model:
        return resolve(name, path, report=report) if path else minilm

    monkeypatch.setattr(reindex, "resolve", found)
    monkeypatch.setattr(engine, "Encoder", lambda spec: encoder)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Server]:
    """One PostgreSQL server with pgvector for all tests of a session."""
    from servers import Server

    server = Server()
    yield server
    server.stop()


@pytest.fixture
def database(postgres: Server) -> Iterator[DatabaseAddress]:
    """A new empty PostgreSQL database, in which the extension ``vector`` has not been created."""
    address = postgres.create_database()
    yield address
    postgres.drop_database(address)


@pytest.fixture(scope="session")
def oracle(minilm: Model) -> Oracle:
    """What each text's vector must be."""
    from servers import Oracle

    return Oracle(minilm.name, minilm.path)
