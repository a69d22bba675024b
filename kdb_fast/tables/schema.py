"""Tables and indexes of both dialects, as statements.

``kdb_search`` (and ``kdb_search_fts`` on SQLite) are KameleonDB's: created here only where missing, in the
shape KameleonDB creates them. The ``kdb_fast_…`` tables and columns are ours; KameleonDB ignores them.

Those of PostgreSQL are templates for :meth:`kdb_fast.tables.target.Target.statement`.
"""

from __future__ import annotations

import re

VECTOR_INDEX = "ix_kdb_search_vector"
FTS_INDEX = "ix_kdb_search_fts"

POSTGRESQL_SEARCH = """
CREATE TABLE IF NOT EXISTS {kdb_search} (
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

POSTGRESQL_PLAIN_INDEXES = {
    "ix_kdb_search_entity": "USING btree (entity_name)",
    "ix_kdb_search_record": "USING btree (record_id)",
}

POSTGRESQL_SEARCH_USING = {
    FTS_INDEX: "USING gin (tsv)",
    VECTOR_INDEX: "USING hnsw (embedding {pgvector}vector_cosine_ops)",
}
POSTGRESQL_SEARCH_INDEXES = {
    name: f"CREATE INDEX {name} ON {{kdb_search}} {using}" for name, using in POSTGRESQL_SEARCH_USING.items()
}
"""The indexes that are dropped and rebuilt around a large load, in the order of building."""

POSTGRESQL_COLUMNS = {
    "kdb_fast_fingerprint": "varchar(64)",
    "kdb_fast_run": "bigint",
    "kdb_fast_at": "timestamptz",
    "kdb_fast_source_at": "timestamptz",
}

POSTGRESQL_OWN = (
    """
CREATE TABLE IF NOT EXISTS {kdb_fast_runs} (
  run bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  state varchar(16) NOT NULL,
  phase varchar(64) NOT NULL DEFAULT 'start',
  fingerprint varchar(64) NOT NULL,
  model text NOT NULL,
  dimensions integer NOT NULL,
  host text NOT NULL,
  pid integer NOT NULL,
  process_started double precision NOT NULL,
  started_at timestamptz NOT NULL DEFAULT now(),
  heartbeat_at timestamptz NOT NULL DEFAULT now(),
  ended_at timestamptz,
  last_flush integer NOT NULL DEFAULT 0,
  last_result text,
  receipt text
)
""",
    """
CREATE TABLE IF NOT EXISTS {kdb_fast_rejects} (
  entity_name text NOT NULL,
  record_id text NOT NULL,
  content_hash bytea NOT NULL,
  reason text NOT NULL,
  detail text NOT NULL,
  position bigint NOT NULL DEFAULT 0,
  run bigint NOT NULL,
  rejected_at timestamptz NOT NULL DEFAULT now(),
  PRIMARY KEY (entity_name, record_id, content_hash, position)
)
""",
    """
CREATE TABLE IF NOT EXISTS {kdb_fast_state} (
  key text PRIMARY KEY,
  value text NOT NULL
)
""",
)

SQLITE_SEARCH = """
CREATE TABLE IF NOT EXISTS kdb_search (
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

SQLITE_PLAIN_INDEXES = {"ix_kdb_search_entity": "entity_name", "ix_kdb_search_record": "record_id"}
"""Name and column."""

SQLITE_FTS = """
CREATE VIRTUAL TABLE IF NOT EXISTS kdb_search_fts USING fts5(
  id UNINDEXED, entity_name, record_id UNINDEXED, content, tokenize='porter unicode61'
)
"""

SQLITE_COLUMNS = {
    "kdb_fast_fingerprint": "TEXT",
    "kdb_fast_run": "INTEGER",
    "kdb_fast_at": "TEXT",
    "kdb_fast_source_at": "TEXT",
}

SQLITE_OWN = (
    """
CREATE TABLE IF NOT EXISTS kdb_fast_runs (
  run INTEGER PRIMARY KEY AUTOINCREMENT,
  state TEXT NOT NULL,
  phase TEXT NOT NULL DEFAULT 'start',
  fingerprint TEXT NOT NULL,
  model TEXT NOT NULL,
  dimensions INTEGER NOT NULL,
  host TEXT NOT NULL,
  pid INTEGER NOT NULL,
  process_started REAL NOT NULL,
  started_at TEXT NOT NULL DEFAULT (strftime('%Y-%m-%d %H:%M:%f', 'now')),
  heartbeat_at TEXT NOT NULL DEFAULT (strftime('%Y-%m-%d %H:%M:%f', 'now')),
  ended_at TEXT,
  last_flush INTEGER NOT NULL DEFAULT 0,
  last_result TEXT,
  receipt TEXT
)
""",
    """
CREATE TABLE IF NOT EXISTS kdb_fast_rejects (
  entity_name TEXT NOT NULL,
  record_id TEXT NOT NULL,
  content_hash BLOB NOT NULL,
  reason TEXT NOT NULL,
  detail TEXT NOT NULL,
  position INTEGER NOT NULL DEFAULT 0,
  run INTEGER NOT NULL,
  rejected_at TEXT NOT NULL DEFAULT (strftime('%Y-%m-%d %H:%M:%f', 'now')),
  PRIMARY KEY (entity_name, record_id, content_hash, position)
)
""",
    "CREATE TABLE IF NOT EXISTS kdb_fast_state (key TEXT PRIMARY KEY, value TEXT NOT NULL)",
    # Float32 little-endian copy of each vector, for search: reading KameleonDB's JSON text is 100 times slower.
    # The copy is true as long as `search_id` and `at` equal id and updated_at of the row in kdb_search: rowids
    # may be given anew by VACUUM or a dump, and KameleonDB does not know this table.
    """
CREATE TABLE IF NOT EXISTS kdb_fast_vectors (
  search_rowid INTEGER PRIMARY KEY,
  search_id TEXT NOT NULL,
  at TEXT NOT NULL,
  vector BLOB NOT NULL
)
""",
)


def columns_in(statement: str) -> list[str]:
    """Names of the columns that one of the CREATE TABLE statements above declares."""
    return re.findall(r"[(,]\s*([a-z_]+) [A-Za-z]", statement)
