"""What the specification asks of batch embedding, a test for each of its lines."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kameleon import Kameleon, close_kameleon, open_kameleon
from search_engines import Hashes, Words, new_database, sqlalchemy_url

from kdb_fast import SearchEngine
from kdb_fast.accounting import Counts
from kdb_fast.cli.bars import Lines
from kdb_fast.db.address import DatabaseAddress
from kdb_fast.embedding.models.lookup import Model
from kdb_fast.errors import UsageError
from kdb_fast.kameleondb import install, uninstall
from kdb_fast.settings import DEFAULT_BATCH_SIZE, ReindexOptions

pytest.importorskip("kameleondb")
pytestmark = pytest.mark.filterwarnings("ignore:The default datetime adapter is deprecated:DeprecationWarning")


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> DatabaseAddress:
    """An empty database of each kind."""
    return new_database(request.param, request, tmp_path)


@pytest.fixture(params=["sqlite", "postgresql"])
def kameleon(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Kameleon]:
    found = open_kameleon(request.param, request, capsys, tmp_path)
    found.client.create_entity("Contact", fields=[{"name": "name", "type": "string"}])
    yield found
    uninstall()
    close_kameleon(found, request)


def open_engine(store: DatabaseAddress, provider: Any) -> SearchEngine:
    return SearchEngine(sqlalchemy_url(store).replace("+psycopg", ""), provider)


def batch(count: int, entity: str = "Contact") -> list[tuple[str, str, str]]:
    return [(entity, f"{entity}-{i}", f"name: person number {i}") for i in range(count)]


def indexed(engine: SearchEngine) -> dict[str, int]:
    return {status.entity: status.indexed for status in engine.get_status()}


# -- the batch API, on both stores -------------------------------------------------------------------------------


def test_index_records_batch_empty(store: DatabaseAddress) -> None:
    provider = Hashes()
    with open_engine(store, provider) as engine:
        engine.index_records_batch([])
        assert indexed(engine) == {}
    assert provider.batches == []


@pytest.mark.parametrize("count", [10, 1000], ids=["small", "large"])
def test_index_records_batch(store: DatabaseAddress, count: int) -> None:
    provider = Words()
    with open_engine(store, provider) as engine:
        engine.index_records_batch(batch(count))
        assert indexed(engine) == {"Contact": count}
        assert engine.search("person number 7", limit=1)[0].id == "Contact-7"
    assert sum(len(texts) for texts in provider.batches) == count
    assert len(provider.embedded) == 1, "the query: no record is embedded by itself"


def test_index_records_batch_no_provider(store: DatabaseAddress) -> None:
    with open_engine(store, None) as engine:
        engine.index_records_batch(batch(10))
        assert indexed(engine) == {"Contact": 10}
        assert engine.search("number 7", limit=1)[0].id == "Contact-7"


# -- the two command lines ---------------------------------------------------------------------------------------


def test_cli_data_insert_with_batch_input(kameleon: Kameleon, minilm: Model) -> None:
    """``kameleondb data insert Contact < records.jsonl --batch-size 100``"""
    lines = "\n".join(json.dumps({"name": f"person {i}"}) for i in range(20)).encode()
    answer = kameleon.kameleondb("data", "insert", "Contact", "--batch-size", "100", stdin=lines)
    assert answer.code == 0, answer
    assert len(kameleon.index()) == 20


def test_cli_reindex_with_batch_size(kameleon: Kameleon, minilm: Model) -> None:
    """``kameleondb embeddings reindex Contact --batch-size 100``: existing records, by the batch API."""
    kameleon.client.entity("Contact").insert_many([{"name": f"person {i}"} for i in range(20)])
    answer = kameleon.kameleondb("-j", "embeddings", "reindex", "Contact", "--batch-size", "100")
    assert answer.code == 0, answer
    assert answer.json["records_indexed"] == answer.json["indexed"] == len(kameleon.index()) == 20


# -- transactions ------------------------------------------------------------------------------------------------


def test_transaction_queues_and_flushes_as_one_batch(store: DatabaseAddress) -> None:
    provider = Hashes()
    with open_engine(store, provider) as engine:
        with engine.transaction():
            for record in batch(10):
                engine.index_record(*record)
            assert provider.batches == []
        assert [len(texts) for texts in provider.batches] == [10]
        assert indexed(engine) == {"Contact": 10}


def test_transaction_rollback_leaves_the_index_as_it_was(store: DatabaseAddress) -> None:
    with open_engine(store, Hashes()) as engine:
        engine.index_records_batch(batch(2))
        with pytest.raises(ZeroDivisionError), engine.transaction():  # noqa: PT012
            engine.index_records_batch(batch(10))
            engine.delete_record("Contact", "Contact-0")
            raise ZeroDivisionError
        assert indexed(engine) == {"Contact": 2}


# -- what must not change ----------------------------------------------------------------------------------------


def test_single_index_record_still_works(store: DatabaseAddress) -> None:
    with open_engine(store, Words()) as engine:
        engine.index_record("Contact", "1", "name: Alice")
        engine.index_record("Contact", "1", "name: Alice Smith")
        assert indexed(engine) == {"Contact": 1}
        assert engine.search("Smith")[0].matched_text == "name: Alice Smith"


def test_batch_with_mixed_entities(store: DatabaseAddress) -> None:
    with open_engine(store, Words()) as engine:
        engine.index_records_batch([*batch(5), *batch(7, "Product"), *batch(3, "Ticket")])
        assert indexed(engine) == {"Contact": 5, "Product": 7, "Ticket": 3}
        assert {found.entity for found in engine.search("person", entity="Product")} == {"Product"}


# -- batch sizes, progress, speed --------------------------------------------------------------------------------


def test_the_default_batch_size_is_100() -> None:
    assert DEFAULT_BATCH_SIZE == ReindexOptions().batch_size == 100


@pytest.mark.parametrize(("provider", "most"), [("fastembed", 1000), ("openai", 2048)])
def test_batch_sizes_of_each_provider(provider: str, most: int) -> None:
    assert ReindexOptions(provider=provider, batch_size=most).batch_size == most
    with pytest.raises(UsageError):
        ReindexOptions(provider=provider, batch_size=most + 1)


@pytest.mark.parametrize(("kind", "most"), [("postgresql", 1000), ("sqlite", 10_000)])
def test_batch_sizes_of_each_store(kind: str, most: int, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    with open_engine(new_database(kind, request, tmp_path), Hashes(4)) as engine:
        engine.index_records_batch(batch(most))
        assert indexed(engine) == {"Contact": most}


def test_progress_for_10_000_records_and_more(kameleon: Kameleon, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reindex goes beyond the 10,000 records at which KameleonDB's own ends, and shows how far it is."""
    count = 10_050
    kameleon.client.entity("Contact").insert_many([{"name": f"person {i}"} for i in range(count)])
    install(Hashes(4))
    shown: list[int] = []

    class Seen(Lines):
        def update(self, counts: Counts) -> None:
            shown.append(counts.stored)
            super().update(counts)

    monkeypatch.setattr("kdb_fast.cli.bars.LINE_SECONDS", 0.0)
    result = kameleon.client.reindex_embeddings("Contact", batch_size=1000, progress=Seen())
    assert result["indexed"] == len(kameleon.index()) == count
    assert shown == sorted(shown)
    assert len(set(shown)) > 2
    (stated,) = kameleon.client.embedding_status("Contact")
    assert (stated["indexed"], stated["pending"]) == (count, 0)


def test_the_stress_run_of_30_000_records_is_in_the_benchmark() -> None:
    """Its time is asked for where it is measured: ``python -m bench stress``."""
    stress = importlib.import_module("bench.part_stress")
    commands = importlib.import_module("bench.__main__")
    assert stress.RECORDS == 30_000
    assert "stress" in commands.PARTS
    assert callable(stress.run)
