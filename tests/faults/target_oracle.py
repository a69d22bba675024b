"""What must hold after every run of a target of a user's own table, whatever happened in it: the oracle of its fault
tests and of the soak.

The table has the columns ``id``, ``body`` and ``theirs``: whether the row has a vector that its application wrote.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from articles import floats
from oracle import PARTS, TOLERANCE, Receipt, check_nothing_left
from servers import Vector, execute

from kdb_fast.db.address import DatabaseAddress

FOREIGN: Vector = np.full(384, 384**-0.5, np.float32)
"""The vector that the application gives some rows of a column."""


@dataclass(frozen=True)
class Row:
    """A row of the table; ``text_hash`` is that of the text whose vector it has, as far as we know."""

    key: int
    text: str | None
    theirs: bool
    vector: Vector | None
    text_hash: bytes | None

    @property
    def wanted(self) -> bool:
        """Whether it must have a vector of ours."""
        return self.text is not None and not self.theirs

    @property
    def in_step(self) -> bool:
        """Whether it has one, which is known to be that of its text."""
        wanted = hashlib.sha256((self.text or "").encode()).digest()
        return self.vector is not None and self.text_hash == wanted

    @property
    def is_ours(self) -> bool:
        """Whether it has a vector of ours, or is known to."""
        return (self.vector is not None or self.text_hash is not None) and not self.theirs


@dataclass(frozen=True)
class Found:
    """All rows; ``orphans`` are vectors, or what is known of them, without a row."""

    rows: list[Row]
    orphans: int
    doubled: int


def rows_of(address: DatabaseAddress, name: str, kind: str) -> Found:
    """Rows of the table ``name`` and what there is of its target, which has the same name.

    Args:
        kind: ``column``, or ``table`` for the vectors in ``NAME_vectors``.
    """
    cast = "::text" if address.dialect == "postgresql" else ""
    if kind == "column":
        beside, key, vector, text_hash = f"kdb_fast_{name}_state", "key_1", f"t.embedding{cast}", "text_hash"
    else:
        beside, key, vector, text_hash = f"{name}_vectors", "id", f"b.embedding{cast}", "kdb_fast_hash"
    rows = execute(
        address,
        f"SELECT t.id, t.body, t.theirs, {vector}, b.{text_hash} FROM {name} t LEFT JOIN {beside} b ON b.{key} = t.id",
    )
    orphan = f"SELECT count(*) FROM {beside} b WHERE NOT EXISTS (SELECT 1 FROM {name} t WHERE t.id = b.{key})"
    ((orphans,),) = execute(address, orphan)
    found = [
        Row(number, text, bool(theirs), None if value is None else floats(value), text_hash and bytes(text_hash))
        for number, text, theirs, value, text_hash in rows
    ]
    return Found(found, orphans, len(found) - len({row.key for row in found}))


def check(
    address: DatabaseAddress,
    name: str,
    kind: str,
    receipt: Receipt,
    *,
    vector: Callable[[str], Vector],
    rerun: Callable[[], Receipt],
    mark: Path | None = None,
) -> None:
    """Everything that must hold after a complete run of the target, since whose start nothing has changed.

    Every row with a text has the vector of its text, no other row has one of ours, what is known of the vectors is in
    step with them, the counts add up, nothing is left, and the same again stores nothing.

    Args:
        receipt: Of the last run, which ended well.
        rerun: Runs the same again and returns its receipt.
        mark: Of the processes of the runs, as ``oracle.check`` has it.
    """
    check_nothing_left(address, mark)
    found = check_rows(address, name, kind, vector)
    read = sum(row.text is not None for row in found.rows)
    _check_counts(address, receipt, read)
    again = rerun()
    assert (again["stored"], again["reused"], again["deleted"], again["superseded"]) == (0, 0, 0, 0), again
    assert again["foreign"] == sum(row.theirs and row.text is not None for row in found.rows)
    _check_counts(address, again, read)
    check_nothing_left(address, mark)


def check_rows(address: DatabaseAddress, name: str, kind: str, vector: Callable[[str], Vector]) -> Found:
    """Of all that, what concerns the rows."""
    found = rows_of(address, name, kind)
    assert (found.orphans, found.doubled) == (0, 0)
    for row in found.rows:
        if row.theirs:
            assert row.vector is not None, row.key
            np.testing.assert_array_equal(row.vector, FOREIGN, err_msg=str(row.key))
        elif row.wanted:
            assert row.in_step, row.key
            assert row.vector is not None
            wanted = vector(row.text or "")
            np.testing.assert_allclose(row.vector, wanted, rtol=0, atol=TOLERANCE, err_msg=str(row.key))
        else:
            assert not row.is_ours, row.key
    return found


def _check_counts(address: DatabaseAddress, receipt: Receipt, read: int) -> None:
    assert receipt["state"] == "done"
    assert receipt["read"] == sum(receipt[part] for part in PARTS), receipt
    assert receipt["read"] == read, receipt
    newest = execute(address, "SELECT run, state, receipt FROM kdb_fast_runs ORDER BY run DESC LIMIT 1")
    assert newest[0][:2] == (receipt["run"], "done")
    assert json.loads(newest[0][2]) == json.loads(json.dumps(receipt))
    assert execute(address, "SELECT count(*) FROM kdb_fast_runs WHERE state = 'running'") == [(0,)]
