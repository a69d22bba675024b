"""One small job with a fault at every named point, then without: nothing is lost, doubled or left behind.

By default each point is killed at its first hit on PostgreSQL, and meets one of the other actions in turn on SQLite.
``KDB_FAST_FAULT_LOOP=full`` has every action at the n-th hit of every point on both, n = 1, 2, … until it is no longer
hit, and a kill at every point with the real model.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import oracle as oracles
import poison_worker
import pytest
from commands import Command, Commands, RealCommands
from kameleondb import KameleonDB
from servers import Oracle, Server, Vector, eventually, execute

import kdb_fast
from kdb_fast.cli.demo import sqlalchemy_url
from kdb_fast.db.address import DatabaseAddress
from kdb_fast.embedding.models.lookup import Model
from kdb_fast.faults import POINTS
from kdb_fast.records import Record, content_from_fields

FULL = os.environ.get("KDB_FAST_FAULT_LOOP") == "full"
ACTIONS = ("kill", "raise", "hang", "enospc")
POSTGRESQL_ONLY = ("store.index_dropped", "store.index_build")
LOOPED = [point for point in POINTS if point not in ("store.migrate", "store.migrated")]
"""The others are hit before the job: ``test_migrations.py``."""
PARENT = ("source.", "pipeline.", "supervisor.")

KILLED = -9
REJECTS, RESOURCE, DEFECT = 3, 7, 70
"""Exit codes."""


def test_every_point_of_the_list_is_in_the_code_and_no_other() -> None:
    folder = Path(kdb_fast.__file__).parent
    found = [name for file in folder.rglob("*.py") for name in re.findall(r'\bfault\("([^"]+)"\)', file.read_text())]
    assert set(found) == set(POINTS)


# -- the job -----------------------------------------------------------------------------------------------


class Job:
    """A reindex of KameleonDB's records in which everything happens that can: rows that are new, changed, unchanged,
    equal, refused by the database, without text and deleted, and a vector index that is dropped and built again.

    Attributes:
        records: What the index holds afterwards.
        rejected: The key of the record that the database refuses.
        to_write: Rows that a run writes which does all of the job.
    """

    def __init__(self, template: DatabaseAddress, commands: Commands, new: int) -> None:
        self.template, self.commands = template, commands
        client = KameleonDB(sqlalchemy_url(template))
        names = ("name", "text")
        entity: Any = client.create_entity("Note", fields=[{"name": name, "type": "text"} for name in names])

        def insert(first: int, texts: list[str | None]) -> dict[str, dict[str, Any]]:
            rows = [{"name": text and f"note {first + i}", "text": text} for i, text in enumerate(texts)]
            return dict(zip(entity.insert_many(rows), rows, strict=True))

        before = insert(0, [f"{i} words to begin with" for i in range(12)])
        assert self.start(template).wait() == 0
        ids = list(before)
        for key in ids[:2]:
            entity.delete(key)
            del before[key]
        for key in ids[2:5]:
            before[key]["text"] += " and to go on"
            entity.update(key, {"text": before[key]["text"]})
        entity.update(ids[5], {"name": None, "text": None})
        del before[ids[5]]
        after = insert(100, [f"{poison_worker.MORTAL} number {i}" if i == 9 else f"new {i}" for i in range(new)])
        equal = [{"name": "twin", "text": "the same in all"}] * 3
        after |= dict(zip(entity.insert_many(equal), equal, strict=True))
        insert(200, [None])
        (refused,) = entity.insert_many([{"name": "bad", "text": "not to be stored"}])
        _refuse(template)
        client.close()
        rows = before | after
        self.records = [
            Record(("Note", key), content_from_fields((n, row[n]) for n in names)) for key, row in rows.items()
        ]
        self.rejected = [("Note", refused)]
        self.to_write = 3 + len(after)

    def start(self, database: DatabaseAddress, *options: str, **environment: str) -> Command:
        """The command of the job."""
        return self.commands.start(
            "reindex", "Note", "--db", sqlalchemy_url(database), "--json", "--no-progress", "--max-rejects", "1",
            *options, **environment,
        )  # fmt: skip

    def written(self, database: DatabaseAddress) -> int:
        """Rows of the job that are committed."""
        return int(execute(database, "SELECT count(*) FROM kdb_search WHERE kdb_fast_run = 2")[0][0])


def _refuse(database: DatabaseAddress) -> None:
    """Let the database refuse every row with the words "not to be stored"."""
    condition = "NEW.content LIKE '%not to be stored%'"
    for event in ("INSERT", "UPDATE"):
        if database.dialect == "sqlite":
            execute(
                database,
                f"CREATE TRIGGER refuse_{event} BEFORE {event} ON kdb_search WHEN {condition} "
                "BEGIN SELECT RAISE(ABORT, 'refused'); END",
            )
            continue
        execute(
            database,
            "CREATE OR REPLACE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN RAISE EXCEPTION 'refused'; END $$",
        )
        execute(
            database,
            f"CREATE TRIGGER refuse_{event} BEFORE {event} ON kdb_search FOR EACH ROW WHEN ({condition}) "
            "EXECUTE FUNCTION refuse()",
        )


@pytest.fixture(scope="module")
def real_commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    found = RealCommands(tmp_path_factory.mktemp("commands"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def postgresql_job(postgres: Server, commands: Commands) -> Iterator[Job]:
    template = postgres.create_database()
    yield Job(template, commands, new=24)
    postgres.drop_database(template)


@pytest.fixture(scope="module")
def real_job(postgres: Server, real_commands: Commands, minilm: Model) -> Iterator[Job]:
    template = postgres.create_database()
    # So many that the vector index is dropped and built again.
    yield Job(template, real_commands, new=220)
    postgres.drop_database(template)


@pytest.fixture(scope="module")
def sqlite_job(tmp_path_factory: pytest.TempPathFactory, commands: Commands) -> Job:
    path = tmp_path_factory.mktemp("template") / "template.db"
    job = Job(DatabaseAddress("sqlite", str(path), f"sqlite:///{path}"), commands, new=24)
    execute(job.template, "PRAGMA wal_checkpoint(TRUNCATE)")
    return job


# -- the loop ----------------------------------------------------------------------------------------------


def expected_exit(point: str, action: str) -> int:
    """Of the run that meets the fault: a child's death is made good, the parent's ends the run."""
    if not point.startswith(PARENT):
        return REJECTS
    return {"kill": KILLED, "hang": KILLED, "raise": DEFECT, "enospc": RESOURCE}[action]


def run_with_fault(
    job: Job, database: DatabaseAddress, point: str, hit: int, action: str, vector: Callable[[str], Vector]
) -> bool:
    """A run with the fault, one without, and the oracle. False if the point was hit less often."""
    commands = job.commands
    if point == "supervisor.reap":
        (commands.mark / poison_worker.MORTAL).touch()
    embedded = commands.mark / "embedded"
    embedded.write_text("")
    command = job.start(database, "--workers", "1", KDB_FAST_FAULT=f"{point}:{hit}:{action}")
    if action == "hang" and point.startswith(PARENT):
        command.wait_until_stopped()
        command.kill()
    code = command.wait()
    fired = commands.fired()
    assert code == (expected_exit(point, action) if fired else REJECTS), command.err
    receipt = command.receipt if code == REJECTS else {}
    if point.startswith(("writer.", "store.")) and not isinstance(commands, RealCommands):
        # What a dead writer had not committed is still in shared memory: nothing was embedded twice.
        times = sum(len(line.split()) - 1 for line in embedded.read_text().splitlines())
        assert times == receipt["stored"] + receipt["rejected"]
    if code != REJECTS:
        eventually(lambda: not commands.processes())
        eventually(lambda: not oracles.sessions(database))
        committed = job.written(database)
        again = job.start(database)
        assert again.wait() == REJECTS, again.err
        receipt = again.receipt
        assert receipt["stored"] + receipt["reused"] == job.to_write - committed
    oracles.check_nothing_left(database)
    eventually(lambda: not commands.processes())
    if not fired and hit > 1:
        return False

    def rerun() -> dict[str, Any]:
        command = job.start(database)
        assert command.wait() == REJECTS, command.err
        return command.receipt

    oracles.check(database, job.records, receipt, vector=vector, rerun=rerun, rejected=job.rejected)
    return fired


def loop(
    job: Job, fresh: Callable[[], DatabaseAddress], point: str, action: str, vector: Callable[[str], Vector]
) -> None:
    hits = 0
    while run_with_fault(job, fresh(), point, hits + 1, action, vector):
        hits += 1
        if not FULL:
            break
    assert hits, f"the point {point} is not hit"
    print(f"{job.template.dialect} {point} {action}: {hits} hits")


@pytest.mark.timeout(1200 if FULL else 120)
@pytest.mark.parametrize("action", ACTIONS if FULL else ["kill"])
@pytest.mark.parametrize("point", LOOPED)
def test_postgresql(postgres: Server, postgresql_job: Job, point: str, action: str) -> None:
    databases: list[DatabaseAddress] = []

    def fresh() -> DatabaseAddress:
        drop()
        databases.append(postgres.create_database(postgresql_job.template))
        return databases[-1]

    def drop() -> None:
        while databases:
            postgres.drop_database(databases.pop())

    loop(postgresql_job, fresh, point, action, poison_worker.vector_of)
    drop()


SQLITE_POINTS = [point for point in LOOPED if point not in POSTGRESQL_ONLY]
IN_TURN = [(point, ACTIONS[1 + number % 3]) for number, point in enumerate(SQLITE_POINTS)]


@pytest.mark.timeout(1200 if FULL else 120)
@pytest.mark.parametrize(
    ("point", "action"), [(point, action) for point in SQLITE_POINTS for action in ACTIONS] if FULL else IN_TURN
)
def test_sqlite(tmp_path: Path, sqlite_job: Job, point: str, action: str) -> None:
    loop(sqlite_job, lambda: _copy(sqlite_job, tmp_path), point, action, poison_worker.vector_of)


def _copy(job: Job, folder: Path) -> DatabaseAddress:
    """A copy of the job's database, in place of an earlier one."""
    for file in folder.glob("job.db*"):
        file.unlink()
    path = shutil.copy(job.template.conninfo, folder / "job.db")
    return DatabaseAddress("sqlite", str(path), f"sqlite:///{path}")


# -- changes meanwhile -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["postgresql", "sqlite"])
def test_records_that_change_while_a_run_is_on_its_way_are_pending_until_the_next(
    request: pytest.FixtureRequest, postgres: Server, tmp_path: Path, kind: str
) -> None:
    job: Job = request.getfixturevalue(f"{kind}_job")
    database = postgres.create_database(job.template) if kind == "postgresql" else _copy(job, tmp_path)

    def pending() -> int:
        command = job.commands.start("status", "--db", sqlalchemy_url(database), "--json")
        assert command.wait() == 0, command.err
        (entity,) = command.receipt["entities"]
        return int(entity["pending"])

    # Everything has been read, and nothing is written yet.
    command = job.start(database, "--workers", "1", KDB_FAST_FAULT="pipeline.flush:1:hang")
    command.wait_until_stopped()
    assert job.commands.fired()
    records = {str(record.key[1]): record for record in job.records}
    first, *_, new, gone = list(records)[:-3]  # the last three are equal
    with contextlib.closing(KameleonDB(sqlalchemy_url(database))) as client:
        entity = client.entity("Note")
        for key in (first, new):
            entity.update(key, {"text": "changed meanwhile"})
        entity.delete(gone)
        added = entity.insert({"name": "late", "text": "new meanwhile"})
    command.send(signal.SIGCONT)
    assert command.wait() == REJECTS, command.err
    assert pending() == 3
    again = job.start(database)
    assert again.wait() == REJECTS, again.err
    assert again.receipt["stored"] == 3
    del records[gone]
    for key in (first, new):
        name = records[key].content.partition(" | ")[0]
        records[key] = records[key]._replace(content=f"{name} | text: changed meanwhile")
    records[added] = Record(("Note", added), "name: late | text: new meanwhile")
    assert pending() == 0
    oracles.check(database, records.values(), again.receipt, vector=poison_worker.vector_of, rejected=job.rejected)
    if kind == "postgresql":
        postgres.drop_database(database)


# -- the real model ----------------------------------------------------------------------------------------


# No worker dies by itself with the real model, so that nothing is reaped.
REAL_POINTS = [point for point in LOOPED if point != "supervisor.reap"] if FULL else ["store.after_commit"]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("point", REAL_POINTS)
def test_killed_with_the_real_model(postgres: Server, real_job: Job, oracle: Oracle, point: str) -> None:
    database = postgres.create_database(real_job.template)
    assert run_with_fault(real_job, database, point, 1, "kill", oracle.vector)
    postgres.drop_database(database)
