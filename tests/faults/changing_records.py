"""Records of KameleonDB that change all the time, for the soak."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

from servers import execute, mixed_texts

from kdb_fast.cli.demo import sqlalchemy_url
from kdb_fast.db.address import DatabaseAddress
from kdb_fast.records import Record, content_from_fields


class Records:
    """Records of KameleonDB, which change. Read by SQL: what is there is what must be in the index."""

    FIELDS = ("title", "text")

    def __init__(self, address: DatabaseAddress, chance: random.Random, count: int) -> None:
        self._address, self._random, self._goal = address, chance, count
        self._texts = mixed_texts(5000, longest=40)
        execute(address, "CREATE EXTENSION vector")
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
        text = chance.choice(self._texts[1:])
        return {"title": f"note {chance.randrange(10**6)}", "text": " ".join(text.split()[: chance.randint(2, 12)])}

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
