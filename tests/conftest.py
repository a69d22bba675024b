"""Fixtures of all tests. The model is fetched once for each machine and kept: ``~/.cache/kdb-fast-tests``."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kdb_fast.db.address import DatabaseAddress

if TYPE_CHECKING:
    from commands import Commands, MakeJob
    from servers import Oracle, Server
    from table_commands import Table

    from kdb_fast.embedding.encoder import Encoder
    from kdb_fast.embedding.models.lookup import Model


sys.path.append(str(Path(__file__).parent / "faults"))  # commands with a stub for the model, for all tests


@pytest.fixture(scope="session", autouse=True)
def kdb_fast_home() -> Iterator[Path]:
    """``KDB_FAST_HOME`` of the environment, else the tests' own, so that no test sees the user's data."""
    home = Path(os.environ.get("KDB_FAST_HOME") or Path.home() / ".cache" / "kdb-fast-tests")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDB_FAST_HOME", str(home))
        yield home


@pytest.fixture(scope="session")
def minilm(kdb_fast_home: Path) -> Model:
    """all-MiniLM-L6-v2 as this version builds it, fetched on first use."""
    from kdb_fast.embedding.models.lookup import pull
    from kdb_fast.settings import DEFAULT_MODEL

    return pull(DEFAULT_MODEL)


@pytest.fixture(scope="session")
def encoder(minilm: Model) -> Encoder:
    """all-MiniLM-L6-v2 in this process, loaded once."""
    from kdb_fast.embedding.encoder import Encoder, EncoderSpec

    return Encoder(EncoderSpec(minilm, 100))


@pytest.fixture
def loaded_once(monkeypatch: pytest.MonkeyPatch, minilm: Model, encoder: Encoder) -> None:
    """Runs in this process share one loaded model; one that is named by its directory is looked up as ever."""
    from kdb_fast.embedding.models.lookup import resolve
    from kdb_fast.engine import inline
    from kdb_fast.indexing import run_embedding

    def found(name: str, path: Path | None, report: Any) -> Model:
        return resolve(name, path, report=report) if path else minilm

    monkeypatch.setattr(run_embedding, "resolve", found)
    monkeypatch.setattr(inline, "Encoder", lambda spec: encoder)


@pytest.fixture
def new_threads() -> Callable[[str], list[threading.Thread]]:
    """The living threads of a name, or of one that begins with it, that the test began itself.

    A thread of an earlier test may be about to end only now: it had been told to, and nobody waited for it.
    """
    before = set(threading.enumerate())
    return lambda name: [
        thread for thread in threading.enumerate() if thread not in before and thread.name.startswith(name)
    ]


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


@pytest.fixture
def sqlite_database(tmp_path: Path) -> DatabaseAddress:
    """A SQLite database that is made when it is first written to."""
    return DatabaseAddress("sqlite", str(tmp_path / "index.db"), f"sqlite:///{tmp_path / 'index.db'}")


@pytest.fixture(params=["postgresql", "sqlite"])
def index(request: pytest.FixtureRequest) -> DatabaseAddress:
    """An empty database of each kind."""
    name = "database" if request.param == "postgresql" else "sqlite_database"
    address: DatabaseAddress = request.getfixturevalue(name)
    return address


@pytest.fixture
def address(index: DatabaseAddress) -> DatabaseAddress:
    """The same."""
    return index


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    """Commands with a stub for the model; none of their processes outlives the module."""
    from commands import Commands

    found = Commands(tmp_path_factory.mktemp("commands"))
    yield found
    found.close()


@pytest.fixture
def empty_table(commands: Commands, index: DatabaseAddress) -> Iterator[Table]:
    """A table for articles, and commands on it."""
    from table_commands import Table

    yield Table(commands, index)
    commands.clear()


@pytest.fixture
def table(empty_table: Table) -> Table:
    """The same with two articles."""
    empty_table.add(1, "one", "two")
    return empty_table


@pytest.fixture
def make_job(commands: Commands, tmp_path: Path) -> Iterator[MakeJob]:
    """Makes a job of texts in a file; its processes end with the test. For tests/faults."""
    from commands import FileJob

    yield lambda database, texts: FileJob(commands, database, tmp_path, texts)
    commands.clear()


@pytest.fixture(scope="session")
def oracle(minilm: Model) -> Oracle:
    """What each text's vector must be."""
    from servers import Oracle

    return Oracle(minilm.name, minilm.path)
