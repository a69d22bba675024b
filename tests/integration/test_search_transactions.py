"""Blocks of ``transaction()``, and batches tied to an SQLAlchemy session: all is kept, or nothing."""

# ruff: noqa: PT012 - it is whole blocks that fail here

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from search_engines import EXACT, Hashes, sqlalchemy_url
from servers import cosine, execute, index_rows
from sqlalchemy import event
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, scoped_session, sessionmaker
from sqlalchemy.pool import StaticPool

from kdb_fast.db.address import DatabaseAddress
from kdb_fast.errors import ProviderError, RecordError, UsageError
from kdb_fast.search import transactions
from kdb_fast.search.engine import SearchEngine, SessionBatch


class Base(DeclarativeBase):
    pass


class Article(Base):
    __tablename__ = "article"
    id: Mapped[str] = mapped_column(primary_key=True)
    title: Mapped[str] = mapped_column(unique=True)


@pytest.fixture
def engine(address: DatabaseAddress) -> Iterator[sqlalchemy.Engine]:
    engine = sqlalchemy.create_engine(sqlalchemy_url(address))
    Base.metadata.create_all(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def provider() -> Hashes:
    return Hashes()


@pytest.fixture
def search(engine: sqlalchemy.Engine, provider: Hashes) -> Iterator[SearchEngine]:
    with SearchEngine(engine, provider) as search:
        yield search


@pytest.fixture
def session(engine: sqlalchemy.Engine) -> Iterator[Session]:
    with Session(engine) as session:
        yield session


def indexed(address: DatabaseAddress) -> dict[str, str]:
    """Text by record id, as another connection sees it; asserts that full-text rows and vectors belong to it."""
    rows = index_rows(address)
    provider = Hashes()
    for row in rows.values():
        assert row.vector is not None
        assert cosine(row.vector, provider.vectors([row.content])[0]) >= EXACT
    if address.dialect == "sqlite":
        columns = "id, entity_name, record_id, content"
        found = execute(address, f"SELECT {columns} FROM kdb_search_fts")
        assert sorted(found) == sorted(execute(address, f"SELECT {columns} FROM kdb_search"))
    return {key[1]: row.content for key, row in rows.items()}


def articles(address: DatabaseAddress) -> set[str]:
    return {key for (key,) in execute(address, "SELECT id FROM article")}


class Stop(Exception):
    pass


# -- with search.transaction() -----------------------------------------------------------------------------


def test_block_is_written_as_one_batch_at_its_end(
    search: SearchEngine, address: DatabaseAddress, provider: Hashes
) -> None:
    with search.transaction() as same:
        assert same is search
        for number in range(50):
            search.index_record("Note", f"r{number}", f"text {number}")
        assert indexed(address) == {}
        assert search.search("text") == []
        assert provider.batches == []
    assert indexed(address) == {f"r{number}": f"text {number}" for number in range(50)}
    assert [len(batch) for batch in provider.batches] == [50]
    assert len(search.search("text")) == 10


def test_exception_discards_the_block(search: SearchEngine, address: DatabaseAddress, provider: Hashes) -> None:
    search.index_record("Note", "before", "text")
    with pytest.raises(Stop), search.transaction():
        search.index_record("Note", "1", "text")
        search.index_record("Note", "before", "changed")
        search.delete_record("Note", "before")
        raise Stop
    assert indexed(address) == {"before": "text"}
    assert len(provider.batches) == 1
    search.index_record("Note", "after", "text")
    assert indexed(address) == {"before": "text", "after": "text"}


def test_within_a_block_the_last_operation_of_a_key_counts(search: SearchEngine, address: DatabaseAddress) -> None:
    search.index_records_batch([("Note", "old", "text"), ("Note", "other", "text")])
    with search.transaction():
        search.index_record("Note", "1", "first")
        search.index_record("Note", "1", "second")
        search.index_record("Note", "2", "gone again")
        search.delete_record("Note", "2")
        search.delete_record("Note", "old")
        search.delete_record("Note", "other")
        search.index_record("Note", "other", "back again")
        search.index_record("Note", "3", "emptied")
        search.index_record("Note", "3", "")
        search.delete_record("Note", "never there")
    assert indexed(address) == {"1": "second", "other": "back again"}


def test_nested_blocks_join_the_outer_one(search: SearchEngine, address: DatabaseAddress) -> None:
    with search.transaction():
        search.index_record("Note", "1", "outer")
        with search.transaction() as inner:
            assert inner is search
            search.index_record("Note", "2", "inner")
        assert indexed(address) == {}
    assert indexed(address) == {"1": "outer", "2": "inner"}
    with pytest.raises(Stop), search.transaction():
        with search.transaction():
            search.index_record("Note", "3", "inner")
        raise Stop
    with pytest.raises(Stop), search.transaction():
        search.index_record("Note", "4", "outer")
        with search.transaction():
            raise Stop
    assert indexed(address) == {"1": "outer", "2": "inner"}


def test_batches_within_a_block_are_all_or_none(search: SearchEngine, address: DatabaseAddress) -> None:
    with search.transaction():
        search.index_record("Note", "1", "fine")
        with pytest.raises(RecordError):
            search.index_records_batch([("Note", "1", "changed"), ("Note", "2", "fine"), ("Note", "x" * 99, "bad")])
        search.index_records_batch(("Note", key, "good") for key in ("3", "4"))
    assert indexed(address) == {"1": "fine", "3": "good", "4": "good"}


def test_empty_block_touches_nothing(search: SearchEngine, address: DatabaseAddress) -> None:
    with search.transaction():
        search.index_records_batch([])
    assert indexed(address) == {}


@pytest.fixture
def small_queue(monkeypatch: pytest.MonkeyPatch) -> int:
    """Room for about five short records."""
    monkeypatch.setattr(transactions, "QUEUE_BYTES", 5 * (transactions.OPERATION_BYTES + 10))
    return 5


def test_queue_beyond_its_bound_is_written_early_and_committed_once(
    search: SearchEngine, address: DatabaseAddress, provider: Hashes, small_queue: int
) -> None:
    with search.transaction():
        for number in range(23):
            search.index_record("Note", f"r{number}", f"text {number}")
        search.delete_record("Note", "r3")
        assert max(map(len, provider.batches)) <= small_queue + 1
        assert len(provider.batches) >= 3
        assert indexed(address) == {}
    assert indexed(address) == {f"r{number}": f"text {number}" for number in range(23) if number != 3}


def test_exception_takes_back_what_was_written_early(
    search: SearchEngine, address: DatabaseAddress, provider: Hashes, small_queue: int
) -> None:
    search.index_records_batch([("Note", "r1", "before"), ("Note", "r2", "before")])
    with pytest.raises(Stop), search.transaction():
        search.delete_record("Note", "r2")
        for number in range(23):
            search.index_record("Note", f"r{number}", f"text {number}")
        assert len(provider.batches) > 3
        raise Stop
    assert indexed(address) == {"r1": "before", "r2": "before"}
    search.index_record("Note", "r1", "after")
    assert indexed(address) == {"r1": "after", "r2": "before"}
    assert len(search.search("after")) == 2


def test_deletions_count_for_the_bound_too(search: SearchEngine, address: DatabaseAddress, small_queue: int) -> None:
    search.index_records_batch([("Note", f"r{number}", "text") for number in range(20)])
    with search.transaction():
        queue = search._queue()
        assert queue is not None
        for number in range(20):
            search.delete_record("Note", f"r{number}")
            assert len(queue._operations) <= small_queue + 1
        assert len(indexed(address)) == 20
    assert indexed(address) == {}


def test_batch_that_fails_after_it_was_written_in_part_takes_the_block_with_it(
    search: SearchEngine, address: DatabaseAddress, small_queue: int
) -> None:
    records = [("Note", f"r{number}", f"text {number}") for number in range(20)]
    bad: list[Any] = [("Note", "bad", None)]
    with pytest.raises(UsageError, match="failed after a part of it had been written"), search.transaction():
        search.index_record("Note", "first", "fine")
        with pytest.raises(RecordError):
            search.index_records_batch([*records, *bad])
        search.index_record("Note", "last", "fine")
    assert indexed(address) == {}
    search.index_records_batch(records)
    assert len(indexed(address)) == 20


def test_record_that_cannot_be_embedded_fails_the_block_at_its_end(
    search: SearchEngine, address: DatabaseAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(texts: list[str]) -> Any:
        raise ConnectionError

    with monkeypatch.context() as patch:
        patch.setattr(search._provider, "embed_batch", broken)
        with pytest.raises(ProviderError), search.transaction():
            search.index_record("Note", "1", "text")
    assert indexed(address) == {}
    search.index_record("Note", "2", "text")
    assert indexed(address) == {"2": "text"}


def test_block_belongs_to_its_thread(search: SearchEngine, address: DatabaseAddress) -> None:
    def other_thread(record_id: str, *, fails: bool) -> None:
        with search.transaction():
            search.index_record("Note", record_id, "of another block")
            if fails:
                raise Stop

    def run(*arguments: Any, **options: Any) -> None:
        thread = threading.Thread(target=lambda: _quietly(other_thread, *arguments, **options))
        thread.start()
        thread.join()

    with search.transaction():
        search.index_record("Note", "mine", "of this block")
        run("theirs", fails=False)
        assert indexed(address) == {"theirs": "of another block"}
        run("lost", fails=True)
        direct = threading.Thread(target=search.index_record, args=("Note", "direct", "of no block"))
        direct.start()
        direct.join()
        assert set(indexed(address)) == {"theirs", "direct"}
    assert set(indexed(address)) == {"theirs", "direct", "mine"}


def _quietly(work: Any, *arguments: Any, **options: Any) -> None:
    with contextlib.suppress(Stop):
        work(*arguments, **options)


def test_block_without_a_provider_is_batched_too(engine: sqlalchemy.Engine, address: DatabaseAddress) -> None:
    with SearchEngine(engine) as search:
        with pytest.raises(Stop), search.transaction():
            search.index_record("Note", "lost", "text")
            raise Stop
        with search.transaction():
            search.index_record("Note", "1", "one")
            search.index_record("Note", "2", "two")
        assert {key[1]: row.vector for key, row in index_rows(address).items()} == {"1": None, "2": None}


# -- search.for_session() ----------------------------------------------------------------------------------


def test_rows_come_with_the_sessions_commit(search: SearchEngine, session: Session, address: DatabaseAddress) -> None:
    batch = search.for_session(session)
    session.add(Article(id="1", title="first"))
    batch.index_record("Article", "1", "title: first")
    batch.index_records_batch([("Article", "2", "title: second"), ("Article", "3", "title: third")])
    batch.delete_record("Article", "2")
    assert len(batch) == 4
    session.flush()
    assert indexed(address) == {}
    session.commit()
    assert indexed(address) == {"1": "title: first", "3": "title: third"}
    assert articles(address) == {"1"}
    assert len(batch) == 0
    session.add(Article(id="4", title="fourth"))
    batch.index_record("Article", "4", "title: fourth")
    batch.delete_record("Article", "1")
    session.commit()
    assert indexed(address) == {"3": "title: third", "4": "title: fourth"}


def test_rows_are_in_the_sessions_own_transaction_before_its_commit(
    search: SearchEngine, session: Session, address: DatabaseAddress
) -> None:
    batch = search.for_session(session)
    seen: list[tuple[int, set[str], set[str]]] = []

    @event.listens_for(session, "before_commit")
    def just_before_the_commit(session: Session) -> None:
        inside = session.execute(sqlalchemy.text("SELECT count(*) FROM kdb_search")).scalar_one()
        seen.append((inside, set(indexed(address)), articles(address)))

    session.add(Article(id="1", title="first"))
    batch.index_record("Article", "1", "text")
    session.commit()
    assert seen == [(1, set(), set())]
    assert (set(indexed(address)), articles(address)) == ({"1"}, {"1"})


@pytest.mark.parametrize("with_rows", [True, False])
def test_failure_after_the_rows_were_written_leaves_nothing(
    search: SearchEngine, session: Session, address: DatabaseAddress, with_rows: bool
) -> None:
    batch = search.for_session(session)

    def fail(session: Session) -> None:
        raise Stop

    event.listen(session, "before_commit", fail)
    if with_rows:
        session.add(Article(id="1", title="first"))
    batch.index_record("Article", "1", "text")
    with pytest.raises(Stop):
        session.commit()
    session.rollback()
    assert (indexed(address), articles(address)) == ({}, set())
    event.remove(session, "before_commit", fail)
    session.commit()
    assert indexed(address) == {}


def test_failing_flush_leaves_nothing_and_costs_no_embedding(
    search: SearchEngine, session: Session, address: DatabaseAddress, provider: Hashes
) -> None:
    session.add(Article(id="0", title="taken"))
    session.commit()
    batch = search.for_session(session)
    batch.index_record("Article", "1", "text")
    session.add(Article(id="1", title="taken"))
    with pytest.raises(IntegrityError):
        session.commit()
    assert provider.batches == []
    with pytest.raises(UsageError, match="has failed or is at its end"):
        batch.index_record("Article", "2", "text")
    session.rollback()
    assert len(batch) == 0
    session.commit()
    assert (indexed(address), articles(address)) == ({}, {"0"})


def test_rollback_discards(search: SearchEngine, session: Session, address: DatabaseAddress) -> None:
    batch = search.for_session(session)
    batch.index_record("Article", "1", "text")
    session.rollback()
    assert len(batch) == 0
    batch.index_record("Article", "2", "text")
    session.commit()
    assert indexed(address) == {"2": "text"}


def test_closing_the_session_discards(search: SearchEngine, session: Session, address: DatabaseAddress) -> None:
    batch = search.for_session(session)
    session.add(Article(id="1", title="first"))
    batch.index_record("Article", "1", "text")
    session.flush()
    session.close()
    session.add(Article(id="2", title="second"))
    session.commit()
    assert (indexed(address), articles(address)) == ({}, {"2"})


def test_savepoint_that_is_rolled_back_discards_what_was_queued_within(
    search: SearchEngine, session: Session, address: DatabaseAddress
) -> None:
    batch = search.for_session(session)
    batch.index_record("Article", "before", "text")
    with pytest.raises(Stop), session.begin_nested():
        batch.index_record("Article", "within", "text")
        with session.begin_nested():
            batch.index_record("Article", "deeper", "text")
        raise Stop
    batch.index_record("Article", "between", "text")
    with session.begin_nested():
        batch.index_record("Article", "kept", "text")
        with pytest.raises(Stop), session.begin_nested():
            batch.delete_record("Article", "kept")
            raise Stop
    batch.index_record("Article", "after", "text")
    assert indexed(address) == {}
    session.commit()
    assert set(indexed(address)) == {"before", "between", "kept", "after"}


def test_flush_that_fails_within_a_savepoint_keeps_what_was_queued_before(
    search: SearchEngine, session: Session, address: DatabaseAddress
) -> None:
    batch = search.for_session(session)
    session.add(Article(id="1", title="taken"))
    batch.index_record("Article", "1", "text")
    session.flush()
    with pytest.raises(IntegrityError), session.begin_nested():
        session.add(Article(id="2", title="taken"))
        batch.index_record("Article", "2", "text")
        session.flush()
    session.commit()
    assert (set(indexed(address)), articles(address)) == ({"1"}, {"1"})


def test_batch_made_within_a_savepoint_goes_with_it(
    search: SearchEngine, session: Session, address: DatabaseAddress
) -> None:
    with pytest.raises(Stop), session.begin_nested():
        batch = search.for_session(session)
        batch.index_record("Article", "1", "text")
        raise Stop
    batch.index_record("Article", "2", "text")
    session.commit()
    assert set(indexed(address)) == {"2"}


def test_listeners_of_the_flush_may_queue(
    search: SearchEngine, session: Session, address: DatabaseAddress, provider: Hashes
) -> None:
    batch = search.for_session(session)

    @event.listens_for(session, "after_flush")
    def index_what_is_new(session: Session, context: Any) -> None:
        for article in session.new:
            batch.index_record("Article", article.id, article.title)

    session.add(Article(id="1", title="first"))
    session.commit()
    assert (indexed(address), articles(address)) == ({"1": "first"}, {"1"})

    @event.listens_for(session, "before_commit")
    def add_more(session: Session) -> None:
        if session.get(Article, "3") is None:
            session.add(Article(id="3", title="late"))

    session.add(Article(id="2", title="second"))
    session.commit()
    assert indexed(address) == {"1": "first", "2": "second", "3": "late"}
    assert provider.batches == [["first"], ["second"], ["late"]]


def test_queueing_after_the_commit_is_refused(search: SearchEngine, session: Session, address: DatabaseAddress) -> None:
    batch = search.for_session(session)
    refused: list[UsageError] = []

    @event.listens_for(session, "after_commit")
    def too_late(session: Session) -> None:
        with pytest.raises(UsageError, match="is at its end") as caught:
            batch.index_record("Article", "late", "text")
        refused.append(caught.value)

    session.add(Article(id="1", title="first"))
    session.commit()
    assert len(refused) == 1
    session.add(Article(id="2", title="second"))
    session.commit()
    assert indexed(address) == {}


def test_failed_embedding_stops_the_commit_which_may_be_tried_again(
    search: SearchEngine, session: Session, address: DatabaseAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = search.for_session(session)
    session.add(Article(id="1", title="first"))
    batch.index_record("Article", "1", "text")

    def broken(texts: list[str]) -> Any:
        raise ConnectionError

    with monkeypatch.context() as patch:
        patch.setattr(search._provider, "embed_batch", broken)
        with pytest.raises(ProviderError):
            session.commit()
        assert (indexed(address), articles(address)) == ({}, set())
    session.commit()
    assert (indexed(address), articles(address)) == ({"1": "text"}, {"1"})


def test_row_that_the_database_refuses_undoes_the_batch_but_not_the_session(
    search: SearchEngine, session: Session, address: DatabaseAddress
) -> None:
    if address.dialect == "postgresql":
        execute(address, "ALTER TABLE kdb_search ADD CHECK (content <> 'forbidden')")
    else:
        execute(
            address,
            "CREATE TRIGGER refuse BEFORE INSERT ON kdb_search WHEN NEW.content = 'forbidden' "
            "BEGIN SELECT RAISE(ABORT, 'no'); END",
        )
    batch = search.for_session(session)
    session.add(Article(id="1", title="first"))
    batch.index_records_batch([("Article", "1", "fine"), ("Article", "2", "forbidden")])
    with pytest.raises(RecordError, match="refused"):
        session.commit()
    assert session.execute(sqlalchemy.text("SELECT count(*) FROM kdb_search")).scalar_one() == 0
    assert session.execute(sqlalchemy.text("SELECT count(*) FROM article")).scalar_one() == 1
    session.rollback()
    assert (indexed(address), articles(address)) == ({}, set())


def test_bad_record_is_refused_when_it_is_queued(search: SearchEngine, session: Session) -> None:
    batch = search.for_session(session)
    bad: Any = [("Article", "1", "fine"), ("Article", "2", None)]
    with pytest.raises(RecordError, match="'Article'/'2' cannot be indexed"):
        batch.index_records_batch(bad)
    assert len(batch) == 0


def test_session_has_one_batch_for_each_engine(
    search: SearchEngine, engine: sqlalchemy.Engine, session: Session, address: DatabaseAddress
) -> None:
    batch = search.for_session(session)
    assert isinstance(batch, SessionBatch)
    assert search.for_session(session) is batch
    with SearchEngine(engine, Hashes()) as other:
        assert other.for_session(session) is not batch
        search.for_session(session).index_record("Article", "1", "text")
        other.for_session(session).index_record("Article", "2", "text")
        session.commit()
    assert set(indexed(address)) == {"1", "2"}


def test_scoped_session_is_the_one_of_this_thread(
    search: SearchEngine, engine: sqlalchemy.Engine, address: DatabaseAddress
) -> None:
    scoped = scoped_session(sessionmaker(engine))
    search.for_session(scoped).index_record("Article", "1", "text")
    with Session(engine) as unrelated:
        unrelated.commit()
    assert indexed(address) == {}
    scoped.commit()
    assert set(indexed(address)) == {"1"}
    scoped.remove()


def test_session_on_a_connection_follows_the_transaction_around_it(
    search: SearchEngine, engine: sqlalchemy.Engine, address: DatabaseAddress
) -> None:
    with engine.connect() as connection, connection.begin() as outer:
        with Session(connection, join_transaction_mode="rollback_only") as session:
            search.for_session(session).index_record("Article", "1", "text")
            session.commit()
            assert session.execute(sqlalchemy.text("SELECT count(*) FROM kdb_search")).scalar_one() == 1
        outer.rollback()
    assert indexed(address) == {}


def test_writing_waits_for_nobody_while_the_session_holds_the_lock(
    search: SearchEngine, session: Session, address: DatabaseAddress
) -> None:
    session.add(Article(id="1", title="first"))
    session.flush()  # SQLite's only write lock is the session's now
    search.for_session(session).index_record("Article", "1", "text")
    session.commit()
    assert set(indexed(address)) == {"1"}


def test_settings_of_the_sessions_transaction_stay(database: DatabaseAddress) -> None:
    engine = sqlalchemy.create_engine(sqlalchemy_url(database))
    names = ("enable_hashjoin", "enable_mergejoin", "lock_timeout", "idle_in_transaction_session_timeout")
    seen: list[list[str]] = []
    with SearchEngine(engine, Hashes()) as search, Session(engine) as session:
        batch = search.for_session(session)

        @event.listens_for(session, "before_commit")
        def look(session: Session) -> None:
            seen.append([session.execute(sqlalchemy.text(f"SHOW {name}")).scalar_one() for name in names])

        session.execute(sqlalchemy.text("SET LOCAL enable_hashjoin = off"))
        batch.index_record("Article", "1", "text")
        session.commit()
    assert seen == [["off", "on", "0", "0"]]
    engine.dispose()


def test_sqlalchemys_recipe_for_savepoints_of_sqlite_works_too(tmp_path: Path) -> None:
    address = DatabaseAddress("sqlite", str(tmp_path / "index.db"), "")
    engine = sqlalchemy.create_engine(sqlalchemy_url(address))

    @event.listens_for(engine, "connect")
    def let_us_begin(connection: Any, record: Any) -> None:
        connection.isolation_level = None

    @event.listens_for(engine, "begin")
    def begin(connection: sqlalchemy.Connection) -> None:
        connection.exec_driver_sql("BEGIN")

    Base.metadata.create_all(engine)
    with SearchEngine(engine, Hashes()) as search, Session(engine) as session:
        batch = search.for_session(session)
        session.add(Article(id="1", title="first"))
        batch.index_record("Article", "1", "text")
        with pytest.raises(Stop), session.begin_nested():
            session.add(Article(id="2", title="second"))
            batch.index_record("Article", "2", "text")
            session.flush()
            raise Stop
        session.commit()
        batch.index_record("Article", "3", "text")
        session.rollback()
    assert (set(indexed(address)), articles(address)) == ({"1"}, {"1"})
    engine.dispose()


def test_session_in_memory_shares_the_engines_connection() -> None:
    engine = sqlalchemy.create_engine("sqlite://", poolclass=StaticPool)
    Base.metadata.create_all(engine)
    with SearchEngine(engine, Hashes()) as search, Session(engine) as session:
        batch = search.for_session(session)
        session.add(Article(id="1", title="first"))
        batch.index_record("Article", "1", "text")
        session.commit()
        batch.index_record("Article", "2", "text")
        session.rollback()
        assert [result.id for result in search.search("text")] == ["1"]
    engine.dispose()


# -- sessions that cannot be used --------------------------------------------------------------------------


def test_other_things_than_sessions_are_refused(search: SearchEngine, engine: sqlalchemy.Engine) -> None:
    for thing in (None, engine, sessionmaker(engine)):
        with pytest.raises(UsageError, match="expected an SQLAlchemy Session"):
            search.for_session(thing)


def test_session_in_autocommit_mode_is_refused(database: DatabaseAddress) -> None:
    engine = sqlalchemy.create_engine(sqlalchemy_url(database), isolation_level="AUTOCOMMIT")
    with SearchEngine(engine, Hashes()) as search, Session(engine) as session:
        search.for_session(session).index_record("Article", "1", "text")
        with pytest.raises(UsageError, match="autocommit"):
            session.commit()
    assert indexed(database) == {}
    engine.dispose()


def test_session_of_another_database_is_refused(search: SearchEngine, address: DatabaseAddress, tmp_path: Path) -> None:
    other = sqlalchemy.create_engine(f"sqlite:///{tmp_path}/other.db")
    memory = sqlalchemy.create_engine("sqlite://")
    for engine in (other, memory):
        with Session(engine) as session:
            search.for_session(session).index_record("Article", "1", "text")
            with pytest.raises(UsageError, match=r"another SQLite database|this engine is for postgresql"):
                session.commit()
        engine.dispose()
    assert indexed(address) == {}


def test_session_of_another_server_is_refused(database: DatabaseAddress, tmp_path: Path) -> None:
    engine = sqlalchemy.create_engine(sqlalchemy_url(database))
    with SearchEngine(f"sqlite:///{tmp_path}/index.db", Hashes()) as search, Session(engine) as session:
        search.for_session(session).index_record("Article", "1", "text")
        with pytest.raises(UsageError, match="this engine is for sqlite"):
            session.commit()
    engine.dispose()
