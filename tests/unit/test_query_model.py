"""Which model embeds a query: that of the index, or one whose vectors can be compared with it."""

from __future__ import annotations

import sqlite3
from typing import Any

import numpy as np
import pytest

from kdb_fast import query_model
from kdb_fast.errors import SchemaError
from kdb_fast.models import Model
from kdb_fast.providers import openai_fingerprint
from kdb_fast.query_model import IndexModel, embed_query, index_model
from kdb_fast.settings import DEFAULT_MODEL
from kdb_fast.stores import schema

ADDRESS = "http://127.0.0.1:1/v1"
SMALL = "text-embedding-3-small"
LOCAL = openai_fingerprint("nomic-embed", 8, ADDRESS)


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None]]:
    """Collects (provider, model) instead of asking OpenAI."""
    asked: list[tuple[str, str | None]] = []

    def ask(query: str, made: Any, name: str | None, warn: Any) -> Any:
        asked.append(("openai", name))
        return np.ones(8, np.float32)

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
    warned: list[str] = []
    vector = embed_query("words", made, warn=warned.append)
    assert (vector.shape, vector.dtype, asked, warned) == ((384,), np.float32, [], [])


def test_fingerprint_of_any_precision_is_the_models(minilm: Model) -> None:
    warned: list[str] = []
    for precision in ("fp32", "int8"):
        embed_query("words", IndexModel(minilm.name, 384, minilm.fingerprint(precision)), warn=warned.append)
    assert warned == []
    embed_query("words", IndexModel(minilm.name, 384, "of other files"), warn=warned.append)
    assert len(warned) == 1


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
    connection.execute(schema.SQLITE_SEARCH)
    assert index_model(connection, "sqlite") is None
    row = "INSERT INTO kdb_search (id, entity_name, record_id, content, embedding, model, dimensions) VALUES "
    connection.execute(row + "('1', 'E', '1', 'text', NULL, NULL, NULL)")
    assert index_model(connection, "sqlite") is None
    connection.execute(row + "('2', 'E', '2', 'text', '[1]', 'of a row', 1)")
    assert index_model(connection, "sqlite") == IndexModel("of a row", 1, None)
    for name, kind in schema.SQLITE_COLUMNS.items():
        connection.execute(f"ALTER TABLE kdb_search ADD COLUMN {name} {kind}")
    for statement in schema.SQLITE_OWN:
        connection.execute(statement)
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
