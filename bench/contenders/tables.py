"""The vectors of a plain table of texts, without the encoder: by kdb-fast, and by hand as most would write it."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Any

from kdb_fast.db.address import DatabaseAddress
from kdb_fast.db.sqlite_connection import connect_sqlite
from kdb_fast.indexing.reindex import reindex
from kdb_fast.resources import peak_rss_bytes
from kdb_fast.settings import ReindexOptions
from kdb_fast.sources.table.input import TableInput
from kdb_fast.stores.postgresql import column_find as pg_find
from kdb_fast.stores.postgresql import table_find as pg_table_find
from kdb_fast.stores.postgresql.session import PgSession
from kdb_fast.stores.sqlite import column_find as sqlite_find
from kdb_fast.stores.sqlite import table_find as sqlite_table_find
from kdb_fast.tables.column_target import ColumnTarget, column_text
from kdb_fast.tables.definition import Definition
from kdb_fast.tables.find_relation import find_relation
from kdb_fast.tables.table_target import TableTarget
from kdb_fast.tables.target import rows_on

from .. import data, database, free_encoder, vectors
from ..watched import Watch, watched
from .peers import STATEMENT_ROWS

TABLE = "CREATE TABLE kdb_articles (id bigint PRIMARY KEY, body text, embedding {vector})"
STATE = (
    "CREATE TABLE kdb_noted (id bigint PRIMARY KEY, fingerprint varchar(64), text_hash bytea, vector_hash bytea, "
    "at timestamptz)"
)
NOTE = (
    "INSERT INTO kdb_noted VALUES (%s, %s, %s, %s, now()) ON CONFLICT (id) DO UPDATE SET fingerprint = "
    "EXCLUDED.fingerprint, text_hash = EXCLUDED.text_hash, vector_hash = EXCLUDED.vector_hash, at = EXCLUDED.at"
)
HNSW = "CREATE INDEX kdb_articles_hnsw ON kdb_articles USING hnsw (embedding vector_cosine_ops)"
BESIDE = "kdb_article_vectors"
FINGERPRINT = "0123456789abcdef"
TEXT_CHARS = 200


def column(params: dict[str, Any]) -> dict[str, Any]:
    """kdb-fast over every row of a table; process start included.

    No index is made where there is none. With ``index`` each row has a vector by then and there is an HNSW index over
    them, all texts have changed, and that is what is done with the index: ``keep`` or ``defer``.
    """
    count = filled(params)
    if params.get("index"):
        _reindex(params)
        _execute(params["conninfo"], "UPDATE kdb_articles SET body = body || ' changed'")
        _execute(params["conninfo"], "VACUUM ANALYZE kdb_articles")
        _execute(params["conninfo"], HNSW)
    seconds, watch = _reindex(params, params.get("index", "none"))
    _verify(params, count)
    _execute(params["conninfo"], "VACUUM ANALYZE")
    return {"seconds": seconds, "records": count, "seconds_after_start": watch.seconds_after_start}


def column_again(params: dict[str, Any]) -> dict[str, Any]:
    """kdb-fast over the table that :func:`column` has filled; nothing has changed, or ``changed`` rows have."""
    count = int(params["records"])
    if params.get("changed"):
        every = count // params["changed"]
        _execute(params["conninfo"], f"UPDATE kdb_articles SET body = body || ' changed' WHERE id % {every} = 0")
    seconds, _ = _reindex(params)
    return {"seconds": seconds, "records": count, "parent_rss_bytes": peak_rss_bytes()}


def beside(params: dict[str, Any]) -> dict[str, Any]:
    """kdb-fast into a table of vectors beside the table, which is made; its foreign key is validated in the end."""
    count = filled(params)
    address = database.address_of(params["conninfo"])
    with watched(worker_target=free_encoder.run, memory=False) as watch:
        started = time.perf_counter()
        read = TableInput(definition(address, BESIDE))
        reindex(address, read, ReindexOptions(index="none"), target=beside_target(address))
        seconds = time.perf_counter() - started
        ended = time.monotonic()
    _verify(params, count, BESIDE)
    assert watch.ready_at is not None
    # With what comes after the last COMMIT: the foreign key.
    after_start = ended - watch.ready_at
    return {"seconds": seconds, "records": count, "seconds_after_start": after_start}


def loading_beside(params: dict[str, Any]) -> dict[str, Any]:
    """pgvector-python's published example of bulk loading, with a key, and a foreign key that is validated in the end.

    The rows are ready beforehand. With ``noted`` they have the columns that :func:`beside` fills, too.
    """
    count = filled(params)
    columns = {"id": "bigint PRIMARY KEY", "embedding": f"vector({database.DIMENSIONS})"}
    if params.get("noted"):
        columns |= {"text_hash": "bytea", "vector_hash": "bytea", "fingerprint": "varchar(64)", "run": "bigint"}
        columns["at"] = "timestamptz"
    now = datetime.now(UTC)
    with database.connect(params["conninfo"]) as connection:
        pages = _pages(connection)
        rows = [
            (key, vector, text, sha, FINGERPRINT, 1, now)[: len(columns)] for p in pages for key, text, sha, vector in p
        ]
        started = time.perf_counter()
        definitions = ", ".join(f"{name} {kind}" for name, kind in columns.items())
        connection.execute(f"CREATE TABLE {BESIDE} ({definitions})".encode())
        statement = f"COPY {BESIDE} ({', '.join(columns)}) FROM STDIN WITH (FORMAT BINARY)"
        with connection.cursor().copy(statement.encode()) as copy:
            copy.set_types(("int8", "vector", "bytea", "bytea", "varchar", "int8", "timestamptz")[: len(columns)])
            for row in rows:
                copy.write_row(row)
                # As in the example: keeps libpq's buffer small.
                while connection.pgconn.flush() == 1:
                    pass
        connection.execute(f"ALTER TABLE {BESIDE} ADD FOREIGN KEY (id) REFERENCES kdb_articles ON DELETE CASCADE")
        seconds = time.perf_counter() - started
    _verify(params, count, BESIDE)
    return {"seconds": seconds, "records": count}


def update_executemany(params: dict[str, Any]) -> dict[str, Any]:
    """By hand: read pages, update each row, and note text and vector, in transactions of STATEMENT_ROWS rows."""
    count = filled(params)
    with database.connect(params["conninfo"]) as connection, connection.cursor() as cursor:
        connection.execute(STATE)
        started = time.perf_counter()
        for rows in _pages(connection):
            with connection.transaction():
                cursor.executemany("UPDATE kdb_articles SET embedding = %s WHERE id = %s", [(r[3], r[0]) for r in rows])
                cursor.executemany(NOTE, [(r[0], FINGERPRINT, r[1], r[2]) for r in rows])
        seconds = time.perf_counter() - started
    _verify(params, count)
    return {"seconds": seconds, "records": count}


def update_staging(params: dict[str, Any]) -> dict[str, Any]:
    """By hand: read pages, COPY into a temporary table, then one UPDATE … FROM it and one INSERT of what is noted."""
    count = filled(params)
    with database.connect(params["conninfo"]) as connection:
        connection.execute(STATE)
        started = time.perf_counter()
        with connection.transaction():
            connection.execute(
                "CREATE TEMP TABLE staging (id bigint, text_hash bytea, vector_hash bytea, embedding vector) "
                "ON COMMIT DROP"
            )
            for rows in _pages(connection):
                with connection.cursor().copy("COPY staging FROM STDIN WITH (FORMAT BINARY)") as copy:
                    copy.set_types(("int8", "bytea", "bytea", "vector"))
                    for row in rows:
                        copy.write_row(row)
            connection.execute("ANALYZE staging")
            connection.execute("UPDATE kdb_articles a SET embedding = s.embedding FROM staging s WHERE a.id = s.id")
            connection.execute(
                NOTE.replace(
                    "VALUES (%s, %s, %s, %s, now())",
                    "SELECT id, '" + FINGERPRINT + "', text_hash, vector_hash, now() FROM staging",
                )
            )
        seconds = time.perf_counter() - started
    _verify(params, count)
    return {"seconds": seconds, "records": count}


def _pages(connection: Any) -> Iterator[list[tuple[int, bytes, bytes, Any]]]:
    """Key, hash of the text, hash of the vector and vector of the rows of the table, by pages of its key."""
    last = -1
    while True:
        rows = connection.execute(
            "SELECT id, body FROM kdb_articles WHERE id > %s ORDER BY id LIMIT %s", (last, STATEMENT_ROWS)
        ).fetchall()
        if not rows:
            return
        last = rows[-1][0]
        matrix = vectors.of_texts([body for _, body in rows])
        yield [
            (key, hashlib.sha256(body.encode()).digest(), hashlib.sha256(vector.tobytes()).digest(), vector)
            for (key, body), vector in zip(rows, matrix, strict=True)
        ]


# -- the table ---------------------------------------------------------------------------------------------


def filled(params: dict[str, Any], *, whole: bool = False, vector: str = "vector") -> int:
    """A new table of texts of about TEXT_CHARS characters (``whole``: as they are), without vectors.

    Args:
        vector: Type of the column of vectors in PostgreSQL.
    """
    read = data.read(params["data"], params["records"])
    texts: Iterable[str] = read if whole else (f"{i}: {f'{text} ' * 5}"[:TEXT_CHARS] for i, text in enumerate(read))
    if params["conninfo"].startswith("sqlite:"):
        with contextlib.closing(_sqlite(params["conninfo"])) as connection, connection:
            connection.execute("BEGIN")
            connection.execute(TABLE.format(vector="BLOB").replace("bigint", "INTEGER"))
            connection.executemany("INSERT INTO kdb_articles (id, body) VALUES (?, ?)", enumerate(texts))
        return int(params["records"])
    with database.connect(params["conninfo"]) as connection:
        connection.execute(TABLE.format(vector=f"{vector}({database.DIMENSIONS})").encode())
        with connection.cursor().copy("COPY kdb_articles (id, body) FROM STDIN") as copy:
            for row in enumerate(texts):
                copy.write_row(row)
        connection.execute("VACUUM ANALYZE kdb_articles")
    return int(params["records"])


def _reindex(params: dict[str, Any], index: str = "none") -> tuple[float, Watch]:
    address = database.address_of(params["conninfo"])
    read = TableInput(definition(address))
    with watched(worker_target=free_encoder.run, memory=False) as watch:
        started = time.perf_counter()
        options = ReindexOptions(index=index if address.dialect == "postgresql" else None)
        reindex(address, read, options, target=column_target(address))
        seconds = time.perf_counter() - started
    return seconds, watch


def definition(address: DatabaseAddress, into: str = "") -> Definition:
    """What is read of the table that :func:`filled` has made."""
    schema = None if address.dialect == "sqlite" else "public"
    return Definition(name="bench", schema=schema, table="kdb_articles", text=("body",), into=into)


def beside_target(address: DatabaseAddress) -> TableTarget:
    """A table of vectors beside it."""
    if address.dialect == "sqlite":
        with contextlib.closing(connect_sqlite(address)) as connection:
            relation = find_relation(rows_on(connection, "sqlite"), "sqlite", "kdb_articles")
            return sqlite_table_find.find_table(connection, "bench", BESIDE, key=relation.keys[0], source=relation)
    session = PgSession(address, "bench")
    with contextlib.closing(session), session.transaction() as cursor:
        relation = find_relation(rows_on(cursor, "postgresql"), "postgresql", "public.kdb_articles")
        return pg_table_find.find_table(
            cursor, session.target, "bench", f"public.{BESIDE}", key=relation.keys[0], source=relation
        )


def column_target(address: DatabaseAddress) -> ColumnTarget:
    """Its column of vectors."""
    text = column_text("body", address.dialect)
    if address.dialect == "sqlite":
        with contextlib.closing(connect_sqlite(address)) as connection:
            return sqlite_find.find_column(connection, "bench", "kdb_articles", text=text, vector="embedding")
    session = PgSession(address, "bench")
    with contextlib.closing(session), session.transaction() as cursor:
        return pg_find.find_column(
            cursor, session.target, "bench", "public.kdb_articles", text=text, vector="embedding"
        )


def _sqlite(conninfo: str) -> Any:
    return connect_sqlite(database.address_of(conninfo), must_exist=False)


def _execute(conninfo: str, statement: str) -> None:
    if conninfo.startswith("sqlite:"):
        with contextlib.closing(_sqlite(conninfo)) as connection, connection:
            if statement.startswith("UPDATE"):
                connection.execute(statement)
        return
    with database.connect(conninfo) as connection:
        connection.execute("SET maintenance_work_mem = '512MB'")
        connection.execute(statement.encode())


def _verify(params: dict[str, Any], count: int, table: str = "kdb_articles") -> None:
    """That every row has a vector."""
    if params["conninfo"].startswith("sqlite:"):
        with contextlib.closing(_sqlite(params["conninfo"])) as file:
            (found,) = file.execute(f"SELECT count(embedding) FROM {table}").fetchone()
            assert found == count, f"{found} vectors were written, expected {count}"
        return
    with database.connect(params["conninfo"]) as connection:
        row = connection.execute(f"SELECT count(embedding) FROM {table}".encode()).fetchone()
        assert row is not None
        assert row[0] == count, f"{row[0]} vectors were written, expected {count}"
