"""PostgreSQL: the index that a user's table gets where it has none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .check import vector_version
from .index_catalog import SearchIndex, cut_name
from .indexed import Indexed

if TYPE_CHECKING:
    import psycopg

    Cursor = psycopg.Cursor[tuple[Any, ...]]

INDEX_ROWS = 10_000
"""Rows with a vector from which a table gets an index."""

MOST_NUMBERS = {"vector": 2_000, "halfvec": 4_000}
"""Longest vector of each type that an HNSW index of pgvector holds."""

HALF_VECTORS = (0, 7)
"""The version of pgvector that has halfvec."""

_COLUMN = """
SELECT b.typname::text, CASE WHEN t.typtype = 'd' THEN t.typtypmod ELSE a.atttypmod END, c.relkind = 'p',
  quote_ident(a.attname), (SELECT quote_ident(n.nspname) FROM pg_extension e
   JOIN pg_namespace n ON n.oid = e.extnamespace WHERE e.extname = 'vector')
FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid JOIN pg_type t ON t.oid = a.atttypid
JOIN pg_type b ON b.oid = coalesce(nullif(t.typbasetype, 0), t.oid)
WHERE c.oid = to_regclass(%s) AND a.attname = %s AND a.attnum > 0 AND NOT a.attisdropped
"""


def default_index(cursor: Cursor, indexed: Indexed, dimensions: int) -> SearchIndex | str:
    """The index that a table without any gets, HNSW for the cosine; or why it gets none.

    A column that takes vectors of any length is indexed as one of ``dimensions``, and one that is too long for an index
    in half precision.
    """
    row = cursor.execute(_COLUMN.encode(), (indexed.regclass, indexed.vector)).fetchone()
    assert row is not None
    # Names as the server writes them in a definition: what was built is compared with it.
    kind, declared, partitioned, column, pgvector = row
    used = kind if dimensions <= MOST_NUMBERS[kind] else "halfvec"
    if dimensions > MOST_NUMBERS[used]:
        return f"an index of pgvector holds at most {MOST_NUMBERS[used]:,} numbers, and a vector has {dimensions:,}"
    if used == "halfvec" and vector_version(cursor) < HALF_VECTORS:
        return f"vectors of {dimensions:,} numbers are indexed from pgvector 0.7 on"
    some = f"SELECT FROM {indexed.qualified} WHERE {column} IS NOT NULL LIMIT {INDEX_ROWS}"
    if cursor.execute(f"SELECT count(*) FROM ({some}) v".encode()).fetchone() != (INDEX_ROWS,):  # noqa: S608 - quoted
        return f"one is made from {INDEX_ROWS:,} rows on"
    if declared <= 0:
        length = f"{pgvector}.vector_dims({column})"
        statement = f"SELECT {length} FROM {indexed.qualified} WHERE {length} <> {int(dimensions)} LIMIT 1"  # noqa: S608
        other = cursor.execute(statement.encode()).fetchone()
        if other is not None:
            return f"{indexed.vector} holds vectors of {other[0]:,} numbers beside those of {dimensions:,}"
    if declared <= 0 or used != kind:
        column = f"(({column})::{pgvector}.{used}({int(dimensions)}))"
    using = f"USING hnsw ({column} {pgvector}.{used}_cosine_ops)"
    name = cut_name(f"{indexed.table}_{indexed.vector}", "_idx")
    return SearchIndex(indexed.schema, indexed.table, name, using, vector=True, partitioned=partitioned)
