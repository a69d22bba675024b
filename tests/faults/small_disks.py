"""A server whose disk and whose /dev/shm are small; started with file systems of its own (``unshare -m``), as root.

Prints what became of five runs of kdb-fast as one JSON object: on a full tablespace (``full``), after something was
deleted there (``freed``), the same for a column of a table (``column full``, ``column freed``), and with too little
shared memory for the index (``index``).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from commands import Command, Commands
from servers import Server, connect_as, execute
from test_database_faults import RECORDS, Job

from kdb_fast.cli.demo import sqlalchemy_url
from kdb_fast.db.address import DatabaseAddress


def mount(size: str, where: Path | str, *options: str) -> None:
    settings = ",".join([f"size={size}", *options])
    subprocess.run(["mount", "-t", "tmpfs", "-o", settings, "tmpfs", str(where)], check=True)


def remount(size: str, where: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", where], check=True)


def outcome(job: Job, command: Command) -> dict[str, Any]:
    return {"code": command.wait(), "err": command.err, "committed": job.committed(), **command.receipt}


def on_a_full_tablespace(server: Server, commands: Commands, folder: Path) -> dict[str, Any]:
    disk = folder / "disk"
    disk.mkdir()
    mount("24m", disk)
    owner = Path(execute(server.address, "SHOW data_directory")[0][0]).stat()
    os.chown(disk, owner.st_uid, owner.st_gid)
    execute(server.address, f"CREATE TABLESPACE small LOCATION '{disk}'")
    execute(server.address, "CREATE DATABASE small TABLESPACE small")
    address = connect_as(replace(server.address, display="postgresql://tests/small"), dbname="small")
    execute(address, "CREATE EXTENSION vector")
    job = Job(commands, address, sqlalchemy_url(address), folder)
    # Incompressible: a text of a random word takes its size on the disk.
    job.write([r._replace(content=f"{r.content} {os.urandom(20_000).hex()}") for r in RECORDS])
    fill(address, disk)
    full = outcome(job, job.start("--workers", "1"))
    execute(address, "DROP TABLE filler")
    freed = outcome(job, job.start("--workers", "1"))
    return {"full": full, "freed": freed, **under_a_column(commands, address, disk)}


def under_a_column(commands: Commands, address: DatabaseAddress, disk: Path) -> dict[str, Any]:
    """The same for a column of an application's table."""
    execute(address, "DROP TABLE kdb_search")
    execute(address, "CREATE TABLE articles (id bigint PRIMARY KEY, body text, embedding vector(384))")
    execute(address, "INSERT INTO articles SELECT i, 'article ' || i FROM generate_series(1, 1500) i")
    fill(address, disk)

    def run(*arguments: str) -> dict[str, Any]:
        command = commands.start("reindex", *arguments, "--workers", "1", "--json", KDB_FAST_DB=sqlalchemy_url(address))
        code = command.wait()
        ((written,),) = execute(address, "SELECT count(embedding) FROM articles")
        return {"code": code, "err": command.err, "written": written, **command.receipt}

    full = run("--table", "articles", "--text", "body", "--vector", "embedding")
    execute(address, "DROP TABLE filler")
    return {"column full": full, "column freed": run("articles")}


def fill(address: DatabaseAddress, disk: Path) -> None:
    """Leave some 1.5 MB."""
    execute(address, "CREATE TABLE filler (a text STORAGE EXTERNAL)")  # not compressed
    while free(disk) > 1_500_000:
        execute(address, "INSERT INTO filler SELECT repeat('x', 10000) FROM generate_series(1, 20)")


def free(disk: Path) -> int:
    found = os.statvfs(disk)
    return found.f_bavail * found.f_frsize


def with_little_shared_memory(server: Server, commands: Commands, folder: Path) -> dict[str, Any]:
    address = server.create_database()
    execute(address, "CREATE EXTENSION vector")
    job = Job(commands, address, sqlalchemy_url(address), folder)
    first = job.start()
    assert first.wait() == 0, first.err
    # A small table is given parallel workers only on request.
    execute(address, "ALTER TABLE kdb_search SET (parallel_workers = 2); DROP INDEX ix_kdb_search_vector")
    execute(address, "DROP INDEX ix_kdb_search_fts")
    remount("8m", "/dev/shm")
    found = outcome(job, job.start())
    names = execute(
        address, "SELECT indexname FROM pg_indexes WHERE indexdef ~ 'hnsw|gin' AND tablename = 'kdb_search' ORDER BY 1"
    )
    return {"index": {**found, "indexes": [name for (name,) in names]}}


def main() -> None:
    mount("256m", "/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="kdb-fast-disks-"))
    folder.chmod(0o755)
    commands = Commands(folder)
    server = Server()
    try:
        found = on_a_full_tablespace(server, commands, folder)
        found |= with_little_shared_memory(server, commands, folder)
    finally:
        commands.close()
        server.stop()
        subprocess.run(["umount", str(folder / "disk")], check=False)
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
