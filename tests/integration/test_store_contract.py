"""What every store does: preparing, the lock, look-ups, flushes, refused rows, rejects, the library's way, pruning.

Each test runs on every kind in ``store_harness.KINDS``. What is one database's own stands in
``test_postgresql_store.py`` and ``test_sqlite_store.py``.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest
from servers import IndexRow
from store_harness import (
    DIMENSIONS,
    EDITS,
    ENTITY,
    FINGERPRINT,
    KINDS,
    LIBRARY,
    SECRET,
    Harness,
    begin,
    end,
    flush,
    fresh,
    harness_of,
    looked_up,
    lookup,
    moment,
    numbered,
    products_of,
    put,
    reject,
    rejected_keys,
    slot_of,
    vector_of,
    write,
)

from kdb_fast.catalog.records import live_rows
from kdb_fast.errors import LockedError, RecordError, SchemaError
from kdb_fast.ipc.row_block import NO_VALUE
from kdb_fast.ipc.slab import Row, Slab, SlabShape
from kdb_fast.records import Record, content_hash
from kdb_fast.stores import open_store
from kdb_fast.stores.base import FlushSlot, IndexStore, RunSpec, Store
from kdb_fast.stores.runs import STALE_SECONDS


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def empty(kind: str, request: pytest.FixtureRequest) -> Iterator[Harness]:
    """A store on an empty database."""
    with harness_of(kind, request) as harness:
        yield harness


@pytest.fixture
def harness(empty: Harness) -> Iterator[Harness]:
    """A store that is prepared; after the test all that it keeps of a row must be in step."""
    empty.store.prepare(DIMENSIONS)
    yield empty
    empty.check()


@pytest.fixture
def store(harness: Harness) -> Store:
    return harness.store


@pytest.fixture
def index(harness: Harness) -> IndexStore:
    return harness.index_store


@pytest.fixture
def run(store: Store) -> RunSpec:
    return begin(store)


def each(what: Callable[[type[Harness]], Any]) -> list[tuple[str, str]]:
    """Each kind with each of something that it has."""
    return [(kind, one) for kind, harness in KINDS.items() for one in what(harness)]


# -- preparing ---------------------------------------------------------------------------------------------


def test_second_prepare_changes_nothing(harness: Harness, store: Store) -> None:
    before = harness.execute(harness.catalog)
    store.prepare(DIMENSIONS)
    if store.column_dimensions() is None:
        store.prepare(2 * DIMENSIONS)
    assert harness.execute(harness.catalog) == before


def test_two_first_runs_at_once_both_prepare(empty: Harness) -> None:
    barrier, errors = threading.Barrier(4), []

    def prepare() -> None:
        try:
            with contextlib.closing(open_store(empty.address, "test")) as store:
                barrier.wait(10)
                store.prepare(DIMENSIONS)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=prepare) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert errors == []
    assert empty.store.count() == 0


def test_kameleondbs_table_is_taken_as_it_is(empty: Harness) -> None:
    store = empty.store
    empty.execute(empty.table)
    shape = empty.execute(empty.shape)
    for key, text in numbered(6, "theirs").items():
        empty.index(key, text)
    empty.index("r001", "theirs moved")
    store.prepare(DIMENSIONS)
    assert empty.execute(empty.shape) == shape
    assert empty.contents()["r001"] == "theirs moved"
    assert {row.fingerprint for row in lookup(store, *numbered(8)).values()} == {None}
    run = begin(store)
    assert write(store, run, numbered(8)).rows == 8
    empty.check()
    assert empty.matching("theirs") == []

    empty.index("r002", "theirs again")
    empty.index("r008", "theirs new")
    empty.check()
    assert write(store, run, {**numbered(9), "r009": "one more"}).rows == 10
    empty.check()
    empty.delete("r004")
    assert flush(store, run, deletes=["r002", "r003", "r004"]).deleted == 2
    empty.check()


@pytest.mark.parametrize(("kind", "what"), each(lambda harness: harness.unfit))
def test_a_table_of_another_shape_is_refused_and_left_alone(empty: Harness, what: str) -> None:
    script, message = empty.unfit[what]
    empty.execute(script)
    before = empty.execute(empty.catalog)
    with pytest.raises(SchemaError, match=message):
        empty.open().prepare(DIMENSIONS)
    assert empty.execute(empty.catalog) == before


@pytest.mark.parametrize("prepared", [False, True])
def test_a_database_that_cannot_be_written_is_refused(empty: Harness, prepared: bool) -> None:
    if prepared:
        empty.store.prepare(DIMENSIONS)
    with pytest.raises(SchemaError, match=r"read-only|cannot be written"):
        empty.read_only().prepare(DIMENSIONS)


def test_table_that_is_gone_is_named(empty: Harness) -> None:
    empty.store.prepare(DIMENSIONS)
    run = begin(empty.store)
    empty.execute("DROP TABLE kdb_search")
    with pytest.raises(SchemaError, match="kdb_search"):
        flush(empty.store, run, slot_of(fresh(("a", "one"))))


# -- the lock ----------------------------------------------------------------------------------------------

HOLDER = """
import sys
from kdb_fast.db.address import DatabaseAddress
from kdb_fast.stores import open_store
store = open_store(DatabaseAddress(*sys.argv[1:]), "holder")
run = store.begin_run(fingerprint="f", model="m", dimensions=8, wait=0)
print(run.number, flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def holder(harness: Harness) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Another process that holds the index; yields it and the number of its run."""
    address = harness.address
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, address.dialect, address.conninfo, address.display],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        try:
            yield process, int(process.stdout.readline())
        finally:
            process.kill()


def states(harness: Harness) -> list[tuple[str, bool]]:
    return [(run.state, run.ended) for run in harness.runs()]


def test_second_run_is_refused_until_the_first_is_dead(harness: Harness, store: Store) -> None:
    with holder(harness) as (process, number):
        with pytest.raises(LockedError) as caught:
            begin(store)
        assert f"Run {number} holds the index: process {process.pid} on {socket.gethostname()}" in caught.value.message
        assert "--wait" in caught.value.remedy
        process.kill()
        process.wait(10)
        assert begin(store).number > number
    assert states(harness) == [("abandoned", True), ("running", False)]


def test_run_of_this_process_is_named_until_it_has_ended(harness: Harness, store: Store, run: RunSpec) -> None:
    with pytest.raises(LockedError, match=f"Run {run.number} holds the index: process {os.getpid()}"):
        begin(harness.open())
    end(store, run, stored=3, model="ü")
    ended = harness.runs()[0]
    assert (ended.state, ended.phase, ended.ended) == ("done", "end", True)
    assert json.loads(str(ended.receipt)) == {"stored": 3, "model": "ü"}
    assert begin(store).number > run.number


def dead_pid() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


EARLIER = "process_started = process_started - 86400"


@pytest.mark.parametrize(
    ("change", "silent", "holds"),
    [
        ("pid = {dead}", None, None),
        (f"pid = {{parent}}, {EARLIER}", None, None),
        (EARLIER, None, None),
        ("host = 'elsewhere'", None, "on elsewhere"),
        ("host = 'elsewhere'", STALE_SECONDS - 5, "on elsewhere"),
        ("host = 'elsewhere'", STALE_SECONDS + 1, None),
        ("phase = phase", STALE_SECONDS + 1, "holds the index"),
    ],
    ids=["dead", "pid-taken", "pid-taken-by-me", "elsewhere", "elsewhere-slow", "elsewhere-silent", "myself-silent"],
)
def test_only_a_dead_or_silent_run_is_taken_over(
    harness: Harness, store: Store, run: RunSpec, change: str, silent: float | None, holds: str | None
) -> None:
    harness.change_run(change.format(dead=dead_pid(), parent=os.getppid()), silent)
    if holds is None:
        assert begin(store).number > run.number
    else:
        with pytest.raises(LockedError, match=holds):
            begin(store)


def test_hanging_run_of_this_machine_is_taken_over(harness: Harness, store: Store) -> None:
    with holder(harness) as (_, number):
        harness.change_run(silent=3600)
        assert begin(store).number > number


def test_heartbeat_keeps_a_run_alive(harness: Harness, store: Store, run: RunSpec) -> None:
    harness.change_run("host = 'elsewhere'", silent=3600)
    store.heartbeat(run.number, "embed")
    with pytest.raises(LockedError, match="last sign of life 0 s ago"):
        begin(store)
    assert harness.runs()[0].phase == "embed"


def test_heartbeat_neither_waits_for_a_writer_nor_fails(harness: Harness, store: Store, run: RunSpec) -> None:
    before = harness.runs()
    with harness.busy_run():
        store.heartbeat(run.number, "embed")
    assert harness.runs() == before
    assert before[0].phase == "start"
    store.heartbeat(run.number, "embed")
    ((_, _, phase, _, at, _),) = harness.runs()
    assert phase == "embed"
    assert at > before[0].heartbeat


def test_run_that_was_replaced_cannot_write(harness: Harness, store: Store, run: RunSpec) -> None:
    write(store, run, {"a": "before"})
    harness.change_run("host = 'elsewhere'", silent=3600)
    other = harness.open()
    new = begin(other)
    assert new.number > run.number
    with pytest.raises(LockedError, match=f"Run {run.number} no longer holds the index"):
        flush(store, run, slot_of(fresh(("b", "after"))), deletes=["a"])
    assert harness.contents() == {"a": "before"}
    store.end_run(run.number, "done", {})
    assert states(harness) == [("abandoned", True), ("running", False)]
    assert other.after_a_crash(new.number)
    assert write(other, new, {"b": "written"}).rows == 1


def test_wait_takes_the_lock_when_the_other_run_ends(harness: Harness, store: Store, run: RunSpec) -> None:
    second = harness.open()
    waited: list[str] = []

    def on_wait(what: str) -> None:
        waited.append(what)
        store.end_run(run.number, "stopped", {})

    second.on_wait = on_wait
    assert begin(second, wait=60.0).number > run.number
    assert waited == [f"waiting for run {run.number} of process {os.getpid()} on {socket.gethostname()}"]


# -- look-ups ----------------------------------------------------------------------------------------------


def test_lookup_gives_hash_fingerprint_and_version_of_stored_rows_only(store: Store, run: RunSpec) -> None:
    write(store, run, {**numbered(60), "a": "Grüße 你好"})
    found = lookup(store, "a", *numbered(1100))
    assert set(found) == {"a", *numbered(60)}
    assert found["r007"].content_hash == content_hash("text number7")
    assert found["a"].content_hash == content_hash("Grüße 你好")
    assert {row.fingerprint for row in found.values()} == {FINGERPRINT}
    assert all(row.row_version != NO_VALUE for row in found.values())
    assert lookup(store, "r007", entity="Other") == {}
    assert lookup(store) == {}
    assert (store.count(), store.count(ENTITY), store.count("Other")) == (61, 61, 0)


@pytest.mark.parametrize("change", ["text and time", "written again", *EDITS])
def test_row_that_another_program_changed_has_no_fingerprint_and_can_be_replaced(
    harness: Harness, store: Store, run: RunSpec, change: str
) -> None:
    write(store, run, {"a": "one", "b": "two"})
    before = lookup(store, "a")["a"]
    if change in EDITS:
        harness.edit("a", change)
    else:
        harness.index("a", "edited" if change == "text and time" else "one")
    found = lookup(store, "a", "b")
    assert found["a"].fingerprint is None
    assert (found["a"].content_hash == before.content_hash) == (change != "text and time")
    assert (found["a"].row_version != before.row_version) == (change != "no vector")
    assert found["b"].fingerprint == FINGERPRINT
    # It can be replaced, also where it has no time any more.
    assert write(store, run, {"a": "ours"}).rows == 1
    assert harness.contents()["a"] == "ours"


def test_content_is_compared_even_if_an_editor_left_the_time(harness: Harness, store: Store, run: RunSpec) -> None:
    write(store, run, {"a": "one"})
    harness.execute("UPDATE kdb_search SET content = 'edited'")
    assert lookup(store, "a")["a"].content_hash == content_hash("edited")
    write(store, run, {"a": "one"})


# -- flushes -----------------------------------------------------------------------------------------------

UNICODE = [
    "plain",
    "Grüße, naïve café",
    "你好，世界",
    "👩‍👩‍👧‍👦 family",
    "ע‎ברית",
    "tab\tnew\nline",
    "\\N \\. '\"",
    "a" * 100_000,
]


def assert_vector(harness: Harness, row: IndexRow, text: str) -> None:
    assert row.vector is not None
    np.testing.assert_allclose(row.vector, vector_of(text), rtol=0, atol=harness.vector_error)


def test_new_rows_are_stored_as_they_are(harness: Harness, store: Store) -> None:
    run = begin(store, model="m" * 150)
    before = datetime.now(UTC) - timedelta(seconds=1)
    rows = fresh(*((f"k{i}", text) for i, text in enumerate(UNICODE)), entity="Ünïcode 实体")
    result = flush(store, run, slot_of(rows[:5]), slot_of(rows[5:], number=1))
    assert (result.rows, result.superseded, result.rejected, result.deleted) == (len(UNICODE), (), (), 0)
    assert result.bytes > 100_000
    stored = harness.rows()
    assert store.count("Ünïcode 实体") == len(stored) == len(UNICODE)
    for i, text in enumerate(UNICODE):
        row = stored[f"k{i}"]
        assert row.content == text
        assert_vector(harness, row, text)
        assert (row.model, row.dimensions, row.run, row.fingerprint) == ("m" * 100, DIMENSIONS, run.number, FINGERPRINT)
    assert len({row_id for row_id, _ in harness.ids().values()}) == len(UNICODE)
    for row_id, created in harness.ids().values():
        assert str(uuid.UUID(row_id)) == row_id
        assert uuid.UUID(row_id).version == 7
        assert before <= moment(created) <= datetime.now(UTC)
    assert harness.execute(
        "SELECT count(*) FROM kdb_search WHERE created_at = updated_at AND updated_at = kdb_fast_at"
    ) == [(len(UNICODE),)]
    assert harness.source_times() == [None] * len(UNICODE)
    assert harness.matching("family") == ["k3"]


def test_several_slots_and_skipped_rows_are_written_in_one_flush(harness: Harness, store: Store, run: RunSpec) -> None:
    first = slot_of(fresh(*numbered(40).items()), skip=[0, 39])
    second = slot_of(fresh(*((f"m{i}", f"other {i}") for i in range(10)), entity="Memo"), number=1)
    assert flush(store, run, first, second).rows == 48
    assert (store.count(), store.count(ENTITY), store.count("Memo")) == (48, 38, 10)
    assert set(lookup(store, *numbered(40))) == {f"r{i:03d}" for i in range(1, 39)}


def test_time_of_the_source_is_kept_to_the_microsecond(harness: Harness, store: Store, run: RunSpec) -> None:
    slot = slot_of(fresh(("a", "one"), ("b", "two"), ("c", "three")))
    slot.slot.source_at[:3] = [1_700_000_000_123_456, -1, NO_VALUE]
    flush(store, run, slot)
    epoch = datetime(1970, 1, 1, tzinfo=UTC)
    assert harness.source_times() == [
        epoch + timedelta(microseconds=1_700_000_000_123_456),
        epoch - timedelta(microseconds=1),
        None,
    ]


def test_existing_rows_are_replaced_and_keep_their_id(harness: Harness, store: Store, run: RunSpec) -> None:
    write(store, run, {"a": "old words", "b": "two"})
    ids = harness.ids()
    end(store, run)
    later = harness.open()
    second = begin(later, fingerprint="other", model="another")
    result = write(later, second, {"a": "new words", "c": "three"})
    assert (result.rows, result.superseded) == (2, ())
    assert harness.contents() == {"a": "new words", "b": "two", "c": "three"}
    row = harness.rows()["a"]
    assert_vector(harness, row, "new words")
    assert (row.run, row.fingerprint, row.model) == (second.number, "other", "another")
    assert {key: harness.ids()[key] for key in ids} == ids
    assert (harness.matching("old"), harness.matching("new")) == ([], ["a"])


def test_same_text_new_text_and_new_rows_in_one_flush(harness: Harness, store: Store, run: RunSpec) -> None:
    write(store, run, {"a": "cats purr", "b": "dogs bark", "d": "cows moo"})
    end(store, run)
    second = begin(store, fingerprint="other")
    slot = slot_of(looked_up(store, ("a", "cats purr"), ("b", "birds sing"), ("c", "fish swim")))
    slot.slot.vectors[0] = vector_of("another model")
    result = flush(store, second, slot)
    assert (result.rows, result.superseded, result.rejected) == (3, (), ())
    stored = harness.rows()
    # A row whose text is the same gets the new vector all the same, and counts as written by this run.
    assert_vector(harness, stored["a"], "another model")
    assert {key: row.run for key, row in stored.items()} == {
        **dict.fromkeys("abc", second.number), "d": run.number
    }  # fmt: skip
    words = {"cat": "a", "purr": "a", "bird": "b", "sing": "b", "fish": "c", "swim": "c", "cow": "d", "moo": "d"}
    assert {word: "".join(harness.matching(word)) for word in words} == words
    assert harness.matching("dog") == harness.matching("bark") == []


def test_row_inserted_by_another_program_meanwhile_stays(harness: Harness, store: Store, run: RunSpec) -> None:
    rows = fresh(("a", "ours"), ("b", "ours"), ("c", "ours"))
    harness.index("b", "theirs")
    result = flush(store, run, slot_of(fresh(("z", "ours"))), slot_of(rows, number=1))
    assert (result.rows, result.superseded) == (3, ((1, 1),))
    assert harness.contents() == {"a": "ours", "b": "theirs", "c": "ours", "z": "ours"}
    # The next flush of PostgreSQL goes the careful way at once, with the same outcome.
    harness.index("e", "theirs")
    result = flush(store, run, slot_of(fresh(("d", "ours"), ("e", "ours"))))
    assert (result.rows, result.superseded) == (1, ((0, 1),))
    assert harness.contents()["e"] == "theirs"


def test_rows_that_another_program_changed_since_the_lookup_are_theirs(
    harness: Harness, store: Store, run: RunSpec
) -> None:
    write(store, run, numbered(4))
    end(store, run)
    second = begin(store)
    rows = looked_up(store, *numbered(6, "ours").items())
    harness.index("r001", "theirs, changed")
    harness.index("r004", "theirs, new")
    harness.delete("r003")
    result = flush(store, second, slot_of(rows))
    assert (result.rows, result.superseded) == (4, ((0, 1), (0, 4)))
    theirs = {"r001": "theirs, changed", "r004": "theirs, new"}
    assert harness.contents() == {**numbered(6, "ours"), **theirs}


def test_run_overwrites_its_own_row_until_another_program_changes_it(
    harness: Harness, store: Store, run: RunSpec
) -> None:
    write(store, run, {"a": "earlier"})
    result = flush(store, run, slot_of(fresh(("a", "later"))))
    assert (result.rows, result.superseded) == (1, ())
    assert harness.contents() == {"a": "later"}
    rows = looked_up(store, ("a", "again"))
    harness.delete("a")
    assert flush(store, run, slot_of(rows)).rows == 1
    assert harness.contents() == {"a": "again"}
    harness.index("a", "theirs")
    result = flush(store, run, slot_of(fresh(("a", "ours"))))
    assert (result.rows, result.superseded) == (0, ((0, 0),))
    assert harness.contents() == {"a": "theirs"}


LATEST = 1_000_000
"""Number of a flush: after those of other tests."""


def test_repeated_flush_gives_the_first_result_and_writes_nothing(harness: Harness, store: Store, run: RunSpec) -> None:
    harness.index("b", "theirs")
    harness.execute(harness.refusals["trigger"][0])
    write(store, run, {"c": "three"})
    rows = fresh(("a", "ours"), ("b", "ours"), ("r", SECRET))
    first = flush(store, run, slot_of(rows), number=LATEST, rejects=[reject("q", 7)], deletes=["c", "gone"])
    assert (first.rows, first.superseded, first.deleted) == (1, ((0, 1),), 1)
    assert [r[:2] for r in first.rejected] == [(0, 2)]
    before = harness.execute(harness.versions)
    again = flush(harness.open(), run, slot_of(rows), number=LATEST, rejects=[reject("q", 7)], deletes=["a"])
    assert again == first
    assert harness.execute(harness.versions) == before
    assert set(rejected_keys(store)) == {"q", "r"}
    assert flush(store, run, slot_of(fresh(("z", "more"))), number=LATEST + 1).rows == 1


def test_deletes_are_counted(harness: Harness, store: Store, run: RunSpec) -> None:
    write(store, run, numbered(10))
    result = write(store, run, {"new": "more"}, deletes=["r003", "r004", "missing", ("Other", "r005")])
    assert (result.rows, result.deleted) == (1, 2)
    assert set(harness.contents()) == {*numbered(10), "new"} - {"r003", "r004"}
    assert harness.matching("number3") == []


def test_vectors_that_are_not_what_the_worker_wrote_are_never_stored(
    harness: Harness, store: Store, run: RunSpec
) -> None:
    write(store, run, {"r1": "one"})
    good = slot_of(fresh(("r2", "two")))
    for rows in (fresh(("r3", "three")), looked_up(store, ("r1", "changed"))):
        slot = slot_of(rows, number=1)
        written = slot._replace(crcs=((0, 1, slot.slot.checksum()),))
        slot.slot.vectors[0, 5] += 1
        with pytest.raises(RuntimeError, match="vectors 0:1 of slot 1 are not what the worker wrote"):
            flush(store, run, good, written)
    assert harness.contents() == {"r1": "one"}
    slot = slot_of(fresh(("r3", "three"), ("r4", "four")), number=1)
    flush(store, run, good, slot._replace(crcs=((0, 2, slot.slot.checksum()),)))
    assert harness.contents() == {"r1": "one", "r2": "two", "r3": "three", "r4": "four"}


def test_indexes_are_after_a_load_what_they_were(harness: Harness, store: Store, run: RunSpec) -> None:
    before = harness.execute(harness.shape)
    store.drop_index()
    write(store, run, numbered(20))
    store.finish_index(lambda doing: None)
    assert harness.execute(harness.shape) == before


# -- rows that the database refuses ------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "how"), each(lambda harness: harness.refusals))
def test_refused_rows_are_found_and_the_others_stored(harness: Harness, store: Store, run: RunSpec, how: str) -> None:
    script, reason, detail = harness.refusals[how]
    harness.execute(script)
    write(store, run, {"old": "old text"})
    pairs = [(f"k{i}", f"number {i}" + (f" {SECRET}" if i in (0, 11, 12, 70) else "")) for i in range(74)]
    result = flush(
        store,
        run,
        slot_of([*fresh(*pairs[:10]), *looked_up(store, ("old", f"{SECRET} again"))]),
        slot_of(fresh(*pairs[10:]), number=1),
    )
    assert result.rows == 70
    assert sorted(result.rejected) == [(s, r, reason, detail) for s, r in ((0, 0), (0, 10), (1, 1), (1, 2), (1, 60))]
    assert harness.contents() == {"old": "old text"} | {k: t for k, t in pairs if SECRET not in t}
    rejects = {r["record_id"]: r for r in store.rejects(ENTITY)}
    assert set(rejects) == {"k0", "k11", "k12", "k70", "old"}
    assert rejects["k0"]["content_hash"] == content_hash(f"number 0 {SECRET}").hex()
    assert (rejects["k0"]["reason"], rejects["k0"]["run"]) == (reason, run.number)
    assert SECRET not in str(list(rejects.values()))


def test_a_constraint_gives_its_own_reason(empty: Harness) -> None:
    empty.execute(empty.strict_table)
    empty.store.prepare(DIMENSIONS)
    result = write(empty.store, begin(empty.store), {"a": "x", "b": "same", "c": "same", "d": "good"})
    assert sorted((row, reason) for _, row, reason, _ in result.rejected) == [(0, "check"), (2, "unique")]
    assert sorted(empty.contents()) == ["b", "d"]
    empty.check()


def test_row_that_a_trigger_drops_is_not_counted_as_stored(harness: Harness, store: Store, run: RunSpec) -> None:
    harness.execute(harness.drops_silently)
    harness.index("c", "theirs")
    for rows in (fresh(("a", "one"), ("b", SECRET)), fresh(("c", "ours"), ("b", SECRET), ("d", "two"))):
        result = flush(store, run, slot_of(rows))
        assert [r[:3] for r in result.rejected] == [(0, 1, "database_refused")]
        assert result.rows == 1
    assert harness.contents() == {"a": "one", "c": "theirs", "d": "two"}
    assert rejected_keys(store) == ["b"]


def test_vector_with_nan_is_rejected_alone(harness: Harness, store: Store, run: RunSpec) -> None:
    write(store, run, {"a": "one"})
    slot = slot_of(fresh(("b", "two"), ("c", "three"), ("d", "four")))
    slot.slot.vectors[1, 0] = np.nan
    result = flush(store, run, slot)
    assert result.rows == 2
    assert [r[:3] for r in result.rejected] == [(0, 1, "not_finite")]
    assert harness.contents() == {"a": "one", "b": "two", "d": "four"}


# -- rejects -----------------------------------------------------------------------------------------------


def test_rejects_are_kept_with_printable_keys_and_newest_run_first(store: Store, run: RunSpec) -> None:
    odd = reject("\x00odd\ud800" + "x" * 300, 3)._replace(reason="bad", detail="d" * 900, content_hash=b"")
    flush(store, run, rejects=[reject("x" * 300, 8), reject("a", 1), odd, reject("bad\x00id", 7)])
    end(store, run)
    later = begin(store)
    flush(store, later, rejects=[reject("later", 2, entity="Memo")])
    found = list(store.rejects())
    assert [(r["entity"], r["record_id"][:12], r["reason"], r["position"]) for r in found] == [
        ("Memo", "later", "empty_text", 2),
        (ENTITY, "a", "empty_text", 1),
        (ENTITY, "\\x00odd\\ud80", "bad", 3),
        (ENTITY, "bad\\x00id", "empty_text", 7),
        (ENTITY, "x" * 12, "empty_text", 8),
    ]
    assert found[0]["rejected_at"].utcoffset() is not None
    assert list(store.rejects("Memo")) == found[:1]


def test_reject_is_forgotten_once_a_later_run_has_stored_the_record(store: Store, run: RunSpec) -> None:
    flush(store, run, rejects=[reject("a", 1), reject("b", 2)])
    write(store, run, {"a": "mended in the same run"})
    assert rejected_keys(store) == ["a", "b"]
    end(store, run)
    write(store, begin(store), {"a": "now it has a text"})
    assert rejected_keys(store) == ["b"]


def test_the_same_reject_of_two_runs_is_one_row(store: Store, run: RunSpec) -> None:
    flush(store, run, rejects=[reject("a", 1)])
    end(store, run)
    second = begin(store)
    flush(store, second, rejects=[reject("a", 1)])
    assert [r["run"] for r in store.rejects(ENTITY)] == [second.number]
    assert list(store.rejects("Other")) == []


def test_rejects_are_found_by_the_name_of_an_entity_that_no_table_can_hold(store: Store, run: RunSpec) -> None:
    flush(store, run, rejects=[reject(key, entity=name) for key in "ba" for name in ("n\0", "b", "a")])
    assert [(r["entity"], r["record_id"]) for r in store.rejects()] == [
        ("a", "a"), ("a", "b"), ("b", "a"), ("b", "b"), ("n\\x00", "a"), ("n\\x00", "b")
    ]  # fmt: skip
    assert rejected_keys(store, "n\0") == ["a", "b"]
    end(store, run, input="in")
    assert store.clear_rejects([("n\0", "a")]) == 1
    assert store.forget_rejects_of_input("n\0", "in", run.number + 1) == 1
    assert store.forget_older_rejects(["b", "a", "n\0"], run.number + 1) == 4


def test_rejects_are_cleared_by_key_or_all(store: Store, run: RunSpec) -> None:
    flush(store, run, rejects=[reject("a"), reject("a", 2), reject("b\n"), reject("c")])
    assert store.clear_rejects([(ENTITY, "a"), (ENTITY, "b\n"), ("Memo", "c")]) == 3
    assert store.clear_rejects() == 1
    assert list(store.rejects()) == []


# -- the library's way -------------------------------------------------------------------------------------


def test_put_writes_the_newest_text_whoever_wrote_the_row(harness: Harness, index: IndexStore, run: RunSpec) -> None:
    write(index, run, numbered(4))
    harness.index("r001", "theirs")
    with index.transaction():
        put(index, {"r000": "newest", "r001": "newest", "r009": "new"})
        put(index, {"r009": "newer"}, deletes=["r002"])
    assert harness.contents() == {"r000": "newest", "r001": "newest", "r003": "text number3", "r009": "newer"}
    row = harness.rows()["r001"]
    assert (row.model, row.run) == (LIBRARY.model, LIBRARY.number)
    assert lookup(index, "r000")["r000"].fingerprint == LIBRARY.fingerprint


def test_put_without_vectors_leaves_none_behind(harness: Harness, index: IndexStore, run: RunSpec) -> None:
    write(index, run, numbered(2))
    slot = Slab.local(SlabShape(slots=1, rows=4, dimensions=1)).slots[0]
    slot.put(1, [Row(Record((ENTITY, key), "plain")) for key in ("r000", "new")], [NO_VALUE] * 2)
    with index.transaction():
        index.upsert(LIBRARY, [FlushSlot(slot, frozenset())], [], vectors=False)
    plain = [row for row in harness.rows().values() if row.content == "plain"]
    assert [(row.vector, row.model, row.dimensions) for row in plain] == [(None, None, None)] * 2
    assert harness.matching("plain") == ["new", "r000"]
    assert lookup(index, "r000")["r000"].fingerprint is None


def put_all(index: IndexStore, *batches: Mapping[str, str]) -> None:
    with index.transaction():
        for texts in batches:
            put(index, texts)


def test_a_refused_row_takes_back_the_whole_unit_and_is_named(harness: Harness, index: IndexStore) -> None:
    script, reason, detail = harness.refusals["trigger"]
    harness.execute(script)
    with pytest.raises(RecordError) as caught:
        put_all(index, {"a": "first"}, {**numbered(4), "r002": SECRET})
    assert f"The record '{ENTITY}'/'r002' was refused ({reason}): {detail}" in caught.value.message
    assert harness.contents() == {}


def test_a_row_that_a_trigger_drops_takes_back_the_whole_unit(harness: Harness, index: IndexStore) -> None:
    harness.execute(harness.drops_silently)
    with pytest.raises(RecordError, match=r"dropped|left the row out") as caught:
        put_all(index, {"a": "one", "b": SECRET})
    assert SECRET not in str(caught.value)
    assert harness.contents() == {}
    put_all(index, {"a": "one", "c": "two"})
    assert harness.contents() == {"a": "one", "c": "two"}


def test_a_record_that_the_library_stores_is_no_longer_rejected(index: IndexStore, run: RunSpec) -> None:
    write(index, run, {}, rejects=[reject("a"), reject("other")])
    put_all(index, {"a": "one"})
    assert rejected_keys(index) == ["other"]


# -- records that are gone ---------------------------------------------------------------------------------


@pytest.fixture
def products(harness: Harness) -> Iterator[tuple[Any, list[str]]]:
    """A real KameleonDB in the same database, with eight products; yields it and their ids."""
    with products_of(harness.address) as made:
        yield made


def delete_two(db: Any, ids: list[str]) -> None:
    product = db.entity("Product")
    for record_id in ids[:2]:
        product.delete(record_id)


def materialize_and_delete_two(db: Any, ids: list[str]) -> None:
    assert db.materialize_entity("Product")["success"]
    with db._connection.engine.begin() as connection:
        for record_id in ids[:2]:
            connection.exec_driver_sql(f"UPDATE kdb_product SET is_deleted = (1 = 1) WHERE id = '{record_id}'")


@pytest.mark.parametrize("remove", [delete_two, materialize_and_delete_two], ids=["shared", "dedicated"])
def test_rows_whose_record_is_deleted_are_removed(
    harness: Harness,
    store: Store,
    run: RunSpec,
    products: tuple[Any, list[str]],
    remove: Callable[[Any, list[str]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(harness.prune_rows, 3)
    db, ids = products
    write(store, run, dict.fromkeys(ids, "thing"), entity="Product")
    write(store, run, {"gone": "no such record"}, entity="Product")
    write(store, run, {"kept": "of another entity"})
    assert store.prune(ENTITY, live_rows) == 0
    remove(db, ids)
    assert store.prune("Product", live_rows) == 3
    assert store.prune("Product", live_rows) == 0
    assert set(harness.contents()) == {*ids[2:], "kept"}


def test_without_kameleondbs_tables_nothing_is_removed(store: Store, run: RunSpec) -> None:
    write(store, run, numbered(3))
    assert store.prune(ENTITY, live_rows) == 0
    assert store.count() == 3
