"""A table of an application, and commands of kdb-fast on it as processes of their own, with a stub for the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import poison_worker
import pytest
from commands import Command, Commands
from servers import cosine, execute

from kdb_fast.cli.demo import sqlalchemy_url
from kdb_fast.db.address import DatabaseAddress
from kdb_fast.embedding.models.lookup import Model
from kdb_fast.engine import inline
from kdb_fast.indexing import run_embedding

DIMENSIONS = 384

COLUMNS = {
    "postgresql": f"id bigint PRIMARY KEY, title text, body text, lang text, embedding vector({DIMENSIONS})",
    "sqlite": "id INTEGER PRIMARY KEY, title TEXT, body TEXT, lang TEXT, embedding BLOB",
}

DESCRIBED = ("--table", "articles", "--text", "title", "--text", "body", "--vector", "embedding")

INTO = ("--table", "articles", "--text", "body", "--into", "vectors")

MODEL = Model("stub", Path(), "stub.onnx", DIMENSIONS, 512, "mean", True, ())


def stub_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stub for the model, in the runs of this process."""
    monkeypatch.setattr(run_embedding, "resolve", lambda *args, **options: MODEL)
    monkeypatch.setattr(inline, "Encoder", poison_worker.StubEncoder)


class Table:
    """The table ``articles`` of an application, and commands on it."""

    def __init__(self, commands: Commands, address: DatabaseAddress) -> None:
        self.commands, self.address = commands, address
        if address.dialect == "postgresql":
            execute(address, "CREATE EXTENSION vector")
        execute(address, f"CREATE TABLE articles ({COLUMNS[address.dialect]})")

    @property
    def is_postgresql(self) -> bool:
        return self.address.dialect == "postgresql"

    def add(self, first: int, *texts: str, title: str = "Title") -> None:
        for number, text in enumerate(texts, first):
            execute(self.address, "INSERT INTO articles (id, title, body) VALUES (%s, %s, %s)", number, title, text)

    def start(self, *arguments: str, db: DatabaseAddress | None = None, **environment: str) -> Command:
        return self.commands.start(*arguments, "--db", sqlalchemy_url(db or self.address), **environment)

    def run(self, *arguments: str, code: int = 0, db: DatabaseAddress | None = None) -> str:
        """A command that ends with this exit code; what it has printed to standard output, or of an error the line."""
        command = self.start(*arguments, db=db)
        assert command.wait() == code, command.err
        lines = [line for line in command.err.splitlines() if line.startswith("kdb-fast: ")]
        assert len(lines) == (code not in (0, 3)), command.err
        return lines[0] if lines else command.out

    def json(self, *arguments: str, code: int = 0) -> dict[str, Any]:
        """The object that it prints."""
        command = self.start(*arguments, "--json")
        assert command.wait() == code, command.err
        found: dict[str, Any] = json.loads(command.out)
        return found

    def vectors(self, column: str = "embedding") -> dict[int, Any]:
        """Vector of each row that has one, by id."""
        value = f"{column}::text" if self.address.dialect == "postgresql" else column
        rows = execute(self.address, f"SELECT id, {value} FROM articles WHERE {column} IS NOT NULL")
        return {n: np.frombuffer(v, "<f4") if isinstance(v, bytes) else np.array(json.loads(v)) for n, v in rows}

    def check(self, *numbers: int) -> None:
        """Exactly these rows have vectors, each that of its title and body."""
        found = self.vectors()
        assert sorted(found) == sorted(numbers)
        for number, title, body in execute(self.address, "SELECT id, title, body FROM articles"):
            if number in found:
                assert (
                    cosine(found[number], poison_worker.vector_of("\n\n".join(filter(None, (title, body))))) > 0.99999
                ), number
