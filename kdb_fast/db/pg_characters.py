"""PostgreSQL: which characters a database can hold.

A database that is not in UTF-8 has the letters of its own encoding only, LATIN1 for example no ``€`` and no ``日``. A
parameter or a copied row with another one ends its statement (SQLSTATE 22P05). So what comes from outside is looked
at first, character by character, and the server is asked once for each: a page of 1,000 records full of such letters
costs one question, and nothing of it is embedded in vain.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from .pg_settings import ENCODING, server_encoding

if TYPE_CHECKING:
    import psycopg

    Connection = psycopg.Connection[tuple[Any, ...]]


class Characters:
    """What is known of the characters of one database.

    Attributes:
        encoding: That of the database, as PostgreSQL names it.
    """

    def __init__(self, encoding: str) -> None:
        self.encoding = encoding
        self._held: dict[str, bool] = {}

    @classmethod
    def of(cls, connection: Connection) -> Characters | None:
        """None for a database that holds all of them."""
        encoding = server_encoding(connection)
        return None if encoding == ENCODING else cls(encoding)

    def missing(self, connection: Connection, texts: Iterable[str]) -> frozenset[str]:
        """The characters in ``texts`` that the database cannot hold, or not as they are.

        Args:
            connection: To the database, in a transaction or in none.

        Raises:
            psycopg.Error: The server does not answer.
        """
        seen: set[str] = set()
        for text in texts:
            if not text.isascii():
                seen.update(text)
        new = sorted(c for c in seen if c not in self._held and not c.isascii())
        if new:
            held = _held(connection, new)
            self._held.update((character, character in held) for character in new)
        return frozenset(c for c in seen if not self._held.get(c, True))


def escaped(text: str, missing: frozenset[str]) -> str:
    """The text with ``missing`` characters written as \\xNN or \\uNNNN, so that the database can hold it."""
    return "".join(ascii(c)[1:-1] if c in missing else c for c in text) if missing else text


def _held(connection: Connection, characters: Sequence[str]) -> set[str]:
    """Those of the characters that come back from the database as they are."""
    import psycopg

    plain = [c for c in characters if not "\ud800" <= c <= "\udfff"]
    if connection.info.server_version >= 160_000:
        rows = connection.execute(
            "SELECT n FROM unnest(%s::text[]) WITH ORDINALITY AS t(e, n) WHERE pg_input_is_valid(e, 'jsonb')",
            ([json.dumps(c) for c in plain],),
        ).fetchall()
        plain = [plain[row[0] - 1] for row in rows]
    found: set[str] = set()
    parts = [plain] if plain else []
    while parts:
        part = parts.pop()
        idle = connection.pgconn.transaction_status == psycopg.pq.TransactionStatus.IDLE
        try:
            # An error ends a transaction unless there is a savepoint.
            with contextlib.nullcontext() if idle else connection.transaction():
                row = connection.execute("SELECT %s::text", ("\n".join(part),)).fetchone()
        except psycopg.errors.UntranslatableCharacter:
            if len(part) > 1:  # before version 16: halved until those that cannot be held stand alone
                middle = len(part) // 2
                parts += [part[:middle], part[middle:]]
            continue
        assert row is not None
        # Some encodings have one place for two characters, and give back the other one.
        found.update(c for c, back in zip(part, str(row[0]).split("\n"), strict=True) if c == back)
    return found
