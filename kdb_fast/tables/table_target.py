"""A table of vectors beside the table that is read, as a target: its rows are ours to insert, update and delete.

It has the key of what is read, and what is known of a row (the hash of its text, which model made its vector) lies in
the row itself. A vector is ours as long as it is the one that was written: its SHA-256 stands beside it, so that
another program's is never taken for ours. On SQLite the table may be one of the extension sqlite-vec, which holds
vectors only: what is known then lies in a table of ours.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import SchemaError
from ..receipt import TargetNames
from ..records import storable_key
from .column_target import VectorColumn, state_table
from .keyed_table import KeyedTable
from .names import qualified
from .relation import Relation

HASH = "kdb_fast_hash"
SEAL = "kdb_fast_seal"
STATE_COLUMNS = (HASH, SEAL, "kdb_fast_fingerprint", "kdb_fast_run", "kdb_fast_at")
"""What is known of a row: SHA-256 of the record's whole text as it was read, SHA-256 of the vector as it is stored, the
model, the run that has written it, and when."""

VERSION = "kdb_fast_version"
"""In PostgreSQL: the transaction that has written the row, as the table itself notes it. Where that is still the row's
own (``xmin``), nobody has written it since, and its vector need not be hashed: 384 dimensions take the server 15 us.
After a dump, or replication, the hash tells."""

CHUNK_COLUMNS = ("chunk", "start_char", "end_char", "kdb_fast_chunks")
"""Of a piece: its number from 0, its first character in the record's text and the one behind its last, and how many
pieces the record has."""
REVISION = "kdb_fast_revision"
"""Of a piece that is put aside: tells apart two records of one key."""
CONTENT = "content"
TSVECTOR = "tsv"
RESERVED = (*CHUNK_COLUMNS, CONTENT, TSVECTOR, *STATE_COLUMNS, VERSION)
"""Names that a column of the key cannot have, nor that of the vectors."""


@dataclass(frozen=True)
class TableTarget(KeyedTable):
    """Where the vectors of records go: a row for each.

    Attributes:
        vector: The column of the vectors.
        source: The table that its key refers to; None where what is read is none, or one of another database.
        content: The text is stored with its vector, for searches.
        chunked: A record has a row for each piece of its text.
        keyword: Keyword search: in PostgreSQL the text search configuration; on SQLite, where the text is stored then,
            the tokenizer of FTS5; '' without.
        vec0: SQLite: the table is one of sqlite-vec, whose rowid is the key.
        text: SQL expression of a record's text over the columns of ``source``; '' without one.
    """

    vector: VectorColumn
    source: Relation | None = None
    content: bool = False
    chunked: bool = False
    keyword: str = ""
    vec0: bool = False
    text: str = ""

    @property
    def identity(self) -> str:
        """Under which runs and rejects are kept: the table itself, so that no other name leads to it beside."""
        return self.shown if self.schema is not None else self.shown.lower()  # SQLite compares names without case

    @property
    def names(self) -> TargetNames:
        """As the receipt of a run has them."""
        return TargetNames(self.name, self.shown, self.vector.name, tuple(key.name for key in self.key))

    @functools.cached_property
    def parts(self) -> dict[str, str]:
        """``{table}`` is the table of vectors, ``{known}`` that of what is known of them, ``{source}`` the one that the
        key refers to, ``{aside}`` that of pieces whose record is not whole yet; ``{embedding}`` is the column of the
        vectors, ``{columns}`` are those of the key, ``{written}`` the others."""
        source = self.source
        return {
            **super().parts,
            "source": "" if source is None else qualified(source.schema, source.name, self.home.dialect),
            "known": self.home.table(state_table(self.name)) if self.vec0 else self.quoted,
            "embedding": self.column(self.vector.name),
            "columns": self.each_key("{column}"),
            "written": ", ".join(map(self.column, self.written)),
            "aside": self.home.table(self.aside),
            "revision": REVISION,
        }

    @property
    def aside(self) -> str:
        """Name of the table of pieces of records that are not whole yet; in the schema of our own tables."""
        return state_table(self.name, "pieces")

    @property
    def written(self) -> tuple[str, ...]:
        """Names of the columns beside those of the key, in their order."""
        return (
            *(CHUNK_COLUMNS if self.chunked else ()),
            *((CONTENT,) if self.content else ()),
            self.vector.name,
            *STATE_COLUMNS,
            *((TSVECTOR,) if self.keyword and self.home.dialect == "postgresql" else ()),
        )

    @property
    def unique(self) -> tuple[str, ...]:
        """Names of the columns of its primary key."""
        return (*(key.name for key in self.key), *(CHUNK_COLUMNS[:1] if self.chunked else ()))

    def has_record(self, row: str, lock: str = "") -> str:
        """The condition that the table which the key refers to has the record of a row.

        Args:
            row: Template of a column of the row's key, such as ``s.key_{number}::{type}``.
            lock: How the record is locked, as SELECT writes it.
        """
        same = self.same_key("r.{column}", row)
        return f"EXISTS (SELECT 1 FROM {self.parts['source']} r WHERE {same}{lock})"  # noqa: S608 - names


def check_names(target: TableTarget) -> None:
    """Raise SchemaError where two columns of the table would have the same name."""
    names = [key.name.lower() for key in target.key]
    taken = [key.name for key in target.key if key.name.lower() in RESERVED]
    if taken or target.vector.name.lower() in (*names, *RESERVED):
        name = storable_key(taken[0] if taken else target.vector.name)
        what = "a key" if taken else "vectors"
        raise SchemaError(
            f"The table {target.shown} cannot have {what} in a column {name}: another of its columns has this name.",
            remedy="Read a query that names the column otherwise: --query 'SELECT … AS …'."
            if taken
            else "Give the vectors another column: --vector NAME.",
        )


def check_columns(target: TableTarget, found: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    """Raise SchemaError where the table that is there is not what a run can write.

    Args:
        found: Its columns with their types.
        wanted: Those of the key, and the others that a run writes, with theirs.
    """
    if not any(name in found for name in STATE_COLUMNS):
        raise SchemaError(
            f"{target.shown} is another program's table: it has no column {', '.join(STATE_COLUMNS[:2])} ….",
            remedy="Give the vectors a table of their own: --into NAME. Or a column of it: --vector NAME.",
        )
    in_pieces = CHUNK_COLUMNS[-1] in found
    if in_pieces != target.chunked:
        rows = ("a piece of a text", "a whole text")
        raise SchemaError(
            f"A row of {target.shown} is {rows[not in_pieces]}; this run writes {rows[not target.chunked]} into each.",
            remedy=f"{'Give' if in_pieces else 'Leave out'} --chunk. Or write into another table, --into NAME, or run: "
            f"DROP TABLE {target.shown}; then all is embedded again.",
        )
    differing = [
        f"{storable_key(name)} is {f'of type {found[name]}' if name in found else 'missing'}, expected {kind}"
        for name, kind in wanted.items()
        if found.get(name) != kind
    ]
    if differing:
        raise SchemaError(
            f"The table {target.shown} was made for something else: {'; '.join(differing)}.",
            remedy=f"Run: DROP TABLE {target.shown}; then all is embedded again. Or write into another: --into NAME.",
        )
