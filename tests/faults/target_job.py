"""A target of an application's table in which everything happens that can, for tests that make its runs fail."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import poison_worker
import target_oracle
from commands import Command, Commands
from servers import Server, execute

from kdb_fast.cli.demo import sqlalchemy_url
from kdb_fast.db.address import DatabaseAddress

KINDS = ("column", "table")

COLUMNS = {
    "postgresql": "id bigint PRIMARY KEY, body text, theirs boolean NOT NULL DEFAULT false, embedding vector(384)",
    "sqlite": "id INTEGER PRIMARY KEY, body TEXT, theirs INTEGER NOT NULL DEFAULT 0, embedding BLOB",
}

PLACE = {"column": ("--vector", "embedding"), "table": ("--into", "articles_vectors")}
HOLDER = {"column": "articles", "table": "articles_vectors"}
"""The table that has the column of the vectors."""

INDEXES = (
    "SELECT pg_get_indexdef(indexrelid), indisvalid AND indisready FROM pg_index "
    "WHERE indrelid = %s::regclass ORDER BY 1"
)


class TargetJob:
    """The target ``articles``, kept and once brought up to date; since then rows were edited, emptied, deleted and
    added, one that had no text has one, and one was given a vector by the application.

    Attributes:
        to_write: Rows that a run writes.
    """

    def __init__(self, template: DatabaseAddress, commands: Commands, kind: str) -> None:
        self.template, self.commands, self.kind = template, commands, kind
        if template.dialect == "postgresql":
            execute(template, "CREATE EXTENSION vector")
        execute(template, f"CREATE TABLE articles ({COLUMNS[template.dialect]})")
        self.add(template, 0, *(f"{number} words to begin with" for number in range(12)), None)
        described = ("--table", "articles", "--text", "body", *PLACE[kind], "--index", "defer", "--name", "articles")
        first = self.start(template, *described)
        assert first.wait() == 0, first.err
        if template.dialect == "postgresql":
            execute(template, f"CREATE INDEX near ON {HOLDER[kind]} USING hnsw (embedding vector_cosine_ops)")
            self.indexes = execute(template, INDEXES, HOLDER[kind])
        execute(template, "DELETE FROM articles WHERE id < 2")
        execute(template, "UPDATE articles SET body = body || ' and to go on' WHERE id IN (2, 3, 4)")
        execute(template, "UPDATE articles SET body = NULL WHERE id = 5")
        execute(template, "UPDATE articles SET body = 'a text at last' WHERE id = 12")
        if kind == "column":
            vector: Any = target_oracle.FOREIGN.tobytes()
            if template.dialect == "postgresql":
                vector = str(target_oracle.FOREIGN.tolist())
            execute(template, "UPDATE articles SET embedding = %s, theirs = true WHERE id = 6", vector)
        new = [f"{poison_worker.MORTAL} number {i}" if i == 9 else f"new {i}" for i in range(24)]
        self.add(template, 100, *new, None, "the same in all", "the same in all")
        self.to_write = 4 + len(new) + 2

    @staticmethod
    def add(database: DatabaseAddress, first: int, *texts: str | None) -> None:
        """Rows with these ids from ``first`` on."""
        for number, text in enumerate(texts, first):
            execute(database, "INSERT INTO articles (id, body) VALUES (%s, %s)", number, text)

    def start(self, database: DatabaseAddress, *options: str, **environment: str) -> Command:
        """The command; without a description it is the short one that names what is kept."""
        return self.commands.start(
            "reindex", *(() if "--table" in options else ("articles",)), *options, "--json", "--no-progress",
            "--db", sqlalchemy_url(database), **environment,
        )  # fmt: skip

    def run(self, database: DatabaseAddress) -> dict[str, Any]:
        """A run that must end well; its receipt."""
        command = self.start(database)
        assert command.wait() == 0, command.err
        return command.receipt

    def check(self, database: DatabaseAddress, receipt: dict[str, Any]) -> None:
        """The oracle, with another run of the same; the indexes are what they were."""
        target_oracle.check(
            database, "articles", self.kind, receipt, vector=poison_worker.vector_of, rerun=lambda: self.run(database)
        )
        assert execute(database, "SELECT key FROM kdb_fast_state WHERE key LIKE 'dropped%%'") == []
        if database.dialect == "postgresql":
            assert execute(database, INDEXES, HOLDER[self.kind]) == self.indexes


class Jobs:
    """The jobs of both kinds on both databases, each made once, and copies of them."""

    def __init__(self, postgres: Server, commands: Commands, folder: Path) -> None:
        self._postgres, self._commands, self._folder = postgres, commands, folder
        self._jobs: dict[tuple[str, str], TargetJob] = {}
        self._copies: list[DatabaseAddress] = []

    def of(self, dialect: str, kind: str) -> TargetJob:
        if (dialect, kind) not in self._jobs:
            template = self._postgres.create_database() if dialect == "postgresql" else self._file(f"{kind}.db")
            self._jobs[dialect, kind] = TargetJob(template, self._commands, kind)
            if dialect == "sqlite":
                execute(template, "PRAGMA wal_checkpoint(TRUNCATE)")
        return self._jobs[dialect, kind]

    def copy(self, job: TargetJob) -> DatabaseAddress:
        """A database as the job's, in place of an earlier one."""
        self.drop_copies()
        if job.template.dialect == "postgresql":
            self._copies.append(self._postgres.create_database(job.template))
            return self._copies[-1]
        for file in self._folder.glob("job.db*"):
            file.unlink()
        shutil.copy(job.template.conninfo, self._folder / "job.db")
        return self._file("job.db")

    def drop_copies(self) -> None:
        self._commands.clear()
        while self._copies:
            self._postgres.drop_database(self._copies.pop())

    def close(self) -> None:
        """Drop all of them."""
        self.drop_copies()
        for job in self._jobs.values():
            if job.template.dialect == "postgresql":
                self._postgres.drop_database(job.template)

    def _file(self, name: str) -> DatabaseAddress:
        path = self._folder / name
        return DatabaseAddress("sqlite", str(path), f"sqlite:///{path}")
