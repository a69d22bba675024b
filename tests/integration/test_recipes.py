"""Another model for the index of another package: the package makes it, kdb-fast embeds it anew, the package finds.

The packages pin other versions of what kdb-fast itself is tested with, so they live in an environment of their own,
which ``tools/elsewhere.py recipes`` makes; ``KDB_FAST_RECIPES`` names its Python.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from search_engines import sqlalchemy_url
from servers import Oracle, execute

from kdb_fast.db.address import DatabaseAddress
from kdb_fast.tables.other_packages import made_by

PYTHON = os.environ.get("KDB_FAST_RECIPES", "")
pytestmark = pytest.mark.skipif(not PYTHON, reason="tools/elsewhere.py recipes runs it, where the packages are")

JOBS = Path(__file__).resolve().parent.parent / "recipes"
TEXTS = [
    "A rain jacket for cyclists, with reflecting stripes.",
    "Copper kettle with a wooden handle, two litres.",
    "Tent for two people, pitched in five minutes.",
    "Espresso machine with a grinder of steel.",
    "Sea kayak with a rudder and two hatches.",
    "A lamp that is charged by the sun.",
]
QUERY = "something to boil water for tea in"
ANSWER = TEXTS[1]


def package(script: str, **job: Any) -> list[str]:
    """Have the package do something."""
    done = subprocess.run(
        [PYTHON, "-W", "ignore", str(JOBS / f"{script}_job.py")],
        input=json.dumps({"count": 3, **job}), capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result: list[str] = json.loads(done.stdout.splitlines()[-1])
    return result


def kdb_fast(*arguments: str, python: str = sys.executable, **environment: str) -> dict[str, Any]:
    """Run the command with ``--json``."""
    done = subprocess.run(
        [python, "-m", "kdb_fast", *arguments, "--json"],
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    receipt: dict[str, Any] = json.loads(done.stdout)
    return receipt


def old_vectors(dimensions: int) -> dict[str, list[float]]:
    """Of a model by which every text is as near as any other."""
    random = np.random.default_rng(1)
    return {text: random.standard_normal(dimensions).tolist() for text in (*TEXTS, QUERY)}


@pytest.fixture
def vectors(oracle: Oracle) -> dict[str, list[float]]:
    """Of all-MiniLM-L6-v2."""
    return {text: oracle.vector(text).tolist() for text in (*TEXTS, QUERY)}


def url_of(address: DatabaseAddress, driver: str = "") -> str:
    """The address as a URL; with a driver one for SQLAlchemy."""
    return sqlalchemy_url(address).replace("+psycopg", f"+{driver}" if driver else "")


def package_of(address: DatabaseAddress, table: str) -> str:
    """The package that kdb-fast takes a table for."""
    columns = execute(address, "SELECT column_name::text FROM information_schema.columns WHERE table_name = %s", table)
    return made_by({name for (name,) in columns})


def test_langchain(database: DatabaseAddress, vectors: dict[str, list[float]]) -> None:
    """Its column takes vectors of any length, so the new model's may be longer."""
    url = url_of(database, "psycopg")
    package("langchain", do="make", url=url, texts=TEXTS, vectors=old_vectors(8))
    command = ["reindex", "--db", url_of(database), "--table", "langchain_pg_embedding", "--text", "document"]
    command += ["--vector", "embedding"]
    assert package_of(database, "langchain_pg_embedding") == "LangChain"
    assert kdb_fast(*command)["foreign"] == len(TEXTS)
    assert kdb_fast(*command, "--replace")["stored"] == len(TEXTS)
    found = package("langchain", do="find", url=url, query=QUERY, vectors=vectors)
    assert found[0] == ANSWER
    assert len(found) == 3
    again = kdb_fast("reindex", "langchain_pg_embedding", "--db", url_of(database))
    assert (again["stored"], again["unchanged"], again["foreign"]) == (0, len(TEXTS), 0)


def test_llama_index(database: DatabaseAddress, vectors: dict[str, list[float]]) -> None:
    """Its column has a length, and its index is kept."""
    url = url_of(database, "psycopg2")
    package("llama_index", do="make", url=url, texts=TEXTS, vectors=old_vectors(384))
    assert package_of(database, "data_notes") == "LlamaIndex"
    definitions = "SELECT indexdef FROM pg_indexes WHERE tablename = 'data_notes' ORDER BY 1"
    before = execute(database, definitions)
    assert any("hnsw" in definition for (definition,) in before)
    receipt = kdb_fast(
        "reindex", "--db", url_of(database), "--table", "data_notes", "--text", "text", "--vector", "embedding",
        "--replace",
    )  # fmt: skip
    assert receipt["stored"] == len(TEXTS)
    assert execute(database, definitions) == before
    assert package("llama_index", do="find", url=url, query=QUERY, vectors=vectors)[0] == ANSWER


@pytest.mark.parametrize("kind", ["blob", "vec0"])
def test_sqlite_vec(tmp_path: Path, vectors: dict[str, list[float]], kind: str) -> None:
    file = tmp_path / "notes.db"
    package("sqlite_vec", do="make", file=str(file), texts=TEXTS, vectors=old_vectors(8))
    database = ["--db", f"sqlite:///{file}"]
    how = loading_extensions() if kind == "vec0" else {}
    described = ["--table", "notes", "--text", "body", "--into", "note_vectors", *(["--vec0"] if how else [])]
    assert kdb_fast("reindex", *described, *database, **how)["stored"] == len(TEXTS)
    assert package("sqlite_vec", do="find", kind=kind, file=str(file), query=QUERY, vectors=vectors)[0] == ANSWER
    assert kdb_fast("reindex", "note_vectors", *database, **how)["unchanged"] == len(TEXTS)
    assert kdb_fast("targets", "show", "note_vectors", *database, **how)["rows"] == len(TEXTS)
    assert "note_vectors" in kdb_fast("targets", "drop", "note_vectors", "--with-vectors", *database, **how)["removed"]


def loading_extensions() -> dict[str, str]:
    """The Python of the packages with kdb-fast and what it needs: the tests' own may be built without extensions."""
    version = "import sys; print(*sys.version_info[:2])"
    theirs = subprocess.run([PYTHON, "-c", version], capture_output=True, text=True, timeout=20, check=True).stdout
    if theirs.split() != [str(part) for part in sys.version_info[:2]]:
        pytest.skip(f"the Python that loads extensions is {theirs.strip()}, that of the tests another one")
    return {"python": PYTHON, "PYTHONPATH": f"{JOBS.parent.parent}:{sysconfig.get_path('purelib')}"}
