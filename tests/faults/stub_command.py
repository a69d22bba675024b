"""kdb-fast's command line with a stub for the model and limits that suit small jobs, ready in a moment.

Run as a program it waits for requests on standard input and forks for each command, so that a command is a process
of its own that need not import anything first; see ``commands.py`` for the other end. All else is real: the children
that a command starts, their pipes, the slab and the database.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

import article_command
import cluster_stub
import poison_worker
import psycopg  # noqa: F401 - imported once for all commands

from kdb_fast import cli, faults, sources
from kdb_fast.cli import bars, report
from kdb_fast.db import sqlite_connection
from kdb_fast.embedding.models.lookup import Model
from kdb_fast.engine import child_processes, inline, plan, start
from kdb_fast.engine.cluster import driver
from kdb_fast.engine.process_pool import ProcessPool
from kdb_fast.indexing import flushing, pipeline, run_embedding, signals
from kdb_fast.stores import open_store, runs
from kdb_fast.stores.postgresql import session as pg_session
from kdb_fast.stores.postgresql import store as postgresql
from kdb_fast.stores.sqlite import store as sqlite
from kdb_fast.tables import index_policy

__all__ = ["bars", "open_store", "pipeline", "postgresql", "report", "sources", "sqlite", "sqlite_connection"]

MODEL = Model("stub", Path(), "stub.onnx", 384, 512, "mean", True, ())

SHARD_ROWS = 8


def use_stubs() -> None:
    """Replace the model, and make shards, flushes and waiting times small; ``LC_SECONDS`` may set more of these."""
    run_embedding.resolve = lambda *args, **options: MODEL  # type: ignore[attr-defined]
    run_embedding.Splitter = article_command.StubSplitter  # type: ignore[attr-defined, assignment]
    inline.Encoder = poison_worker.StubEncoder  # type: ignore[attr-defined, assignment]
    start.ProcessPool = functools.partial(  # type: ignore[attr-defined, assignment]
        ProcessPool, worker_target=poison_worker.run
    )
    driver.run = cluster_stub.run
    plan.SHARD_ROWS = SHARD_ROWS  # type: ignore[attr-defined]
    flushing.FLOOR_BYTES = 25_000  # about 15 rows
    index_policy.DEFER_FLOOR = 10
    child_processes.STOPPED_SECONDS, child_processes.CHECK_SECONDS = 0.3, 0.1
    seconds = json.loads(os.environ.get("LC_SECONDS", "{}"))
    runs.STALE_SECONDS = seconds.get("stale", runs.STALE_SECONDS)
    pg_session.LIMITS = pg_session.LIMITS.replace("'30s'", f"'{seconds.get('lock', 30)}s'")
    sqlite_connection.SQLITE_BUSY_TIMEOUT = seconds.get("busy", sqlite_connection.SQLITE_BUSY_TIMEOUT)
    pipeline.DRAIN_SECONDS = seconds.get("drain", pipeline.DRAIN_SECONDS)
    signals.GRACE_SECONDS = seconds.get("grace", signals.GRACE_SECONDS)


def _command(arguments: list[str], environment: dict[str, str], directory: Path) -> None:
    """In the forked process: run the command with its output in ``directory``, and end."""
    for number, name in ((0, os.devnull), (1, directory / "out"), (2, directory / "err")):
        descriptor = os.open(name, os.O_RDWR | os.O_CREAT, 0o600)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.update(environment)
    faults.load_plan(os.environ.get("KDB_FAST_FAULT"))
    use_stubs()
    code = 1
    with contextlib.suppress(SystemExit):
        code = article_command.run(arguments[1:]) if arguments[0] == "articles" else cli.run(arguments)
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def serve() -> None:
    """Answer requests, a JSON object on a line each, until standard input ends."""
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        answer: int | None
        if "arguments" in request:
            answer = os.fork()
            if answer == 0:
                _command(request["arguments"], request["environment"], Path(request["directory"]))
        else:
            pid, status = os.waitpid(request["wait_for"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
