"""PostgreSQL: the rights that a run on a table of any kind needs, asked for all at once, before anything is read."""

from __future__ import annotations

from collections.abc import Iterable

from ...errors import SchemaError
from ...records import storable_key
from ...tables.column_target import state_table
from ...tables.definition import Definition
from ...tables.target import MIGRATIONS, OWN, REJECTS, RUNS, STATE, TARGETS, Params, Rows, Target

WRITE = ("SELECT", "INSERT", "UPDATE", "DELETE")


class _Rights:
    """Rights that are needed, each with the condition that this role has it."""

    def __init__(self) -> None:
        self.params = Params("postgresql")
        self.needed: list[tuple[str, str, str]] = []
        """Condition (NULL where the object does not exist), right, and on what."""

    def oid(self, schema: str, table: str) -> str:
        return (
            "(SELECT c.oid FROM pg_catalog.pg_class c "  # noqa: S608 - parameters
            "JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace "
            f"WHERE n.nspname = {self.params(schema)}::name AND c.relname = {self.params(table)}::name)"
        )

    def on_table(self, schema: str, table: str, rights: Iterable[str]) -> None:
        oid, shown = self.oid(schema, table), Target(schema).shown(table)
        for right in rights:
            self.needed.append((f"has_table_privilege({oid}, {self.params(right)}::text)", right, shown))

    def on_schema(self, schema: str, right: str, unless: str = "false") -> None:
        has = f"has_schema_privilege({self.params(schema)}::name, {self.params(right)}::text)"
        self.needed.append((f"({unless} OR {has})", right, f"SCHEMA {Target(schema).shown()}"))

    def lacking(self, rows: Rows) -> dict[str, list[str]]:
        """On what → which rights are missing."""
        (has,) = rows("SELECT " + ", ".join(condition for condition, _, _ in self.needed), self.params.values)
        lacking: dict[str, list[str]] = {}
        for (_, right, what), is_there in zip(self.needed, has, strict=True):
            if is_there is False:
                lacking.setdefault(what, []).append(right)
        return lacking


def check_table_rights(rows: Rows, home: Target, definition: Definition) -> None:
    """Raise SchemaError where this role may not do what a run of a target does; names every right, with its GRANT.

    Args:
        rows: Runs statements on the database that is written.
        home: Where our own tables are.
    """
    rights, schema = _Rights(), str(home.schema)
    own = [*OWN, *([] if definition.into else [state_table(definition.name)])]
    there = " AND ".join(f"{rights.oid(schema, table)} IS NOT NULL" for table in own)
    rights.on_schema(schema, "USAGE")
    rights.on_schema(schema, "CREATE", unless=f"({there})")
    for table in (RUNS, REJECTS, STATE, TARGETS, *own[len(OWN) :]):
        rights.on_table(schema, table, WRITE)
    rights.on_table(schema, MIGRATIONS, ["SELECT"])
    if definition.table and not definition.source:
        rights.on_table(str(definition.schema), definition.table, ["SELECT"])
    if definition.into:
        into_schema = str(definition.into_schema)
        rights.on_schema(into_schema, "USAGE")
        rights.on_schema(into_schema, "CREATE", unless=f"{rights.oid(into_schema, definition.into)} IS NOT NULL")
        rights.on_table(into_schema, definition.into, WRITE)
    else:
        vector = definition.vector
        rights.on_table(str(definition.schema), definition.table, ["SELECT"])
        oid = rights.oid(str(definition.schema), definition.table)
        named = rights.params(vector)
        may_update = (
            "(SELECT has_column_privilege(a.attrelid, a.attnum, 'UPDATE') FROM pg_catalog.pg_attribute a "  # noqa: S608 - parameters
            f"WHERE a.attrelid = {oid} AND a.attname = {named}::name)"
        )
        rights.needed.append((may_update, f"UPDATE ({Target(vector).shown()})", definition.written))
    if home.pgvector is not None:
        rights.on_schema(home.pgvector, "USAGE")
    rights.needed.append(("has_database_privilege(current_database(), 'TEMP')", "TEMP", "DATABASE …"))
    if lacking := rights.lacking(rows):
        ((role, database),) = rows("SELECT current_user::text, current_database()::text", {})
        role, database = Target(role).shown(), Target(database).shown()
        wanted = [
            f"{', '.join(dict.fromkeys(names))} ON {what.replace('DATABASE …', f'DATABASE {database}')}"
            for what, names in lacking.items()
        ]
        raise SchemaError(
            f"The role {role} lacks rights for the target {storable_key(definition.name)}: {'; '.join(wanted)}.",
            remedy=f"Let the owner run: {' '.join(f'GRANT {right} TO {role};' for right in wanted)}"
            + (
                " Or name a schema for kdb-fast's own tables: --state-schema NAME"
                * (f"SCHEMA {home.shown()}" in lacking)
            ),
        )
