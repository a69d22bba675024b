"""Which schemas hold our own tables, and the targets that are kept there.

A name is looked for where the search path leads first, as the database does it, then in every schema that has targets:
``--state-schema`` need not be said again to find what was made with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from ..db.address import DatabaseAddress
from ..errors import SchemaError
from ..records import storable_key
from ..tables.definition import Definition
from ..tables.describe import find_kept, no_target
from ..tables.target import TARGETS, Dialect, Rows, Target, columns_of, find_target

LIST = "SELECT definition FROM {kdb_fast_targets} ORDER BY name"

SCHEMAS = """
SELECT n.nspname::text, has_schema_privilege(n.oid, 'USAGE'), array_agg(c.relname::text ORDER BY c.relname),
  array_agg(c.relname::text ORDER BY c.relname) FILTER (WHERE NOT has_table_privilege(c.oid, 'SELECT')),
  current_user::text
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE c.relname BETWEEN 'kdb_fast_' AND 'kdb_fast_~' AND c.relkind = 'r' AND n.oid <> pg_my_temp_schema()
GROUP BY n.oid, n.nspname ORDER BY n.nspname <> %(home)s, n.nspname
"""


class Kept(NamedTuple):
    """A target that is kept.

    Attributes:
        home: Where our own tables of it are.
        definition: As it is kept.
    """

    home: Target
    definition: Definition

    def where(self, address: DatabaseAddress) -> DatabaseAddress:
        """The address with the schema of our own tables."""
        return replace(address, schema=self.home.schema)


@dataclass(frozen=True)
class Homes:
    """Where our own tables are in a database.

    Attributes:
        home: Where a new target would be kept: the schema that was named, or that the search path leads to.
        alone: It was named: no target of another is meant.
        schemas: All that have tables of ours, ``home`` first; () on SQLite.
        kept: The targets that this role may read, those of ``home`` first.
        hidden: What this role needs to read the others, a sentence for each schema.
    """

    home: Target
    alone: bool = False
    schemas: tuple[str, ...] = ()
    kept: tuple[Kept, ...] = ()
    hidden: Mapping[str, str] = field(default_factory=dict)

    @property
    def meant(self) -> list[Kept]:
        """The targets that a command may mean."""
        return [kept for kept in self.kept if kept.home == self.home or not self.alone]

    @property
    def notes(self) -> tuple[str, ...]:
        """What this role needs to read the targets that it may mean and not read, a sentence each."""
        return tuple(note for schema, note in self.hidden.items() if schema == self.home.schema or not self.alone)

    def of(self, home: Target) -> list[Definition]:
        """Those that are kept there."""
        return [kept.definition for kept in self.kept if kept.home == home]

    def beside(self, home: Target) -> list[Kept]:
        """Those that are kept elsewhere."""
        return [kept for kept in self.kept if kept.home != home]

    def find(self, name: str) -> Kept | None:
        """The target of this name; None where there is none.

        Raises:
            SchemaError: The search path leads to none, and several other schemas have one.
        """
        named = [kept for kept in self.meant if find_kept(name, [kept.definition], self.home.dialect)]
        if len(named) > 1 and named[0].home != self.home:
            places = [kept.home.shown() for kept in named]
            raise SchemaError(
                f"There are targets {storable_key(name)} in the schemas {', '.join(places)}.",
                remedy=f"Say which is meant: --state-schema {places[0]}",
            )
        return named[0] if named else None

    def one(self, name: str) -> Kept:
        """The target of this name.

        Raises:
            SchemaError: There is none, or several, or this role may not read it.
        """
        found = self.find(name)
        if found is None:
            raise no_target(name, [kept.definition for kept in self.meant], self.notes)
        return found


def find_homes(rows: Rows, dialect: Dialect, schema: str | None = None) -> Homes:
    """Where our own tables are, and the targets that are kept in them.

    Args:
        rows: Runs statements on the database.
        schema: The only one that is meant, where it was named.

    Raises:
        SchemaError: There is no such schema, or a target was described by a newer kdb-fast.
    """
    home = find_target(rows, dialect, schema, plain=True)
    if dialect == "sqlite":
        return Homes(home, kept=tuple(_kept(rows, home) if columns_of(rows, home, [TARGETS]) else ()))
    schemas: list[str] = []
    kept: list[Kept] = []
    hidden: dict[str, str] = {}
    for name, usable, tables, unreadable, role in rows(SCHEMAS, {"home": home.schema}):
        schemas.append(name)
        there = replace(home, schema=name)
        if usable and TARGETS not in (unreadable or ()):
            kept += _kept(rows, there) if TARGETS in tables else ()
        else:
            hidden[name] = _hidden(there, role, usable, unreadable or ())
    return Homes(home, schema is not None, tuple(schemas), tuple(kept), hidden)


def _kept(rows: Rows, home: Target) -> Iterator[Kept]:
    for (definition,) in rows(home.text(LIST), {}):
        yield Kept(home, Definition.from_json(definition))


def _hidden(home: Target, role: str, usable: bool, unreadable: Iterable[str]) -> str:
    to = Target(role).shown()
    grants = [] if usable else [f"GRANT USAGE ON SCHEMA {home.shown()} TO {to};"]
    if tables := ", ".join(map(home.shown, unreadable)):
        grants.append(f"GRANT SELECT ON {tables} TO {to};")
    return f"The role {to} may not read the targets in the schema {home.shown()}; let its owner run: {' '.join(grants)}"
