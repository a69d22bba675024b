"""KameleonDB's search table as a target, and how it is made where it is missing: in the shape that KameleonDB gives it.

The ``kdb_fast_…`` columns are ours; KameleonDB ignores them. The statements are templates for
:meth:`kdb_fast.tables.target.Target.statement`.
"""

from __future__ import annotations

from ..records import Key
from .index_table import IndexTable
from .key import KeyColumn, unfit_for

MAX_ENTITY_CHARS = 255
"""``entity_name`` is varchar(255)."""

MAX_RECORD_ID_CHARS = 36
"""``record_id`` is varchar(36)."""

KEY = (
    KeyColumn("entity_name", "varchar(255)", "entity name", MAX_ENTITY_CHARS, ("bad_entity", "bad_entity")),
    KeyColumn("record_id", "varchar(36)", "record id", MAX_RECORD_ID_CHARS, ("missing_id", "id_too_long")),
)
"""A record's key is the name of its entity and its id within it."""

KDB_SEARCH = IndexTable("kdb_search", KEY)

unfit = unfit_for(KEY)


def entity_and_id(key: Key) -> tuple[str, str]:
    """The two parts of a key."""
    entity, record_id = key
    return str(entity), str(record_id)


POSTGRESQL_SEARCH = """
CREATE TABLE IF NOT EXISTS {index} (
  id varchar(36) PRIMARY KEY,
  entity_name varchar(255) NOT NULL,
  record_id varchar(36) NOT NULL,
  content text NOT NULL,
  embedding {vector}({dimensions}),
  model varchar(100),
  dimensions integer,
  created_at timestamptz NOT NULL DEFAULT now(),
  updated_at timestamptz,
  tsv tsvector GENERATED ALWAYS AS (to_tsvector('english', content)) STORED,
  UNIQUE (entity_name, record_id)
)
"""

PLAIN_INDEXES = {"ix_{}_entity": "entity_name", "ix_{}_record": "record_id"}
"""Names, by the table's, and columns of the indexes that stay whatever is loaded."""

POSTGRESQL_TEXT_INDEX = "USING gin (tsv)"
POSTGRESQL_VECTOR_INDEX = "USING hnsw (embedding {pgvector}vector_cosine_ops)"
"""The indexes that are dropped and rebuilt around a large load."""


def postgresql_indexes(table: IndexTable) -> dict[str, str]:
    """Name and definition of each index that a new table gets."""
    plain = {name.format(table.name): f"USING btree ({column})" for name, column in PLAIN_INDEXES.items()}
    return {**plain, table.text_index: POSTGRESQL_TEXT_INDEX, table.vector_index: POSTGRESQL_VECTOR_INDEX}


POSTGRESQL_COLUMNS = {
    "kdb_fast_fingerprint": "varchar(64)",
    "kdb_fast_run": "bigint",
    "kdb_fast_at": "timestamptz",
    "kdb_fast_source_at": "timestamptz",
}

SQLITE_SEARCH = """
CREATE TABLE IF NOT EXISTS {index} (
  id VARCHAR(36) NOT NULL PRIMARY KEY,
  entity_name VARCHAR(255) NOT NULL,
  record_id VARCHAR(36) NOT NULL,
  content TEXT NOT NULL,
  embedding BLOB,
  model VARCHAR(100),
  dimensions INTEGER,
  created_at TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP,
  updated_at TEXT,
  UNIQUE (entity_name, record_id)
)
"""

SQLITE_FTS = """
CREATE VIRTUAL TABLE IF NOT EXISTS {full_text} USING fts5(
  id UNINDEXED, entity_name, record_id UNINDEXED, content, tokenize='porter unicode61'
)
"""

SQLITE_COLUMNS = {
    "kdb_fast_fingerprint": "TEXT",
    "kdb_fast_run": "INTEGER",
    "kdb_fast_at": "TEXT",
    "kdb_fast_source_at": "TEXT",
}
