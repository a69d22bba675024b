"""A vector column of the user's own table, as a target: rows are only updated, and in that column only.

What is known of a row (which model made its vector, of which text) lies in a table of ours beside it,
``kdb_fast_<name>_state``, by the table's own key: hashes of the text and of the vector as the column holds it.

* A vector is ours while it is the one that we noted, whatever its text is now. If the text is the noted one too, and
  the fingerprint the run's, the row is unchanged; else its vector is made anew.
* Any other vector is foreign: of a row that we know nothing of, or written over ours by another program. It may have
  been paid for, so it is never overwritten or taken away, unless ``replace`` says so; and never taken for ours.

The table of the state refers to nothing: a foreign key would add triggers to the user's table and keep TRUNCATE from
it. What it has of rows that are gone is removed at the end of each run. Neither the table's name nor its number is
noted there, so that it holds for a table that was renamed, rewritten or restored.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import SchemaError
from ..receipt import TargetNames
from ..records import MAX_CONTENT_BYTES, number_of, storable_key
from .keyed_table import KeyedTable
from .names import one_line
from .target import identifier

MAX_NAME_BYTES = 63 - len("kdb_fast__pieces")
HASH_DIGITS = 8


@dataclass(frozen=True)
class VectorColumn:
    """The column of the vectors.

    Attributes:
        name: Its name.
        type: As a cast writes it, such as ``public.halfvec(384)``; on SQLite ``blob`` (float32, little-endian, one
            after the other) or ``json`` (text).
        dimensions: Length of its vectors; None where the column takes any.
        sender: PostgreSQL: the function that gives a value's bytes.
        form: As :class:`.definition.Definition` has it.
    """

    name: str
    type: str
    dimensions: int | None = None
    sender: str = ""
    form: str = ""


@dataclass(frozen=True)
class ColumnTarget(KeyedTable):
    """Where the vectors of a table go. Its state is kept under ``name``.

    Attributes:
        text: SQL expression of a row's text over the columns of the table; see :func:`column_text`.
        vector: The column that is written.
        replace: Vectors of other programs are overwritten.
        vacuum: PostgreSQL: the versions of rows that are left behind are freed now and then during a run.
        keyword: The state has what keyword search needs: in PostgreSQL the text search configuration, on SQLite the
            tokenizer of FTS5; '' without.
    """

    text: str
    vector: VectorColumn
    replace: bool = False
    vacuum: bool = False
    keyword: str = ""

    @property
    def identity(self) -> str:
        """Under which runs and rejects are kept: the column itself, so that no other name leads to it beside."""
        name = f"{self.shown}.{self.vector.name}"
        return name if self.schema is not None else name.lower()  # SQLite compares names without case

    @property
    def names(self) -> TargetNames:
        """As the receipt of a run has them."""
        return TargetNames(self.name, self.shown, self.vector.name, tuple(key.name for key in self.key))

    @property
    def state(self) -> str:
        """Name of the table of what is known."""
        return state_table(self.name)

    @functools.cached_property
    def parts(self) -> dict[str, str]:
        """``{table}`` is the table and ``{state}`` ours, ``{embedding}`` the column of the vectors, ``{type}`` its
        type, ``{sender}`` the function that gives its bytes, ``{text}`` the bytes of the text."""
        postgresql = self.home.dialect == "postgresql"
        return {
            **super().parts,
            "state": self.home.table(self.state),
            "embedding": self.column(self.vector.name),
            "type": self.vector.type,
            "sender": self.vector.sender,
            "text": text_bytes(self.text) if postgresql else f"CAST(({self.text}) AS BLOB)",
        }


def state_table(name: str, suffix: str = "state") -> str:
    """Name of the table of what is known of a target; of a name that PostgreSQL would cut (at 63 bytes) the end is a
    hash."""
    if len(name.encode()) > MAX_NAME_BYTES:
        digest = hashlib.sha256(name.encode()).hexdigest()[:HASH_DIGITS]
        name = name.encode()[: MAX_NAME_BYTES - HASH_DIGITS].decode(errors="ignore") + digest
    return f"kdb_fast_{name}_{suffix}"


NOTE_TRIGGERS = (
    "INSERT INTO {kdb_fast_state} AS s VALUES ({value}, {value}) "
    "ON CONFLICT (key) DO UPDATE SET value = excluded.value WHERE s.value <> excluded.value"
)
"""Notes under :func:`triggers_key` which triggers a run has told of; changes a row only where they are others."""


def times_written(pending: int) -> str:
    """How often a trigger fires for each row that a run writes.

    Args:
        pending: Rows without a vector of the model; of the others those are written whose text has changed.
    """
    return f"up to {number_of(pending, 'time')}" if pending > 0 else "once for each row that has changed"


def triggers_key(target: ColumnTarget) -> str:
    """Key of the state in which triggers are noted that are known."""
    return f"triggers/{target.identity}"


def unreadable_text(target: ColumnTarget, why: str) -> SchemaError:
    """The error for an expression that is none over the columns of the table."""
    return SchemaError(
        f"The text of {target.shown} cannot be read by {storable_key(one_line(target.text))}: {why}.",
        remedy="Give a column of the table, or an SQL expression over its columns.",
    )


STATE_COLUMNS = ("fingerprint", "text_hash", "vector_hash", "run", "at", "source_at")
"""Of the table of the state, beside those of the key; in PostgreSQL also ``version``, of the row as we have written
it."""


COUNT = (
    "SELECT CASE WHEN EXISTS (SELECT 1 FROM {state}) THEN (SELECT count(*) FROM {state}) "
    "ELSE (SELECT count(*) FROM {table} t WHERE t.{embedding} IS NOT NULL) END"
)
"""Rows with a vector that we know of; where there is none, with any. Those of the state are counted in a tenth of the
time: its rows are small."""


def check_state(target: ColumnTarget, found: Mapping[str, str], table: str) -> None:
    """Raise SchemaError where the table of the state was made for another key.

    Args:
        found: Its columns with their types.
        table: Its name as a statement writes it.
    """
    wanted = {f"key_{number}": key.type for number, key in enumerate(target.key, 1)}
    have = {name: kind for name, kind in found.items() if name.startswith("key_")}
    if have != wanted or not found.keys() >= set(STATE_COLUMNS):
        remedy = f"Run: DROP TABLE {table}; kdb-fast then knows none of the vectors: embed all again with --replace."
        if have.keys() == wanted.keys() and target.home.dialect == "postgresql":
            changes = ", ".join(f"ALTER {name} TYPE {kind}" for name, kind in wanted.items() if have[name] != kind)
            remedy = f"If it holds the same keys, run: ALTER TABLE {table} {changes};"
        raise SchemaError(
            f"The table {target.home.shown(target.state)} was made for a key of the types "
            f"{', '.join(have.values()) or '—'}; that of {target.shown} is of {', '.join(wanted.values())}.",
            remedy=remedy,
        )


def column_text(name: str, dialect: str) -> str:
    """The expression of a text that is in one column."""
    return identifier(name, "postgresql" if dialect == "postgresql" else "sqlite")


def text_bytes(text: str) -> str:
    """PostgreSQL: SQL of a text in UTF-8 as :func:`~kdb_fast.records.cut_content` leaves it."""
    # psycopg takes a per cent sign for the start of a placeholder.
    text = f"({text})::text".replace("%", "%%")
    whole, longest = f"convert_to({text}, 'UTF8')", MAX_CONTENT_BYTES
    middle = [f"WHEN get_byte({whole}, {longest - n}) & 192 <> 128 THEN {n}" for n in range(3)]
    return (
        f"CASE WHEN octet_length({text}) <= {longest // 4} THEN {whole} WHEN octet_length({whole}) <= {longest} "
        f"THEN {whole} ELSE substring({whole} FOR {longest} - CASE {' '.join(middle)} ELSE 3 END) END"
    )


def altered_rows(shown: str, count: int, by: str) -> str:
    """What a person must know of rows that are not stored as they were written.

    Args:
        shown: The table.
        by: Its triggers.
    """
    return (
        f"{number_of(count, 'row')} of {shown} {'does' if count == 1 else 'do'} not hold the text and vector that were "
        f"written ({by}, or another program): the next run embeds those with another text again, "
        "and leaves another vector alone."
    )
