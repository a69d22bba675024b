"""The tables as kdb-fast made them before they had versions. Where they are there already, they stay as they are."""

from __future__ import annotations

POSTGRESQL = (
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

SQLITE = (
    """
CREATE TABLE IF NOT EXISTS {kdb_fast_runs} (
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
CREATE TABLE IF NOT EXISTS {kdb_fast_rejects} (
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
    "CREATE TABLE IF NOT EXISTS {kdb_fast_state} (key TEXT PRIMARY KEY, value TEXT NOT NULL)",
    # Float32 little-endian copy of each vector, for search: reading KameleonDB's JSON text is 100 times slower.
    # The copy is true as long as `search_id` and `at` equal id and updated_at of the row in kdb_search: rowids
    # may be given anew by VACUUM or a dump, and KameleonDB does not know this table.
    """
CREATE TABLE IF NOT EXISTS {kdb_fast_vectors} (
  search_rowid INTEGER PRIMARY KEY,
  search_id TEXT NOT NULL,
  at TEXT NOT NULL,
  vector BLOB NOT NULL
)
""",
)
