"""A PgBouncer between commands and the database's server."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from servers import connect_as, eventually

from kdb_fast.db.address import DatabaseAddress


@contextlib.contextmanager
def pooler(database: DatabaseAddress, mode: str, sessions: int) -> Iterator[DatabaseAddress]:
    """The database through PgBouncer; skips the test where that is not installed.

    Args:
        mode: ``transaction``: each transaction is given any of the sessions; ``session``: a connection keeps its own.
        sessions: Those with the server.
    """
    program = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin")
    if program is None:
        pytest.skip("PgBouncer is not installed")
    from psycopg.conninfo import conninfo_to_dict

    server = conninfo_to_dict(database.conninfo)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="kdb-fast-tests-") as folder:
        # PgBouncer does not run as root; the server's own user may open the server's socket.
        os.chmod(folder, 0o755)
        settings = Path(folder) / "pgbouncer.ini"
        settings.write_text(
            f"[databases]\n* = host={server['host']} port={server['port']} user=postgres\n"
            f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\nauth_type = any\n"
            f"pool_mode = {mode}\ndefault_pool_size = {sessions}\n"
        )
        settings.chmod(0o644)
        with open(Path(folder) / "log", "wb") as log:
            user = ["-u", Path(str(server["host"])).owner()] if os.geteuid() == 0 else []
            process = subprocess.Popen([program, *user, str(settings)], stderr=log, stdout=log)
        try:
            eventually(lambda: process.poll() is not None or _answers(port))
            assert process.poll() is None, (Path(folder) / "log").read_text()
            yield connect_as(database, host="127.0.0.1", port=str(port))
        finally:
            process.terminate()
            process.wait(20)


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False
