"""The index's tables and indexes of both dialects, as statements.

``kdb_search`` (and ``kdb_search_fts`` on SQLite) are KameleonDB's: created here only where missing, in the
shape KameleonDB creates them. The ``kdb_fast_…`` columns are ours; KameleonDB ignores them. Our own tables: see
:mod:`.migrations`.

Those of PostgreSQL are templates for :meth:`kdb_fast.tables.target.Target.statement`.
"""

from __future__ import annotations

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
