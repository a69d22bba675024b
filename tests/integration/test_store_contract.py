"""What every store does: preparing, the lock, look-ups, flushes, refused rows, rejects.

Each test runs on every kind in ``target_harness.STORES``. What only an index does stands in ``test_index_contract.py``,
what only a vector column or a table of vectors does in ``test_column_target.py`` and ``test_tables_target.py``.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
from store_harness import (
    DIMENSIONS,
    ENTITY,
    FINGERPRINT,
    SECRET,
    Harness,
    begin,
    end,
    flush,
    harness_of,
    lookup,
    names,
    numbered,
    reject,
    rejected_keys,
    slot_of,
    vector_of,
)
from target_harness import STORES

from kdb_fast.errors import LockedError, SchemaError
from kdb_fast.ipc.row_block import NO_VALUE
from kdb_fast.records import content_hash
from kdb_fast.stores.base import Found, RunSpec, Store
from kdb_fast.stores.runs import STALE_SECONDS


@pytest.fixture(params=STORES)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def empty(kind: str, request: pytest.FixtureRequest) -> Iterator[Harness]:
    """A store on an empty database."""
    with harness_of(STORES[kind], request) as harness:
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
def run(store: Store) -> RunSpec:
    return begin(store)


def each(what: Callable[[type[Harness]], Any]) -> list[tuple[str, str]]:
    """Each kind with each of something that it has."""
    return [(kind, one) for kind, harness in STORES.items() for one in what(harness)]


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
            with contextlib.closing(empty.connect()) as store:
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


@pytest.mark.parametrize("prepared", [False, True])
def test_a_database_that_cannot_be_written_is_refused(empty: Harness, prepared: bool) -> None:
    if prepared:
        empty.store.prepare(DIMENSIONS)
    with pytest.raises(SchemaError, match=r"read-only|cannot be written"):
        empty.read_only().prepare(DIMENSIONS)


def test_table_that_is_gone_is_named(empty: Harness) -> None:
    empty.store.prepare(DIMENSIONS)
    run = begin(empty.store)
    rows = empty.fresh(("a", "one"))
    empty.execute(f"DROP TABLE {empty.written}")
    with pytest.raises(SchemaError, match=empty.written):
        flush(empty.store, run, slot_of(rows))


# -- the lock ----------------------------------------------------------------------------------------------


HOLDER = """
import pickle, sys
from kdb_fast.stores import open_store
address, target = pickle.loads(bytes.fromhex(sys.argv[1]))
store = open_store(address, "holder", target=target)
run = store.begin_run(fingerprint="f", model="m", dimensions=8, wait=0)
print(run.number, flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def holder(harness: Harness) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Another process that holds the index; yields it and the number of its run."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, pickle.dumps((harness.address, harness.target)).hex()],
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


OTHER_RUNS: dict[str, tuple[str, float | None, str | None]] = {
    "dead": ("pid = {dead}", None, None),
    "its pid is another's": (f"pid = {{parent}}, {EARLIER}", None, None),
    "its pid is mine": (EARLIER, None, None),
    "elsewhere": ("host = 'elsewhere'", None, "on elsewhere"),
    "elsewhere, slow": ("host = 'elsewhere'", STALE_SECONDS - 5, "on elsewhere"),
    "elsewhere, silent": ("host = 'elsewhere'", STALE_SECONDS + 1, None),
    "myself, silent": ("phase = phase", STALE_SECONDS + 1, "holds the index"),
}
"""A change of the running run, for how many seconds it has been silent, and what is said where it still holds."""


def test_only_a_dead_or_silent_run_is_taken_over(harness: Harness, store: Store) -> None:
    for case, (change, silent, holds) in OTHER_RUNS.items():
        run = begin(store)
        harness.change_run(change.format(dead=dead_pid(), parent=os.getppid()), silent)
        if holds is None:
            taken_over = run
            run = begin(store)
            assert run.number > taken_over.number, case
        else:
            with pytest.raises(LockedError, match=holds):
                begin(store)
        end(store, run)


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
    harness.write(store, run, {"a": "before"})
    rows = harness.fresh(("b", "after"))
    harness.change_run("host = 'elsewhere'", silent=3600)
    other = harness.open()
    new = begin(other)
    assert new.number > run.number
    with pytest.raises(LockedError, match=f"Run {run.number} no longer holds the index"):
        flush(store, run, slot_of(rows), deletes=["a"])
    assert harness.contents() == {"a": "before"}
    store.end_run(run.number, "done", {})
    assert states(harness) == [("abandoned", True), ("running", False)]
    assert other.after_a_crash(new.number)
    assert harness.write(other, new, {"b": "written"}).rows == 1


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


def test_lookup_gives_hash_fingerprint_and_version_of_stored_rows(harness: Harness, store: Store, run: RunSpec) -> None:
    harness.write(store, run, {**numbered(60), "a": "Grüße 你好"})
    found = lookup(store, "a", *numbered(1100))
    assert set(found) == {"a", *numbered(60)}
    assert found["r007"].content_hash == content_hash("text number7")
    assert found["a"].content_hash == content_hash("Grüße 你好")
    assert {row.fingerprint for row in found.values()} == {FINGERPRINT}
    assert all(row.row_version != NO_VALUE for row in found.values())
    assert lookup(store, "r007", entity="Other") == {}
    assert lookup(store) == {}
    assert store.count() == 61


def test_a_comparison_leaves_out_what_is_as_it_is_wanted(harness: Harness, store: Store, run: RunSpec) -> None:
    harness.write(store, run, numbered(1100))
    wanted = {**numbered(1100), "r007": "another text", "r1099": "longer", "not there": "x", "nor here": "y"}
    records = [harness.fresh((key, text))[0].record for key, text in wanted.items()]
    keys = [record.key for record in records]
    hashes = [content_hash(text) for text in wanted.values()]
    for fingerprint in (FINGERPRINT, "another model"):
        answer = store.compare(records, hashes, fingerprint)
        found = answer if isinstance(answer, Found) else answer()
        stored = store.lookup(keys)
        places = set(found.unchanged)
        for place, key in enumerate(keys):
            row = stored.get(key)
            if place in places:
                assert row is not None
                assert (row.content_hash, row.fingerprint) == (hashes[place], fingerprint)
            else:
                assert found.rows.get(key) == row
    assert not places


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


def assert_vectors(harness: Harness, texts: Mapping[str, str]) -> None:
    """The vectors of these records are those of these texts."""
    found = harness.vectors()
    for key, text in texts.items():
        np.testing.assert_allclose(found[key], vector_of(text), rtol=0, atol=harness.vector_error)


def test_new_rows_are_stored_as_they_are(harness: Harness, store: Store, run: RunSpec) -> None:
    texts = {f"k{i}": text for i, text in enumerate(UNICODE)}
    rows = harness.fresh(*texts.items(), entity="Ünïcode 实体")
    result = flush(store, run, slot_of(rows[:5]), slot_of(rows[5:], number=1))
    assert (result.rows, result.superseded, result.rejected, result.deleted) == (len(UNICODE), (), (), 0)
    assert result.bytes > 0
    assert store.count() == len(UNICODE)
    assert harness.contents() == texts
    assert_vectors(harness, texts)
    assert store.altered(run.number) == []


def test_several_slots_and_skipped_rows_are_written_in_one_flush(harness: Harness, store: Store, run: RunSpec) -> None:
    first = slot_of(harness.fresh(*numbered(40).items()), skip=[0, 39])
    second = slot_of(harness.fresh(*((f"m{i}", f"other {i}") for i in range(10)), entity="Memo"), number=1)
    assert flush(store, run, first, second).rows == store.count() == 48
    assert set(harness.contents()) == {f"r{i:03d}" for i in range(1, 39)} | {f"m{i}" for i in range(10)}


def test_same_text_new_text_and_new_rows_in_one_flush(harness: Harness, store: Store, run: RunSpec) -> None:
    harness.write(store, run, {"a": "cats purr", "b": "dogs bark", "d": "cows moo"})
    end(store, run)
    later = harness.open()
    second = begin(later, fingerprint="other", model="another")
    assert later.after_a_crash(second.number) is False
    slot = slot_of(harness.looked_up(later, ("a", "cats purr"), ("b", "birds sing"), ("c", "fish swim")))
    slot.slot.vectors[0] = vector_of("another model")
    result = flush(later, second, slot)
    assert (result.rows, result.superseded, result.rejected) == (3, (), ())
    assert harness.contents() == {"a": "cats purr", "b": "birds sing", "c": "fish swim", "d": "cows moo"}
    # A row whose text is the same gets the new vector all the same, and counts as written by this run.
    assert_vectors(harness, {"a": "another model", "b": "birds sing", "c": "fish swim", "d": "cows moo"})
    assert {key: row.fingerprint for key, row in lookup(later, *"abcd").items()} == {
        **dict.fromkeys("abc", "other"), "d": FINGERPRINT
    }  # fmt: skip


def test_what_another_program_outdates_is_superseded(harness: Harness, store: Store, run: RunSpec) -> None:
    harness.write(store, run, {"a": "earlier", "b": "earlier"})
    store.finish_index(lambda what: None)
    end(store, run)
    second = begin(store)
    rows = harness.looked_up(store, *dict.fromkeys("abcd", "ours").items())
    harness.outdate("b")
    harness.outdate("d")
    result = flush(store, second, slot_of(rows))
    assert (result.rows, result.superseded, result.rejected) == (2, ((0, 1), (0, 3)), ())
    assert {key for key, text in harness.contents().items() if text == "ours"} == {"a", "c"}


LATEST = 1_000_000
"""Number of a flush: after those of other tests."""


def test_repeated_flush_gives_the_first_result_and_writes_nothing(harness: Harness, store: Store, run: RunSpec) -> None:
    harness.write(store, run, {"c": "three"})
    rows = harness.fresh(("a", "ours"), ("b", "ours"), ("r", SECRET))
    harness.provide([("c", None)], ENTITY)
    harness.outdate("b")
    harness.execute(harness.refusals["trigger"][0])
    first = flush(store, run, slot_of(rows), number=LATEST, rejects=[reject("q", 7)], deletes=["c", "gone"])
    assert (first.rows, first.superseded, first.deleted) == (1, ((0, 1),), 1)
    assert [r[:2] for r in first.rejected] == [(0, 2)]
    before = harness.execute(harness.versions)
    again = flush(harness.open(), run, slot_of(rows), number=LATEST, rejects=[reject("q", 7)], deletes=["a"])
    assert again == first
    assert harness.execute(harness.versions) == before
    assert set(rejected_keys(store)) == {"q", "r"}
    assert harness.write(store, run, {"z": "more"}, number=LATEST + 1).rows == 1


def test_deletes_are_counted(harness: Harness, store: Store, run: RunSpec) -> None:
    harness.write(store, run, numbered(10))
    result = harness.write(store, run, {"new": "more"}, deletes=["r003", "r004", "missing", ("Other", "r005")])
    assert (result.rows, result.deleted) == (1, 2)
    assert set(harness.contents()) == {*numbered(10), "new"} - {"r003", "r004"}


def test_vectors_that_are_not_what_the_worker_wrote_are_never_stored(
    harness: Harness, store: Store, run: RunSpec
) -> None:
    harness.write(store, run, {"r1": "one"})
    good = slot_of(harness.fresh(("r2", "two")))
    for rows in (harness.fresh(("r3", "three")), harness.looked_up(store, ("r1", "changed"))):
        slot = slot_of(rows, number=1)
        written = slot._replace(crcs=((0, 1, slot.slot.checksum()),))
        slot.slot.vectors[0, 5] += 1
        with pytest.raises(RuntimeError, match="vectors 0:1 of slot 1 are not what the worker wrote"):
            flush(store, run, good, written)
    assert harness.vectors().keys() == {"r1"}
    slot = slot_of(harness.fresh(("r3", "three"), ("r4", "four")), number=1)
    flush(store, run, good, slot._replace(crcs=((0, 2, slot.slot.checksum()),)))
    assert harness.vectors().keys() == {"r1", "r2", "r3", "r4"}
    assert_vectors(harness, {"r1": "one", "r2": "two", "r3": "three", "r4": "four"})


def test_rows_that_a_trigger_changes_are_told(empty: Harness) -> None:
    store = empty.store
    store.prepare(DIMENSIONS)
    empty.execute(empty.alters)
    store.prepare(DIMENSIONS)
    run = begin(store)
    assert empty.write(store, run, {"a": "one", "b": "two"}).rows == 2
    (warning,) = [text for text in store.altered(run.number) if text.startswith("2 rows of ")]
    assert empty.written in warning
    assert "trigger meddle" in warning


# -- rows that the database refuses ------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "how"), each(lambda harness: harness.refusals))
def test_refused_rows_are_found_and_the_others_stored(harness: Harness, store: Store, run: RunSpec, how: str) -> None:
    script, reason, detail = harness.refusals[how]
    harness.execute(script)
    harness.write(store, run, {"old": "old text"})
    pairs = [(f"k{i}", f"number {i}" + (f" {SECRET}" if i in (0, 11, 12, 70) else "")) for i in range(74)]
    result = flush(
        store,
        run,
        slot_of([*harness.fresh(*pairs[:10]), *harness.looked_up(store, ("old", f"{SECRET} again"))]),
        slot_of(harness.fresh(*pairs[10:]), number=1),
    )
    assert result.rows == 70
    assert sorted(result.rejected) == [(s, r, reason, detail) for s, r in ((0, 0), (0, 10), (1, 1), (1, 2), (1, 60))]
    assert harness.vectors().keys() == {"old"} | {k for k, t in pairs if SECRET not in t}
    assert_vectors(harness, {"old": "old text"} | {k: t for k, t in pairs if SECRET not in t})
    rejects = {names(r)[1]: r for r in store.rejects(ENTITY)}
    assert set(rejects) == {"k0", "k11", "k12", "k70", "old"}
    assert rejects["k0"].content_hash == content_hash(f"number 0 {SECRET}").hex()
    assert (rejects["k0"].reason, rejects["k0"].run) == (reason, run.number)
    assert SECRET not in str(list(rejects.values()))


def test_row_that_a_trigger_drops_is_not_counted_as_stored(harness: Harness, store: Store, run: RunSpec) -> None:
    harness.execute(harness.drops_silently)
    rows = harness.fresh(("a", "one"), ("b", SECRET)), harness.fresh(("c", "ours"), ("b", SECRET), ("d", "two"))
    harness.outdate("c")
    for part in rows:
        result = flush(store, run, slot_of(part))
        assert [r[:3] for r in result.rejected] == [(0, 1, "database_refused")]
        assert result.rows == 1
    found = harness.contents()
    assert {**found, "a": "one", "d": "two"} == found
    assert "b" not in found
    assert rejected_keys(store) == ["b"]


def test_vector_with_nan_is_rejected_alone(harness: Harness, store: Store, run: RunSpec) -> None:
    harness.write(store, run, {"a": "one"})
    slot = slot_of(harness.fresh(("b", "two"), ("c", "three"), ("d", "four")))
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
    assert [(names(r)[0], names(r)[1][:12], r.reason, r.position) for r in found] == [
        ("Memo", "later", "empty_text", 2),
        (ENTITY, "a", "empty_text", 1),
        (ENTITY, "\\x00odd\\ud80", "bad", 3),
        (ENTITY, "bad\\x00id", "empty_text", 7),
        (ENTITY, "x" * 12, "empty_text", 8),
    ]
    assert found[0].rejected_at.utcoffset() is not None
    assert list(store.rejects("Memo")) == found[:1]


def test_reject_is_forgotten_once_a_later_run_has_stored_the_record(
    harness: Harness, store: Store, run: RunSpec
) -> None:
    flush(store, run, rejects=[reject("a", 1), reject("b", 2)])
    harness.write(store, run, {"a": "mended in the same run"})
    assert rejected_keys(store) == ["a", "b"]
    end(store, run)
    harness.write(store, begin(store), {"a": "now it has a text"})
    assert rejected_keys(store) == ["b"]


def test_the_same_reject_of_two_runs_is_one_row(store: Store, run: RunSpec) -> None:
    flush(store, run, rejects=[reject("a", 1)])
    end(store, run)
    second = begin(store)
    flush(store, second, rejects=[reject("a", 1)])
    assert [r.run for r in store.rejects(ENTITY)] == [second.number]
    assert list(store.rejects("Other")) == []


def test_rejects_are_found_by_the_name_of_an_entity_that_no_table_can_hold(store: Store, run: RunSpec) -> None:
    flush(store, run, rejects=[reject(key, entity=name) for key in "ba" for name in ("n\0", "b", "a")])
    assert [names(r) for r in store.rejects()] == [
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


# -- records that are gone ---------------------------------------------------------------------------------
