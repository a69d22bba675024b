"""Processes are killed, stopped and starved in the middle of runs; every record must end up stored once, and right."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import poison_worker
import psutil
import pytest
from servers import (
    ListSource,
    Oracle,
    engine_processes,
    eventually,
    execute,
    index_rows,
    kept_rejects,
    mixed_texts,
    records_of,
)

from kdb_fast.cli.demo import sqlalchemy_url
from kdb_fast.db.address import DatabaseAddress
from kdb_fast.embedding.models.lookup import Model
from kdb_fast.engine import child_processes, inline, plan, start, worker
from kdb_fast.engine.base import Engine, wait_for
from kdb_fast.engine.child_processes import Child
from kdb_fast.engine.process_pool import ProcessPool
from kdb_fast.engine.shard_queue import POISON_TRIES
from kdb_fast.engine.writer_process import WriterProcess
from kdb_fast.errors import ModelError, ResourceError
from kdb_fast.indexing import flushing, run_embedding
from kdb_fast.indexing.progress import Silent
from kdb_fast.indexing.reindex import reindex
from kdb_fast.receipt import Receipt
from kdb_fast.records import Record, Reject, content_from_fields
from kdb_fast.settings import ReindexOptions

PARTS = ("stored", "unchanged", "reused", "superseded", "rejected")
WORKERS = 2
RECORDS = records_of(mixed_texts(120, longest=30))


Act = Callable[[Engine], bool]


class Watched(Engine):
    """Calls ``act`` some twenty times a second, in the parent's own thread, until it says that it is done."""

    act: Act | None = None

    def poll(self, timeout: float) -> list[Any]:
        if self.act is not None and self.act(self):
            self.act = None
        return super().poll(min(timeout, 0.05))


class Runs:
    """Runs on one database, with a stub for the model unless ``real``, in shards of 8 rows and small flushes.

    Attributes:
        engines: The engines of the runs so far.
        starts: Processes started so far, by name.
        notes: What a person was told.
    """

    def __init__(self, address: DatabaseAddress, patch: pytest.MonkeyPatch, model: Model) -> None:
        self.address = address
        self.engines: list[Watched] = []
        self.notes: list[str] = []
        self.target: Callable[..., None] = poison_worker.run
        self.act: Act | None = None
        self._patch = patch
        patch.setattr(start, "Engine", self._engine)
        patch.setattr(
            start, "ProcessPool", lambda *args, **options: ProcessPool(*args, worker_target=self.target, **options)
        )
        patch.setattr(run_embedding, "resolve", lambda name, path, report: model)
        patch.setattr(inline, "Encoder", poison_worker.StubEncoder)
        patch.setattr(plan, "SHARD_ROWS", 8)
        patch.setattr(flushing, "FLOOR_BYTES", 40_000)
        # A stopped process is noticed sooner, so that tests need not wait.
        patch.setattr(child_processes, "STOPPED_SECONDS", 0.3)
        patch.setattr(child_processes, "CHECK_SECONDS", 0.1)

    def _engine(self, *parts: Any) -> Engine:
        engine = Watched(*parts)
        if not isinstance(engine.pool, ProcessPool):
            return engine
        engine.act = self.act
        self.engines.append(engine)
        if engine.act is not None:
            # What is to be sabotaged must be there: work is given only once all are ready.
            def all_are_ready() -> bool:
                wait_for((engine.pool, engine.writer), 0.05)
                return all(child.ready for child in children(engine))

            eventually(all_are_ready, 60)
        return engine

    def fault(self, fault: str, directory: Path | None) -> None:
        """Children of the next runs have this fault; with a directory, only the first that meets it."""
        self._patch.setenv("KDB_FAST_FAULT", fault)
        if directory is not None:
            self._patch.setenv("KDB_FAST_FAULT_DIR", str(directory))

    def no_fault(self) -> None:
        self._patch.delenv("KDB_FAST_FAULT", raising=False)
        self._patch.delenv("KDB_FAST_FAULT_DIR", raising=False)

    def run(
        self, records: Sequence[Record | Reject] = RECORDS, *, act: Act | None = None, workers: int | None = WORKERS
    ) -> Receipt:
        """One run. ``act`` is called with its engine again and again, until it says that it has done something."""
        self.act = act
        try:
            receipt = reindex(self.address, ListSource(records), ReindexOptions(workers=workers), Notes(self.notes))
        finally:
            assert engine_processes() == []
        assert act is None or self.engines[-1].act is None, "nothing was sabotaged"
        assert receipt.read == sum(getattr(receipt, part) for part in PARTS)
        return receipt

    def check(self, records: Sequence[Record] = RECORDS) -> None:
        """The index holds exactly these records with their vectors, and another run finds nothing to do."""
        self.no_fault()
        rows = index_rows(self.address)
        assert {key[1]: row.content for key, row in rows.items()} == {r.key[1]: r.content for r in records}
        for row in rows.values():
            assert row.vector is not None
            np.testing.assert_array_equal(row.vector, poison_worker.vector_of(row.content))
        again = self.run(records, workers=None)
        assert (again.unchanged, again.stored, again.flushes) == (len(records), 0, 0)


class Notes(Silent):
    """Keeps what a person is told."""

    def __init__(self, notes: list[str]) -> None:
        self.notes = notes

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def runs(database: DatabaseAddress, monkeypatch: pytest.MonkeyPatch, minilm: Model) -> Iterator[Runs]:
    yield Runs(database, monkeypatch, minilm)
    assert engine_processes() == []


def send(signum: signal.Signals, *killed: Child) -> bool:
    for child in killed:
        os.kill(child.process.pid, signum)
    return bool(killed)


def pool_of(engine: Engine) -> ProcessPool:
    assert isinstance(engine.pool, ProcessPool)
    return engine.pool


def writer_of(engine: Engine) -> Child:
    assert isinstance(engine.writer, WriterProcess)
    return engine.writer._child


def children(engine: Engine) -> list[Child]:
    return [*pool_of(engine)._workers, writer_of(engine)]


def busy(engine: Engine) -> list[Child]:
    pool = pool_of(engine)
    return [child for child in pool._workers if child.ready and pool._queue.tasks_of(child)]


def idle(engine: Engine) -> list[Child]:
    """Workers that have nothing to do while another one is busy."""
    pool = pool_of(engine)
    if not busy(engine):
        return []
    return [child for child in pool._workers if child.ready and not pool._queue.tasks_of(child)]


# -- workers -----------------------------------------------------------------------------------------------


def test_busy_worker_killed_with_the_real_model(runs: Runs, oracle: Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    runs.target = worker.run
    receipt = runs.run(act=lambda engine: send(signal.SIGKILL, *busy(engine)[:1]))
    assert receipt.stored == len(RECORDS)
    assert len(runs.notes) == 1
    assert "died of SIGKILL; replaced, its shard is given out again" in runs.notes[0]
    oracle.check(index_rows(runs.address), RECORDS)
    assert runs.run(workers=None).unchanged == len(RECORDS)


def test_busy_worker_killed(runs: Runs) -> None:
    receipt = runs.run(act=lambda engine: send(signal.SIGKILL, *busy(engine)[:1]))
    assert receipt.stored == len(RECORDS)
    assert len(receipt.warnings) == 1
    runs.check()


def test_idle_worker_killed(runs: Runs) -> None:
    # The shortest text is embedded last: while one worker is slow the other one has nothing to do.
    records = [*RECORDS, Record(("Note", "last"), poison_worker.SLOW)]
    receipt = runs.run(records, act=lambda engine: send(signal.SIGKILL, *idle(engine)[:1]))
    assert receipt.stored == len(records)
    assert "died of SIGKILL" in runs.notes[0]
    runs.check(records)


def test_all_workers_killed(runs: Runs) -> None:
    def all_of_them(engine: Engine) -> bool:
        return len(busy(engine)) == WORKERS and send(signal.SIGKILL, *pool_of(engine)._workers)

    receipt = runs.run(act=all_of_them)
    assert receipt.stored == len(RECORDS)
    assert len(runs.notes) == WORKERS
    runs.check()


def test_all_processes_killed(runs: Runs) -> None:
    def all_of_them(engine: Engine) -> bool:
        return bool(busy(engine)) and send(signal.SIGKILL, *children(engine))

    receipt = runs.run(act=all_of_them)
    assert receipt.stored == len(RECORDS)
    assert len(runs.notes) == WORKERS + 1
    runs.check()


def test_stopped_worker_is_noticed_and_replaced(runs: Runs) -> None:
    receipt = runs.run(act=lambda engine: send(signal.SIGSTOP, *busy(engine)[:1]))
    assert receipt.stored == len(RECORDS)
    assert "hangs; it is replaced" in runs.notes[0]
    runs.check()


def test_stopped_idle_worker_does_not_hold_up_the_end(runs: Runs) -> None:
    records = [*RECORDS[:40], Record(("Note", "last"), poison_worker.SLOW)]
    receipt = runs.run(records, act=lambda engine: send(signal.SIGSTOP, *idle(engine)[:1]))
    assert receipt.stored == len(records)
    assert runs.notes == []
    runs.check(records)


@pytest.mark.parametrize(
    ("point", "action"),
    [
        ("worker.ready", "kill"),
        ("worker.received", "kill"),
        ("worker.encode", "kill"),
        ("worker.encode", "raise"),
        ("worker.encoded", "kill"),
        ("worker.answered", "kill"),
    ],
)
def test_worker_lost_at(runs: Runs, tmp_path: Path, point: str, action: str) -> None:
    runs.fault(f"{point}:1:{action}", tmp_path)
    receipt = runs.run()
    assert (tmp_path / "fired").exists()
    assert receipt.stored == len(RECORDS)
    assert len(runs.notes) == 1
    runs.check()


def test_text_that_kills_its_worker_each_time_is_rejected_alone(runs: Runs) -> None:
    records = [*RECORDS[:60], Record(("Note", "poison"), f"a {poison_worker.DEADLY} text"), *RECORDS[60:]]
    receipt = runs.run(records)
    assert (receipt.stored, receipt.rejected) == (len(RECORDS), 1)
    assert [row[1:3] for row in kept_rejects(runs.address)] == [("poison", "worker_died")]
    assert "deadly" not in " ".join(runs.notes)
    # 8, 8, 4, 2 rows, then alone three times.
    assert len(runs.notes) <= 8
    # The text is tried again by the next run, in a process of its own: nothing else would survive it.
    again = runs.run(records, workers=None)
    assert (again.unchanged, again.rejected) == (len(RECORDS), 1)
    runs.check()


def test_several_deadly_texts_are_all_found(runs: Runs) -> None:
    deadly = [Record(("Note", f"poison{i}"), f"{poison_worker.DEADLY} {i} {'x' * 10 * i}") for i in range(3)]
    mixed = [*RECORDS[:40], *deadly, *RECORDS[40:80]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kdb_fast.settings.RejectLimit.exceeded", lambda self, **counts: False)
        receipt = runs.run(mixed)
    assert (receipt.stored, receipt.rejected) == (80, 3)
    assert sorted(row[1] for row in kept_rejects(runs.address)) == ["poison0", "poison1", "poison2"]
    runs.check(RECORDS[:80])


def test_workers_that_all_die_at_start_end_the_run(runs: Runs) -> None:
    runs.target = worker.run
    runs.fault("worker.start:1:kill", None)
    started = []
    start_worker = ProcessPool._start

    def count(pool: ProcessPool, number: int) -> Child:
        started.append(number)
        return start_worker(pool, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProcessPool, "_start", count)
        with pytest.raises(ResourceError, match="died 6 times in a row without finishing anything") as caught:
            runs.run()
    assert "died of SIGKILL" in caught.value.message
    assert len(started) <= WORKERS + 6
    assert caught.value.receipt is not None
    assert caught.value.receipt.stored == 0
    runs.no_fault()
    runs.target = poison_worker.run
    assert runs.run().stored == len(RECORDS)
    runs.check()


def test_workers_that_no_longer_start_end_the_run_also_while_a_deadly_text_is_searched(runs: Runs) -> None:
    def nothing_starts_any_more(engine: Engine) -> bool:
        is_halving = pool_of(engine)._queue.is_halving
        if is_halving:
            runs.fault("worker.start:1:kill", None)
        return is_halving

    records = [*RECORDS[:60], Record(("Note", "poison"), f"a {poison_worker.DEADLY} text"), *RECORDS[60:]]
    with pytest.raises(ResourceError, match="times in a row without finishing anything"):
        runs.run(records, act=nothing_starts_any_more)
    runs.no_fault()
    receipt = runs.run(records)
    assert (receipt.stored + receipt.unchanged, receipt.rejected) == (len(RECORDS), 1)
    runs.check()


def test_error_of_a_dead_worker_tells_what_it_last_wrote(runs: Runs) -> None:
    runs.target = worker.run
    runs.fault("worker.start:1:raise", None)
    with pytest.raises(ResourceError, match=r"RuntimeError: fault at worker\.start"):
        runs.run()


def test_model_that_cannot_be_loaded_is_a_model_error(
    runs: Runs, minilm: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, _ in minilm.files:
        (tmp_path / name).symlink_to(minilm.path / name)
    (tmp_path / minilm.model_file).unlink()
    (tmp_path / minilm.model_file).write_bytes(b"not a model")
    monkeypatch.setattr(run_embedding, "resolve", lambda name, path, report: replace(minilm, path=tmp_path))
    runs.target = worker.run
    with pytest.raises(ModelError, match="cannot be loaded"):
        runs.run()
    assert index_rows(runs.address) == {}
    assert execute(runs.address, "SELECT state FROM kdb_fast_runs") == [("failed",)]


def test_engine_that_nobody_closed_ends_with_the_process(tmp_path: Path) -> None:
    script = """
import sys, poison_worker, stub_command
from kdb_fast.embedding.encoder import EncoderSpec
from kdb_fast.ipc.slab import Slab, SlabShape
from kdb_fast.engine.base import wait_for
from kdb_fast.engine.child_processes import Children
from kdb_fast.engine.process_pool import ProcessPool
spec = EncoderSpec(stub_command.MODEL, 100)
slab = Slab.create(SlabShape(2, 8, 384))
pool = ProcessPool(Children(), slab, spec, workers=1, cpus=[], worker_target=poison_worker.run)
while not pool._workers[0].ready:
    wait_for((pool,), 0.1)
sys.exit(5)
"""
    path = os.pathsep.join(sys.path)
    process = subprocess.run([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": path}, timeout=60)
    assert process.returncode == 5


# -- the writer --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("point", "hit"),
    [
        ("writer.ready", 1),
        ("writer.received", 1),
        ("store.after_copy", 1),
        ("store.before_commit", 1),
        ("store.before_commit", 2),
        ("store.after_commit", 1),
        ("store.after_commit", 2),
        ("writer.answered", 1),
    ],
)
def test_writer_killed_at(runs: Runs, tmp_path: Path, point: str, hit: int) -> None:
    runs.fault(f"{point}:{hit}:kill", tmp_path)
    receipt = runs.run()
    assert (tmp_path / "fired").exists()
    assert receipt.stored == len(RECORDS)
    assert receipt.superseded == 0
    assert runs.notes
    assert all("replaced, its flush is repeated" in note for note in runs.notes)
    runs.check()


@pytest.mark.parametrize("point", ["store.before_commit", "store.after_commit"])
def test_writer_stopped_at(runs: Runs, tmp_path: Path, point: str) -> None:
    runs.fault(f"{point}:1:hang", tmp_path)
    receipt = runs.run()
    assert receipt.stored == len(RECORDS)
    assert "writer" in runs.notes[0]
    assert "hangs" in runs.notes[0]
    runs.check()


def test_stopped_writer_does_not_block_the_parent_that_has_thousands_of_rejects_for_it(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdb_fast.settings.RejectLimit.exceeded", lambda self, **counts: False)
    rejects = [Reject(("Note", ""), "invalid_json", f"{line} is no use " * 20, bytes(32), line) for line in range(3000)]
    runs.fault("writer.ready:1:hang", tmp_path)
    receipt = runs.run([*rejects, *RECORDS])
    assert (receipt.stored, receipt.rejected) == (len(RECORDS), 3000)
    assert "hangs; it is replaced" in runs.notes[0]
    assert execute(runs.address, "SELECT count(DISTINCT position) FROM kdb_fast_rejects") == [(3000,)]
    runs.check()


@pytest.mark.parametrize("point", ["store.index_dropped", "store.index_build"])
def test_writer_killed_while_it_changes_the_index(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    monkeypatch.setattr("kdb_fast.tables.index_policy.DEFER_FLOOR", 10)
    runs.fault(f"{point}:1:kill", tmp_path)
    receipt = runs.run()
    assert (tmp_path / "fired").exists()
    assert receipt.index.startswith("deferred")
    definitions = execute(runs.address, "SELECT indexname FROM pg_indexes WHERE tablename = 'kdb_search' ORDER BY 1")
    assert {"ix_kdb_search_vector", "ix_kdb_search_fts"} <= {name for (name,) in definitions}
    runs.check()


def test_writer_killed_often_while_it_had_nothing_to_do(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KDB_FAST_FAULT_DIR", str(tmp_path))
    killed: set[int] = set()

    def kill_idle_writer(engine: Engine) -> bool:
        writer = writer_of(engine)
        if writer.ready and engine.writer.idle and writer.process.pid not in killed:
            killed.add(writer.process.pid)
            send(signal.SIGKILL, writer)
        if len(killed) <= POISON_TRIES:
            return False
        (tmp_path / "go").touch()
        return True

    records = [Record(("Note", "waits"), poison_worker.GATED)]
    receipt = runs.run(records, act=kill_idle_writer)
    assert receipt.stored == len(records)
    runs.check(records)


def test_writer_that_dies_each_time_ends_the_run_and_the_next_one_finishes_it(runs: Runs) -> None:
    runs.fault("store.before_commit:1:kill", None)
    with pytest.raises(ResourceError, match="The writer ended 3 times on the same work; the last one died of SIGKILL"):
        runs.run()
    assert index_rows(runs.address) == {}
    runs.no_fault()
    assert runs.run().stored == len(RECORDS)
    runs.check()


def test_deaths_leak_no_files(runs: Runs) -> None:
    def descriptors() -> int:
        gc.collect()
        return psutil.Process().num_fds()

    def kill_all(engine: Engine) -> bool:
        return len(busy(engine)) == WORKERS and send(signal.SIGKILL, *children(engine))

    counts = []
    for attempt in range(2):
        records = [record._replace(content=f"{attempt} {record.content}") for record in RECORDS]
        assert runs.run(records, act=kill_all).stored == len(RECORDS)
        runs.engines.clear()
        counts.append(descriptors())
    assert counts[1] <= counts[0]


# -- the parent --------------------------------------------------------------------------------------------


def test_killed_parent_takes_its_children_along_and_the_next_run_does_the_rest(
    database: DatabaseAddress, oracle: Oracle, tmp_path: Path
) -> None:
    # One unknown word of 2,000 characters: two tokens for the model, but flushes fill soon.
    texts = [f"{text} {'x' * 2000}" for text in mixed_texts(200, longest=30)]
    lines = [json.dumps({"id": f"r{i}", "text": text}) for i, text in enumerate(texts)]
    (tmp_path / "notes.jsonl").write_text("\n".join(lines))
    records = [Record(("Note", f"r{i}"), content_from_fields([("text", text)])) for i, text in enumerate(texts)]
    command = [sys.executable, "-m", "kdb_fast", "reindex", "--from", str(tmp_path / "notes.jsonl"), "--entity", "Note",
               "--db", sqlalchemy_url(database), "--workers", "2", "--json", "--no-progress"]  # fmt: skip
    environment = {**os.environ, "KDB_FAST_FAULT": "pipeline.flushed:1:kill"}
    seen: set[psutil.Process] = set()
    with open(tmp_path / "out", "wb") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out)

    def ended() -> bool:
        with contextlib.suppress(psutil.NoSuchProcess):
            seen.update(psutil.Process(process.pid).children(recursive=True))
        return process.poll() is not None

    eventually(ended, 60)
    assert process.returncode == -signal.SIGKILL, (tmp_path / "out").read_text()
    assert len(seen) >= 3
    eventually(lambda: not any(child.is_running() for child in seen), 10)
    committed = len(index_rows(database))
    assert 0 < committed < len(texts)
    receipt = reindex(database, ListSource(records), ReindexOptions())
    assert (receipt.unchanged, receipt.stored) == (committed, len(texts) - committed)
    oracle.check(index_rows(database), records)
    states = execute(database, "SELECT state FROM kdb_fast_runs ORDER BY run")
    assert states == [("abandoned",), ("done",)]
    assert engine_processes() == []
