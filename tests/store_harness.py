"""What tests of a store share: rows, slots and flushes for any store, and harnesses of the stores of an index.

A harness is a store on a database of its own, with what another program does there and what the tables hold then. Those
of the other kinds are in ``target_harness.py``.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import sqlite3
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from kdb_fast.records import KeptReject, Record, Reject, content_hash
from kdb_fast.stores import open_store
from kdb_fast.stores.base import FlushResult, FlushSlot, IndexStore, RunSpec, Store, Stored, TargetTable
from kdb_fast.tables.kdb_search import KDB_SEARCH, entity_and_id

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
    return [Row(Record((entity, key), text)) for key, text in pairs]


def looked_up(store: Store, *pairs: tuple[str, str], entity: str = ENTITY) -> list[Row]:
    """Rows as the parent makes them: with the version of what is stored now."""
    stored = lookup(store, *(key for key, _ in pairs), entity=entity)
    return [
        Row(Record((entity, key), text), True, stored[key].row_version)
        if key in stored
        else Row(Record((entity, key), text))
        for key, text in pairs
    ]


def lookup(store: Store, *keys: str, entity: str = ENTITY) -> dict[str, Stored]:
    found = store.lookup([(entity, key) for key in keys])
    return {entity_and_id(key)[1]: stored for key, stored in found.items()}


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


def put(store: IndexStore, texts: Mapping[str, str], deletes: Sequence[str] = (), *, vectors: bool = True) -> None:
    """Write texts as the library does; within a unit."""
    store.upsert(LIBRARY, [slot_of(fresh(*texts.items()))], [(ENTITY, key) for key in deletes], vectors=vectors)


def contents(address: DatabaseAddress) -> dict[str, str]:
    """Stored texts by record id."""
    return {key: row.content for (_, key), row in index_rows(address).items()}


def reject(key: str, position: int = 0, entity: str = ENTITY) -> Reject:
    return Reject((entity, key), "empty_text", "the text is empty", content_hash(""), position)


def names(row: KeptReject) -> tuple[str, str]:
    """Entity and record id of a reject; where the target has no groups, they are shown as one key."""
    if row.entity:
        return row.entity, row.record_id
    entity, _, record_id = row.record_id.partition(", ")
    return entity, record_id


def rejected_keys(store: Store, entity: str | None = None) -> list[str]:
    return [names(row)[1] for row in store.rejects(entity)]


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


class Harness(ABC):
    """A store on an empty database, other sessions, and another program that writes there.

    Attributes:
        store: The first session; the test prepares it.
        target: What it writes.
        ago: SQL for the time ``{}`` seconds ago.
        vector_error: Largest difference of an element that is stored.
        written: Table in which its rows are written.
        refusals: Ways in which the database can refuse rows with ``SECRET``: a script, reason and detail of the reject.
        drops_silently: Script after which new rows with ``SECRET`` are dropped, and nothing is said.
        alters: Script of a trigger ``meddle`` that changes rows as they are written.
        catalog: Query for all that the database knows of all tables; changes whenever one is altered.
        versions: Query for each row with what any write to it changes.
    """

    dialect: ClassVar[str]
    ago: ClassVar[str]
    vector_error: ClassVar[float]
    written: ClassVar[str]
    refusals: ClassVar[Mapping[str, tuple[str, str, str]]]
    drops_silently: ClassVar[str]
    alters: ClassVar[str]
    catalog: ClassVar[str]
    versions: ClassVar[str]

    def __init__(self, address: DatabaseAddress) -> None:
        self.address = address
        self.stack = ExitStack()
        self.target = self.find_target()
        self.store = self.open()

    def find_target(self) -> TargetTable:
        """What is written, after what must be there for it has been made."""
        return KDB_SEARCH

    def connect(self) -> Store:
        """Another session, for the caller to close."""
        return open_store(self.address, "test", target=self.target)

    def open(self) -> Store:
        """Another session, closed with the harness."""
        return self.stack.enter_context(contextlib.closing(self.connect()))

    def execute(self, statement: str, *parameters: Any) -> list[tuple[Any, ...]]:
        """Run a statement (%s for parameters) or a script as another program."""
        return execute(self.address, statement, *parameters)

    def check(self) -> None:
        """Assert that no key is there twice, and that what is kept of a row in other places is in step with it."""
        assert len(self.contents()) == self.store.count()

    # -- records and rows of them ----------------------------------------------------------------------

    def provide(self, pairs: Iterable[tuple[str, str | None]], entity: str) -> None:  # noqa: B027 - an index needs none
        """Put records, or None for those without text, where the store expects to find them: nowhere."""

    def fresh(self, *pairs: tuple[str, str], entity: str = ENTITY) -> list[Row]:
        """As :func:`fresh`, of records that are there."""
        self.provide(pairs, entity)
        return fresh(*pairs, entity=entity)

    def looked_up(self, store: Store, *pairs: tuple[str, str], entity: str = ENTITY) -> list[Row]:
        """As :func:`looked_up`, of records that are there."""
        self.provide(pairs, entity)
        return looked_up(store, *pairs, entity=entity)

    def write(
        self,
        store: Store,
        run: RunSpec,
        texts: Mapping[str, str],
        *,
        entity: str = ENTITY,
        deletes: Sequence[str | tuple[str, str]] = (),
        **options: Any,
    ) -> FlushResult:
        """As :func:`write`, of records that are there, and of ``deletes`` that have no text any more."""
        rows = self.looked_up(store, *texts.items(), entity=entity)
        self.provide([(key, None) for key in deletes if isinstance(key, str)], entity)
        return flush(store, run, slot_of(rows), deletes=deletes, **options)

    # -- what is stored --------------------------------------------------------------------------------

    @abstractmethod
    def contents(self) -> dict[str, str]:
        """Stored texts by record id; no test has one id in two entities."""

    @abstractmethod
    def vectors(self) -> dict[str, Any]:
        """Stored vectors by record id."""

    def runs(self) -> list[RunRow]:
        columns = "run, state, phase, ended_at IS NOT NULL, heartbeat_at, receipt"
        found = self.execute(f"SELECT {columns} FROM kdb_fast_runs ORDER BY run")
        return [RunRow(run, state, phase, bool(ended), str(at), text) for run, state, phase, ended, at, text in found]

    # -- another program -------------------------------------------------------------------------------

    @abstractmethod
    def read_only(self) -> Store:
        """A session that cannot write."""

    @abstractmethod
    def outdate(self, key: str) -> None:
        """Do with a record that was read, or with its row, what keeps the store from writing what was made of it."""

    def change_run(self, change: str = "phase = phase", silent: float | None = None) -> None:
        """Change the running run; ``silent``: so many seconds ago was its last sign of life."""
        beat = "" if silent is None else f", heartbeat_at = {self.ago.format(silent)}"
        self.execute(f"UPDATE kdb_fast_runs SET {change}{beat} WHERE state = 'running'")

    @abstractmethod
    def busy_run(self) -> AbstractContextManager[None]:
        """Another session keeps the run's row from being written."""


class OnPostgreSQL(Harness):
    dialect = "postgresql"
    ago = "now() - make_interval(secs => {})"
    vector_error = 0.0
    catalog = """
WITH ours AS (SELECT *, xmin AS version FROM pg_class WHERE relnamespace = 'public'::regnamespace)
SELECT oid::text, relname::text, version::text FROM ours
UNION ALL SELECT attrelid::text, attname::text, xmin::text FROM pg_attribute WHERE attrelid IN (SELECT oid FROM ours)
ORDER BY 1, 2
"""

    @staticmethod
    def trigger(
        table: str, text: str, events: str, action: str, kind: str = "TRIGGER judge BEFORE", how: str = ""
    ) -> str:
        """Script of a trigger that does something with rows with ``SECRET``."""
        return (
            "CREATE FUNCTION judge() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
            f"IF NEW.{text} LIKE '%{SECRET}%' THEN {action}; END IF; RETURN NEW; END $$; "
            f"CREATE {kind} {events} ON {table} {how} FOR EACH ROW EXECUTE FUNCTION judge()"
        )

    @staticmethod
    def meddling(table: str, events: str, change: str) -> str:
        """``alters`` by an assignment to the row ``NEW``."""
        return (
            f"CREATE FUNCTION meddle() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {change}; RETURN NEW; END $$; "
            f"CREATE TRIGGER meddle BEFORE {events} ON {table} FOR EACH ROW EXECUTE FUNCTION meddle()"
        )

    @staticmethod
    def refused(table: str, text: str, events: str) -> dict[str, tuple[str, str, str]]:
        """``refusals`` by a trigger, and by one that fires at the COMMIT."""
        action = f"RAISE EXCEPTION 'not this one: %', NEW.{text}"
        detail = "the database refused the row with SQLSTATE P0001"
        deferred = ("CONSTRAINT TRIGGER judge AFTER", "DEFERRABLE INITIALLY DEFERRED")
        scripts = {
            "trigger": OnPostgreSQL.trigger(table, text, events, action),
            "deferred trigger": OnPostgreSQL.trigger(table, text, events, action, *deferred),
        }
        return {how: (script, "database_refused", detail) for how, script in scripts.items()}

    @staticmethod
    def checked(table: str, text: str) -> tuple[str, str, str]:
        """``refusals`` by a constraint."""
        script = f"ALTER TABLE {table} ADD CONSTRAINT no_secrets CHECK ({text} NOT LIKE '%{SECRET}%')"
        return script, "check", "the database refused the row with SQLSTATE 23514, constraint no_secrets"

    def read_only(self) -> Store:
        address = connect_as(self.address, options="-c default_transaction_read_only=on")
        return self.stack.enter_context(contextlib.closing(open_store(address, "test", target=self.target)))

    @contextlib.contextmanager
    def busy_run(self) -> Iterator[None]:
        import psycopg

        with psycopg.connect(self.address.conninfo) as other:
            other.execute("SELECT FROM kdb_fast_runs FOR UPDATE")
            yield
            other.rollback()


class OnSQLite(Harness):
    """``connection`` is that of the other program."""

    dialect = "sqlite"
    ago = "strftime('%Y-%m-%d %H:%M:%f', 'now', '-{} seconds')"
    vector_error = 1e-8
    catalog = "SELECT name, sql FROM sqlite_master ORDER BY name"

    @staticmethod
    def triggers(table: str, text: str, events: Sequence[str], action: str) -> str:
        """Script of triggers that do something with rows with ``SECRET``."""
        return "".join(
            f"CREATE TRIGGER judge{i} BEFORE {event} ON {table} WHEN NEW.{text} LIKE '%{SECRET}%' "
            f"BEGIN SELECT RAISE({action}); END;"
            for i, event in enumerate(events)
        )

    @staticmethod
    def meddling(table: str, event: str, key: str, change: str) -> str:
        """``alters`` by an update of the row."""
        update = f"UPDATE {table} SET {change} WHERE {key} = NEW.{key}"
        return f"CREATE TRIGGER meddle AFTER {event} ON {table} BEGIN {update}; END"

    @staticmethod
    def refused(table: str, text: str, events: Sequence[str]) -> dict[str, tuple[str, str, str]]:
        """``refusals`` by a trigger."""
        script = OnSQLite.triggers(table, text, events, "ABORT, 'not this one'")
        return {"trigger": (script, "database_refused", "not this one")}

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

    def read_only(self) -> Store:
        connection = sqlite3.connect(f"file:{self.address.conninfo}?mode=ro", uri=True)
        made: Any = type(self.store)
        store: Store = made(self.stack.enter_context(contextlib.closing(connection)), self.target)
        return store

    @contextlib.contextmanager
    def busy_run(self) -> Iterator[None]:
        self.execute("BEGIN IMMEDIATE")
        yield
        self.execute("ROLLBACK")


class IndexHarness(Harness):
    """A store of a search index, as KameleonDB has it.

    Attributes:
        later: SQL for the next time after ``updated_at``.
        prune_rows: Name of the constant that says how many rows are looked at or removed at a time.
        table: Script of the search table as KameleonDB makes it; ``strict_table``: one in which no text is twice, and
            none is ``x``.
        unfit: Tables that must be refused: a script that makes one, and the words of the error.
        shape: Query for the columns and indexes of the search table, but for kdb-fast's columns.
        matching_word: Query for the ids of records that full-text search finds.
    """

    written = "kdb_search"
    later: ClassVar[str]
    prune_rows: ClassVar[str]
    table: ClassVar[str]
    strict_table: ClassVar[str]
    unfit: ClassVar[Mapping[str, tuple[str, str]]]
    shape: ClassVar[str]
    matching_word: ClassVar[str]

    @property
    def index_store(self) -> IndexStore:
        """The first session."""
        assert isinstance(self.store, IndexStore)
        return self.store

    def check(self) -> None:
        assert len(index_rows(self.address)) == self.store.count()

    def rows(self) -> dict[str, IndexRow]:
        """Rows by record id."""
        return {key: row for (_, key), row in index_rows(self.address).items()}

    def contents(self) -> dict[str, str]:
        return contents(self.address)

    def vectors(self) -> dict[str, Any]:
        return {key: row.vector for key, row in self.rows().items()}

    def matching(self, word: str) -> list[str]:
        """Sorted ids of records that full-text search finds."""
        return sorted(key for (key,) in self.execute(self.matching_word, word))

    def ids(self) -> dict[str, tuple[str, str]]:
        """What a row keeps for good, by record id: its own id and when it was made."""
        found = self.execute("SELECT record_id, id, created_at FROM kdb_search")
        return {key: (row_id, str(created)) for key, row_id, created in found}

    def source_times(self) -> list[datetime | None]:
        """When each record was changed at its source, by record id."""
        found = self.execute("SELECT kdb_fast_source_at FROM kdb_search ORDER BY record_id")
        return [at if at is None else moment(str(at)) for (at,) in found]

    @abstractmethod
    def index(self, key: str, text: str) -> None:
        """Insert or update a row as KameleonDB does."""

    def outdate(self, key: str) -> None:
        self.index(key, "theirs")

    def delete(self, key: str) -> None:
        self.execute("DELETE FROM kdb_search WHERE record_id = %s", key)

    def edit(self, key: str, what: str) -> None:
        """Change one of ``EDITS`` of a row."""
        self.execute(f"UPDATE kdb_search SET {EDITS[what].format(later=self.later)} WHERE record_id = '{key}'")


EDITS = {"time": "updated_at = {later}", "no time": "updated_at = NULL", "no vector": "embedding = NULL"}
"""What another program may change of a row beside its text."""


def moment(text: str) -> datetime:
    """A time as a database gives it; in UTC where it does not say."""
    found = datetime.fromisoformat(text)
    return found if found.tzinfo else found.replace(tzinfo=UTC)


class PostgreSQLHarness(OnPostgreSQL, IndexHarness):
    later = "updated_at + interval '1 microsecond'"
    prune_rows = "kdb_fast.stores.postgresql.prepare.PRUNE_BATCH"
    any_table = """
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
    table = any_table.format(size=DIMENSIONS)
    strict_table = (
        f"{table} ALTER TABLE kdb_search ADD CHECK (content <> 'x'); CREATE UNIQUE INDEX once ON kdb_search (content)"
    )

    _UNIQUE = "ALTER TABLE kdb_search DROP CONSTRAINT kdb_search_entity_name_record_id_key; "
    unfit: ClassVar = {
        "another program's": (
            "CREATE EXTENSION vector; CREATE TABLE kdb_search (id int, content text, embedding vector(8))",
            "no column entity_name, record_id, model, dimensions, created_at, updated_at",
        ),
        "no unique constraint": (table + _UNIQUE, "no unique constraint"),
        "partial unique index": (
            table + _UNIQUE + "CREATE UNIQUE INDEX partial ON kdb_search "
            "(entity_name, record_id) WHERE model IS NOT NULL",
            "no unique constraint",
        ),
        "no vectors": (
            table + "DROP INDEX ix_kdb_search_vector; ALTER TABLE kdb_search "
            "DROP COLUMN embedding, ADD COLUMN embedding float4[]",
            rf"embedding is of type _float4; expected vector\({DIMENSIONS}\)",
        ),
        "another dimension": (any_table.format(size=5), f"holds vectors of 5 dimensions; the model gives {DIMENSIONS}"),
    }

    refusals: ClassVar = {
        "check": OnPostgreSQL.checked("kdb_search", "content"),
        **OnPostgreSQL.refused("kdb_search", "content", "INSERT OR UPDATE"),
    }
    drops_silently = OnPostgreSQL.trigger("kdb_search", "content", "INSERT", "RETURN NULL")
    alters = OnPostgreSQL.meddling("kdb_search", "INSERT OR UPDATE", "NEW.content := upper(NEW.content)")
    shape = """
SELECT a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attgenerated, pg_get_expr(d.adbin, d.adrelid)
FROM pg_attribute a LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
WHERE a.attrelid = 'kdb_search'::regclass AND a.attnum > 0 AND NOT a.attisdropped AND a.attname NOT LIKE 'kdb_fast%'
UNION ALL SELECT indexname, indexdef, NULL, NULL, NULL FROM pg_indexes WHERE tablename = 'kdb_search' ORDER BY 1
"""
    versions = "SELECT ctid, xmin, * FROM kdb_search ORDER BY record_id"
    matching_word = "SELECT record_id FROM kdb_search WHERE tsv @@ to_tsquery('english', %s)"

    def index(self, key: str, text: str) -> None:
        statement = (
            "INSERT INTO kdb_search (id, entity_name, record_id, content, updated_at) "
            f"VALUES (gen_random_uuid(), '{ENTITY}', %s, %s, now()) ON CONFLICT (entity_name, record_id) "
            "DO UPDATE SET content = excluded.content, updated_at = excluded.updated_at"
        )
        self.execute(statement, key, text)


class SQLiteHarness(OnSQLite, IndexHarness):
    later = "strftime('%Y-%m-%d %H:%M:%f', updated_at, '+0.001 seconds')"
    prune_rows = "kdb_fast.stores.sqlite.prune.PRUNE_KEYS"
    bare_table = """
CREATE TABLE kdb_search (
  id TEXT PRIMARY KEY, entity_name TEXT NOT NULL, record_id TEXT NOT NULL, content TEXT NOT NULL, embedding BLOB,
  model TEXT, dimensions INTEGER, created_at TEXT NOT NULL DEFAULT (datetime('now')), updated_at TEXT,
  UNIQUE(entity_name, record_id)
);
CREATE INDEX ix_kdb_search_entity ON kdb_search(entity_name);
CREATE INDEX ix_kdb_search_record ON kdb_search(record_id);
"""
    table = f"""{bare_table}
CREATE VIRTUAL TABLE kdb_search_fts USING fts5(
  id UNINDEXED, entity_name, record_id UNINDEXED, content, tokenize='porter unicode61');
"""
    strict_table = table.replace("content TEXT NOT NULL", "content TEXT CHECK(content <> 'x')")
    strict_table += "CREATE UNIQUE INDEX once ON kdb_search (content);"
    unfit: ClassVar = {
        "columns": ("CREATE TABLE kdb_search (id TEXT, entity_name TEXT)", "no column record_id, content, embedding"),
        "view": ("CREATE VIEW kdb_search AS SELECT 1", "is a view"),
        "unique": (bare_table.replace(",\n  UNIQUE(entity_name, record_id)", ""), "unique constraint"),
        "rowid": (bare_table.replace("record_id)\n);", "record_id)\n) WITHOUT ROWID;", 1), "row ids"),
        "not null": (bare_table.replace("model TEXT", "model TEXT, owner TEXT NOT NULL"), "needs a value in owner"),
        "no fts": (bare_table + "CREATE TABLE kdb_search_fts (id, entity_name, record_id, content)", "full-text table"),
        "other fts": (
            bare_table + "CREATE VIRTUAL TABLE kdb_search_fts USING fts5(record_id, content)",
            "full-text table",
        ),
        "encoding": ("PRAGMA encoding = 'UTF-16'; CREATE TABLE t (a)", "UTF-16"),
    }

    refusals: ClassVar = OnSQLite.refused("kdb_search", "content", ["INSERT", "UPDATE"])
    drops_silently = OnSQLite.triggers("kdb_search", "content", ["INSERT"], "IGNORE")
    alters = OnSQLite.meddling("kdb_search", "INSERT", "record_id", "content = upper(content)")
    shape = """
SELECT name, type, "notnull", dflt_value, pk FROM pragma_table_info('kdb_search') WHERE name NOT LIKE 'kdb_fast%'
UNION ALL SELECT name, sql, 0, NULL, 0 FROM sqlite_master WHERE tbl_name = 'kdb_search' AND type = 'index'
"""
    versions = "SELECT rowid, * FROM kdb_search ORDER BY record_id"
    matching_word = "SELECT record_id FROM kdb_search_fts WHERE content MATCH %s"

    def check(self) -> None:
        """Every row has exactly one full-text row with the same id and text, and a true copy of our vector."""
        super().check()
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

    def index(self, key: str, text: str, *, full_text: bool = True) -> None:
        self.execute("BEGIN IMMEDIATE")
        statement = (
            "INSERT INTO kdb_search (id, entity_name, record_id, content, embedding) VALUES (%s, %s, %s, %s, '[1.0]') "
            "ON CONFLICT DO UPDATE SET content = excluded.content, embedding = '[1.0]', updated_at = datetime('now') "
            "RETURNING id"
        )
        ((row_id,),) = self.execute(statement, str(uuid.uuid4()), ENTITY, key, text)
        self.execute("DELETE FROM kdb_search_fts WHERE entity_name = %s AND record_id = %s", ENTITY, key)
        if full_text:
            self.execute("INSERT INTO kdb_search_fts VALUES (%s, %s, %s, %s)", row_id, ENTITY, key, text)
        self.execute("COMMIT")

    def delete(self, key: str) -> None:
        super().delete(key)
        self.execute("DELETE FROM kdb_search_fts WHERE record_id = %s", key)


INDEXES: dict[str, type[IndexHarness]] = {"postgresql": PostgreSQLHarness, "sqlite": SQLiteHarness}


@contextlib.contextmanager
def harness_of(made: type[Harness], request: pytest.FixtureRequest) -> Iterator[Any]:
    """A harness on an empty database."""
    database = "sqlite_database" if made.dialect == "sqlite" else "database"
    harness = made(request.getfixturevalue(database))
    with harness.stack:
        yield harness


@contextlib.contextmanager
def products_of(address: DatabaseAddress) -> Iterator[tuple[Any, list[str]]]:
    """A real KameleonDB in the database, with eight products; yields it and their ids."""
    kameleondb = pytest.importorskip("kameleondb")
    with kameleondb.KameleonDB(sqlalchemy_url(address)) as db:
        entity = db.create_entity("Product", [{"name": "title", "type": "string"}])
        yield db, entity.insert_many([{"title": f"thing {i}"} for i in range(8)])
