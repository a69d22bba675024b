"""Targets that their owners have described are kept under their names (:mod:`kdb_fast.tables.definition`)."""

from __future__ import annotations

POSTGRESQL = (
    """
CREATE TABLE IF NOT EXISTS {kdb_fast_targets} (
  name text PRIMARY KEY,
  definition text NOT NULL,
  created_at timestamptz NOT NULL DEFAULT now(),
  updated_at timestamptz NOT NULL DEFAULT now()
)
""",
)

SQLITE = (
    # As the tables of their state, whose names SQLite compares without case.
    """
CREATE TABLE IF NOT EXISTS {kdb_fast_targets} (
  name TEXT NOT NULL COLLATE NOCASE PRIMARY KEY,
  definition TEXT NOT NULL,
  created_at TEXT NOT NULL DEFAULT (strftime('%Y-%m-%d %H:%M:%f', 'now')),
  updated_at TEXT NOT NULL DEFAULT (strftime('%Y-%m-%d %H:%M:%f', 'now'))
)
""",
)
