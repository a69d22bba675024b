"""What tests of a store share: rows, slots and flushes for any store, and a harness for each kind of store.

A harness is a store on a database of its own, with what another program does there and what the tables hold then.
A new kind of store gets a harness in ``KINDS``; ``integration/test_store_contract.py`` then runs on it too.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import sqlite3
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pytest
from search_engines import sqlalchemy_url
from servers import IndexRow, connect_as, execute, index_rows

from kdb_fast.db.address import DatabaseAddress
from kdb_fast.ipc.row_block import NO_VALUE
from kdb_fast.ipc.slab import Row, Slab, SlabShape
from kdb_fast.records import Record, Reject, content_hash
from kdb_fast.stores import open_store
from kdb_fast.stores.base import FlushResult, FlushSlot, RunSpec, Store, Stored

DIMENSIONS = 8
FINGERPRINT = "0123456789abcdef"
MODEL = "test/model"
ENTITY = "Note"
SECRET = "xyzzy"
"""A word of refused texts that must not turn up in any message or reject."""

LIBRARY = RunSpec(0, "f9", "m9", DIMENSIONS)
"""As the library writes: within no run."""

# -- for any store -----------------------------------------------------------------------------------------


def begin(store: Store, wait: float = 0.0, fingerprint: str = FINGERPRINT, model: str = MODEL) -> RunSpec:
    return store.begin_run(fingerprint=fingerprint, model=model, dimensions=DIMENSIONS, wait=wait)


def end(store: Store, run: RunSpec, **receipt: Any) -> None:
    store.end_run(run.number, "done", receipt)


def vector_of(text: str) -> Any:
    """A random vector, the same for the same text."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])
    return np.random.default_rng(seed).standard_normal(DIMENSIONS).astype(np.float32)


_leases = itertools.count(1)


def slot_of(rows: Sequence[Row], skip: Sequence[int] = (), number: int = 0) -> FlushSlot:
    """A slot as a worker leaves it."""
    slot = Slab.local(SlabShape(number + 1, max(1, len(rows)), DIMENSIONS)).slots[number]
    slot.put(next(_leases), rows, [NO_VALUE] * len(rows))
    for i, row in enumerate(rows):
        slot.vectors[i] = vector_of(row.record.content)
    return FlushSlot(slot, frozenset(skip))


def fresh(*pairs: tuple[str, str], entity: str = ENTITY) -> list[Row]:
    """Rows of keys and texts, as if the index had none of these keys."""
    return [Row(Record(entity, key, text)) for key, text in pairs]


def looked_up(store: Store, *pairs: tuple[str, str], entity: str = ENTITY) -> list[Row]:
    """Rows as the parent makes them: with the version of what is stored now."""
    stored = lookup(store, *(key for key, _ in pairs), entity=entity)
    return [
        Row(Record(entity, key, text), True, stored[key].row_version)
        if key in stored
        else Row(Record(entity, key, text))
        for key, text in pairs
    ]


def lookup(store: Store, *keys: str, entity: str = ENTITY) -> dict[str, Stored]:
    return store.lookup(entity, keys)


_numbers = itertools.count(1)


def flush(
    store: Store,
    run: RunSpec,
    *slots: FlushSlot,
    number: int | None = None,
    rejects: Sequence[Reject] = (),
    deletes: Sequence[str | tuple[str, str]] = (),
) -> FlushResult:
    """Flush slots under a new number; ``deletes`` are record ids, or keys of other entities."""
    keys = [key if isinstance(key, tuple) else (ENTITY, key) for key in deletes]
    return store.flush(run, next(_numbers) if number is None else number, slots, rejects, keys)


def write(store: Store, run: RunSpec, texts: Mapping[str, str], entity: str = ENTITY, **options: Any) -> FlushResult:
    """Look up and flush texts by record id; ``options`` as for :func:`flush`."""
    return flush(store, run, slot_of(looked_up(store, *texts.items(), entity=entity)), **options)


def put(store: Store, texts: Mapping[str, str], deletes: Sequence[str] = (), *, vectors: bool = True) -> None:
    """Write texts as the library does; within a unit."""
    store.put(LIBRARY, [slot_of(fresh(*texts.items()))], [(ENTITY, key) for key in deletes], vectors=vectors)


def contents(address: DatabaseAddress) -> dict[str, str]:
    """Stored texts by record id."""
    return {key: row.content for (_, key), row in index_rows(address).items()}


def reject(key: str, position: int = 0, entity: str = ENTITY) -> Reject:
    return Reject(entity, key, "empty_text", "the text is empty", content_hash(""), position)


def rejected_keys(store: Store, entity: str | None = None) -> list[str]:
    return [row["record_id"] for row in store.rejects(entity)]


def numbered(count: int, word: str = "text") -> dict[str, str]:
    """Texts by record id: ``r000``, ``r001``, …"""
    return {f"r{i:03d}": f"{word} number{i}" for i in range(count)}


# -- a harness for each kind -------------------------------------------------------------------------------


class RunRow(NamedTuple):
    run: int
    state: str
    phase: str
    ended: bool
    heartbeat: str
    receipt: str | None

    def receipts(self) -> Any:
        return self.receipt and json.loads(self.receipt)


class Harness(ABC):
    """A store on an empty database, other sessions, and another program that writes there.

    Attributes:
        store: The first session; the test prepares it.
        refusals: Ways in which the database can refuse a row, with the reason and detail of the reject.
        unfit: Tables that must be refused: a script that makes one, and the words of the error.
        not_finite: Reason for a vector with NaN.
        refused_record: How the library is told of a refused record with the id r002.
        prune_rows: Name of the constant that says how many rows are looked at or removed at a time.
        vector_error: Largest difference of an element that is stored.
        later: SQL for the next time after ``updated_at``.
    """

    dialect: ClassVar[str]
    refusals: ClassVar[Mapping[str, tuple[str, str]]]
    unfit: ClassVar[Mapping[str, tuple[str, str]]]
    not_finite: ClassVar[str]
    refused_record: ClassVar[str]
    prune_rows: ClassVar[str]
    vector_error: ClassVar[float]
    later: ClassVar[str]

    def __init__(self, address: DatabaseAddress) -> None:
        self.address = address
        self.stack = ExitStack()
        self.store = self.open()

    def open(self) -> Store:
        """Another session, closed with the harness."""
        return self.stack.enter_context(contextlib.closing(open_store(self.address, "test")))

    def close(self) -> None:
        self.stack.close()

    def execute(self, statement: str, *parameters: Any) -> list[tuple[Any, ...]]:
        """Run a statement (%s for parameters) as another program."""
        return execute(self.address, statement, *parameters)

    # -- what is stored --------------------------------------------------------------------------------

    def rows(self) -> dict[str, IndexRow]:
        """Rows by record id; no test of this has one id in two entities."""
        return {key: row for (_, key), row in index_rows(self.address).items()}

    def contents(self) -> dict[str, str]:
        return contents(self.address)

    def ids(self) -> dict[str, tuple[str, str]]:
        """What a row keeps for good, by record id: its own id and when it was made."""
        found = self.execute("SELECT record_id, id, created_at FROM kdb_search")
        return {key: (row_id, str(created)) for key, row_id, created in found}

    def runs(self) -> list[RunRow]:
        found = self.execute(
            "SELECT run, state, phase, ended_at IS NOT NULL, heartbeat_at, receipt FROM kdb_fast_runs ORDER BY run"
        )
        return [RunRow(run, state, phase, bool(ended), str(at), text) for run, state, phase, ended, at, text in found]

    @abstractmethod
    def source_times(self) -> list[datetime | None]:
        """When each record was changed at its source, by record id."""

    @abstractmethod
    def matching(self, word: str) -> list[str]:
        """Sorted ids of records that full-text search finds."""

    @abstractmethod
    def versions(self) -> list[tuple[Any, ...]]:
        """Each row with what any write to it changes."""

    @abstractmethod
    def catalog(self) -> list[tuple[Any, ...]]:
        """Everything that the database knows of all tables; changes whenever one is altered."""

    @abstractmethod
    def shape(self) -> object:
        """Columns and indexes of the search table, but for kdb-fast's columns."""

    @abstractmethod
    def check(self) -> None:
        """Assert that what the store keeps of a row in other places is in step with the row."""

    # -- another program -------------------------------------------------------------------------------

    @abstractmethod
    def make_table(self, *, strict: bool = False) -> None:
        """The search table as KameleonDB makes it; ``strict``: no text is twice there, and none is ``x``."""

    @abstractmethod
    def read_only(self) -> Store:
        """A session that cannot write."""

    @abstractmethod
    def index(self, key: str, text: str) -> None:
        """Insert or update a row as KameleonDB does."""

    def delete(self, key: str) -> None:
        self.execute("DELETE FROM kdb_search WHERE record_id = %s", key)

    def edit(self, key: str, what: str) -> None:
        """Change one of ``EDITS`` of a row."""
        self.execute(f"UPDATE kdb_search SET {EDITS[what].format(later=self.later)} WHERE record_id = '{key}'")

    @abstractmethod
    def ago(self, seconds: float) -> str:
        """SQL for the time so long ago."""

    @abstractmethod
    def refuse(self, how: str) -> None:
        """From now on the database refuses rows with ``SECRET`` in one of the ways of ``refusals``."""

    @abstractmethod
    def drop_silently(self) -> None:
        """From now on a trigger drops new rows with ``SECRET``, and nothing is said."""

    def change_run(self, change: str = "phase = phase", silent: float | None = None) -> None:
        """Change the running run; ``silent``: so many seconds ago was its last sign of life."""
        beat = "" if silent is None else f", heartbeat_at = {self.ago(silent)}"
        self.execute(f"UPDATE kdb_fast_runs SET {change}{beat} WHERE state = 'running'")

    @abstractmethod
    def busy_run(self) -> AbstractContextManager[None]:
        """Another session keeps the run's row from being written."""


EDITS = {"time": "updated_at = {later}", "no time": "updated_at = NULL", "no vector": "embedding = NULL"}
"""What another program may change of a row beside its text."""


class PostgreSQLHarness(Harness):
    dialect = "postgresql"
    refusals: ClassVar = {
        "check": ("check", "the database refused the row with SQLSTATE 23514, constraint no_secrets"),
        "trigger": ("database_refused", "the database refused the row with SQLSTATE P0001"),
        "deferred trigger": ("database_refused", "the database refused the row with SQLSTATE P0001"),
    }
    not_finite = "bad_vector"
    refused_record = "A record"
    prune_rows = "kdb_fast.stores.postgresql.prepare.PRUNE_BATCH"
    vector_error = 0.0
    later = "updated_at + interval '1 microsecond'"

    TABLE = """
CREATE EXTENSION IF NOT EXISTS vector;
CREATE TABLE kdb_search (
  id varchar(36) PRIMARY KEY, entity_name varchar(255) NOT NULL, record_id varchar(36) NOT NULL,
  content text NOT NULL, embedding vector({size}), model varchar(100), dimensions integer,
  created_at timestamptz NOT NULL DEFAULT now(), updated_at timestamptz,
  tsv tsvector GENERATED ALWAYS AS (to_tsvector('english', content)) STORED,
  UNIQUE (entity_name, record_id)
);
CREATE INDEX ix_kdb_search_entity ON kdb_search (entity_name);
CREATE INDEX ix_kdb_search_record ON kdb_search (record_id);
CREATE INDEX ix_kdb_search_fts ON kdb_search USING gin (tsv);
CREATE INDEX ix_kdb_search_vector ON kdb_search USING hnsw (embedding vector_cosine_ops) WITH (m=8, ef_construction=32);
"""
    """The table as KameleonDB makes it, but for parameters of the vector index that no default gives."""

    _UNIQUE = "ALTER TABLE kdb_search DROP CONSTRAINT kdb_search_entity_name_record_id_key; "
    unfit: ClassVar = {
        "another program's": (
            "CREATE EXTENSION vector; CREATE TABLE kdb_search (id int, content text, embedding vector(8))",
            "no column entity_name, record_id, model, dimensions, created_at, updated_at",
        ),
        "no unique constraint": (TABLE.format(size=DIMENSIONS) + _UNIQUE, "no unique constraint"),
        "partial unique index": (
            TABLE.format(size=DIMENSIONS) + _UNIQUE + "CREATE UNIQUE INDEX partial ON kdb_search "
            "(entity_name, record_id) WHERE model IS NOT NULL",
            "no unique constraint",
        ),
        "no vectors": (
            TABLE.format(size=DIMENSIONS) + "DROP INDEX ix_kdb_search_vector; ALTER TABLE kdb_search "
            "DROP COLUMN embedding, ADD COLUMN embedding float4[]",
            rf"embedding is of type _float4; expected vector\({DIMENSIONS}\)",
        ),
        "another dimension": (TABLE.format(size=5), f"holds vectors of 5 dimensions; the model gives {DIMENSIONS}"),
    }

    def source_times(self) -> list[datetime | None]:
        return [at for (at,) in self.execute("SELECT kdb_fast_source_at FROM kdb_search ORDER BY record_id")]

    def matching(self, word: str) -> list[str]:
        found = self.execute("SELECT record_id FROM kdb_search WHERE tsv @@ to_tsquery('english', %s) ORDER BY 1", word)
        return [key for (key,) in found]

    def versions(self) -> list[tuple[Any, ...]]:
        return self.execute("SELECT ctid, xmin, * FROM kdb_search ORDER BY record_id")

    def catalog(self) -> list[tuple[Any, ...]]:
        return self.execute(
            "WITH ours AS (SELECT * , xmin AS version FROM pg_class WHERE relnamespace = 'public'::regnamespace) "
            "SELECT oid::text, relname::text, version::text FROM ours UNION ALL "
            "SELECT attrelid::text, attname::text, xmin::text FROM pg_attribute "
            "WHERE attrelid IN (SELECT oid FROM ours) ORDER BY 1, 2"
        )

    def shape(self) -> object:
        return columns_and_indexes(self.address)

    def check(self) -> None:
        """There are no other places."""

    def make_table(self, *, strict: bool = False) -> None:
        self.execute(self.TABLE.format(size=DIMENSIONS))
        if strict:
            self.execute(
                "ALTER TABLE kdb_search ADD CHECK (content <> 'x'); CREATE UNIQUE INDEX once ON kdb_search (content)"
            )

    def read_only(self) -> Store:
        address = connect_as(self.address, options="-c default_transaction_read_only=on")
        return self.stack.enter_context(contextlib.closing(open_store(address, "test")))

    def index(self, key: str, text: str) -> None:
        self.execute(
            "INSERT INTO kdb_search (id, entity_name, record_id, content, updated_at) "
            f"VALUES (gen_random_uuid(), '{ENTITY}', %s, %s, now()) ON CONFLICT (entity_name, record_id) "
            "DO UPDATE SET content = excluded.content, updated_at = excluded.updated_at",
            key,
            text,
        )

    def ago(self, seconds: float) -> str:
        return f"now() - make_interval(secs => {seconds})"

    def refuse(self, how: str) -> None:
        rule = f"content NOT LIKE '%{SECRET}%'"
        function = (
            "CREATE FUNCTION judge() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
            f"IF NOT (NEW.{rule}) THEN RAISE EXCEPTION 'not this one: %', NEW.content; END IF; RETURN NEW; END $$; "
        )
        scripts = {
            "check": f"ALTER TABLE kdb_search ADD CONSTRAINT no_secrets CHECK ({rule})",
            "trigger": function + "CREATE TRIGGER judge BEFORE INSERT OR UPDATE ON kdb_search FOR EACH ROW "
            "EXECUTE FUNCTION judge()",
            "deferred trigger": function + "CREATE CONSTRAINT TRIGGER judge AFTER INSERT OR UPDATE ON kdb_search "
            "DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION judge()",
        }
        self.execute(scripts[how])

    def drop_silently(self) -> None:
        self.execute(
            "CREATE FUNCTION drop_it() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
            f"IF NEW.content LIKE '%{SECRET}%' THEN RETURN NULL; END IF; RETURN NEW; END $$; "
            "CREATE TRIGGER drop_it BEFORE INSERT ON kdb_search FOR EACH ROW EXECUTE FUNCTION drop_it()"
        )

    @contextlib.contextmanager
    def busy_run(self) -> Iterator[None]:
        import psycopg

        with psycopg.connect(self.address.conninfo) as other:
            other.execute("SELECT FROM kdb_fast_runs FOR UPDATE")
            yield
            other.rollback()


def columns_and_indexes(address: DatabaseAddress) -> tuple[list[tuple[Any, ...]], dict[str, str]]:
    """Of PostgreSQL's search table: its columns but for kdb-fast's, and its indexes."""
    columns = execute(
        address,
        "SELECT a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attgenerated, "
        "pg_get_expr(d.adbin, d.adrelid) FROM pg_attribute a LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid "
        "AND d.adnum = a.attnum WHERE a.attrelid = 'kdb_search'::regclass AND a.attnum > 0 AND NOT a.attisdropped "
        "AND a.attname NOT LIKE 'kdb_fast%' ORDER BY a.attname",
    )
    return columns, index_definitions(address)


def index_definitions(address: DatabaseAddress) -> dict[str, str]:
    """Definitions of the indexes of PostgreSQL's search table by name."""
    return dict(execute(address, "SELECT indexname, indexdef FROM pg_indexes WHERE tablename = 'kdb_search'"))


class SQLiteHarness(Harness):
    """``connection`` is that of the other program."""

    dialect = "sqlite"
    refusals: ClassVar = {"trigger": ("database_refused", "not this one")}
    not_finite = "not_finite"
    refused_record = f"'{ENTITY}'/'r002'"
    prune_rows = "kdb_fast.stores.sqlite.prune.PRUNE_KEYS"
    vector_error = 1e-8
    later = "strftime('%Y-%m-%d %H:%M:%f', updated_at, '+0.001 seconds')"

    TABLE = """
CREATE TABLE kdb_search (
  id TEXT PRIMARY KEY, entity_name TEXT NOT NULL, record_id TEXT NOT NULL, content TEXT NOT NULL, embedding BLOB,
  model TEXT, dimensions INTEGER, created_at TEXT NOT NULL DEFAULT (datetime('now')), updated_at TEXT,
  UNIQUE(entity_name, record_id)
);
CREATE INDEX ix_kdb_search_entity ON kdb_search(entity_name);
CREATE INDEX ix_kdb_search_record ON kdb_search(record_id);
"""
    FULL_TEXT = """
CREATE VIRTUAL TABLE kdb_search_fts USING fts5(
  id UNINDEXED, entity_name, record_id UNINDEXED, content, tokenize='porter unicode61');
"""
    unfit: ClassVar = {
        "columns": ("CREATE TABLE kdb_search (id TEXT, entity_name TEXT)", "no column record_id, content, embedding"),
        "view": ("CREATE VIEW kdb_search AS SELECT 1", "is a view"),
        "unique": (TABLE.replace(",\n  UNIQUE(entity_name, record_id)", ""), "unique constraint"),
        "rowid": (TABLE.replace("record_id)\n);", "record_id)\n) WITHOUT ROWID;", 1), "row ids"),
        "not null": (TABLE.replace("model TEXT", "model TEXT, owner TEXT NOT NULL"), "needs a value in owner"),
        "no fts": (TABLE + "CREATE TABLE kdb_search_fts (id, entity_name, record_id, content)", "full-text table"),
        "other fts": (TABLE + "CREATE VIRTUAL TABLE kdb_search_fts USING fts5(record_id, content)", "full-text table"),
        "encoding": ("PRAGMA encoding = 'UTF-16'; CREATE TABLE t (a)", "UTF-16"),
    }

    def __init__(self, address: DatabaseAddress) -> None:
        Path(address.conninfo).touch()
        super().__init__(address)
        self.connection = self.stack.enter_context(
            contextlib.closing(sqlite3.connect(address.conninfo, isolation_level=None))
        )

    def execute(self, statement: str, *parameters: Any) -> list[tuple[Any, ...]]:
        if not parameters and ";" in statement:
            self.connection.executescript(statement)
            return []
        return self.connection.execute(statement.replace("%s", "?"), parameters).fetchall()

    def source_times(self) -> list[datetime | None]:
        found = self.execute("SELECT kdb_fast_source_at FROM kdb_search ORDER BY record_id")
        return [text and datetime.fromisoformat(text).replace(tzinfo=UTC) for (text,) in found]

    def matching(self, word: str) -> list[str]:
        found = self.execute("SELECT record_id FROM kdb_search_fts WHERE content MATCH %s ORDER BY 1", word)
        return [key for (key,) in found]

    def versions(self) -> list[tuple[Any, ...]]:
        return self.execute("SELECT rowid, * FROM kdb_search ORDER BY record_id")

    def catalog(self) -> list[tuple[Any, ...]]:
        return self.execute("SELECT name, sql FROM sqlite_master ORDER BY name")

    def shape(self) -> list[tuple[Any, ...]]:
        return self.execute(
            "SELECT name, type, \"notnull\", dflt_value, pk FROM pragma_table_info('kdb_search') "
            "WHERE name NOT LIKE 'kdb_fast%' UNION ALL SELECT name, sql, 0, NULL, 0 FROM sqlite_master "
            "WHERE tbl_name = 'kdb_search' AND type = 'index'"
        )

    def check(self) -> None:
        """Every row has exactly one full-text row with the same id and text, and a true copy of our vector."""
        columns = "id, entity_name, record_id, content"
        assert self.execute(f"SELECT {columns} FROM kdb_search_fts ORDER BY 1") == self.execute(
            f"SELECT {columns} FROM kdb_search ORDER BY 1"
        )
        self.execute("INSERT INTO kdb_search_fts(kdb_search_fts) VALUES('integrity-check')")
        copies = self.execute(
            "SELECT s.embedding, v.vector FROM kdb_search s LEFT JOIN kdb_fast_vectors v ON v.search_rowid = s.rowid "
            "AND v.search_id = s.id AND v.at = s.updated_at WHERE s.kdb_fast_at = s.updated_at AND s.embedding NOT NULL"
        )
        for embedding, vector in copies:
            assert json.loads(embedding) == pytest.approx(np.frombuffer(vector, "<f4").tolist(), abs=1e-8)

    def make_table(self, *, strict: bool = False) -> None:
        script = self.TABLE + self.FULL_TEXT
        if strict:
            script = script.replace("content TEXT NOT NULL", "content TEXT CHECK(content <> 'x')")
            script += "CREATE UNIQUE INDEX once ON kdb_search (content);"
        self.execute(script)

    def read_only(self) -> Store:
        from kdb_fast.stores.sqlite.store import SQLiteStore

        connection = sqlite3.connect(f"file:{self.address.conninfo}?mode=ro", uri=True)
        return SQLiteStore(self.stack.enter_context(contextlib.closing(connection)))

    def index(self, key: str, text: str, *, full_text: bool = True) -> None:
        self.execute("BEGIN IMMEDIATE")
        found = self.execute("SELECT id FROM kdb_search WHERE entity_name = %s AND record_id = %s", ENTITY, key)
        search_id = found[0][0] if found else str(uuid.uuid4())
        if found:
            self.execute(
                "UPDATE kdb_search SET content = %s, embedding = '[1.0]', updated_at = datetime('now') WHERE id = %s",
                text,
                search_id,
            )
            self.execute("DELETE FROM kdb_search_fts WHERE entity_name = %s AND record_id = %s", ENTITY, key)
        else:
            columns = "id, entity_name, record_id, content, embedding"
            statement = f"INSERT INTO kdb_search ({columns}) VALUES (%s, %s, %s, %s, '[1.0]')"
            self.execute(statement, search_id, ENTITY, key, text)
        if full_text:
            self.execute("INSERT INTO kdb_search_fts VALUES (%s, %s, %s, %s)", search_id, ENTITY, key, text)
        self.execute("COMMIT")

    def delete(self, key: str) -> None:
        super().delete(key)
        self.execute("DELETE FROM kdb_search_fts WHERE record_id = %s", key)

    def ago(self, seconds: float) -> str:
        return f"strftime('%Y-%m-%d %H:%M:%f', 'now', '{-seconds} seconds')"

    def refuse(self, how: str) -> None:
        assert how == "trigger"
        self._on_secret("INSERT", "ABORT, 'not this one'")
        self._on_secret("UPDATE", "ABORT, 'not this one'")

    def drop_silently(self) -> None:
        self._on_secret("INSERT", "IGNORE")

    def _on_secret(self, event: str, raised: str) -> None:
        self.execute(
            f"CREATE TRIGGER on_{event} BEFORE {event} ON kdb_search WHEN NEW.content LIKE '%{SECRET}%' "
            f"BEGIN SELECT RAISE({raised}); END;"
        )

    @contextlib.contextmanager
    def busy_run(self) -> Iterator[None]:
        self.execute("BEGIN IMMEDIATE")
        yield
        self.execute("ROLLBACK")


KINDS: dict[str, type[Harness]] = {"postgresql": PostgreSQLHarness, "sqlite": SQLiteHarness}


@contextlib.contextmanager
def harness_of(kind: str, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The harness of a kind on an empty database."""
    made = KINDS[kind]
    database = "sqlite_database" if made.dialect == "sqlite" else "database"
    harness = made(request.getfixturevalue(database))
    with contextlib.closing(harness):
        yield harness


@contextlib.contextmanager
def products_of(address: DatabaseAddress) -> Iterator[tuple[Any, list[str]]]:
    """A real KameleonDB in the database, with eight products; yields it and their ids."""
    kameleondb = pytest.importorskip("kameleondb")
    with kameleondb.KameleonDB(sqlalchemy_url(address)) as db:
        entity = db.create_entity("Product", [{"name": "title", "type": "string"}])
        yield db, entity.insert_many([{"title": f"thing {i}"} for i in range(8)])
