"""What every store of a search index does beside :mod:`test_store_contract`: KameleonDB's tables, rows that KameleonDB
writes too, the library's way, full text, pruning by entity.

Each test runs on both kinds in ``store_harness.INDEXES``. What is one database's own stands in
``test_postgresql_store.py`` and ``test_sqlite_store.py``.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from store_harness import (
    DIMENSIONS,
    EDITS,
    ENTITY,
    FINGERPRINT,
    INDEXES,
    LIBRARY,
    SECRET,
    IndexHarness,
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
    write,
)

from kdb_fast.catalog.records import live_rows
from kdb_fast.errors import RecordError, SchemaError
from kdb_fast.ipc.row_block import NO_VALUE
from kdb_fast.ipc.slab import Row, Slab, SlabShape
from kdb_fast.records import Record, content_hash
from kdb_fast.stores.base import FlushSlot, IndexStore, RunSpec


@pytest.fixture(params=INDEXES)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def empty(kind: str, request: pytest.FixtureRequest) -> Iterator[IndexHarness]:
    """A store on an empty database."""
    with harness_of(INDEXES[kind], request) as harness:
        yield harness


@pytest.fixture
def harness(empty: IndexHarness) -> Iterator[IndexHarness]:
    """A store that is prepared; after the test all that it keeps of a row must be in step."""
    empty.store.prepare(DIMENSIONS)
    yield empty
    empty.check()


@pytest.fixture
def store(harness: IndexHarness) -> IndexStore:
    return harness.index_store


@pytest.fixture
def run(store: IndexStore) -> RunSpec:
    return begin(store)


def each(what: Callable[[type[IndexHarness]], Any]) -> list[tuple[str, str]]:
    """Each kind with each of something that it has."""
    return [(kind, one) for kind, harness in INDEXES.items() for one in what(harness)]


# -- preparing ---------------------------------------------------------------------------------------------


def test_kameleondbs_table_is_taken_as_it_is(empty: IndexHarness) -> None:
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
def test_a_table_of_another_shape_is_refused_and_left_alone(empty: IndexHarness, what: str) -> None:
    script, message = empty.unfit[what]
    empty.execute(script)
    before = empty.execute(empty.catalog)
    with pytest.raises(SchemaError, match=message):
        empty.open().prepare(DIMENSIONS)
    assert empty.execute(empty.catalog) == before


# -- look-ups ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["text and time", "written again", *EDITS])
def test_row_that_another_program_changed_has_no_fingerprint_and_can_be_replaced(
    harness: IndexHarness, store: IndexStore, run: RunSpec, change: str
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


def test_content_is_compared_even_if_an_editor_left_the_time(
    harness: IndexHarness, store: IndexStore, run: RunSpec
) -> None:
    write(store, run, {"a": "one"})
    harness.execute("UPDATE kdb_search SET content = 'edited'")
    assert lookup(store, "a")["a"].content_hash == content_hash("edited")
    write(store, run, {"a": "one"})


# -- flushes -----------------------------------------------------------------------------------------------


def test_new_rows_have_all_columns(harness: IndexHarness, store: IndexStore) -> None:
    run = begin(store, model="m" * 150)
    before = datetime.now(UTC) - timedelta(seconds=1)
    assert write(store, run, {"a": "one family", "b": "two"}, entity="Ünïcode 实体").rows == 2
    assert harness.execute("SELECT entity_name FROM kdb_search") == [("Ünïcode 实体",)] * 2
    for row in harness.rows().values():
        assert (row.model, row.dimensions, row.run, row.fingerprint) == ("m" * 100, DIMENSIONS, run.number, FINGERPRINT)
    assert len({row_id for row_id, _ in harness.ids().values()}) == 2
    for row_id, created in harness.ids().values():
        assert str(uuid.UUID(row_id)) == row_id
        assert uuid.UUID(row_id).version == 7
        assert before <= moment(created) <= datetime.now(UTC)
    assert harness.execute(
        "SELECT count(*) FROM kdb_search WHERE created_at = updated_at AND updated_at = kdb_fast_at"
    ) == [(2,)]
    assert harness.source_times() == [None] * 2
    assert harness.matching("family") == ["a"]


def test_time_of_the_source_is_kept_to_the_microsecond(harness: IndexHarness, store: IndexStore, run: RunSpec) -> None:
    slot = slot_of(fresh(("a", "one"), ("b", "two"), ("c", "three")))
    slot.slot.source_at[:3] = [1_700_000_000_123_456, -1, NO_VALUE]
    flush(store, run, slot)
    epoch = datetime(1970, 1, 1, tzinfo=UTC)
    assert harness.source_times() == [
        epoch + timedelta(microseconds=1_700_000_000_123_456),
        epoch - timedelta(microseconds=1),
        None,
    ]


def test_rows_keep_their_id_and_are_found_by_their_words(
    harness: IndexHarness, store: IndexStore, run: RunSpec
) -> None:
    write(store, run, {"a": "cats purr", "b": "dogs bark", "d": "cows moo"})
    ids = harness.ids()
    end(store, run)
    second = begin(store, fingerprint="other", model="another")
    # One with the same text, one with another, and a new one.
    assert write(store, second, {"a": "cats purr", "b": "birds sing", "c": "fish swim"}, deletes=["d"]).deleted == 1
    row = harness.rows()["a"]
    assert (row.run, row.fingerprint, row.model) == (second.number, "other", "another")
    assert {key: harness.ids()[key] for key in "ab"} == {key: ids[key] for key in "ab"}
    words = {"cat": "a", "purr": "a", "bird": "b", "sing": "b", "fish": "c", "swim": "c"}
    assert {word: "".join(harness.matching(word)) for word in words} == words
    assert [harness.matching(word) for word in ("dog", "bark", "cow", "moo")] == [[]] * 4


def test_row_inserted_by_another_program_meanwhile_stays(
    harness: IndexHarness, store: IndexStore, run: RunSpec
) -> None:
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
    harness: IndexHarness, store: IndexStore, run: RunSpec
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
    harness: IndexHarness, store: IndexStore, run: RunSpec
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


def test_indexes_are_after_a_load_what_they_were(harness: IndexHarness, store: IndexStore, run: RunSpec) -> None:
    before = harness.execute(harness.shape)
    store.drop_index()
    write(store, run, numbered(20))
    store.finish_index(lambda doing: None)
    assert harness.execute(harness.shape) == before


def test_a_constraint_gives_its_own_reason(empty: IndexHarness) -> None:
    empty.execute(empty.strict_table)
    empty.store.prepare(DIMENSIONS)
    result = write(empty.store, begin(empty.store), {"a": "x", "b": "same", "c": "same", "d": "good"})
    assert sorted((row, reason) for _, row, reason, _ in result.rejected) == [(0, "check"), (2, "unique")]
    assert sorted(empty.contents()) == ["b", "d"]
    empty.check()


# -- the library's way -------------------------------------------------------------------------------------


def test_put_writes_the_newest_text_whoever_wrote_the_row(
    harness: IndexHarness, store: IndexStore, run: RunSpec
) -> None:
    write(store, run, numbered(4))
    harness.index("r001", "theirs")
    with store.transaction():
        put(store, {"r000": "newest", "r001": "newest", "r009": "new"})
        put(store, {"r009": "newer"}, deletes=["r002"])
    assert harness.contents() == {"r000": "newest", "r001": "newest", "r003": "text number3", "r009": "newer"}
    row = harness.rows()["r001"]
    assert (row.model, row.run) == (LIBRARY.model, LIBRARY.number)
    assert lookup(store, "r000")["r000"].fingerprint == LIBRARY.fingerprint


def test_put_without_vectors_leaves_none_behind(harness: IndexHarness, store: IndexStore, run: RunSpec) -> None:
    write(store, run, numbered(2))
    slot = Slab.local(SlabShape(slots=1, rows=4, dimensions=1)).slots[0]
    slot.put(1, [Row(Record((ENTITY, key), "plain")) for key in ("r000", "new")], [NO_VALUE] * 2)
    with store.transaction():
        store.upsert(LIBRARY, [FlushSlot(slot, frozenset())], [], vectors=False)
    plain = [row for row in harness.rows().values() if row.content == "plain"]
    assert [(row.vector, row.model, row.dimensions) for row in plain] == [(None, None, None)] * 2
    assert harness.matching("plain") == ["new", "r000"]
    assert lookup(store, "r000")["r000"].fingerprint is None


def put_all(store: IndexStore, *batches: Mapping[str, str]) -> None:
    with store.transaction():
        for texts in batches:
            put(store, texts)


def test_a_refused_row_takes_back_the_whole_unit_and_is_named(harness: IndexHarness, store: IndexStore) -> None:
    script, reason, detail = harness.refusals["trigger"]
    harness.execute(script)
    with pytest.raises(RecordError) as caught:
        put_all(store, {"a": "first"}, {**numbered(4), "r002": SECRET})
    assert f"The record '{ENTITY}'/'r002' was refused ({reason}): {detail}" in caught.value.message
    assert harness.contents() == {}


def test_a_row_that_a_trigger_drops_takes_back_the_whole_unit(harness: IndexHarness, store: IndexStore) -> None:
    harness.execute(harness.drops_silently)
    with pytest.raises(RecordError, match=r"dropped|left the row out") as caught:
        put_all(store, {"a": "one", "b": SECRET})
    assert SECRET not in str(caught.value)
    assert harness.contents() == {}
    put_all(store, {"a": "one", "c": "two"})
    assert harness.contents() == {"a": "one", "c": "two"}


def test_a_record_that_the_library_stores_is_no_longer_rejected(store: IndexStore, run: RunSpec) -> None:
    write(store, run, {}, rejects=[reject("a"), reject("other")])
    put_all(store, {"a": "one"})
    assert rejected_keys(store) == ["other"]


# -- records that are gone ---------------------------------------------------------------------------------


@pytest.fixture
def products(harness: IndexHarness) -> Iterator[tuple[Any, list[str]]]:
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
    harness: IndexHarness,
    store: IndexStore,
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


def test_without_kameleondbs_tables_nothing_is_removed(store: IndexStore, run: RunSpec) -> None:
    write(store, run, numbered(3))
    assert store.prune(ENTITY, live_rows) == 0
    assert store.count() == 3
