"""A table of vectors in which a text has a row for each piece, on both databases: a record is there whole or not."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from articles import Articles, ArticleSource
from column_writer import DIMENSIONS, begun, vector_of
from servers import Oracle, Vector, cosine, execute

from kdb_fast.db.address import DatabaseAddress
from kdb_fast.embedding.chunking import Splitter
from kdb_fast.embedding.models.files import Model
from kdb_fast.errors import SchemaError, UsageError
from kdb_fast.indexing.reindex import reindex
from kdb_fast.indexing.tables import reindex_table
from kdb_fast.ipc.row_block import NO_VALUE
from kdb_fast.ipc.slab import Row, Slab, SlabShape
from kdb_fast.receipt import Receipt
from kdb_fast.records import Record, Reject, content_hash
from kdb_fast.settings import ReindexOptions
from kdb_fast.stores import open_store, targets
from kdb_fast.stores.base import FlushResult, FlushSlot, RunSpec, Store
from kdb_fast.tables.pieces import PieceOf, piece_key
from kdb_fast.tables.table_target import TableTarget

_numbers = itertools.count(10)


@pytest.fixture
def articles(index: DatabaseAddress) -> Articles:
    return Articles(index)


def target_of(articles: Articles, **options: Any) -> TableTarget:
    return articles.into(chunked=True, **options)


class Stored(NamedTuple):
    """A row of the table."""

    start: int
    end: int
    of: int
    content: str
    text_hash: bytes
    vector: Vector


def stored(articles: Articles) -> dict[int, list[Stored]]:
    """The pieces of each article, which are numbered without a gap."""
    vectors = articles.vectors_beside("article_vectors", "CAST(id AS text) || '/' || chunk")
    columns = "start_char, end_char, kdb_fast_chunks, content, kdb_fast_hash"
    found: dict[int, list[Stored]] = {}
    for number, chunk, *rest in execute(
        articles.address, f"SELECT id, chunk, {columns} FROM article_vectors ORDER BY id, chunk"
    ):
        pieces = found.setdefault(number, [])
        assert chunk == len(pieces)
        start, end, count, content, text_hash = rest
        pieces.append(Stored(start, end, count, content, bytes(text_hash), vectors[f"{number}/{chunk}"]))
    return found


def aside(articles: Articles) -> int:
    """Pieces that wait for the others of their record."""
    return int(execute(articles.address, "SELECT count(*) FROM kdb_fast_articles_pieces")[0][0])


# -- flushes -----------------------------------------------------------------------------------------------


class Writer(NamedTuple):
    """A store in a run, and pieces of texts for it."""

    articles: Articles
    store: Store
    run: RunSpec

    def piece(self, number: int, text: str, piece: int, revision: int) -> Row:
        """A word of an article's text."""
        words = text.split(" ")
        start = len(" ".join(words[:piece])) + (piece > 0)
        place = PieceOf(revision, piece, len(words), start, start + len(words[piece]), content_hash(text))
        return Row(Record(piece_key(self.articles.key(number), place), words[piece]))

    def flush(self, *rows: Row, number: int | None = None, deletes: Sequence[int] = ()) -> FlushResult:
        slot = Slab.local(SlabShape(1, max(1, len(rows)), DIMENSIONS)).slots[0]
        slot.put(1, rows, [NO_VALUE] * len(rows))
        for i, row in enumerate(rows):
            slot.vectors[i] = vector_of(row.record.content)
        slots = [FlushSlot(slot, frozenset())] if rows else []
        number = next(_numbers) if number is None else number
        return self.store.flush(self.run, number, slots, [], [self.articles.key(n) for n in deletes])

    def put(self, number: int, text: str, revision: int) -> FlushResult:
        """All pieces of an article in one flush."""
        pieces = range(len(text.split(" ")))
        return self.flush(*(self.piece(number, text, piece, revision) for piece in pieces))

    def texts(self) -> dict[int, str]:
        """What the table has, of each article."""
        found = stored(self.articles)
        for pieces in found.values():
            for piece in pieces:
                assert piece.of == len(pieces)
                np.testing.assert_allclose(piece.vector, vector_of(piece.content), rtol=1e-5)
        return {number: " ".join(piece.content for piece in pieces) for number, pieces in found.items()}

    def known(self, *numbers: int) -> list[str | None]:
        keys = [self.articles.key(number) for number in numbers]
        found = self.store.lookup(keys)
        return [found[key].fingerprint if key in found else "none" for key in keys]


@pytest.fixture
def writer(articles: Articles) -> Iterator[Writer]:
    articles.add("one", "two", "three")
    with begun(articles.address, target_of(articles)) as (store, run):
        yield Writer(articles, store, run)


def test_record_appears_with_its_last_piece_and_whole(writer: Writer) -> None:
    text = "one two three"
    assert writer.flush(writer.piece(0, text, 2, 1), writer.piece(1, "short", 0, 2)).rows == 2
    assert writer.texts() == {1: "short"}
    assert writer.flush(writer.piece(0, text, 0, 1)).rows == 1
    assert (writer.texts(), writer.known(0, 1)) == ({1: "short"}, ["none", "f"])
    assert aside(writer.articles) == 2
    assert writer.flush(writer.piece(0, text, 1, 1)).rows == 1
    assert writer.texts() == {0: text, 1: "short"}
    assert (writer.known(0, 1), aside(writer.articles)) == (["f", "f"], 0)
    found = stored(writer.articles)[0]
    assert [text[piece.start : piece.end] for piece in found] == ["one", "two", "three"]
    assert {piece.text_hash for piece in found} == {content_hash(text)}
    assert writer.store.lookup([writer.articles.key(0)])[writer.articles.key(0)].content_hash == content_hash(text)


def test_changed_record_keeps_its_rows_until_all_of_the_new_are_there(writer: Writer) -> None:
    writer.put(0, "the first text", 1)
    longer, shorter = "a longer text of six words", "short now"
    writer.flush(*(writer.piece(0, longer, piece, 2) for piece in range(5)))
    assert writer.texts() == {0: "the first text"}
    writer.flush(writer.piece(0, longer, 5, 2), writer.piece(0, shorter, 0, 3))
    assert writer.texts() == {0: longer}
    writer.flush(writer.piece(0, shorter, 1, 3))
    assert writer.texts() == {0: shorter}
    assert aside(writer.articles) == 0


def test_record_that_was_deleted_meanwhile_is_superseded(writer: Writer) -> None:
    writer.flush(writer.piece(0, "one two", 0, 1))
    writer.articles.delete(0)
    result = writer.flush(writer.piece(0, "one two", 1, 1), writer.piece(1, "there", 0, 2))
    assert (result.rows, result.superseded, result.rejected) == (1, ((0, 0),), ())
    assert (writer.texts(), aside(writer.articles)) == ({1: "there"}, 0)


def test_bad_piece_rejects_its_record_and_no_other(writer: Writer) -> None:
    execute(writer.articles.address, "ALTER TABLE article_vectors ADD COLUMN note text")
    if writer.articles.postgresql:
        execute(writer.articles.address, "ALTER TABLE article_vectors ADD CHECK (content <> 'bad')")
    else:
        body = "SELECT RAISE(ABORT, 'no bad piece') WHERE NEW.content = 'bad'"
        execute(
            writer.articles.address,
            f"CREATE TRIGGER refuse BEFORE INSERT ON article_vectors BEGIN {body}; END",
        )
    writer.put(0, "as it was", 1)
    rows = [writer.piece(1, "fine here", 0, 3), *(writer.piece(0, "one bad piece", n, 2) for n in range(3))]
    result = writer.flush(*rows, writer.piece(1, "fine here", 1, 3))
    assert len({row for _, row, _, _ in result.rejected}) == 1
    assert result.rejected[0][1] in (1, 2, 3)
    assert writer.texts() == {0: "as it was", 1: "fine here"}
    rejects = list(writer.store.rejects())
    assert [reject.content_hash for reject in rejects] == [content_hash("one bad piece").hex()]
    writer.store.finish_index(lambda what: None)
    assert aside(writer.articles) == 0
    writer.put(0, "a good text", 4)
    assert writer.texts() == {0: "a good text", 1: "fine here"}


def test_record_that_is_stored_is_no_longer_rejected(articles: Articles) -> None:
    articles.add("one", "two")
    wrong = [Reject(articles.key(n), "why", "so it is", content_hash("one two")) for n in range(2)]
    for number in range(2):
        with begun(articles.address, target_of(articles)) as (store, run):
            writer = Writer(articles, store, run)
            if not number:
                store.flush(run, next(_numbers), [], wrong, [])
                assert len(list(store.rejects())) == 2
            else:
                writer.flush(writer.piece(0, "one two", 0, 1), writer.piece(1, "one", 0, 2))
                writer.flush(writer.piece(0, "one two", 1, 1))
                assert list(store.rejects()) == []
            store.end_run(run.number, "done", {})


def test_record_that_a_trigger_leaves_out_is_rejected(writer: Writer) -> None:
    articles = writer.articles
    if articles.postgresql:
        body = "BEGIN IF NEW.content = 'bad' THEN RETURN NULL; END IF; RETURN NEW; END"
        execute(articles.address, f"CREATE FUNCTION meddle() RETURNS trigger LANGUAGE plpgsql AS $$ {body} $$")
        execute(
            articles.address,
            "CREATE TRIGGER meddle BEFORE INSERT ON article_vectors FOR EACH ROW EXECUTE FUNCTION meddle()",
        )
    else:
        body = "SELECT RAISE(IGNORE) WHERE NEW.content = 'bad'"
        execute(articles.address, f"CREATE TRIGGER meddle BEFORE INSERT ON article_vectors BEGIN {body}; END")
    writer.put(0, "as it was", 1)
    rows = [*(writer.piece(0, "one bad", n, 2) for n in range(2)), writer.piece(1, "fine", 0, 3)]
    result = writer.flush(*rows)
    assert result.rows + len(result.rejected) == 3
    assert {row for _, row, _, _ in result.rejected} <= {0, 1}
    assert result.rejected
    assert writer.texts() == {0: "as it was", 1: "fine"}


def test_record_is_not_known_where_a_piece_is_missing_or_was_changed(writer: Writer) -> None:
    for number in range(3):
        writer.put(number, "one two three", number + 1)
    assert writer.known(0, 1, 2) == ["f", "f", "f"]
    execute(writer.articles.address, "DELETE FROM article_vectors WHERE id = 0 AND chunk = 2")
    value: Any = vector_of("theirs")
    value = value.tobytes() if not writer.articles.postgresql else str(value.tolist())
    execute(writer.articles.address, "UPDATE article_vectors SET embedding = %s WHERE id = 1 AND chunk = 1", value)
    assert writer.known(0, 1, 2) == [None, None, "f"]


def test_deleted_record_may_come_back_in_the_same_flush(writer: Writer) -> None:
    writer.put(0, "as it was", 1)
    result = writer.flush(writer.piece(0, "new", 0, 2), deletes=[0])
    assert result.deleted == 1
    assert writer.texts() == {0: "new"}
    assert writer.flush(deletes=[0]).deleted == 1
    assert writer.texts() == {}


def test_keyword_search_finds_the_pieces_that_are_there(articles: Articles) -> None:
    articles.add("one")
    keyword = "simple" if articles.postgresql else "unicode61"
    with begun(articles.address, target_of(articles, keyword=keyword)) as (store, run):
        writer = Writer(articles, store, run)
        writer.put(0, "a lamp stood here", 1)
        writer.flush(writer.piece(0, "an orbit elsewhere", 0, 2), writer.piece(0, "an orbit elsewhere", 2, 2))
        assert words(articles, "lamp") == [(1,)]
        writer.flush(writer.piece(0, "an orbit elsewhere", 1, 2))
        assert (words(articles, "lamp"), words(articles, "orbit"), words(articles, "elsewhere")) == ([], [(1,)], [(2,)])


def words(articles: Articles, word: str) -> list[tuple[Any, ...]]:
    """Numbers of the pieces that have a word."""
    if articles.postgresql:
        found = "SELECT chunk FROM article_vectors WHERE tsv @@ to_tsquery('simple', %s)"
    else:
        found = (
            "SELECT chunk FROM article_vectors WHERE kdb_fast_number IN "
            "(SELECT rowid FROM article_vectors_fts WHERE article_vectors_fts MATCH %s)"
        )
    return execute(articles.address, found, word)


def test_flush_is_written_once(writer: Writer) -> None:
    first = writer.flush(writer.piece(0, "one two", 0, 1), number=7777)
    assert writer.flush(writer.piece(0, "one two", 0, 1), number=7777) == first
    assert aside(writer.articles) == 1


def test_what_a_killed_run_left_is_cleared_by_the_next(articles: Articles) -> None:
    articles.add("one")
    for state in ("failed", "done"):
        with begun(articles.address, target_of(articles)) as (store, run):
            writer = Writer(articles, store, run)
            assert aside(articles) == 0
            writer.flush(writer.piece(0, "one two", 0, 1))
            store.end_run(run.number, state, {})
    assert aside(articles) == 1


def test_table_that_was_made_anew_gets_a_place_for_its_pieces(articles: Articles) -> None:
    articles.add("one")
    for dimensions, vector in ((DIMENSIONS, "embedding"), (DIMENSIONS + 1, "embedding"), (DIMENSIONS, "other")):
        execute(articles.address, "DROP TABLE IF EXISTS article_vectors")
        with contextlib.closing(
            open_store(articles.address, "test", target=target_of(articles, vector=vector))
        ) as store:
            store.prepare(dimensions)
            run = store.begin_run(fingerprint="f", model="m", dimensions=dimensions, wait=0)
            slot = Slab.local(SlabShape(1, 1, dimensions)).slots[0]
            for piece in range(2):
                slot.put(1, [Writer(articles, store, run).piece(0, "one two", piece, 1)], [NO_VALUE])
                slot.vectors[:] = 1.0
                assert store.flush(run, next(_numbers), [FlushSlot(slot, frozenset())], [], []).rejected == ()
            store.end_run(run.number, "done", {})
        assert execute(articles.address, "SELECT count(*) FROM article_vectors") == [(2,)]


# -- whole runs --------------------------------------------------------------------------------------------

SIZE, OVERLAP = 40, 6
PARTS = ("stored", "unchanged", "reused", "superseded", "rejected")
SENTENCES = ["The ship came in late.", "Nobody had waited for it.", "The quay was dark.", "Was it the fog?"]


def long_text(number: int, sentences: int) -> str:
    return " ".join(f"{SENTENCES[(number + n) % 4]} That was number {number} of {n}." for n in range(sentences))


def run_of(articles: Articles, size: int = SIZE, overlap: int = OVERLAP, **options: Any) -> Receipt:
    source = ArticleSource(articles.address, articles.target(), page_rows=16, complete=True)
    settings = ReindexOptions(chunk=size, overlap=overlap, **options)
    receipt = reindex(articles.address, source, settings, target=target_of(articles))
    assert receipt.read == sum(getattr(receipt, part) for part in PARTS)
    return receipt


def numbers(receipt: Receipt) -> dict[str, int]:
    return {part: getattr(receipt, part) for part in (*PARTS, "deleted", "empty", "chunks") if getattr(receipt, part)}


@pytest.fixture
def check(articles: Articles, minilm: Model, oracle: Oracle) -> Callable[[], int]:
    """Each article with a text has its pieces with their vectors, and nothing else is there; how many there are."""

    def look(size: int = SIZE, overlap: int = OVERLAP) -> int:
        splitter = Splitter.of_model(minilm, size, overlap)
        found = stored(articles)
        texts = {number: text for number, (text, _) in articles.rows().items() if text is not None and text.strip()}
        assert sorted(found) == sorted(texts)
        for number, text in texts.items():
            pieces = found[number]
            assert [(piece.start, piece.end) for piece in pieces] == splitter.split(text)
            for piece in pieces:
                assert (piece.of, piece.text_hash) == (len(pieces), content_hash(text))
                assert piece.content == text[piece.start : piece.end]
                assert cosine(piece.vector, oracle.vector(piece.content)) >= 0.99999
        assert aside(articles) == 0
        return sum(map(len, found.values()))

    return look


@pytest.mark.usefixtures("loaded_once")
def test_a_table_is_brought_up_to_date(articles: Articles, check: Callable[..., int]) -> None:
    articles.add(*(long_text(n, 1 + n) for n in range(12)), None)
    first = run_of(articles)
    pieces = check()
    assert pieces > 24
    assert numbers(first) == {"stored": 12, "empty": 1, "chunks": pieces}
    assert first.truncated == 0
    assert numbers(run_of(articles)) == {"unchanged": 12, "empty": 1}
    articles.set(3, long_text(3, 15))  # longer
    articles.set(9, long_text(9, 1))  # shorter
    articles.set(10, None)
    articles.set(12, long_text(12, 3))
    articles.delete(11)
    second = run_of(articles)
    assert (second.stored, second.unchanged, second.empty) == (3, 8, 1)
    assert second.chunks == sum(len(stored(articles)[number]) for number in (3, 9, 12))
    check()
    # Cut otherwise, all pieces are other ones.
    assert run_of(articles, 64, 0).stored == 11
    check(64, 0)


@pytest.mark.usefixtures("loaded_once")
def test_equal_pieces_are_embedded_once(articles: Articles, check: Callable[..., int]) -> None:
    text = long_text(1, 8)
    articles.add(text)
    alone = run_of(articles)
    articles.add(text, f"{text} {text}", first=1)
    second = run_of(articles, force=True)
    assert (second.stored, second.reused, second.chunks) == (2, 1, check())
    assert second.tokens < 2 * alone.tokens + SIZE


@pytest.mark.usefixtures("loaded_once")
def test_without_pieces_what_is_lost_is_told_with_the_option(articles: Articles) -> None:
    text = long_text(1, 60)
    articles.add(text, "short")
    source = ArticleSource(articles.address, articles.target(), page_rows=16, complete=True)
    receipt = reindex(articles.address, source, ReindexOptions(), target=articles.into())
    assert receipt.truncated == 1
    assert 0.1 * len(text) < receipt.lost_chars < 0.9 * len(text)
    (warning,) = receipt.warnings
    assert warning.startswith("1 record is longer than the model reads.")
    assert "--chunk 200" in warning
    source = ArticleSource(articles.address, articles.target(), page_rows=16, complete=True)
    assert reindex(articles.address, source, ReindexOptions(force=True), target=articles.target()).warnings == ()


@pytest.mark.usefixtures("loaded_once")
def test_file_in_which_a_key_comes_twice(index: DatabaseAddress, tmp_path: Path) -> None:
    if index.dialect == "postgresql":
        execute(index, "CREATE EXTENSION vector")
    file = tmp_path / "notes.jsonl"
    texts = [("a", long_text(1, 9)), ("b", "short"), ("a", long_text(2, 5)), ("c", long_text(1, 9))]
    file.write_text("".join(json.dumps({"id": key, "body": text}) + "\n" for key, text in texts))
    options: dict[str, Any] = {"key": ["id"], "text": ["body"], "into": "notes", "chunk": SIZE}
    receipt = reindex_table(index, from_file=file, **options)
    assert (receipt.read, receipt.superseded, receipt.stored + receipt.reused) == (4, 1, 3)
    found: dict[str, str] = {}
    for key, start, content in execute(index, "SELECT id, start_char, content FROM notes ORDER BY id, chunk"):
        found[key] = found.get(key, "").ljust(start) + content
    assert found == dict(texts)
    again = reindex_table(index, from_file=file, **options)
    assert (again.stored + again.reused, again.unchanged, again.superseded) == (0, 3, 1)


def test_table_of_sqlite_vec_has_no_pieces(sqlite_database: DatabaseAddress) -> None:
    with pytest.raises(SchemaError, match="texts in pieces have several"):
        target_of(Articles(sqlite_database, "id INTEGER PRIMARY KEY, body TEXT, embedding BLOB"), vec0=True)


@pytest.mark.usefixtures("loaded_once")
def test_kept_target_goes_on_in_pieces(articles: Articles, check: Callable[..., int]) -> None:
    articles.add(*(long_text(n, 6) for n in range(3)))
    table, address = articles.name, articles.address
    into = "public.article_vectors" if articles.postgresql else "article_vectors"
    options: dict[str, Any] = {"text": ["body"], "into": into, "name": "articles"}
    first = reindex_table(address, table, chunk=SIZE, overlap=OVERLAP, **options)
    assert numbers(first) == {"stored": 3, "chunks": check()}
    assert numbers(reindex_table(address, name="articles")) == {"unchanged": 3}
    status = targets.status_in(address, "articles")
    assert (status.rows, status.pieces) == (3, first.chunks)
    assert numbers(reindex_table(address, name="articles", filter="id <> 1")) == {"unchanged": 2, "deleted": 1}
    execute(address, f"UPDATE {table} SET body = NULL WHERE id = 2")
    assert numbers(reindex_table(address, name="articles")) == {"unchanged": 1, "deleted": 1, "empty": 1}
    execute(address, f"UPDATE {table} SET body = 'a' WHERE id = 2")
    reindex_table(address, name="articles", filter="")
    assert targets.status_in(address, "articles").rows == 3
    with pytest.raises(SchemaError, match="is a piece of a text; this run writes a whole text into each") as caught:
        reindex_table(address, name="articles", chunk=0)
    assert caught.value.remedy.startswith("Give --chunk.")
    execute(address, "DROP TABLE article_vectors")
    assert numbers(reindex_table(address, name="articles", chunk=0)) == {"stored": 3}
    with pytest.raises(SchemaError, match="is a whole text; this run writes a piece of a text into each"):
        reindex_table(address, name="articles", chunk=SIZE)


def test_what_cannot_be_cut_is_refused(articles: Articles, minilm: Model) -> None:
    articles.add("one")
    for options, message in (
        ({"chunk": 8}, "expected 32 tokens or more"),
        ({"chunk": 40, "overlap": 21}, "expected 0 to 20"),
        ({"overlap": 3}, "belongs to --chunk"),
        ({"chunk": 100, "provider": "openai"}, "needs a model on this machine"),
    ):
        with pytest.raises(UsageError, match=message):
            ReindexOptions(**options)
    source = ArticleSource(articles.address, articles.target())
    for settings, target in (
        (ReindexOptions(chunk=40), articles.into()),
        (ReindexOptions(chunk=40), articles.target()),
        (ReindexOptions(), target_of(articles)),
    ):
        with pytest.raises(UsageError, match="need a table of vectors with a row for each"):
            reindex(articles.address, source, settings, target=target)
    source.close()
    with pytest.raises(UsageError, match=f"reads at most {minilm.max_tokens} tokens"):
        run_of(articles, minilm.max_tokens + 1)
    with contextlib.suppress(Exception):
        assert execute(articles.address, "SELECT count(*) FROM article_vectors") == [(0,)]


def test_an_overlap_stays_while_it_fits(articles: Articles, minilm: Model) -> None:
    articles.add("one two three")

    def run(**options: Any) -> Receipt:
        return reindex_table(articles.address, name="pieces", model_path=minilm.path, limit=1, **options)

    def kept() -> tuple[int, int]:
        found = targets.find_in(articles.address, "pieces")[1]
        return found.chunk, found.overlap

    run(table=articles.name, text="body", into="pieces", chunk=200, overlap=20)
    run(chunk=80)
    assert kept() == (80, 20)
    with pytest.raises(UsageError, match=r"--overlap is 20; expected 0 to 16, half of --chunk 32\."):
        run(chunk=32)
    run(chunk=32, overlap=0)
    assert kept() == (32, 0)
