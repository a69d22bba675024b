"""``kdb-fast demo``: the main job on the documentation of Python's own standard library.

The records are created through the real KameleonDB package, so the tables are the ones a user of KameleonDB
has; everything after that is what ``kdb-fast reindex`` and ``kdb-fast search`` do.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

from ..db.address import DatabaseAddress, opened, parse_address
from ..db.pg_connection import connect_postgresql
from ..db.pg_settings import ENCODING
from ..errors import EXIT_OK, EXIT_REJECTS, KdbFastError, RefusedError, ResourceError
from ..paths import default_data_dir
from ..records import shell_word
from ..settings import DEFAULT_MODEL, ReindexOptions
from .console import print_json

ENTITY = "PythonDoc"
QUESTIONS = (
    "read a comma separated file",
    "wait until several threads have arrived",
    "how similar are two strings",
    "store objects on disk",
    "undo compression of a gz file",
)
FIELDS = [
    {"name": "name", "type": "string"},
    {"name": "kind", "type": "string"},
    {"name": "module", "type": "string"},
    {"name": "summary", "type": "string"},
    {"name": "text", "type": "text"},
]


def run_demo(db: str | None, *, show: bool, as_json: bool) -> int:
    """Create the records once, reindex, and answer a few questions. Returns the exit code."""
    from ..indexing.reindex import reindex
    from ..search.commands import embed_queries, search_open
    from ..sources import SourceSpec
    from . import bars
    from .report import print_receipt, printable

    def say(text: str) -> None:
        if show:
            print(text, file=sys.stderr)

    address = parse_address(db or f"embedded:{default_data_dir() / 'demo'}")
    say(f"database: {address.display}")
    progress: Any = None
    with opened(address) as ready:
        if ready.dialect == "postgresql":
            connect_postgresql(ready, role="demo").close()  # what cannot be indexed is not filled with records
        say("records: the documentation of Python's standard library")
        created = create_records(ready)
        say(f"records: {created:,} created through KameleonDB" if created else "records: already there")
        progress = bars.choose(show)
        try:
            receipt = reindex(ready, SourceSpec((ENTITY,)), ReindexOptions(), progress)
        finally:
            progress.close()
        if not as_json:
            print_receipt(receipt, address.display)
        answers = []
        vectors = embed_queries(QUESTIONS, DEFAULT_MODEL, None)
        for question, vector in zip(QUESTIONS, vectors, strict=True):
            results = search_open(ready, question, vector, entities=(ENTITY,), limit=3)
            answers.append({"query": question, "results": results})
            if not as_json:
                print(f"\n“{question}”")
                for result in results:
                    name, summary = result["data"].get("name") or "", result["data"].get("summary") or ""
                    print(f"  {printable(name, 40):<40}  {printable(summary, 70)}")
    if as_json:
        print_json({**receipt.as_json(), "answers": answers})
    else:
        option = f" --db {address.display}" if address.display.startswith(("embedded:", "sqlite:")) else ""
        print(f'\nAsk it yourself:  {_program()} search "parse a date"{option}')
    return EXIT_REJECTS if receipt.rejected else EXIT_OK


def _program() -> str:
    """How a shell calls kdb-fast: by its name where that is found, else by its path, as after `make demo`."""
    beside = Path(sys.executable).with_name("kdb-fast")
    if shutil.which("kdb-fast") or not beside.exists():
        return "kdb-fast"
    here = beside.relative_to(Path.cwd()) if beside.is_relative_to(Path.cwd()) else beside
    return shell_word(str(here))


def read_documentation() -> list[dict[str, str]]:
    """Run :mod:`kdb_fast.cli.demo_docs` in a process of its own and return its records."""
    command = [sys.executable, "-W", "ignore", "-m", "kdb_fast.cli.demo_docs"]
    try:
        done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, timeout=180, check=False)
    except subprocess.TimeoutExpired:
        raise ResourceError("Reading the standard library's documentation took more than 180 s.") from None
    lines = done.stdout.decode().splitlines()
    if not lines:
        raise KdbFastError(f"Reading the standard library's documentation failed: {done.stderr.decode()[-500:]}")
    return [json.loads(line) for line in lines]


def create_records(address: DatabaseAddress) -> int:
    """Store the documentation through KameleonDB, unless it is there; returns how many were created.

    Raises:
        RefusedError: The package ``kameleondb`` is not installed.
    """
    try:
        from kameleondb import KameleonDB
    except ImportError:
        raise RefusedError(
            "The demo creates its records with KameleonDB, which is not installed.",
            remedy="Run: pip install 'kdb-fast[demo]'",
        ) from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        database = KameleonDB(sqlalchemy_url(address))
        try:
            entity = database.create_entity(name=ENTITY, fields=FIELDS, if_not_exists=True)
            stats = database.get_entity_stats(ENTITY)
            if stats.record_count:
                return 0
            records = read_documentation()
            entity.insert_many(records)
            return len(records)
        finally:
            database.close()


def sqlalchemy_url(address: DatabaseAddress) -> Any:
    """The address for SQLAlchemy, as KameleonDB takes it (a string; the password is in it)."""
    if address.dialect == "sqlite":
        return f"sqlite:///{address.conninfo}"
    from urllib.parse import quote, urlencode

    from psycopg.conninfo import conninfo_to_dict

    parts: dict[str, Any] = {**conninfo_to_dict(address.conninfo), "client_encoding": ENCODING}
    user, password = parts.pop("user", ""), parts.pop("password", "")
    name = parts.pop("dbname", "") or ""
    login = quote(str(user), safe="") + (f":{quote(str(password), safe='')}" if password else "")
    return f"postgresql+psycopg://{login}@/{quote(str(name), safe='')}?{urlencode(parts)}"
