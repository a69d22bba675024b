"""The table of an application that changes all the time, for the soak, with its vectors in a column or in a table
beside it."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any, Literal

import oracle as oracles
import psycopg
import target_oracle
from changing_records import Faulty, short_text
from servers import Vector, execute, mixed_texts
from target_oracle import FOREIGN

import kdb_fast
from kdb_fast.db.address import DatabaseAddress

Kind = Literal["column", "table"]

COLUMNS = "id bigint PRIMARY KEY, body text, theirs boolean NOT NULL DEFAULT false, embedding vector(384)"


class Rows:
    """A table, the application that writes it, and what must hold after a run of its target, which is kept.

    Args:
        kind: Where the vectors are.
        count: About how many rows there are.
    """

    def __init__(self, address: DatabaseAddress, chance: random.Random, kind: Kind, count: int) -> None:
        self.kind, self._address, self._random, self._goal = kind, address, chance, count
        self.name = "articles" if kind == "column" else "posts"
        self.arguments = (self.name,)
        self._texts, self._next = mixed_texts(5000, longest=40), 0
        execute(address, "CREATE EXTENSION IF NOT EXISTS vector")
        execute(address, f"CREATE TABLE {self.name} ({COLUMNS})")
        place: Any = {"vector": "embedding"} if kind == "column" else {"into": "posts_vectors"}
        kdb_fast.reindex_table(address, self.name, name=self.name, text=["body"], **place)
        with psycopg.connect(address.conninfo) as connection:
            self._insert(connection, count)

    def _insert(self, connection: psycopg.Connection[Any], count: int) -> None:
        for _ in range(count):
            text = short_text(self._random, self._texts)
            connection.execute(f"INSERT INTO {self.name} (id, body) VALUES (%s, %s)".encode(), (self._next, text))
            self._next += 1

    def change(self, *, forget_rows: bool) -> None:
        """One transaction, of up to two seconds: edit, empty, insert and delete some, in any order of their keys, so
        that there are about as many as before.

        Args:
            forget_rows: A part of the vectors is removed as well.
        """
        chance = self._random
        with psycopg.connect(self._address.conninfo) as connection:
            keys = [key for (key,) in connection.execute(f"SELECT id FROM {self.name}".encode()).fetchall()]
            chance.shuffle(keys)
            deleted = max(3, len(keys) - self._goal + chance.randint(0, 10))
            for key in keys[: chance.randint(5, 40)]:
                # Some lose their text, and some that had none get one.
                text = short_text(chance, self._texts) if chance.random() < 0.8 else None
                connection.execute(f"UPDATE {self.name} SET body = %s WHERE id = %s".encode(), (text, key))
            for key in keys[-deleted:]:
                connection.execute(f"DELETE FROM {self.name} WHERE id = %s".encode(), (key,))
            if self.kind == "column":
                foreign = f"UPDATE {self.name} SET embedding = %s, theirs = true WHERE id = %s".encode()
                connection.execute(foreign, (str(FOREIGN.tolist()), keys[0]))
            self._insert(connection, chance.randint(5, 20))
            if chance.random() < 0.3:
                time.sleep(chance.uniform(0.2, 2.0))
        if forget_rows:
            forget = (
                f"UPDATE {self.name} SET embedding = NULL, theirs = false"
                if self.kind == "column"
                else "DELETE FROM posts_vectors"
            )
            execute(self._address, f"{forget} WHERE random() < %s", chance.choice((0.1, 0.4, 0.9)))

    def check(self) -> Faulty:
        """After a run that ended well, since whose start nothing has changed."""
        found = target_oracle.rows_of(self._address, self.name, self.kind)
        return Faulty(
            lost=sum(row.wanted and not row.in_step for row in found.rows),
            doubled=found.doubled,
            without_record=found.orphans + sum(not row.wanted and row.is_ours for row in found.rows),
        )

    def wrong_vectors(self, vector: Callable[[str], Vector]) -> list[str]:
        """Rows that have another vector than that of their text."""
        return [
            f"vector of row {row.key} of {self.name}"
            for row in target_oracle.rows_of(self._address, self.name, self.kind).rows
            if row.wanted and (row.vector is None or abs(row.vector - vector(row.text or "")).max() > oracles.TOLERANCE)
        ]

    def check_all(
        self, receipt: oracles.Receipt, vector: Callable[[str], Vector], rerun: Callable[[], oracles.Receipt]
    ) -> None:
        """After the last run; raises AssertionError."""
        target_oracle.check(self._address, self.name, self.kind, receipt, vector=vector, rerun=rerun)
