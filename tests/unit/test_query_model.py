"""Which model embeds a query: that of the index, or one whose vectors can be compared with it."""

from __future__ import annotations

import sqlite3
from typing import Any

import numpy as np
import pytest

from kdb_fast.embedding.encoder import EncoderSpec
from kdb_fast.embedding.models.lookup import Model
from kdb_fast.embedding.providers.openai.provider import openai_fingerprint
from kdb_fast.errors import ModelError, SchemaError
from kdb_fast.origins import IndexModel, Maker, Origin
from kdb_fast.search import query_model
from kdb_fast.search.query_model import embed_query, query_vectors
from kdb_fast.settings import DEFAULT_MODEL
from kdb_fast.stores.past_runs import index_model
from kdb_fast.stores.sqlite import migrate
from kdb_fast.tables import kdb_search
from kdb_fast.tables.migrations import MIGRATIONS
from kdb_fast.tables.target import Target

ADDRESS = "http://127.0.0.1:1/v1"
SMALL = "text-embedding-3-small"
LOCAL = openai_fingerprint("nomic-embed", 8, ADDRESS)


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None]]:
    """Collects (provider, model) instead of asking OpenAI."""
    asked: list[tuple[str, str | None]] = []

    def ask(query: str, made: Any, name: str | None) -> Any:
        asked.append(("openai", name))
        return np.ones(8, np.float32), Maker("x", name or "", 8)

    monkeypatch.setattr(query_model, "_by_openai", ask)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    return asked


@pytest.mark.parametrize(
    ("made", "given", "address", "expected"),
    [
        (IndexModel(SMALL, 384, "x"), {}, None, SMALL),
        (IndexModel(SMALL, 384, None), {"provider": "openai"}, None, SMALL),
        (IndexModel(SMALL, 384, None), {"model": "text-embedding-3-large"}, None, "text-embedding-3-large"),
        (IndexModel("nomic-embed", 8, LOCAL), {}, ADDRESS + "/", "nomic-embed"),
        (IndexModel("nomic-embed", 8, LOCAL), {"provider": "openai"}, ADDRESS, "nomic-embed"),
        (IndexModel(DEFAULT_MODEL, 384, "x"), {"provider": "openai"}, None, None),
        (None, {"provider": "openai"}, None, None),
        (None, {"provider": "openai", "model": "m"}, None, "m"),
    ],
)  # fmt: skip
def test_openai_is_asked_for_its_models(
    monkeypatch: pytest.MonkeyPatch, asked: list[Any], made: Any, given: Any, address: str | None, expected: str | None
) -> None:
    if address:
        monkeypatch.setenv("OPENAI_BASE_URL", address)
    embed_query("words", made, **given)
    assert asked == [("openai", expected)]


@pytest.mark.parametrize(
    "made",
    [
        None,
        IndexModel(None, None, None),
        IndexModel(None, 384, None),
        IndexModel(DEFAULT_MODEL, 384, None),
        IndexModel("all-minilm-l6-V2", 384, None),
    ],
)
def test_default_model_serves_an_index_that_it_may_have_made(minilm: Model, asked: list[Any], made: Any) -> None:
    vector, maker = embed_query("words", made)
    assert (vector.shape, vector.dtype, asked) == ((384,), np.dtype(np.float32), [])
    assert maker == Maker(minilm.fingerprint(), minilm.name, 384)


def test_fingerprint_of_any_precision_is_the_models_and_that_of_other_files_is_not(minilm: Model) -> None:
    mine = [Origin(EncoderSpec(minilm, 1).fingerprint(p), minilm.name, 384) for p in ("fp32", "int8", "bf16")]
    named = [
        Origin(None, minilm.name, 384),
        Origin(None, "all-minilm-l6-V2", None),
        Origin("name:0123", minilm.name, 384),
    ]
    other = Origin("of other files", minilm.name, 384)
    origins = dict.fromkeys([*mine, *named, other], 1)
    (vector,), why = query_vectors("words", origins)
    assert vector.maker == Maker(minilm.fingerprint(), minilm.name, 384)
    assert [why(origin) for origin in [*mine, *named]] == [""] * 6
    assert why(other).startswith("of other files")
    assert query_vectors("words", {other: 1})[0] == []


def test_what_nobody_names_is_compared_with_nothing(minilm: Model) -> None:
    unnamed = Origin(None, None, 384)
    for options in ({}, {"model": minilm.name}, {"provider": "fastembed"}):
        vectors, why = query_vectors("words", {unnamed: 3}, **options)  # type: ignore[arg-type]
        assert vectors == []
        assert "nothing tells which" in why(unnamed)


def test_each_model_of_an_index_embeds_the_query_once(minilm: Model, asked: list[Any]) -> None:
    small, local = Origin("x", SMALL, 8), Origin(minilm.fingerprint(), minilm.name, 384)
    vectors, why = query_vectors("words", {small: 1, small._replace(fingerprint=None): 2, local: 3})
    assert [vector.maker.model for vector in vectors if vector.maker] == [minilm.name, SMALL]
    assert asked == [("openai", SMALL)]
    assert why(small) == why(local) == ""


def test_model_that_is_not_to_be_had_leaves_its_rows_out(minilm: Model) -> None:
    gone, there = Origin("f", "some/other", 384), Origin(minilm.fingerprint(), minilm.name, 384)
    vectors, why = query_vectors("words", {gone: 9, there: 1})
    assert [vector.maker and vector.maker.model for vector in vectors] == [minilm.name]
    assert why(there) == ""
    assert "some/other" in why(gone)
    with pytest.raises(ModelError, match="some/other"):
        query_vectors("words", {gone: 9})


def test_one_model_that_is_asked_for_leaves_the_others_out(minilm: Model, asked: list[Any]) -> None:
    small, local = Origin("x", SMALL, 8), Origin(minilm.fingerprint(), minilm.name, 384)
    given: list[dict[str, Any]] = [{"model": minilm.name}, {"provider": "fastembed"}]
    for options in given:
        vectors, why = query_vectors("words", {small: 5, local: 1}, **options)
        assert [vector.maker and vector.maker.model for vector in vectors] == [minilm.name]
        assert (why(local), why(small), asked) == ("", "another one was asked for.", [])
    with pytest.raises(SchemaError, match="vectors of the model"):
        query_vectors("words", {Origin("x", "some/other", 384): 1}, model=minilm.name)


@pytest.mark.parametrize(
    ("made", "given", "message"),
    [
        (IndexModel("some/other", 384, None), {"model": DEFAULT_MODEL}, "vectors of the model some/other, not of"),
        (IndexModel(DEFAULT_MODEL, 8, None), {}, "vectors of 8 dimensions, made by .*; .* gives 384"),
        (IndexModel(None, 8, None), {}, "made by an unknown model"),
        (IndexModel(SMALL, 384, None), {"provider": "fastembed"}, "not of sentence-transformers"),
    ],
)
def test_vectors_of_two_models_are_not_compared(minilm: Model, made: Any, given: Any, message: str) -> None:
    with pytest.raises(SchemaError, match=message) as caught:
        embed_query("words", made, **given)
    assert f"kdb-fast reindex --model {DEFAULT_MODEL}" in caught.value.remedy


def test_newest_run_that_wrote_tells_the_model_else_a_row() -> None:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    with pytest.raises(SchemaError, match="There is no search index"):
        index_model(connection, "sqlite")
    connection.execute(Target().text(kdb_search.SQLITE_SEARCH))
    assert index_model(connection, "sqlite") is None
    row = "INSERT INTO kdb_search (id, entity_name, record_id, content, embedding, model, dimensions) VALUES "
    connection.execute(row + "('1', 'E', '1', 'text', NULL, NULL, NULL)")
    assert index_model(connection, "sqlite") is None
    connection.execute(row + "('2', 'E', '2', 'text', '[1]', 'of a row', 1)")
    assert index_model(connection, "sqlite") == IndexModel("of a row", 1, None)
    for name, kind in kdb_search.SQLITE_COLUMNS.items():
        connection.execute(f"ALTER TABLE kdb_search ADD COLUMN {name} {kind}")
    for migration in MIGRATIONS:
        migrate.apply(connection, migration)
    connection.execute("UPDATE kdb_search SET kdb_fast_fingerprint = 'f'")
    assert index_model(connection, "sqlite") == IndexModel("of a row", 1, "f")
    columns = "state, fingerprint, model, dimensions, host, pid, process_started, last_flush"
    run = f"INSERT INTO kdb_fast_runs ({columns}) VALUES"
    connection.execute(f"{run} ('done', 'g', 'of a run', 2, 'h', 1, 0, 3)")
    connection.execute(f"{run} ('failed', 'h', 'wrote nothing', 3, 'h', 1, 0, 0)")
    assert index_model(connection, "sqlite") == IndexModel("of a run", 2, "g")
    connection.execute("DELETE FROM kdb_search")
    assert index_model(connection, "sqlite") is None
    connection.close()
