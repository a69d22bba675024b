"""Whole runs, from records to the index, with the real model on both databases."""

from __future__ import annotations

import math
import os
import random
import signal
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from servers import ListSource, Oracle, engine_processes, eventually, execute, index_rows, mixed_texts, records_of

from kdb_fast.db.address import DatabaseAddress
from kdb_fast.embedding.encoder import EncoderSpec
from kdb_fast.embedding.models.lookup import Model
from kdb_fast.engine import start
from kdb_fast.engine.base import Engine
from kdb_fast.errors import LockedError, ModelError, RejectLimitError, SchemaError, StoppedError, UnexpectedError
from kdb_fast.indexing import engine_factory, flushing
from kdb_fast.indexing.intake import Intake, _wait
from kdb_fast.indexing.progress import Silent
from kdb_fast.indexing.reindex import reindex
from kdb_fast.ipc.slab import SlabShape
from kdb_fast.receipt import Receipt
from kdb_fast.records import Key, Record, Reject
from kdb_fast.settings import ReindexOptions, RejectLimit
from kdb_fast.sources.base import Source
from kdb_fast.stores import open_store
from kdb_fast.stores.base import RunSpec

pytestmark = pytest.mark.usefixtures("loaded_once")

PARTS = ("stored", "unchanged", "reused", "superseded", "rejected")


@pytest.fixture
def sqlite_database(tmp_path: Path) -> DatabaseAddress:
    path = tmp_path / "index.db"
    path.touch()
    return DatabaseAddress("sqlite", str(path), f"sqlite:///{path}")


def is_pinned(process: psutil.Process, cpu: int) -> bool:
    return process.cpu_affinity() == [cpu]


def run(
    address: DatabaseAddress, source: Source | Sequence[Record | Reject], *, progress: Any = None, **options: Any
) -> Receipt:
    """One run; asserts that its records add up and that no process of it is left."""
    opened = source if isinstance(source, Source) else ListSource(source)
    receipt = reindex(address, opened, ReindexOptions(**options), progress)
    assert receipt.read == sum(getattr(receipt, part) for part in PARTS)
    assert receipt.state == "done"
    assert engine_processes() == []
    return receipt


def numbers(receipt: Receipt) -> dict[str, int]:
    """The parts of a receipt that are not 0."""
    return {part: getattr(receipt, part) for part in (*PARTS, "deleted", "empty") if getattr(receipt, part)}


# -- the vectors -------------------------------------------------------------------------------------------

TEXTS = mixed_texts(400)


@pytest.mark.parametrize(
    ("kind", "workers"), [("postgresql", 1), ("postgresql", 3), ("postgresql", None), ("sqlite", 2)]
)
def test_every_vector_is_fastembeds_own(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    oracle: Oracle,
    kind: str,
    workers: int | None,
) -> None:
    address = request.getfixturevalue("database" if kind == "postgresql" else "sqlite_database")
    monkeypatch.undo()  # this run finds and loads its model itself
    monkeypatch.setattr(engine_factory, "INLINE_ROWS", 1000)
    records = records_of(TEXTS)
    random.Random(workers).shuffle(records)
    receipt = run(address, records, workers=workers)
    assert numbers(receipt) == {"stored": 400}
    assert receipt.workers == (workers or 0)
    assert receipt.truncated == 1
    assert receipt.padded_tokens >= receipt.tokens > 400
    if kind == "postgresql":
        assert receipt.index.startswith("deferred: about 400 of 400 rows change")
        assert execute(address, "SELECT count(*) FROM pg_index WHERE indrelid = 'kdb_search'::regclass") == [(6,)]
    rows = index_rows(address)
    oracle.check(rows, records)
    assert {(r.model, r.dimensions, r.run, r.fingerprint) for r in rows.values()} == {
        (receipt.model, 384, receipt.run, receipt.fingerprint)
    }
    again = run(address, records)
    assert numbers(again) == {"unchanged": 400}
    assert (again.flushes, again.tokens) == (0, 0)


# -- what is written and what is not -----------------------------------------------------------------------


def test_changed_records_are_embedded_again_and_no_others(index: DatabaseAddress, oracle: Oracle) -> None:
    records = records_of(TEXTS[1:13])
    first = run(index, records)
    changed = [
        *records[:3],
        Record(("Note", "r3"), "now another text"),
        *records[4:],
        Record(("Note", "new"), "a new one"),
    ]
    second = run(index, changed)
    assert (numbers(first), numbers(second)) == ({"stored": 12}, {"unchanged": 11, "stored": 2})
    rows = index_rows(index)
    oracle.check(rows, changed)
    assert {key[1] for key, row in rows.items() if row.run == second.run} == {"r3", "new"}


class EmptyingSource(ListSource):
    """Says that some records have no text any more."""

    def __init__(self, records: Sequence[Record | Reject], emptied: Sequence[Key]) -> None:
        super().__init__(records)
        self.empty = len(emptied)
        self._emptied = list(emptied)

    def take_empty(self) -> list[Key]:
        taken, self._emptied = self._emptied, []
        return taken


def test_record_that_lost_its_text_is_removed(index: DatabaseAddress, oracle: Oracle) -> None:
    records = records_of(TEXTS[1:4])
    run(index, records)
    receipt = run(index, EmptyingSource(records[:2], [("Note", "r2"), ("Note", "never there")]))
    assert numbers(receipt) == {"unchanged": 2, "deleted": 1, "empty": 2}
    oracle.check(index_rows(index), records[:2])


def test_records_of_a_source_that_is_not_complete_stay(index: DatabaseAddress, oracle: Oracle) -> None:
    records = records_of(TEXTS[1:4])
    run(index, records)
    assert numbers(run(index, records[:1])) == {"unchanged": 1}
    oracle.check(index_rows(index), records)


def test_force_embeds_everything_again(index: DatabaseAddress, oracle: Oracle) -> None:
    records = records_of(TEXTS[1:6])
    run(index, records)
    receipt = run(index, records, force=True)
    assert numbers(receipt) == {"stored": 5}
    rows = index_rows(index)
    oracle.check(rows, records)
    assert {row.run for row in rows.values()} == {receipt.run}


def test_equal_texts_are_embedded_once(index: DatabaseAddress, oracle: Oracle) -> None:
    texts = ["the same", "another", "the same", "the same", "another", "alone"]
    receipt = run(index, records_of(texts))
    assert numbers(receipt) == {"stored": 3, "reused": 3}
    assert receipt.tokens == 4 + 3 + 3
    oracle.check(index_rows(index), records_of(texts))


@pytest.mark.parametrize("page_rows", [1, 2, 100])
def test_of_two_records_with_one_key_the_later_one_stays(
    index: DatabaseAddress, oracle: Oracle, page_rows: int
) -> None:
    records = [
        Record(("Note", "a"), "first"),
        Record(("Note", "b"), "only"),
        Record(("Note", "a"), "second"),
        Record(("Other", "a"), "of another entity"),
        Record(("Note", "a"), "first"),
        Record(("Note", "c"), "twice"),
        Record(("Note", "c"), "twice"),
        Record(("Note", "a"), "third"),
    ]
    receipt = run(index, ListSource(records, unique_keys=False, page_rows=page_rows))
    assert receipt.superseded == 4
    assert receipt.stored + receipt.reused == 4
    oracle.check(index_rows(index), records)
    again = run(index, ListSource(records[-1:] + records[1:2], unique_keys=False))
    assert numbers(again) == {"unchanged": 2}


def test_vectors_of_another_model_are_replaced(
    index: DatabaseAddress, oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = records_of(TEXTS[1:6])
    run(index, records)
    monkeypatch.setattr(Model, "fingerprint", lambda self, precision="fp32": "f" * 16)
    receipt = run(index, records)
    assert numbers(receipt) == {"stored": 5}
    rows = index_rows(index)
    oracle.check(rows, records)
    assert {row.fingerprint for row in rows.values()} == {"f" * 16}


def test_row_that_another_program_changes_during_the_run_stays(
    index: DatabaseAddress, oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flushing, "MAX_WAIT_SECONDS", math.inf)  # on a slow machine rows were written before
    # The page is looked up before the next is read, not beside it: the change must not be there yet.
    look_up = Intake._look_up
    monkeypatch.setattr(Intake, "_look_up", lambda self, fit: _wait(look_up(self, fit)))
    run(index, records_of(TEXTS[1:5]))
    records = [Record(("Note", f"r{i}"), f"changed {i}") for i in range(4)]

    def edit(page: int) -> None:
        if page == 0:
            execute(index, "UPDATE kdb_search SET content = %s, updated_at = %s WHERE record_id = 'r2'",
                    "edited by a person", "2031-01-01 00:00:00")  # fmt: skip

    receipt = run(index, ListSource(records, page_rows=4, between=edit))
    assert numbers(receipt) == {"stored": 3, "superseded": 1}
    rows = index_rows(index)
    assert rows["Note", "r2"].content == "edited by a person"
    assert {key[1]: row.content for key, row in rows.items() if key[1] != "r2"} == {
        "r0": "changed 0",
        "r1": "changed 1",
        "r3": "changed 3",
    }
    # Its vector is not of its text: the next run puts that right, as the record says.
    assert numbers(run(index, records)) == {"stored": 1, "unchanged": 3}
    oracle.check(index_rows(index), records)


def test_edited_row_is_brought_back_to_its_record(index: DatabaseAddress, oracle: Oracle) -> None:
    records = records_of(TEXTS[1:4])
    run(index, records)
    execute(index, "UPDATE kdb_search SET content = 'edited' WHERE record_id = 'r1'")
    execute(index, "UPDATE kdb_search SET embedding = NULL WHERE record_id = 'r2'")
    assert numbers(run(index, records)) == {"unchanged": 1, "stored": 2}
    oracle.check(index_rows(index), records)


UNFIT: list[Record | Reject] = [
    Record(("Note", "nul"), "a\x00b"),
    Record(("Note", "half"), "\ud800 alone"),
    Record(("Note", "blank"), " \n"),
    Record(("Note", "x" * 37), "text"),
    Record(("", "no entity"), "text"),
    Reject(("Note", ""), "invalid_json", "line 6 is not JSON", b"\1" * 32, 6),
]


def test_unfit_records_are_told_apart_and_the_others_stored(index: DatabaseAddress, oracle: Oracle) -> None:
    fit = records_of(TEXTS[1:4])
    mixed: list[Record | Reject] = [*UNFIT[:3], *fit, *UNFIT[3:]]
    receipt = run(index, mixed, max_rejects=RejectLimit(count=6))
    assert numbers(receipt) == {"stored": 3, "rejected": 6}
    oracle.check(index_rows(index), fit)
    store = open_store(index, "test")
    reasons = sorted(reject.reason for reject in store.rejects())
    store.close()
    assert reasons == ["bad_entity", "empty_text", "id_too_long", "invalid_json", "lone_surrogate", "nul_byte"]


def test_too_many_unfit_records_end_the_run(index: DatabaseAddress) -> None:
    with pytest.raises(RejectLimitError, match="6 of 9 records were rejected; --max-rejects allows 5") as caught:
        run(index, [*records_of(TEXTS[1:4]), *UNFIT], max_rejects=RejectLimit(count=5))
    assert caught.value.receipt is not None
    assert caught.value.receipt.state == "failed"
    assert numbers(run(index, records_of(TEXTS[1:4])))["stored"] + caught.value.receipt.stored == 3


# -- refusals, the lock, and stops -------------------------------------------------------------------------


def no_source() -> Source:
    raise AssertionError("the source is opened only once all else is fit")


def test_wrong_model_path_is_refused_before_anything_is_done(index: DatabaseAddress, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is not a directory"):
        run(index, records_of(["text"]), model_path=tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"model\.onnx"):
        run(index, records_of(["text"]), model_path=tmp_path / "empty")
    names = "pg_tables WHERE tablename" if index.dialect == "postgresql" else "sqlite_master WHERE name"
    assert execute(index, f"SELECT count(*) FROM {names} LIKE 'kdb%%'".replace("%%", "%")) == [(0,)]


def test_index_of_another_dimension_is_refused(database: DatabaseAddress) -> None:
    store = open_store(database, "test")
    store.prepare(12)
    store.close()
    with pytest.raises(SchemaError, match="holds vectors of 12 dimensions; the model gives 384"):
        run(database, records_of(["text"]))
    assert execute(database, "SELECT count(*) FROM kdb_fast_runs") == [(0,)]


def test_second_run_is_refused_and_the_first_goes_on(index: DatabaseAddress) -> None:
    refused: list[LockedError] = []

    def second_run(page: int) -> None:
        with pytest.raises(LockedError) as caught:
            run(index, records_of(["other"]))
        refused.append(caught.value)

    receipt = run(index, ListSource(records_of(["text"]), between=second_run))
    assert numbers(receipt) == {"stored": 1}
    assert f"Run {receipt.run} holds the index: process {os.getpid()}" in refused[0].message


def test_source_is_closed_in_any_case(index: DatabaseAddress) -> None:
    def fail(page: int) -> None:
        raise ZeroDivisionError

    source = ListSource(records_of(["text"]), between=fail)
    with pytest.raises(UnexpectedError) as caught:
        run(index, source)
    assert isinstance(caught.value.cause, ZeroDivisionError)
    assert caught.value.receipt is not None
    assert caught.value.receipt.state == "failed"
    assert source.closed == 1
    assert execute(index, "SELECT state FROM kdb_fast_runs") == [("failed",)]
    assert numbers(run(index, records_of(["text"]))) == {"stored": 1}


@pytest.mark.parametrize(
    ("index", "signum", "code"),
    [("postgresql", signal.SIGINT, 130), ("sqlite", signal.SIGTERM, 143)],
    indirect=["index"],
)
def test_signal_ends_a_run_after_writing_what_is_embedded(
    index: DatabaseAddress, oracle: Oracle, monkeypatch: pytest.MonkeyPatch, signum: signal.Signals, code: int
) -> None:
    monkeypatch.setattr(flushing, "FLOOR_BYTES", 20_000)
    monkeypatch.setattr("kdb_fast.indexing.pipeline.SHARD_ROWS", 16)
    records = records_of(TEXTS[1:61])
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    progress = StopAfterFirstRows(signum)
    with pytest.raises(StoppedError) as caught:
        run(index, records, progress=progress)
    receipt = caught.value.receipt
    assert receipt is not None
    assert caught.value.exit_code == code
    assert receipt.state == "stopped"
    rows = index_rows(index)
    assert receipt.stored == len(rows) > 0
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == handlers
    again = run(index, records)
    assert again.stored == 60 - len(rows)
    oracle.check(index_rows(index), records)


class StopAfterFirstRows(Silent):
    """Sends a signal to this process once something was stored, as a person does who has seen enough."""

    def __init__(self, signum: signal.Signals) -> None:
        self.signum: signal.Signals | None = signum

    def update(self, counts: Any) -> None:
        if self.signum is not None and counts.flushes:
            os.kill(os.getpid(), self.signum)
            self.signum = None


# -- KameleonDB's records ----------------------------------------------------------------------------------


@pytest.fixture
def kameleondb(index: DatabaseAddress) -> Iterator[Any]:
    module = pytest.importorskip("kameleondb")
    from kdb_fast.cli.demo import sqlalchemy_url

    client = module.KameleonDB(sqlalchemy_url(index))
    yield client
    client.close()


@pytest.mark.filterwarnings("ignore:The default datetime adapter is deprecated:DeprecationWarning")
def test_kameleondbs_records_are_indexed_and_kept_in_step(
    index: DatabaseAddress, kameleondb: Any, oracle: Oracle
) -> None:
    from kdb_fast.sources import SourceSpec

    entity = kameleondb.create_entity(
        name="Product",
        fields=[
            {"name": "name", "type": "string"},
            {"name": "price", "type": "float"},
            {"name": "description", "type": "text"},
        ],
    )
    data = [{"name": f"Lamp {i}", "price": 1.5 * i, "description": text} for i, text in enumerate(TEXTS[1:11])]
    data.append({"name": None, "price": 3.0, "description": ""})
    ids = entity.insert_many(data)

    def reindex_products() -> Receipt:
        source = SourceSpec(("Product",)).open(index)
        return run(index, source)

    assert numbers(reindex_products()) == {"stored": 10, "empty": 1}
    expected = {
        key: f"name: {row['name']} | description: {row['description']}"
        for key, row in zip(ids, data, strict=True)
        if row["name"]
    }
    oracle.check(index_rows(index), [Record(("Product", key), text) for key, text in expected.items()])
    assert numbers(reindex_products()) == {"unchanged": 10, "empty": 1}

    entity.delete(ids[0])
    entity.update(ids[1], {"name": "Lantern"})
    entity.update(ids[2], {"price": 99.0})
    entity.update(ids[3], {"name": None, "description": None})
    added = entity.insert({"name": "Torch", "price": 1.0, "description": None})
    receipt = reindex_products()
    assert numbers(receipt) == {"unchanged": 7, "stored": 2, "deleted": 2, "empty": 2}
    del expected[ids[0]], expected[ids[3]]
    expected[ids[1]] = f"name: Lantern | description: {data[1]['description']}"
    expected[added] = "name: Torch"
    oracle.check(index_rows(index), [Record(("Product", key), text) for key, text in expected.items()])


# -- the processes -----------------------------------------------------------------------------------------


@pytest.fixture
def start_engine(database: DatabaseAddress, minilm: Model) -> Iterator[Callable[[int], Engine]]:
    engines: list[Engine] = []

    def start_one(workers: int) -> Engine:
        cpus = sorted(os.sched_getaffinity(0))
        spec = EncoderSpec(minilm, 100)
        run_spec = RunSpec(1, "f", minilm.name, 384)
        engine = start.with_processes(SlabShape(2, 8, 384), spec, database, run_spec, workers=workers, cpus=cpus)
        engines.append(engine)
        return engine

    yield start_one
    for engine in engines:
        engine.close(kill=True)
    assert engine_processes() == []


SECRETS = {
    "PGPASSWORD": "s3cret-1",
    "PGSERVICEFILE": "/s3cret-2",
    "PGUSER": "s3cret-3",
    "KDB_FAST_DB": "postgresql://u:s3cret-4@h/d",
    "OPENAI_API_KEY": "s3cret-5",
    "AWS_SECRET_ACCESS_KEY": "s3cret-6",
}


def test_workers_see_no_credentials_and_keep_to_one_cpu_each(
    start_engine: Callable[[int], Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in SECRETS.items():
        if name not in ("PGSERVICEFILE", "PGUSER"):
            monkeypatch.setenv(name, value)
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "true")
    workers = min(2, len(os.sched_getaffinity(0)))
    engine = start_engine(workers)
    assert dict(os.environ).items() >= {"PGPASSWORD": "s3cret-1"}.items()
    pids = engine.pids()
    assert set(pids) == {"writer", *(f"worker-{i + 1}" for i in range(workers))}
    cpus = sorted(os.sched_getaffinity(0))
    for number in range(workers):
        process = psutil.Process(pids[f"worker-{number + 1}"])
        # A worker pins itself before it loads anything heavy.
        eventually(partial(is_pinned, process, cpus[number]))
        environment = process.environ()
        assert not [name for name in environment if name.startswith("PG") or name in SECRETS]
        assert "s3cret" not in str(environment) + str(process.cmdline())
        assert environment["OMP_NUM_THREADS"] == "1"
        assert environment["ORT_DISABLE_TELEMETRY"] == "true"
    assert psutil.Process(pids["writer"]).environ()["PGPASSWORD"] == "s3cret-1"
