"""From a database URL, or an SQLAlchemy engine of the caller's, to the library's connections.

===================  ======================================  ==============================================
given                to write and to read                    for the caller's own session
===================  ======================================  ==============================================
URL, SQLite file     connections of our own                  the session's connection
engine, PostgreSQL   taken from the engine for good, so that  the session's connection
                     its ``connect_args`` and ``creator`` hold
engine, in memory    the engine's one connection             the same one
===================  ======================================  ==============================================
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from typing import Any

from ..db import pg_settings
from ..db.address import DatabaseAddress, parse_address, redact
from ..db.pg_connection import connect_postgresql, connection_remedy
from ..errors import DatabaseError, RefusedError, UsageError
from .connections import Connections, main_file

MEMORY = DatabaseAddress("sqlite", ":memory:", "sqlite:///:memory:")


def connections_for(engine: Any) -> Connections:
    """Connections to the database of a URL or of an SQLAlchemy engine.

    Raises:
        UsageError: It is neither, or its dialect is neither PostgreSQL nor SQLite.
        DatabaseError: The engine cannot connect.
    """
    if isinstance(engine, str):
        if engine in ("sqlite://", "sqlite:///:memory:"):
            raise UsageError(
                "A URL cannot name an SQLite database in memory: each connection would have its own.",
                remedy="Pass the SQLAlchemy engine that holds it, or use sqlite:///file.db.",
            )
        return Connections(parse_address(engine, "engine"))
    if isinstance(engine, DatabaseAddress):
        return Connections(engine)
    if not hasattr(engine, "url") or not hasattr(engine, "raw_connection") or hasattr(engine, "sync_engine"):
        raise UsageError(f"engine is {type(engine).__name__}; expected a database URL or an SQLAlchemy Engine.")
    if engine.dialect.name == "sqlite":
        return _for_sqlite(engine)
    if engine.dialect.name == "postgresql":
        return _for_postgresql(engine)
    raise UsageError(f"The engine is for {engine.dialect.name}; expected PostgreSQL or SQLite.")


def _for_sqlite(engine: Any) -> Connections:
    name = engine.url.database
    if name and name != ":memory:" and not name.startswith("file:"):
        return Connections(DatabaseAddress("sqlite", os.path.abspath(name), f"sqlite:///{name}"))
    held = _checked_out(engine, MEMORY)
    connection = held.driver_connection
    if not isinstance(connection, sqlite3.Connection):
        raise UsageError(f"The engine's driver is {type(connection).__module__}; expected sqlite3.")
    if path := main_file(connection):
        held.close()
        read_only = engine.url.query.get("mode") == "ro" or engine.url.query.get("immutable") == "1"
        return Connections(
            DatabaseAddress("sqlite", path, f"sqlite:///{path}", read_only=read_only, may_create=not read_only)
        )
    # Held for good: each return to the pool would roll back what a session has open on the same connection.
    return Connections(MEMORY, shared=connection, keep=held)


def _for_postgresql(engine: Any) -> Connections:
    from sqlalchemy.pool import StaticPool

    if engine.dialect.driver != "psycopg" or isinstance(engine.pool, StaticPool):
        return Connections(parse_address(engine.url.render_as_string(hide_password=False), "the engine's URL"))
    import psycopg
    from psycopg.conninfo import make_conninfo
    from psycopg.rows import tuple_row

    # Only shown, and its password kept out of messages: connections come from the engine.
    conninfo = make_conninfo(password=engine.url.password) if engine.url.password else ""
    address = DatabaseAddress("postgresql", conninfo, engine.url.render_as_string(hide_password=True))

    def connect() -> psycopg.Connection[tuple[Any, ...]]:
        while True:
            held = _checked_out(engine, address)
            connection: psycopg.Connection[tuple[Any, ...]] = held.driver_connection
            try:
                # What the engine's listeners have set for this connection, such as a tenant's search_path, stays.
                connection.commit()
                pg_settings.check_encoding(connection, address.display)
                connection.autocommit = True
                # Also to see whether it is alive.
                connection.execute(f"SET client_encoding TO '{pg_settings.ENCODING}'")
            except psycopg.OperationalError:
                # It was cut while it lay in the pool. One after the other is thrown away, until a new one is made.
                held.invalidate()
                continue
            except RefusedError:
                held.close()
                raise
            held.detach()
            pg_settings.pin(connection)
            connection.prepare_threshold = None  # poolers lose prepared statements
            connection.row_factory = tuple_row
            return connection

    return Connections(address, connect=connect)


def _checked_out(engine: Any, address: DatabaseAddress) -> Any:
    try:
        return engine.raw_connection()
    except Exception as error:  # the driver's, the pool's, or that of the caller's own `creator`
        if isinstance(error, TypeError) and address.dialect == "postgresql":
            # psycopg gives SQLAlchemy bytes where the database has no encoding: say so.
            with contextlib.suppress(DatabaseError, UsageError):
                url = parse_address(engine.url.render_as_string(hide_password=False), "the engine's URL")
                connect_postgresql(url, role="library").close()
        detail = " ".join(redact(str(getattr(error, "orig", None) or error), address).split())
        raise DatabaseError(
            f"Cannot connect to {address.display}: {detail}.",
            remedy=connection_remedy(detail, address.given_as),
        ) from None
