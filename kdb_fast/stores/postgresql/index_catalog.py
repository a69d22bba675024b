"""PostgreSQL: the search indexes of a table and of all its partitions, as the server's catalogue has them.

Those are the indexes of the column of the vectors, or of an expression over it, whatever their access method (hnsw,
ivfflat or another extension's), and the GIN indexes of the columns for keyword search. Others are left alone, such as a
B-tree that only has the column in its condition.

A partitioned index stands for one index on each partition, which are attached to it; it may be invalid where some
partition has none, and a partition may have indexes of its own that are attached to nothing. All that makes up this
tree is read into :class:`SearchIndex`, so that an index can be dropped, remembered in the database and made again.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from ...tables.target import identifier

if TYPE_CHECKING:
    import psycopg

    from .indexed import Indexed

    Cursor = psycopg.Cursor[tuple[Any, ...]]

Name = tuple[str, str]
"""Schema and name of a table or index."""

NAME_BYTES = 63
"""Longest name of an index: NAMEDATALEN - 1 of a server as it is usually built."""

MOST_BYTES_OF_LETTER = 4
"""Of UTF-8: so many bytes may be missing from the longest name where it was cut before a letter."""


@dataclass(frozen=True)
class SearchIndex:
    """A vector or full-text index.

    Attributes:
        schema: Of the table, and so of the index.
        using: The rest of its definition, from ``USING`` on, with every name qualified.
        vector: Whether it ranks vectors; the others are full-text indexes.
        partitioned: Whether it stands for the indexes that are attached to it.
        valid: Whether the server uses it; of a partitioned one, whether every partition has its part.
        tablespace: "" for the database's own; None for that in which the role's new tables are made.
        statistics: Targets of its columns that are not the default, by number.
        parent: The index to which it is attached.
        fixed: It cannot be dropped and made again: something depends on it that would be lost.
    """

    schema: str
    table: str
    name: str
    using: str
    vector: bool
    partitioned: bool = False
    valid: bool = True
    tablespace: str | None = None
    comment: str | None = None
    statistics: dict[str, int] = field(default_factory=dict)
    parent: Name | None = None
    fixed: bool = False

    @property
    def key(self) -> Name:
        return self.schema, self.name

    @property
    def place(self) -> Name:
        """The table that it is on."""
        return self.schema, self.table

    def statement(self, name: str, *, only: bool = False, concurrently: bool = False) -> str:
        """The statement that makes it under this name; of a partitioned one with all parts, or ``only`` itself."""
        how = "CONCURRENTLY " if concurrently and not self.partitioned else ""
        on = f"{'ONLY ' if only else ''}{qualified(self.place)}"
        return f"CREATE INDEX {how}{identifier(name)} ON {on} {self.using}"

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any]) -> SearchIndex:
        parent = values["parent"]
        return SearchIndex(**{**values, "parent": None if parent is None else (parent[0], parent[1])})

    @property
    def is_ivfflat(self) -> bool:
        """Whether its lists are made of the vectors that there were when it was built."""
        return self.using.startswith("USING ivfflat")

    @staticmethod
    def from_definition(place: Name, pgvector: str, name: str, definition: str) -> SearchIndex:
        """An index of the search table by the statement that the server gave for it, without schemas of operator
        classes: ``pgvector`` is that of pgvector's."""
        on, _, using = definition.partition(" USING ")
        using = re.sub(r"(?<![.\w])(?=(?:vector|halfvec|sparsevec|bit)_\w+_ops\b)", f"{pgvector}.", using)
        vector = using.startswith(("hnsw", "ivfflat"))
        return SearchIndex(*place, name, f"USING {using}", vector, partitioned=" ON ONLY " in on)


@dataclass(frozen=True)
class Relation:
    """A table of the tree. ``leaf``: it holds rows, so it has indexes that can be searched."""

    parent: Name | None
    leaf: bool
    inside: bool


def qualified(name: Name) -> str:
    """A table or index for a statement."""
    return f"{identifier(name[0])}.{identifier(name[1])}"


_TREE = """
WITH tree AS (
  SELECT to_regclass(%(root)s)::oid AS oid WHERE to_regclass(%(root)s) IS NOT NULL
  UNION SELECT relid::oid FROM pg_partition_tree(to_regclass(%(root)s))
), named AS (
  SELECT oid, true AS inside FROM tree UNION ALL
  SELECT c.oid, false FROM unnest(%(schemas)s::text[], %(tables)s::text[]) AS t(schema, name)
  JOIN pg_namespace n ON n.nspname = t.schema JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = t.name
  WHERE c.relkind IN ('r', 'p') AND c.oid NOT IN (SELECT oid FROM tree)
)
"""
"""The search table with all its partitions, and other tables by name."""

RELATIONS = (
    _TREE
    + """
SELECT n.nspname::text, c.relname::text, pn.nspname::text, p.relname::text, c.relkind = 'r', named.inside
FROM named JOIN pg_class c ON c.oid = named.oid JOIN pg_namespace n ON n.oid = c.relnamespace
LEFT JOIN pg_inherits h ON h.inhrelid = c.oid AND c.relispartition
LEFT JOIN pg_class p ON p.oid = h.inhparent LEFT JOIN pg_namespace pn ON pn.oid = p.relnamespace
ORDER BY 1, 2
"""
)

INDEXES = (
    _TREE  # noqa: S608 - constants
    + """
SELECT n.nspname::text, t.relname::text, c.relname::text, pg_get_indexdef(c.oid),
  format('CREATE INDEX %%I ON %%s%%I.%%I ', c.relname, CASE WHEN c.relkind = 'I' THEN 'ONLY ' ELSE '' END,
         n.nspname, t.relname),
  m.amname <> 'gin', c.relkind = 'I', i.indisvalid, coalesce(s.spcname::text, ''),
  obj_description(c.oid, 'pg_class'),
  (SELECT coalesce(jsonb_object_agg(a.attnum::text, a.attstattarget), '{}') FROM pg_attribute a
   WHERE a.attrelid = c.oid AND a.attstattarget >= 0),
  pn.nspname::text, p.relname::text,
  i.indisunique OR i.indisexclusion OR i.indisclustered OR i.indisreplident
    OR EXISTS (SELECT FROM pg_constraint k WHERE k.conindid = c.oid)
    OR EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid
               AND d.refclassid = 'pg_extension'::regclass)
    OR (p.oid IS NOT NULL AND pi.indrelid NOT IN (SELECT oid FROM named))
FROM named JOIN pg_index i ON i.indrelid = named.oid
JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_am m ON m.oid = c.relam
JOIN pg_class t ON t.oid = i.indrelid JOIN pg_namespace n ON n.oid = t.relnamespace
LEFT JOIN pg_tablespace s ON s.oid = c.reltablespace
LEFT JOIN pg_inherits h ON h.inhrelid = c.oid LEFT JOIN pg_class p ON p.oid = h.inhparent
LEFT JOIN pg_namespace pn ON pn.oid = p.relnamespace LEFT JOIN pg_index pi ON pi.indexrelid = p.oid
WHERE m.amname NOT IN ('btree', 'hash', 'gist', 'spgist', 'brin') AND EXISTS (
  SELECT FROM pg_attribute a WHERE a.attrelid = i.indrelid
  AND (a.attnum = ANY (i.indkey::int2[]) OR i.indexprs::text ~ (':varattno ' || a.attnum || ' '))
  AND CASE WHEN m.amname = 'gin' THEN a.attname = ANY (%(texts)s::text[]) ELSE a.attname = %(vector)s END)
ORDER BY 1, 2, 3
"""
)
"""What a condition (``indpred``) refers to does not count; ``pg_depend`` could not tell it from an expression."""


OBSTACLES = (
    _TREE  # noqa: S608 - constants
    + """
SELECT (SELECT format('%%I.%%I', n.nspname, c.relname) FROM named JOIN pg_class c ON c.oid = named.oid
        JOIN pg_namespace n ON n.oid = c.relnamespace WHERE NOT pg_has_role(c.relowner, 'USAGE')
        ORDER BY c.oid <> to_regclass(%(root)s), 1 LIMIT 1),
  (SELECT quote_ident(n.nspname) FROM named JOIN pg_class c ON c.oid = named.oid
   JOIN pg_namespace n ON n.oid = c.relnamespace WHERE NOT has_schema_privilege(n.oid, 'CREATE') LIMIT 1),
  (SELECT quote_ident(s.spcname) FROM pg_tablespace s JOIN pg_database d ON d.datname = current_database()
   WHERE s.spcname = ANY (%(tablespaces)s::text[]) AND s.oid <> d.dattablespace
   AND NOT has_tablespace_privilege(s.oid, 'CREATE') LIMIT 1)
"""
)


def read_relations(cursor: Cursor, indexed: Indexed, others: Iterable[Name] = ()) -> dict[Name, Relation]:
    """The search table, its partitions on all levels, and those of the ``others`` that there are."""
    return {
        (schema, name): Relation(None if parent is None else (parent_schema, parent), leaf, inside)
        for schema, name, parent_schema, parent, leaf, inside in cursor.execute(RELATIONS, _names(indexed, others))
    }


def read_indexes(cursor: Cursor, indexed: Indexed, others: Iterable[Name] = ()) -> list[SearchIndex]:
    """The search indexes of these tables."""
    # Definitions name what the search path would find without its schema. The next session's path may be another.
    (path,) = cursor.execute("SELECT current_setting('search_path')").fetchone() or ("",)
    cursor.execute("SET LOCAL search_path = pg_catalog, pg_temp")
    rows = cursor.execute(INDEXES, _names(indexed, others)).fetchall()
    cursor.execute("SELECT set_config('search_path', %s, true)", (path,))
    found = []
    for (schema, table, name, definition, prefix, vector, partitioned, valid, tablespace, comment, statistics,
         parent_schema, parent, fixed) in rows:  # fmt: skip
        found.append(
            SearchIndex(
                schema, table, name, definition.removeprefix(prefix), vector, partitioned, valid, tablespace, comment,
                statistics, None if parent is None else (parent_schema, parent),
                fixed or not definition.startswith(prefix),
            )
        )  # fmt: skip
    return found


def _names(indexed: Indexed, others: Iterable[Name]) -> dict[str, Any]:
    others = list(others)
    return {
        "root": indexed.regclass,
        "vector": indexed.vector,
        "texts": list(indexed.texts),
        "schemas": [schema for schema, _ in others],
        "tables": [table for _, table in others],
    }


def obstacle(cursor: Cursor, indexed: Indexed, indexes: Iterable[SearchIndex]) -> str | None:
    """Why this role cannot make these indexes again; None if it can."""
    indexes = list(indexes)
    row = cursor.execute(
        OBSTACLES,
        {
            **_names(indexed, {index.place for index in indexes}),
            "tablespaces": [index.tablespace for index in indexes if index.tablespace],
        },
    ).fetchone()
    assert row is not None
    table, schema, tablespace = row
    if table is not None:
        return f"this role does not own {table}"
    if schema is not None:
        return f"this role may not create indexes in the schema {schema}"
    return None if tablespace is None else f"this role may not use the tablespace {tablespace}"


def free_name(cursor: Cursor, schema: str, name: str) -> str:
    """``name``, or with a number behind it, such that nothing in the schema has it."""
    rows = cursor.execute(
        "SELECT c.relname::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = %s",
        (schema,),
    )
    taken = {row[0] for row in rows}
    candidate, number = cut_name(name), 0
    while candidate in taken:
        number += 1
        candidate = cut_name(name, str(number))
    return candidate


def cut_name(name: str, end: str = "") -> str:
    """A name that the server will not cut, with ``end`` behind it."""
    return name.encode()[: NAME_BYTES - len(end.encode())].decode(errors="ignore") + end


def owner_of_name(cursor: Cursor, key: Name) -> str:
    """What has this name, for a message."""
    row = cursor.execute(
        "SELECT coalesce('an index of ' || i.indrelid::regclass::text, 'another object') FROM pg_class c "
        "JOIN pg_namespace n ON n.oid = c.relnamespace LEFT JOIN pg_index i ON i.indexrelid = c.oid "
        "WHERE n.nspname = %s AND c.relname = %s",
        key,
    ).fetchone()
    return str(row[0]) if row else "another object"


def create(cursor: Cursor, index: SearchIndex, name: str, *, only: bool = False) -> list[str]:
    """Make an index under this name, with its tablespace, comment and statistics; returns warnings."""
    tablespace, warnings = find_tablespace(cursor, index, name)
    if tablespace is None:
        cursor.execute("SET LOCAL default_tablespace TO DEFAULT")
    else:
        cursor.execute("SELECT set_config('default_tablespace', %s, true)", (tablespace,))
    cursor.execute(index.statement(name, only=only).encode())
    complete(cursor, index, name)
    return warnings


def find_tablespace(cursor: Cursor, index: SearchIndex, name: str) -> tuple[str | None, list[str]]:
    """The tablespace to make an index in, as :class:`SearchIndex` has it, and a warning where its own is gone."""
    tablespace = index.tablespace
    if tablespace and not cursor.execute("SELECT 1 FROM pg_tablespace WHERE spcname = %s", (tablespace,)).fetchone():
        return "", [f"The tablespace {tablespace} of {name} is gone; {name} is in the database's own."]
    return tablespace, []


def complete(cursor: Cursor, index: SearchIndex, name: str) -> None:
    """Give what was made under this name what an index has beside its definition: statistics and comment."""
    from psycopg import sql

    on = qualified((index.schema, name))
    for column, statistics in index.statistics.items():
        cursor.execute(f"ALTER INDEX {on} ALTER COLUMN {int(column)} SET STATISTICS {int(statistics)}".encode())
    if index.comment is not None:
        cursor.execute(sql.SQL("COMMENT ON INDEX {} IS {}").format(sql.SQL(on), sql.Literal(index.comment)))


def drop_copies(cursor: Cursor, index: SearchIndex, present: Iterable[SearchIndex]) -> None:
    """Drop what an interrupted REINDEX CONCURRENTLY of the index has left: invalid copies, by the server's names."""
    for copy in present:
        named = re.fullmatch(r"(.*)_cc(?:new|old)[0-9]*", copy.name)
        if named is None or copy.valid or (copy.place, copy.using) != (index.place, index.using):
            continue
        is_cut = len(copy.name.encode()) > NAME_BYTES - MOST_BYTES_OF_LETTER
        if named[1] == index.name or (is_cut and index.name.startswith(named[1])):
            cursor.execute(f"DROP INDEX IF EXISTS {qualified(copy.key)}".encode())
