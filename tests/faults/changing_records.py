"""Records of KameleonDB that change all the time, for the soak."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import oracle as oracles
from servers import Vector, execute, index_rows, mixed_texts

from kdb_fast.cli.demo import sqlalchemy_url
from kdb_fast.db.address import DatabaseAddress
from kdb_fast.records import Record, content_from_fields


class Faulty(NamedTuple):
    """How many rows are not as a run that ended well should have left them."""

    lost: int
    doubled: int
    without_record: int


def short_text(chance: random.Random, texts: Sequence[str]) -> str:
    """Some words of one of them."""
    return " ".join(chance.choice(texts[1:]).split()[: chance.randint(2, 12)])


class Records:
    """Records of KameleonDB, which change. Read by SQL: what is there is what must be in the index."""

    FIELDS = ("title", "text")
    arguments: tuple[str, ...] = ()
    """Of ``kdb-fast reindex``."""

    def __init__(self, address: DatabaseAddress, chance: random.Random, count: int) -> None:
        self._address, self._random, self._goal = address, chance, count
        self._texts = mixed_texts(5000, longest=40)
        execute(address, "CREATE EXTENSION IF NOT EXISTS vector")
        with self._entity(create=True) as entity:
            entity.insert_many([self._new() for _ in range(count)])

    @contextlib.contextmanager
    def _entity(self, *, create: bool = False) -> Iterator[Any]:
        from kameleondb import KameleonDB

        client = KameleonDB(sqlalchemy_url(self._address))
        try:
            if create:
                client.create_entity("Note", fields=[{"name": name, "type": "text"} for name in self.FIELDS])
            yield client.entity("Note")
        finally:
            client.close()

    def _new(self) -> dict[str, str]:
        chance = self._random
        return {"title": f"note {chance.randrange(10**6)}", "text": short_text(chance, self._texts)}

    def change(self, *, forget_rows: bool) -> None:
        """Edit, insert and delete some, so that there are about as many as before.

        Args:
            forget_rows: Another program removes a part of the rows of the index.
        """
        chance = self._random
        with self._entity() as entity:
            rows = execute(self._address, "SELECT id FROM kdb_records WHERE NOT is_deleted ORDER BY id")
            keys = [key for (key,) in rows]
            chance.shuffle(keys)
            edited, deleted = chance.randint(10, 100), max(5, len(keys) - self._goal + chance.randint(5, 30))
            for key in keys[:edited]:
                entity.update(key, self._new())
            for key in keys[edited : edited + deleted]:
                entity.delete(key)
            entity.insert_many([self._new() for _ in range(chance.randint(20, 60))])
        if forget_rows and execute(self._address, "SELECT to_regclass('kdb_search')") != [(None,)]:
            execute(self._address, "DELETE FROM kdb_search WHERE random() < %s", chance.choice((0.1, 0.4, 0.9)))

    def read(self) -> list[Record]:
        rows = execute(self._address, "SELECT id, data FROM kdb_records WHERE NOT is_deleted")
        return [Record(("Note", key), content_from_fields((n, data.get(n)) for n in self.FIELDS)) for key, data in rows]

    def check(self) -> Faulty:
        """After a run that ended well, since whose start nothing has changed: every record is there once, as it is."""
        found = execute(self._address, "SELECT record_id, content FROM kdb_search WHERE embedding IS NOT NULL")
        wanted = {str(record.key[1]): record.content for record in self.read()}
        rows = dict(found)
        return Faulty(
            lost=sum(rows.get(key) != content for key, content in wanted.items()),
            doubled=len(found) - len(rows),
            without_record=len(rows.keys() - wanted.keys()),
        )

    def wrong_vectors(self, vector: Callable[[str], Vector]) -> list[str]:
        """Rows that have another vector than that of their text."""
        return [
            f"vector of {key}"
            for key, row in index_rows(self._address).items()
            if row.vector is None or abs(row.vector - vector(row.content)).max() > oracles.TOLERANCE
        ]

    def check_all(
        self, receipt: oracles.Receipt, vector: Callable[[str], Vector], rerun: Callable[[], oracles.Receipt]
    ) -> None:
        """After the last run; raises AssertionError."""
        oracles.check(self._address, self.read(), receipt, vector=vector, rerun=rerun)
