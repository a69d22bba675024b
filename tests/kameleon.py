"""A database in which the real KameleonDB keeps records, and kdb-fast's command line on it, in this process."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import pytest
from servers import Server, execute

from kdb_fast.cli import run
from kdb_fast.db.address import DatabaseAddress, parse_address


class Answer(NamedTuple):
    """What a command gave: exit code, standard output and standard error."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one object on standard output."""
        found: dict[str, Any] = json.loads(self.out)
        return found


class Kameleon:
    """One database, KameleonDB's client on it, plain SQL and kdb-fast's commands."""

    def __init__(self, address: DatabaseAddress, url: str, capture: pytest.CaptureFixture[str], folder: Path) -> None:
        from kameleondb import KameleonDB

        self.address, self.url = address, url
        self.client: Any = KameleonDB(url)  # of which kdb_fast.kameleondb.install() changes the methods
        self._capture = capture
        self._folder = folder

    @property
    def is_postgresql(self) -> bool:
        return self.address.dialect == "postgresql"

    def execute(self, statement: str, *parameters: Any) -> list[tuple[Any, ...]]:
        """Rows of a statement with %s for its parameters."""
        return execute(self.address, statement, *parameters)

    def kdb_fast(self, *arguments: str, stdin: bytes | None = None) -> Answer:
        """Run a command on this database."""
        return self._run([*arguments, "--db", self.url.replace("+psycopg", "")], stdin)

    def kameleondb(self, *arguments: str, stdin: bytes | None = None) -> Answer:
        """Run a command of KameleonDB's own on this database, as ``kdb-fast kameleondb``."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("KAMELEONDB_URL", self.url)
            return self._run(["kameleondb", *arguments], stdin)

    def _run(self, arguments: list[str], stdin: bytes | None) -> Answer:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin or b"")))
            self._capture.readouterr()
            code = run(arguments)
        return Answer(code, *self._capture.readouterr())

    def insert(self, entity: str, records: Iterable[Any] | bytes, *options: str) -> Answer:
        """``insert`` from a file, a line for each record; bytes are the file as it is."""
        path = self._folder / "records.jsonl"
        lines = records if isinstance(records, bytes) else b"".join(json.dumps(r).encode() + b"\n" for r in records)
        path.write_bytes(lines)
        return self.kdb_fast("insert", entity, str(path), "--json", "--no-progress", *options)

    def reindex(self, *entities: str) -> dict[str, Any]:
        """The receipt of a reindex that ends well or with rejects."""
        answer = self.kdb_fast("reindex", *entities, "--json", "--no-progress", "--max-rejects", "100")
        assert answer.code in (0, 3), answer
        return answer.json

    def index(self) -> dict[str, str]:
        """Content by record id, of rows that have a vector."""
        return dict(self.execute("SELECT record_id, content FROM kdb_search WHERE embedding IS NOT NULL"))

    def shared(self, entity: str) -> dict[str, Any]:
        """Stored data by record id, of live records in the shared table; JSON text on SQLite."""
        return dict(
            self.execute(
                "SELECT r.id, r.data FROM kdb_records r JOIN kdb_entity_definitions e ON e.id = r.entity_id "
                "WHERE e.name = %s AND NOT r.is_deleted AND r.created_by IS NULL",
                entity,
            )
        )

    def columns(self, table: str, columns: Iterable[str]) -> list[tuple[Any, ...]]:
        """Values of these columns of a dedicated table, in a fixed order."""
        names = ", ".join(f'"{column}"' for column in columns)
        return sorted(self.execute(f'SELECT {names} FROM "{table}"'), key=repr)


def open_kameleon(
    kind: str, request: pytest.FixtureRequest, capture: pytest.CaptureFixture[str], folder: Path
) -> Kameleon:
    """A new database of this dialect with KameleonDB's tables."""
    if kind == "sqlite":
        url = f"sqlite:///{folder / 'test.db'}"
        return Kameleon(parse_address(url), url, capture, folder)
    server: Server = request.getfixturevalue("postgres")
    address = server.create_database()
    from psycopg.conninfo import conninfo_to_dict

    parts: Mapping[str, Any] = conninfo_to_dict(address.conninfo)
    where = f"{parts['dbname']}?host={quote(str(parts['host']), safe='')}&port={parts['port']}"
    return Kameleon(address, f"postgresql+psycopg://postgres@/{where}", capture, folder)


def close_kameleon(kameleon: Kameleon, request: pytest.FixtureRequest) -> None:
    """Close the client and drop a database of the server."""
    kameleon.client.close()
    if kameleon.is_postgresql:
        request.getfixturevalue("postgres").drop_database(kameleon.address)
