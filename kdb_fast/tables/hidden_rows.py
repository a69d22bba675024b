"""Tables that may not show this session all their rows: those under row level security, views, foreign tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

from ..errors import SchemaError
from .target import Rows, Target


class HiddenRowsError(SchemaError):
    """Records may be there that this session does not see; the message says why."""


class Relation(NamedTuple):
    """What a name belongs to.

    Attributes:
        kind: PostgreSQL's ``relkind``: ``r`` for a table, ``p`` for a partitioned one, ``v`` for a view.
        filtered: Whether row level security leaves rows out for this role.
        role: The role's name; '' on SQLite.
    """

    kind: str
    filtered: bool = False
    role: str = ""


def relations(rows: Rows, target: Target, tables: Sequence[str]) -> dict[str, Relation]:
    """What each of these names belongs to; names of nothing are left out."""
    if target.dialect == "sqlite":
        # SQLite compares names without case.
        found = rows(
            "SELECT t.value, m.type FROM json_each(:tables) t "
            "JOIN sqlite_master m ON m.name = t.value COLLATE NOCASE AND m.type IN ('table', 'view')",
            {"tables": json.dumps(list(tables))},
        )
        return {name: Relation("v" if kind == "view" else "r") for name, kind in found}
    found = rows(
        "SELECT t, c.relkind::text, row_security_active(c.oid), current_user::text "
        "FROM unnest(%(tables)s::text[], %(qualified)s::text[]) x(t, q) JOIN pg_class c ON c.oid = to_regclass(q)",
        {"tables": list(tables), "qualified": [target.regclass(table) for table in tables]},
    )
    return {row[0]: Relation(*row[1:]) for row in found}


def check_unfiltered(rows: Rows, target: Target, tables: Sequence[str], why: str) -> None:
    """Raise SchemaError where row level security lets this role see only a part of one of the tables.

    Args:
        why: Why it must see all of it, for the message.
    """
    for table, relation in relations(rows, target, tables).items():
        if relation.filtered:
            raise SchemaError(
                f"Row level security on {target.shown(table)} lets the role {relation.role} see only a part of it; "
                f"{why}.",
                remedy=f"Run as a role that sees all of it: the owner (without FORCE ROW LEVEL SECURITY), or one with "
                f"BYPASSRLS (ALTER ROLE {relation.role} BYPASSRLS;).",
            )


def check_whole(rows: Rows, target: Target, tables: Sequence[str]) -> frozenset[str]:
    """Names of those of the tables that exist.

    Raises:
        HiddenRowsError: One of them may not show this session all its rows.
    """
    found = relations(rows, target, tables)
    for table, (kind, filtered, role) in found.items():
        if kind not in ("r", "p"):
            what = {"v": "a view", "m": "a materialized view", "f": "a foreign table"}.get(kind, "no table")
            raise HiddenRowsError(f"{target.shown(table)} is {what}, which may leave records out")
        if filtered:
            raise HiddenRowsError(
                f"row level security lets the role {role} see only a part of {target.shown(table)}; "
                "run as a role that sees all of it (BYPASSRLS, or the table's owner)"
            )
    return frozenset(found)
