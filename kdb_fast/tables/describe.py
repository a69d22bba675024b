"""From what was asked for to the definition of a target: names as the catalogue has them, and nothing is guessed.

A target that is kept is looked at as if it were described now. What is not there any more is named with the command
that says what is meant instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict

from ..errors import SchemaError, UsageError
from ..records import shell_word, storable_key
from .adapting import adapting
from .definition import Definition, changes
from .find_relation import find_relation, no_column, no_key, no_place
from .names import as_typed, or_nearest, split_identifier
from .relation import Relation
from .target import Dialect, Rows, Target
from .text import text_columns

RESERVED = "kdb_"
"""What names of KameleonDB's tables and of our own begin with."""


class Given(TypedDict, total=False):
    """What was asked for, of the fields of a :class:`.definition.Definition`; the rest is as it is kept.

    ``table`` and ``into`` are SQL identifiers.
    """

    table: str
    query: str
    filter: str
    key: tuple[str, ...]
    text: tuple[str, ...]
    template: str
    vector: str
    form: str
    into: str
    model: str
    provider: str
    base_url: str
    dimensions: int
    precision: str
    chunk: int
    overlap: int
    document_prefix: str
    query_prefix: str
    keyword: str
    index: str
    source: str


@dataclass(frozen=True)
class Described:
    """A target.

    Attributes:
        definition: What will be kept.
        before: As it was kept; None for a new one.
        as_kept: The same, where none of its names was given anew: what is not there has changed in the database.
        creates: The column of the vectors is missing, and is to be made.
        notes: What a person should know, a sentence each.
    """

    definition: Definition
    before: Definition | None = None
    as_kept: Definition | None = None
    creates: bool = False
    notes: tuple[str, ...] = ()

    @property
    def reads_anew(self) -> bool:
        """Whether what is read has not been read so before."""
        before = self.before
        return before is None or any(
            getattr(before, name) != getattr(self.definition, name) for name in (*NAMES, "schema")
        )


def check_given(given: Given, *, create: bool = False) -> None:
    """Raise UsageError for options that make no sense together."""

    def both(one: str, other: str, remedy: str) -> None:
        if given.get(one) and given.get(other):
            raise UsageError(f"--{one} and --{other} exclude each other.", remedy=remedy)

    both("table", "query", "Name the table, or give the SELECT that reads it.")
    both("text", "template", "The template names the columns itself, in braces.")
    both("filter", "query", "Put the condition into the query's WHERE.")
    if create and given.get("into"):
        raise UsageError("--create belongs to --vector.", remedy="The table of --into is made where it is missing.")


def describe(
    rows: Rows,
    dialect: Dialect,
    name: str,
    given: Given,
    kept: Sequence[Definition],
    *,
    elsewhere: Sequence[tuple[Target, Definition]] = (),
    create: bool = False,
    read: Rows | None = None,
    read_from: str = "",
    from_file: bool = False,
) -> Described:
    """The target that was asked for.

    Args:
        rows: Runs statements on the database that is written.
        dialect: Of that database.
        name: Of the target; '' for that of its table.
        given: What was asked for; what is kept is changed by it.
        kept: All targets whose state is kept beside this one's.
        elsewhere: Those that are kept in other schemas, with where.
        create: The column of the vectors may be missing.
        read: Runs statements on the database that is read, where that is another.
        read_from: That one's address, for messages.
        from_file: A file is read.

    Raises:
        UsageError: Options make no sense together.
        SchemaError: Something is not there, or not any more, or another target has the same place.
    """
    check_given(given, create=create)
    read = read or rows
    if given.get("form") == "vec0" and dialect != "sqlite":
        raise UsageError("--vec0 makes a table of sqlite-vec, and this database is PostgreSQL.", remedy="Leave it out.")
    with adapting(None, read_from):
        relation = find_relation(read, dialect, given["table"]) if "table" in given else None
    into_schema, into = _place(rows, dialect, given["into"], relation) if "into" in given else (None, "")
    named = bool(name)
    name = name or into or (relation.name if relation else "")
    before = find_kept(name, kept, dialect)
    if before is None and not (relation or "query" in given or from_file):
        raise no_target(name, kept)
    _check_file(before, from_file)
    wanted = replace(before or Definition(name=name), **_plain(given))
    if relation is not None and before is None and not into and "vector" not in given:
        raise UsageError(
            f"Nothing says where the vectors of {relation.shown} go.",
            remedy="Name a column of it for them, --vector COLUMN, or a table of their own, --into NAME.",
        )
    if before is not None and not wanted.into and wanted.vector != before.vector:
        wanted = replace(wanted, form="")  # another column
    if relation is not None:
        wanted = replace(wanted, schema=relation.schema, table=relation.name, query="")
    if "query" in given:
        wanted = replace(wanted, schema=None, table="", filter="")
    if into:
        wanted = replace(wanted, into_schema=into_schema, into=into)
        if before is None or "table" not in before.created:
            wanted = replace(wanted, created=("table",))
    if wanted.query and not wanted.into:
        raise UsageError(
            "--query has no column that could be written.", remedy="Name a table for the vectors: --into NAME."
        )
    if wanted.query and not wanted.key:
        raise UsageError(
            "--query needs --key COLUMN, by which its rows are told apart.", remedy="Repeat it for several columns."
        )
    if wanted.chunk and not wanted.into:
        raise UsageError("--chunk has no place for several vectors of a row.", remedy="Name a table: --into NAME.")
    if given.get("text") or ("text" in given and "template" not in given):
        wanted = replace(wanted, template="")
    elif "template" in given:
        wanted = replace(wanted, text=())
    if "model" in given and "dimensions" not in given:
        wanted = replace(wanted, dimensions=0)
    if before is not None and bool(before.into) != bool(wanted.into):
        raise _moved(before, wanted)
    creates, as_kept = False, None if given.keys() & NAMES else before
    with adapting(as_kept, read_from):
        if relation is None and wanted.table:
            relation = find_relation(read, dialect, as_typed(wanted.schema, wanted.table))
        if relation is not None:
            creates = create and not wanted.into and relation.column(wanted.vector) is None
            wanted = _checked(wanted, relation, dialect, kept, creates=creates)
    if creates:
        wanted = replace(wanted, created=("column",))
    if before is not None:
        _check_not_moved(rows, dialect, before, wanted)
        if not named:
            _check_same_source(read, dialect, before, wanted)
    _check_place(wanted, kept, dialect)
    for home, other in elsewhere:
        if _overlap(other, wanted, dialect):
            raise _taken(wanted, other, f", which is kept in the schema {home.shown()},")
    return Described(wanted, before, as_kept, creates, tuple(changes(before, wanted)))


def _check_file(before: Definition | None, from_file: bool) -> None:
    """Raise UsageError where a target of files is given none, or another one a file."""
    if before is None or from_file == (not (before.table or before.query)):
        return
    word = shell_word(before.name)
    if from_file:
        raise UsageError(
            f"The target {storable_key(before.name)} reads {before.read}, not a file.",
            remedy="Give the vectors of the file another table: --into NAME.",
        )
    raise UsageError(
        f"The target {storable_key(before.name)} is filled from files.",
        remedy=f"Name one: kdb-fast reindex {word} --from FILE",
    )


def find_kept(name: str, kept: Iterable[Definition], dialect: str) -> Definition | None:
    """The target of this name; on SQLite in whatever case."""
    if dialect == "sqlite":
        return next((d for d in kept if d.name.lower() == name.lower()), None)
    return next((d for d in kept if d.name == name), None)


NO_TARGET = "There is no target"


def no_target(name: str, kept: Sequence[Definition], hidden: Sequence[str] = ()) -> SchemaError:
    """The error for a name that no target has.

    Args:
        hidden: What the role needs to see the targets that it may not read, a sentence for each schema.
    """
    names = sorted({definition.name for definition in kept})
    return SchemaError(
        f"{NO_TARGET} {storable_key(name)}{or_nearest(name, names)}",
        remedy=" ".join((*hidden, "Describe it: kdb-fast reindex --table TABLE --text COLUMN --vector COLUMN.")),
    )


def _plain(given: Given) -> dict[str, Any]:
    """Without what must be looked up."""
    return {name: value for name, value in given.items() if name not in ("table", "into")}


def _place(rows: Rows, dialect: Dialect, into: str, relation: Relation | None) -> tuple[str | None, str]:
    """Schema and name of the table of ``--into``: without a schema it is beside the table that is read."""
    schema, name = split_identifier(into, dialect)
    if dialect == "sqlite":
        if schema is not None and schema.lower() != "main":
            raise SchemaError(
                f"--into {storable_key(into)}: vectors go into the file of --db itself, not into one attached to it.",
                remedy=f"Leave the schema out: --into {shell_word(name)}",
            )
        return None, name
    if schema is None:
        ((current,),) = rows("SELECT current_schema()::text", {})
        beside = relation.schema if relation is not None else None
        return (current if beside in (None, "information_schema", "pg_catalog") else beside), name
    if not rows("SELECT 1 FROM pg_catalog.pg_namespace WHERE nspname = %(schema)s", {"schema": schema}):
        shown = Target(schema).shown()
        raise SchemaError(
            f"There is no schema {shown} for the table of vectors.", remedy=f"Run: CREATE SCHEMA {shown};"
        )
    return schema, name


def _checked(
    wanted: Definition, relation: Relation, dialect: Dialect, kept: Iterable[Definition], *, creates: bool
) -> Definition:
    """With the names of columns as the catalogue has them."""

    def column(name: str, remedy: str = "") -> str:
        found = relation.column(name)
        if found is None:
            raise no_column(relation, name, remedy)
        return found.name

    if not wanted.into and not relation.is_table:
        raise no_place(relation)
    key = tuple(map(column, wanted.key))
    if not key and not relation.keys:
        raise no_key(relation, dialect)
    key = key or tuple(part.name for part in relation.keys[0])
    vector = wanted.vector
    if not wanted.into and not creates:
        vector = column(vector, "To add it for the vectors: --create.")
    text = wanted.text
    if not text and not wanted.template:
        beside = [other for other in kept if not other.into and _read(other, dialect) == _read(wanted, dialect)]
        vectors = [other.vector for other in (*beside, *(() if wanted.into else (wanted,)))]
        text = text_columns(relation, (*key, *vectors), provider=wanted.provider)
    return replace(wanted, key=key, vector=vector, text=text)


def _folded(name: str | None, dialect: Dialect) -> str:
    """By which the database tells names apart."""
    return (name or "").lower() if dialect == "sqlite" else name or ""


def _written(definition: Definition, dialect: Dialect) -> tuple[str, str, str]:
    """Schema, table and column of the vectors."""
    schema, table = definition.place
    return _folded(schema, dialect), _folded(table, dialect), _folded(definition.vector, dialect)


def _check_not_moved(rows: Rows, dialect: Dialect, before: Definition, wanted: Definition) -> None:
    """Raise SchemaError where a target's vectors would go elsewhere, unless its table or column is there no more."""
    if _written(before, dialect) != _written(wanted, dialect) and not _is_gone(rows, dialect, before):
        raise _moved(before, wanted)


def _moved(before: Definition, wanted: Definition) -> SchemaError:
    return SchemaError(
        f"There is a target {storable_key(before.name)}: {before.shown}; this would be {wanted.shown}.",
        remedy="Give this one a name of its own: --name NAME. Or forget the other: kdb-fast targets drop "
        f"{shell_word(before.name)}",
    )


def _check_same_source(read: Rows, dialect: Dialect, before: Definition, wanted: Definition) -> None:
    """Raise SchemaError where a table of vectors is to be filled from something else, and no target was named: what it
    has of the one would be removed.

    Args:
        read: Runs statements on the database that is read.
    """
    if _read(before, dialect) == _read(wanted, dialect) or before.source != wanted.source:
        return
    if before.table:
        try:
            find_relation(read, dialect, as_typed(before.schema, before.table))
        except SchemaError:
            return  # renamed
    this, what = ("this query", "--query SQL") if wanted.query else (wanted.read, f"--table {wanted.read}")
    other = "another query" if before.query and wanted.query else before.read
    raise SchemaError(
        f"{before.written} holds the vectors of {other}; those that {this} does not have would be removed.",
        remedy="Write into another: --into NAME. For rows of both, one --query with UNION ALL. Or name the target to "
        f"change what it reads: kdb-fast reindex {shell_word(before.name)} {what}",
    )


def _read(definition: Definition, dialect: Dialect) -> tuple[str, str, str]:
    return _folded(definition.schema, dialect), _folded(definition.table, dialect), definition.query


def _is_gone(rows: Rows, dialect: Dialect, definition: Definition) -> bool:
    """Whether there is no table or column any more that the vectors of a target went to."""
    try:
        relation = find_relation(rows, dialect, as_typed(*definition.place))
    except SchemaError:
        return True
    return relation.column(definition.vector) is None


def _check_place(wanted: Definition, kept: Iterable[Definition], dialect: Dialect) -> None:
    """Raise SchemaError where another target has the same place: vectors of two would be mixed."""
    schema, table, _ = _written(wanted, dialect)
    if table.startswith(RESERVED):
        raise SchemaError(
            f"{wanted.written} is KameleonDB's or kdb-fast's own table.", remedy="Name another: --into NAME."
        )
    if wanted.into and (schema, table) == (_folded(wanted.schema, dialect), _folded(wanted.table, dialect)):
        raise SchemaError(f"{wanted.written} is the table that is read.", remedy="Name another: --into NAME.")
    for other in kept:
        if _folded(other.name, dialect) == _folded(wanted.name, dialect):
            continue
        if not wanted.into and _read(other, dialect) == _read(wanted, dialect) and wanted.vector in other.text:
            raise SchemaError(
                f"{wanted.place_shown} is part of the text of the target {storable_key(other.name)}: its vectors "
                "would be embedded.",
                remedy=f"Name the text of that: kdb-fast reindex {shell_word(other.name)} --text COLUMN",
            )
        if _overlap(other, wanted, dialect):
            raise _taken(wanted, other)


def _overlap(one: Definition, other: Definition, dialect: Dialect) -> bool:
    """Whether the vectors of both have the same place: a column, or anything of a table of vectors."""
    places = [_written(definition, dialect) for definition in (one, other)]
    return places[0] == places[1] or (places[0][:2] == places[1][:2] and bool(one.into or other.into))


def _taken(wanted: Definition, other: Definition, where: str = "") -> SchemaError:
    whole = wanted.into or other.into
    return SchemaError(
        f"{wanted.written}{'' if whole else f'.{wanted.vector}'} is written by the target {storable_key(other.name)}"
        f"{where} already.",
        remedy=f"Run: kdb-fast reindex {shell_word(other.name)}; or forget that target: "
        f"kdb-fast targets drop {shell_word(other.name)}",
    )


NAMES = frozenset({"table", "query", "filter", "key", "text", "template", "vector", "into", "source"})
"""Fields of a definition that are about what there is in the database."""
