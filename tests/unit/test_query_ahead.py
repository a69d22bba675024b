"""A command embeds the query ahead by the model that has most likely made the index; else as if it had not tried."""

from __future__ import annotations

import shutil
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest

from kdb_fast.embedding import offline
from kdb_fast.embedding.models import lookup
from kdb_fast.embedding.models.lookup import Model
from kdb_fast.errors import ModelError, SchemaError
from kdb_fast.origins import IndexModel, Maker, Origin
from kdb_fast.search.ahead import QueryAhead
from kdb_fast.search.query_model import embed_query, query_vectors
from kdb_fast.settings import DEFAULT_MODEL

MINE = IndexModel(DEFAULT_MODEL, 384, None)
AHEAD = (np.ones(384, np.float32), Maker("f", DEFAULT_MODEL, 384))


@pytest.fixture(autouse=True)
def whole_fastembed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests of this process need FastEmbed as it is."""
    monkeypatch.setattr(offline, "import_fastembed", lambda: None)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


def known(made: IndexModel | None) -> Future[IndexModel | None]:
    likely: Future[IndexModel | None] = Future()
    likely.set_result(made)
    return likely


@pytest.mark.parametrize("made", [None, MINE, IndexModel("all-minilm-l6-V2", None, None), IndexModel(None, 384, None)])
def test_the_models_own_vector(minilm: Model, made: IndexModel | None) -> None:
    vector, maker = embed_query("words", None)
    ahead = QueryAhead(None, None, None).embed("words", known(made))
    assert ahead is not None
    assert np.array_equal(ahead[0], vector)
    assert ahead[1] == maker


@pytest.mark.parametrize(
    ("made", "model"),
    [
        (IndexModel("BAAI/bge-small-en-v1.5", 384, None), None),
        (IndexModel("text-embedding-3-small", 384, None), None),
        (MINE, "some/other"),
        (MINE, "text-embedding-3-small"),
    ],
)
def test_nothing_for_another_model(minilm: Model, made: IndexModel, model: str | None) -> None:
    assert QueryAhead(None, model, None).embed("words", known(made)) is None


def test_nothing_where_the_model_is_still_to_be_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDB_FAST_HOME", str(tmp_path))
    monkeypatch.setattr(offline, "import_fastembed", lambda: pytest.fail("it could not be fetched any more"))
    assert QueryAhead(None, None, None).embed("words", known(MINE)) is None


def test_a_damaged_model_embeds_nothing_and_is_named_by_who_needs_it(minilm: Model, tmp_path: Path) -> None:
    damaged = tmp_path / "model"
    shutil.copytree(minilm.path, damaged)
    (damaged / "tokenizer.json").write_text("{}")
    assert QueryAhead(None, None, damaged).embed("words", known(MINE)) is None
    with pytest.raises(ModelError, match="damaged"):
        embed_query("words", MINE, model_path=damaged)


def test_it_serves_the_vectors_of_its_model_only(minilm: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "resolve", lambda *given, **options: pytest.fail(f"{given} is not needed"))
    mine, other = Origin("f", DEFAULT_MODEL, 384), Origin("g", "some/other", 384)
    vectors, why = query_vectors("words", {mine: 2}, ahead=AHEAD)
    assert [(vector.vector is AHEAD[0], vector.maker) for vector in vectors] == [(True, AHEAD[1])]
    assert why(mine) == ""
    with pytest.raises(SchemaError, match="8 dimensions"):
        embed_query("words", IndexModel(DEFAULT_MODEL, 8, None), ahead=AHEAD)
    monkeypatch.undo()
    with pytest.raises(ModelError, match="some/other"):
        query_vectors("words", {other: 1}, ahead=AHEAD)
