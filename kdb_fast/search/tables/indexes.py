"""PostgreSQL: the vector indexes of a column, and the order that each of them gives."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any

from ..readers.postgresql import EF_PER_ROW, MAX_EF_SEARCH, SCAN_PER_ROW

OPERATORS = ("<=>", "<#>", "<->", "<+>", "<~>", "<%>")
"""pgvector's operators that order: cosine, inner product, Euclidean, taxicab, Hamming, Jaccard. The nearer a ranking
comes to that by cosine, the further in front."""

OF_BITS = ("<~>", "<%>")
"""Those between bits, of which a vector has one a number."""

FIND = """
SELECT c.relname::text, m.amname::text, pg_get_indexdef(i.indexrelid, 1, false), o.oprname::text,
  format('OPERATOR(%%I.%%s)', n.nspname, o.oprname), i.indkey[0] <> 0, i.indpred IS NOT NULL,
  coalesce((SELECT substr(option, 7)::int FROM unnest(c.reloptions) option WHERE option LIKE 'lists=%%'), 100)
FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_am m ON m.oid = c.relam
JOIN pg_opclass k ON k.oid = i.indclass[0]
JOIN pg_amop a ON a.amopfamily = k.opcfamily AND a.amoppurpose = 'o' AND a.amoplefttype = k.opcintype
JOIN pg_operator o ON o.oid = a.amopopr JOIN pg_namespace n ON n.oid = o.oprnamespace
WHERE m.amname IN ('hnsw', 'ivfflat') AND i.indisvalid AND i.indnkeyatts = 1
AND (i.indrelid = to_regclass({table}) OR i.indrelid IN (SELECT relid FROM pg_partition_tree(to_regclass({table}))))
AND EXISTS (
  SELECT FROM pg_attribute f JOIN pg_depend d ON d.refobjid = f.attrelid AND d.refobjsubid = f.attnum
  WHERE f.attrelid = i.indrelid AND f.attname = {column} AND d.refclassid = 'pg_class'::regclass
  AND d.classid = 'pg_class'::regclass AND d.objid = i.indexrelid
  AND (i.indkey[0] = 0 OR i.indkey[0] = f.attnum))
"""


@dataclass(frozen=True)
class VectorIndex:
    """What an index orders rows by; that of the parts of a partitioned table counts once.

    Attributes:
        names: Of the indexes.
        method: ``hnsw`` or ``ivfflat``.
        expression: Over the columns of the table, such as ``(embedding)::halfvec(384)``.
        distance: Name of the operator.
        operator: The same for a statement, with its schema.
        whole: It is of the column itself, not of an expression.
        partial: It does not hold all rows.
        lists: Of ivfflat.
    """

    names: frozenset[str]
    method: str
    expression: str
    distance: str
    operator: str
    whole: bool
    partial: bool
    lists: int = 0

    @property
    def exact(self) -> bool:
        """Whether it orders by what a search ranks by."""
        return self.whole and self.distance == "<=>"

    @property
    def fits(self) -> bool:
        """Whether a ranking in its order is right, whether the server uses it or not."""
        return self.exact and not self.partial

    def order(self, query: str, column: str) -> str:
        """What rows are ordered by, for the query's vector as SQL of the column's own type."""
        if self.whole:
            return f"{self.expression} {self.operator} {query}"
        # The same expression over the query: its column is the query there.
        of_query = f"(SELECT {self.expression} FROM (SELECT {query} AS {column}) kdb_fast_query)"  # noqa: S608
        return f"{self.expression} {self.operator} {of_query}"

    def settings(self, rows: int, *, iterative: bool) -> dict[str, str]:
        """Settings for a scan that gives so many rows.

        Args:
            iterative: An index goes on until there are enough (pgvector 0.8); without, all must come from one list of
                candidates.
        """
        if self.method == "ivfflat":
            # pgvector's own advice: the root of the number of lists. Its default is one list.
            settings = {"ivfflat.probes": str(math.ceil(math.sqrt(self.lists)))}
            return {**settings, "ivfflat.iterative_scan": "relaxed_order"} if iterative else settings
        wanted = rows * (EF_PER_ROW if iterative else SCAN_PER_ROW)
        settings = {"hnsw.ef_search": str(min(max(wanted, 40), MAX_EF_SEARCH))}
        if iterative:
            settings["hnsw.iterative_scan"] = "strict_order"
            settings["hnsw.max_scan_tuples"] = str(rows * SCAN_PER_ROW)
        return settings


def find_indexes(found: Iterable[tuple[Any, ...]]) -> list[VectorIndex]:
    """The indexes of a column, the best first, from the rows of :data:`FIND`."""
    indexes: dict[tuple[Any, ...], VectorIndex] = {}
    for name, method, expression, distance, operator, whole, partial, lists in found:
        key = (method, expression, operator, partial)
        index = VectorIndex(frozenset({name}), method, expression, distance, operator, whole, partial, lists)
        before = indexes.get(key)
        indexes[key] = index if before is None else replace(index, names=index.names | before.names)
    known = [index for index in indexes.values() if index.distance in OPERATORS]
    return sorted(known, key=lambda i: (OPERATORS.index(i.distance), not i.whole, i.partial, i.method != "hnsw"))


def uses(plan: Any, names: Collection[str]) -> bool:
    """Whether a plan, as EXPLAIN gives it in JSON, reads one of these indexes."""
    if isinstance(plan, dict):
        return plan.get("Index Name") in names or uses(list(plan.values()), names)
    return isinstance(plan, list) and any(uses(part, names) for part in plan)
