"""A target as its owner has described it: what is read, where the vectors go, which model makes them.

It is kept under its name in ``kdb_fast_targets``, so that the second command is short. Names are kept, not numbers of
the catalogue, so that it survives a dump; and never a password.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from ..errors import SchemaError
from ..records import storable_key
from .target import Target

SQLITE_FORMS = ("blob", "json", "vec0")


@dataclass(frozen=True, kw_only=True)
class Definition:
    """What was asked for, with the names as the catalogue has them.

    Attributes:
        name: Under which it is kept.
        schema: Of the table that is read; None on SQLite and for a query.
        table: The table, view or the like that is read; '' for a query or files.
        query: A SELECT that gives the rows; '' for a table or files.
        filter: SQL condition that the rows of the table meet; '' for all.
        key: Names of the columns by which a row is told from others.
        text: Columns, or SQL expressions over the columns, that are embedded; () where ``template`` says it.
        template: Text with names of columns in braces; '' for the texts with a blank line between.
        vector: Name of the column of the vectors: one of ``table``'s, or of ``into``'s.
        form: How SQLite keeps a vector: ``blob``, ``json`` or ``vec0``; in PostgreSQL the column's type below any
            domain, ``vector`` or ``halfvec``. '' before the first run.
        into_schema: Of the table of vectors beside the table; None on SQLite and without one.
        into: The table of vectors beside the table; '' where the vectors go into a column of ``table``.
        chunk: Tokens of a piece that a long text is cut into; 0 for whole texts.
        overlap: Tokens that two neighbouring pieces share.
        document_prefix: Written before each text when it is embedded.
        query_prefix: Written before each query when it is embedded.
        keyword: PostgreSQL: the text search configuration; SQLite: the tokenizer of FTS5; '' without keyword search.
        model: Its name.
        provider: ``fastembed`` or ``openai``.
        base_url: Address of the provider, without any secret; '' for its own.
        dimensions: Length of the vectors.
        precision: Of the model; see :class:`~kdb_fast.settings.ReindexOptions`.
        index: What is done with the indexes of the vectors: '' (the rule), ``keep``, ``defer``, ``concurrently`` or
            ``none``.
        source: Address of the database that is read, without any secret; '' for the one that is written.
        created: What kdb-fast has made, so that it may remove it again: of ``column``, ``table``, ``view``.
    """

    name: str
    schema: str | None = None
    table: str = ""
    query: str = ""
    filter: str = ""
    key: tuple[str, ...] = ()
    text: tuple[str, ...] = ()
    template: str = ""
    vector: str = "embedding"
    form: str = ""
    into_schema: str | None = None
    into: str = ""
    chunk: int = 0
    overlap: int = 0
    document_prefix: str = ""
    query_prefix: str = ""
    keyword: str = ""
    model: str = ""
    provider: str = "fastembed"
    base_url: str = ""
    dimensions: int = 0
    precision: str = "fp32"
    index: str = ""
    source: str = ""
    created: tuple[str, ...] = ()

    @property
    def place(self) -> tuple[str | None, str]:
        """Schema and name of the table that the vectors go to."""
        return (self.into_schema, self.into) if self.into else (self.schema, self.table)

    @property
    def written(self) -> str:
        """The table that the vectors go to, for a message."""
        schema, table = self.place
        return Target(schema).shown(table)

    @property
    def place_shown(self) -> str:
        """The table of vectors, or the column, for a message."""
        return self.written if self.into else f"{self.written}.{storable_key(self.vector)}"

    @property
    def identity(self) -> str:
        """Under which its runs and rejects are kept: the place itself, so that no other name leads to it beside."""
        name = self.written if self.into else f"{self.written}.{self.vector}"
        return name.lower() if self.form in SQLITE_FORMS else name  # SQLite compares names without case

    @property
    def read(self) -> str:
        """What is read, for a message."""
        return Target(self.schema).shown(self.table) if self.table else "a query" if self.query else "files"

    @property
    def shown(self) -> str:
        """What is read and written, for a message."""
        column = storable_key(self.vector)
        return f"{self.written} of {self.read}" if self.into else f"the column {column} of {self.written}"

    def as_json(self) -> str:
        """As ``kdb_fast_targets`` keeps it."""
        return json.dumps(asdict(self), ensure_ascii=False, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """What :meth:`as_json` gave.

        Raises:
            SchemaError: It is none, or of a newer version.
        """
        try:
            values: dict[str, Any] = json.loads(text)
            known = {field.name for field in fields(cls)}
            if unknown := sorted(values.keys() - known):
                raise SchemaError(
                    f"The target {values.get('name')!r} was described by a newer kdb-fast, with {', '.join(unknown)}.",
                    remedy="Use that version.",
                )
            parts: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in values.items()}
            return cls(**parts)
        except (ValueError, TypeError) as error:
            raise SchemaError(f"A row of kdb_fast_targets cannot be read: {error}.") from None


CHANGES = (
    "table",
    "query",
    "filter",
    "key",
    "text",
    "template",
    "vector",
    "model",
    "base_url",
    "precision",
    "chunk",
    "overlap",
    "document_prefix",
    "query_prefix",
    "keyword",
    "index",
    "source",
)
"""Fields of a definition whose change is said."""


def changes(before: Definition | None, wanted: Definition) -> Iterator[str]:
    """What a target that is kept is now and was not before, a sentence each."""
    if before is None:
        return
    for name in CHANGES:
        old, new = (_shown(getattr(definition, name)) for definition in (before, wanted))
        if old != new and not (name == "model" and not wanted.model):
            yield f"The target {storable_key(wanted.name)} is changed: {name} {new or '—'} instead of {old or '—'}."


def _shown(value: str | int | tuple[str, ...]) -> str:
    return storable_key(", ".join(value) if isinstance(value, tuple) else str(value or ""), 300)
