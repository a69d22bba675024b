"""What stands before a text when it is embedded: the table of models, the fingerprint, the text itself."""

from __future__ import annotations

import contextlib
import io
import sqlite3
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdb_fast.cli.report import print_receipt
from kdb_fast.db.address import DatabaseAddress
from kdb_fast.embedding.chunking import chunked_fingerprint
from kdb_fast.embedding.encoder import PROBE, Encoder, EncoderSpec, Matrix
from kdb_fast.embedding.models.catalogue import catalogue
from kdb_fast.embedding.models.lookup import Model
from kdb_fast.embedding.prefixes import ASKED_FOR, NOT_ASKED_FOR, Prefixes, prefixes_of
from kdb_fast.embedding.providers.base import EmbeddingProvider
from kdb_fast.embedding.providers.prefixed import PrefixedProvider
from kdb_fast.errors import ModelError, UsageError
from kdb_fast.indexing.reindex import reindex
from kdb_fast.indexing.run_embedding import Embedding
from kdb_fast.origins import Maker, Origin, prefixed, same_model
from kdb_fast.receipt import Receipt
from kdb_fast.records import MAX_CONTENT_BYTES, was_cut
from kdb_fast.settings import ReindexOptions
from kdb_fast.sources import SourceSpec


class TestTable:
    def test_each_of_fastembeds_models_was_looked_at_and_no_other_is_named(self) -> None:
        names = {entry.name for entry in catalogue().values()}
        assert names == ASKED_FOR.keys() | NOT_ASKED_FOR
        assert not ASKED_FOR.keys() & NOT_ASKED_FOR

    def test_models_that_fastembed_says_need_prefixes_have_them(self) -> None:
        need = {entry.name for entry in catalogue().values() if "queries/documents: necessary" in entry.description}
        assert len(need) > 5
        assert need <= ASKED_FOR.keys()

    def test_each_has_a_source_and_at_least_one_prefix(self) -> None:
        for name, (document, query, source) in ASKED_FOR.items():
            assert source.startswith("https://huggingface.co/"), name
            assert document or query, name

    @pytest.mark.parametrize(
        ("name", "document", "query"),
        [
            ("intfloat/multilingual-e5-large", "passage: ", "query: "),
            ("NOMIC-AI/nomic-embed-text-v1.5", "search_document: ", "search_query: "),
            ("BAAI/bge-small-en-v1.5", "", "Represent this sentence for searching relevant passages: "),
        ],
    )
    def test_they_are_found_by_the_whole_name_in_any_case(self, name: str, document: str, query: str) -> None:
        assert prefixes_of(name)[:2] == (document, query)

    @pytest.mark.parametrize("name", ["sentence-transformers/all-MiniLM-L6-v2", "e5", "text-embedding-3-small", ""])
    def test_others_have_none(self, name: str) -> None:
        assert prefixes_of(name) == Prefixes("", "", "")


class TestFingerprint:
    def test_without_a_prefix_it_is_the_models_own(self, minilm: Model) -> None:
        assert EncoderSpec(minilm, 100).fingerprint() == minilm.fingerprint() == prefixed(minilm.fingerprint(), "")

    def test_each_prefix_has_its_own_and_all_can_be_compared_with_one_query(self, minilm: Model) -> None:
        spec = EncoderSpec(minilm, 100)
        found = [replace(spec, prefix=prefix).fingerprint() for prefix in ("", "passage: ", "passage:", "\n")]
        found += [replace(spec, prefix="passage: ").fingerprint("bf16")]
        assert len(set(found)) == 5
        assert all(same_model(one, found[0]) for one in found)
        maker = Maker(minilm.fingerprint(), minilm.name, 384)
        assert all(maker.has_made(Origin(one, minilm.name, 384)) for one in found)

    def test_the_longest_fits_its_column(self) -> None:
        int8 = prefixed("f" * 16, "passage: ") + "-int8-" + "f" * 16 + "-bf16"
        assert len(chunked_fingerprint(int8, 8192, 4000)) <= 64


class TestEncoder:
    TEXTS = ("a cat sat on the mat", "Überraschung: naïve café", "long " * 2000)

    def test_a_text_is_read_with_its_prefix_and_counted_with_it(self, minilm: Model, encoder: Encoder) -> None:
        spec = EncoderSpec(minilm, 100, prefix="search_document: ")
        vectors, expected = np.empty((3, 384), np.float32), np.empty((3, 384), np.float32)
        tally = Encoder(spec).encode(self.TEXTS, vectors)
        whole = encoder.encode(["search_document: " + text for text in self.TEXTS], expected)
        assert tally == whole._replace(lost_chars=tally.lost_chars)
        assert 0 <= whole.lost_chars - tally.lost_chars < len("search_document: ")
        assert np.abs(vectors - expected).max() < 1e-6
        assert tally.truncated == 1
        assert tally.tokens > encoder.encode(self.TEXTS, expected).tokens

    def test_a_lower_precision_is_calibrated_on_texts_with_their_prefix(self, minilm: Model, encoder: Encoder) -> None:
        found = Encoder(EncoderSpec(minilm, 100, prefix="passage: ")).token_ids(self.TEXTS)
        assert found == encoder.token_ids(["passage: " + text for text in self.TEXTS])

    def test_a_text_that_was_cut_before_is_not_counted_again(self, minilm: Model) -> None:
        text = "word " * (MAX_CONTENT_BYTES // 5)
        assert was_cut(text)
        tally = Encoder(EncoderSpec(minilm, 100, prefix="passage: ")).encode([text], np.empty((1, 384), np.float32))
        assert tally.truncated == 0

    def test_a_prefix_that_leaves_no_room_is_refused(self, minilm: Model) -> None:
        with pytest.raises(ModelError, match="nothing is left of a text"):
            Encoder(EncoderSpec(minilm, 100, prefix="word " * 600))


class Recorder(EmbeddingProvider):
    """Remembers what it was given."""

    dimensions, model_name, max_tokens, max_batch, concurrent_calls = 2, "own", 77, 5, 3

    def __init__(self) -> None:
        self.given: list[str] = []

    def embed(self, text: str) -> list[float]:
        return self.embed_batch([text])[0]

    def embed_batch(self, texts: list[str]) -> list[list[float]]:
        self.given += texts
        return [[1.0, 2.0] for _ in texts]


class TestProvider:
    def test_it_is_given_every_text_with_the_prefix(self) -> None:
        inner = Recorder()
        made = PrefixedProvider(inner, "passage: ")
        made.embed("a")
        made.embed_batch(["b", "c"])
        out: Matrix = np.empty((6, 2), np.float32)
        made.embed_into(["d"] * 6, out)
        assert inner.given == ["passage: a", "passage: b", "passage: c", *["passage: d"] * 6]
        assert (out == [1, 2]).all()

    def test_all_else_is_the_providers_own(self) -> None:
        inner = Recorder()
        made = PrefixedProvider(inner, "passage: ")
        for name in ("dimensions", "model_name", "max_tokens", "max_batch", "concurrent_calls", "read_chars"):
            assert getattr(made, name) == getattr(inner, name), name
        assert made.named_class is Recorder
        assert made.fingerprint() == prefixed(inner.fingerprint(), "passage: ")
        assert Maker(*inner.maker()).has_made(Origin(made.fingerprint(), "own", 2))

    def test_an_object_that_derives_from_nothing_may_be_one(self) -> None:
        class Plain:
            dimensions, model_name = 1, "plain"

            def embed(self, text: str) -> list[float]:
                return [float(len(text))]

            def embed_batch(self, texts: Sequence[str]) -> list[list[float]]:
                return [self.embed(text) for text in texts]

        assert PrefixedProvider(Plain(), "12").embed("345") == [5.0]

    def test_a_text_that_was_cut_is_still_known_as_one(self) -> None:
        inner = Recorder()
        PrefixedProvider(inner, "passage: ").embed_into(["x" * MAX_CONTENT_BYTES], np.empty((1, 2), np.float32))
        assert was_cut(inner.given[0])
        assert inner.given[0].startswith("passage: x")


def shown(receipt: Receipt) -> str:
    """The summary of a run."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        print_receipt(receipt, "db")
    return output.getvalue()


def contents(address: DatabaseAddress) -> list[str]:
    """Texts of the index."""
    with contextlib.closing(sqlite3.connect(address.conninfo)) as connection:
        return [text for (text,) in connection.execute("SELECT content FROM kdb_search ORDER BY 1")]


class TestRun:
    def test_the_model_reads_it_and_the_index_does_not_hold_it(
        self, sqlite_database: DatabaseAddress, tmp_path: Path
    ) -> None:
        (tmp_path / "notes.jsonl").write_text('{"id": "1", "x": "one"}\n{"id": "2", "x": "two"}\n')
        sqlite3.connect(sqlite_database.conninfo).close()
        source = SourceSpec(from_file=str(tmp_path / "notes.jsonl"), entity="Note")

        def run(prefix: str) -> tuple[list[str], Receipt]:
            provider = Recorder()
            options = ReindexOptions(provider="openai", document_prefix=prefix)
            receipt = reindex(sqlite_database, source, options, embedding=Embedding.of_provider(provider))
            return [text for text in provider.given if text != PROBE], receipt

        given, receipt = run("passage: ")
        assert sorted(given) == ["passage: x: one", "passage: x: two"]
        assert receipt.document_prefix == "passage: "
        assert "'passage: ' before each text" in shown(receipt)
        assert contents(sqlite_database) == ["x: one", "x: two"]
        assert run("passage: ")[1].unchanged == 2
        given, receipt = run("")
        assert sorted(given) == ["x: one", "x: two"]
        assert receipt.fingerprint == Recorder().fingerprint()
        assert run("")[1].unchanged == 2
        assert "before each text" not in shown(receipt)

    def test_it_holds_for_a_model_and_for_a_provider(self, minilm: Model) -> None:
        model = Embedding.of_model(EncoderSpec(minilm, 100))
        provider = Embedding.of_provider(Recorder())
        for plain in (model, provider):
            made = plain.with_prefix("passage: ")
            assert made.fingerprint == prefixed(plain.fingerprint, "passage: ")
            assert (made.name, made.dimensions, made.read_chars) == (plain.name, plain.dimensions, plain.read_chars)
            assert plain.with_prefix("") is plain
        spec = model.with_prefix("passage: ").spec
        assert spec is not None
        assert spec.prefix == "passage: "

    def test_pieces_leave_room_for_it(self, minilm: Model) -> None:
        plain = Embedding.of_model(EncoderSpec(minilm, 100))
        text = "one two three four five six seven eight nine ten. " * 20
        pieces = []
        for made in (plain, plain.with_prefix("search_document: ")):
            split = made.in_pieces(36, 0).split
            assert split is not None
            pieces.append(split(text))
        assert len(pieces[1]) > len(pieces[0])

    @pytest.mark.parametrize(("prefix", "fault"), [("a\0b", "NUL"), ("\udcff", "surrogate")])
    def test_a_prefix_that_no_model_can_read_is_refused(self, prefix: str, fault: str) -> None:
        with pytest.raises(UsageError, match=fault):
            ReindexOptions(document_prefix=prefix)

    @pytest.mark.parametrize("prefix", ["", "passage: ", "Instruct: find\nQuery:", "为这个句子："])
    def test_any_text_is_one(self, prefix: str) -> None:
        options: Any = ReindexOptions(document_prefix=prefix)
        assert options.document_prefix == prefix
