"""A table of texts with a vector column, as another program has made it, and how it is read."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from servers import Vector, cosine, execute

from kdb_fast.db.address import DatabaseAddress
from kdb_fast.db.sqlite_connection import connect_sqlite
from kdb_fast.records import Key, Record, Reject, is_blank
from kdb_fast.sources.reader import Reader
from kdb_fast.sources.table.select import select
from kdb_fast.sources.table.source import TableSource
from kdb_fast.stores.postgresql import column_find as pg_find
from kdb_fast.stores.postgresql import table_find as pg_table_find
from kdb_fast.stores.postgresql.session import PgSession
from kdb_fast.stores.sqlite import column_find as sqlite_find
from kdb_fast.stores.sqlite import table_find as sqlite_table_find
from kdb_fast.tables.column_target import ColumnTarget, column_text
from kdb_fast.tables.definition import Definition
from kdb_fast.tables.relation import Relation
from kdb_fast.tables.table_target import TableTarget
from kdb_fast.tables.target import Params, Rows, Target

COLUMNS = {
    "postgresql": "id bigint, lang text, body text, embedding vector, PRIMARY KEY (id, lang)",
    "sqlite": "id INTEGER, lang TEXT, body TEXT, embedding BLOB, PRIMARY KEY (id, lang)",
}


class Articles:
    """The table.

    Args:
        columns: Instead of those it has by default.
        name: As SQL writes it.
        make: Make the table; it is there already where this is False.
    """

    def __init__(
        self, address: DatabaseAddress, columns: str | None = None, name: str | None = None, *, make: bool = True
    ) -> None:
        self.address = address
        self.postgresql = address.dialect == "postgresql"
        self.name = name or ("shop.articles" if self.postgresql else "articles")
        if not make:
            return
        if self.postgresql:
            execute(address, "CREATE EXTENSION IF NOT EXISTS vector")
            execute(address, "CREATE SCHEMA IF NOT EXISTS shop")
        execute(address, f"CREATE TABLE {self.name} ({columns or COLUMNS[address.dialect]})")

    def target(self, text: str | None = None, name: str = "articles", **options: Any) -> ColumnTarget:
        """Where a run writes: the column ``embedding``."""
        options = {"vector": "embedding", "text": text or column_text("body", self.address.dialect), **options}
        if not self.postgresql:
            table = self.name.strip('"').replace('""', '"')
            with contextlib.closing(connect_sqlite(self.address)) as connection:
                return sqlite_find.find_column(connection, name, table, **options)
        session = PgSession(self.address, "test")
        with contextlib.closing(session), session.transaction() as cursor:
            return pg_find.find_column(cursor, session.target, name, self.name, **options)

    def into(self, into: str = "article_vectors", kind: str = "table", **options: Any) -> TableTarget:
        """A table of vectors beside it.

        Args:
            into: Its name as SQL writes it.
            kind: What the table of articles is taken for.
        """
        read = self.target(key=options.pop("key", ()))
        source = Relation(read.schema, read.table, kind, keys=(read.key,))
        options = {"text": read.text, **options}
        if not self.postgresql:
            table = into.strip('"').replace('""', '"')
            with contextlib.closing(connect_sqlite(self.address)) as connection:
                return sqlite_table_find.find_table(
                    connection, "articles", table, key=read.key, source=source, **options
                )
        session = PgSession(self.address, "test")
        with contextlib.closing(session), session.transaction() as cursor:
            return pg_table_find.find_table(
                cursor, session.target, "articles", into, key=read.key, source=source, **options
            )

    def key(self, number: int, *more: str) -> Key:
        """The key of a record."""
        more = more or ("en",)
        return (str(number), *more) if self.postgresql else (number, *more)

    def add(self, *texts: str | None, first: int = 0) -> None:
        """Rows with these ids from ``first`` on."""
        for number, text in enumerate(texts, first):
            execute(self.address, f"INSERT INTO {self.name} (id, lang, body) VALUES (%s, 'en', %s)", number, text)

    def set(self, number: int, text: str | None) -> None:
        """Another text."""
        execute(self.address, f"UPDATE {self.name} SET body = %s WHERE id = %s", text, number)

    def set_vector(self, number: int, vector: Vector) -> None:
        """Another vector, as another program writes one."""
        value: Any = np.array(vector, "<f4").tobytes()
        if self.postgresql:
            value = json.dumps([float(x) for x in vector])
        execute(self.address, f"UPDATE {self.name} SET embedding = %s WHERE id = %s", value, number)

    def delete(self, number: int) -> None:
        """One row less."""
        execute(self.address, f"DELETE FROM {self.name} WHERE id = %s", number)

    def add_trigger(self, body: str, event: str = "BEFORE UPDATE", when: str = "") -> None:
        """A trigger ``meddle`` for each row."""
        if self.postgresql:
            function = f"CREATE FUNCTION meddle() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {body} END $$"
            execute(self.address, function)
            body = "EXECUTE FUNCTION meddle()"
            execute(self.address, f"CREATE TRIGGER meddle {event} ON {self.name} FOR EACH ROW {when} {body}")
        else:
            execute(self.address, f"CREATE TRIGGER meddle {event} ON {self.name} {when} BEGIN {body}; END")

    def drop_trigger(self) -> None:
        """Drop it again."""
        execute(self.address, f"DROP TRIGGER meddle{f' ON {self.name}' if self.postgresql else ''}")

    def rows(self) -> dict[Any, tuple[str | None, Vector | None]]:
        """Text and vector by id."""
        column = "embedding::text" if self.postgresql else "embedding"
        rows = execute(self.address, f"SELECT id, body, {column} FROM {self.name}")
        return {number: (text, None if value is None else floats(value)) for number, text, value in rows}

    def vector(self, number: int) -> Vector:
        """Of one row, which must have one."""
        _, vector = self.rows()[number]
        assert vector is not None
        return vector

    def vectors_beside(self, table: str, key: str = "id") -> dict[Any, Vector]:
        """Those of a table of vectors, by a column of its key."""
        column = "embedding::text" if self.postgresql else "embedding"
        rows = execute(self.address, f"SELECT {key}, {column} FROM {table}")
        return {number: floats(value) for number, value in rows}

    def state(self) -> list[tuple[Any, ...]]:
        """Keys that we know a vector of, and the run that has written each."""
        return execute(self.address, "SELECT key_1, key_2, run FROM kdb_fast_articles_state ORDER BY 1, 2")

    def check(self, vector: Callable[[str], Vector], foreign: Mapping[Any, str] = MappingProxyType({})) -> None:
        """Every row with a text has its vector, and no other row has one. ``foreign``: those that have the vector of
        another text, which another program has given them."""
        for number, (text, found) in self.rows().items():
            text = foreign.get(number, text)
            if text is None or is_blank(text):
                assert found is None, number
            else:
                assert found is not None, number
                assert cosine(found, vector(text)) >= 0.99999, number


def floats(value: str | bytes) -> Vector:
    """A vector as a column gives it."""
    return np.frombuffer(value, "<f4") if isinstance(value, bytes) else np.array(json.loads(value), np.float32)


@dataclass(frozen=True)
class Live:
    """The rows of a table of vectors whose record is among those that are read (``kdb_fast.tables.target.LiveRows``).

    Attributes:
        target: The table that is read.
        where: Condition of what is read of it, whose rows are ``t``.
    """

    target: ColumnTarget
    where: str = "1 = 1"

    def __call__(self, rows: Rows, target: Target, entity: str, params: Params) -> str:
        same = self.target.same_key("t.{column}", "s.{column}")
        return f"EXISTS (SELECT 1 FROM {self.target.quoted} t WHERE {self.where} AND {same})"


class ArticleSource(TableSource):
    """Reads the table.

    Args:
        elsewhere: The address is of another database than the target's: then nothing is known of its rows.
        between: Called with the page's number after each page was read.
        complete: What is in no page has no record any more.
    """

    def __init__(
        self,
        address: DatabaseAddress,
        target: ColumnTarget,
        *,
        page_rows: int = 100,
        elsewhere: bool = False,
        between: Callable[[int], None] = lambda page: None,
        complete: bool = False,
    ) -> None:
        definition = Definition(
            name=target.name,
            schema=target.schema,
            table=target.table,
            key=tuple(column.name for column in target.key),
            text=(target.text,),
        )
        reader = Reader(address)
        super().__init__(reader, select(reader, definition), elsewhere=elsewhere, page_rows=page_rows)
        if not complete:
            self.live_rows = None
        self._between = between
        self.sent = 0
        """Records in all pages."""
        self.again: list[Key] = []
        """Keys that were read again."""

    def pages(self) -> Iterator[list[Record | Reject]]:
        for number, page in enumerate(super().pages()):
            self.sent += len(page)
            yield page
            self._between(number)

    def read_again(self, keys: Sequence[Key]) -> list[Record | Reject]:
        self.again += keys
        found = super().read_again(keys)
        self._between(-len(self.again))
        return found
