"""Whole runs through a provider's API, from the command line to the index, against a server on this machine."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from openai_server import KEY, MODEL, OpenAIServer, Reply, hashed, shortened
from search_engines import EXACT, new_database, sqlalchemy_url
from servers import ListSource, cosine, engine_processes, eventually, execute, index_rows, records_of

from kdb_fast import cli
from kdb_fast.database import DatabaseAddress
from kdb_fast.errors import SchemaError
from kdb_fast.openai_api import PROBE
from kdb_fast.providers import OpenAIProvider, ProviderKeyError
from kdb_fast.reindex import reindex
from kdb_fast.search import SearchEngine
from kdb_fast.settings import ReindexOptions
from kdb_fast.stores import open_store

DIMENSIONS = 384
WRONG_KEY = "sk-proj-Wrong9876543210zyxwvuZYXWVU"


def server_vectors(texts: Sequence[str]) -> Any:
    return hashed(texts, 400)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenAIServer]:
    for name in list(os.environ):
        if name.startswith("OPENAI_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    with OpenAIServer(server_vectors) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        yield server


@pytest.fixture(params=["postgresql", "sqlite"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> DatabaseAddress:
    """An empty database of each kind."""
    address = new_database(request.param, request, tmp_path)
    if address.dialect == "sqlite":
        Path(address.conninfo).touch()
    return address


class Answer:
    """What a command gave."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def receipt(self) -> dict[str, Any]:
        receipt: dict[str, Any] = json.loads(self.out)
        return receipt


Run = Callable[..., Answer]


@pytest.fixture
def run(address: DatabaseAddress, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """``kdb-fast reindex --provider openai`` over texts, one record for each."""

    def run(texts: Sequence[str], *options: str) -> Answer:
        path = tmp_path / "records.jsonl"
        path.write_text("".join(json.dumps({"id": f"r{i}", "text": text}) + "\n" for i, text in enumerate(texts)))
        url = sqlalchemy_url(address).replace("+psycopg", "")
        capsys.readouterr()
        code = cli.run(
            ["reindex", "--db", url, "--from", str(path), "--entity", "Note", "--field", "text", "--provider", "openai",
             "--json", "--no-progress", *options]
        )  # fmt: skip
        assert engine_processes() == []
        return Answer(code, *capsys.readouterr())

    return run


def check(address: DatabaseAddress, texts: dict[str, str]) -> None:
    """The index holds these texts by record id, each with the server's own vector."""
    rows = index_rows(address)
    assert {key[1]: row.content for key, row in rows.items()} == {key: f"text: {text}" for key, text in texts.items()}
    for row in rows.values():
        expected = shortened(server_vectors([row.content]), DIMENSIONS)[0]
        assert row.vector is not None
        np.testing.assert_allclose(row.vector, expected, atol=1e-6)
        assert (row.model, row.dimensions) == (MODEL, DIMENSIONS)


def numbered(texts: Sequence[str]) -> dict[str, str]:
    return {f"r{i}": text for i, text in enumerate(texts)}


TEXTS = [f"text number {i}" + " and more" * (i % 40) for i in range(300)]


def test_vectors_are_the_servers(server: OpenAIServer, address: DatabaseAddress, run: Run) -> None:
    answer = run(TEXTS)
    assert (answer.code, answer.err) == (0, "")
    receipt = answer.receipt
    assert (receipt["read"], receipt["stored"], receipt["rejected"]) == (300, 300, 0)
    assert (receipt["model"], receipt["dimensions"], receipt["workers"]) == (MODEL, DIMENSIONS, 8)
    if address.dialect == "postgresql":
        assert receipt["index"].startswith("deferred"), "a large load comes before the vector index"
        (definition,) = execute(address, "SELECT indexdef FROM pg_indexes WHERE indexname = 'ix_kdb_search_vector'")
        assert "hnsw" in definition[0]
    check(address, numbered(TEXTS))
    assert sorted(server.embedded) == sorted([PROBE, *(f"text: {text}" for text in TEXTS)])


def test_second_run_pays_for_what_has_changed(server: OpenAIServer, address: DatabaseAddress, run: Run) -> None:
    run(TEXTS[:20])
    del server.seen[:]
    again = run(TEXTS[:20])
    assert (again.code, again.receipt["unchanged"]) == (0, 20)
    assert server.seen == []
    changed = [*TEXTS[:5], "a new text", *TEXTS[6:21]]
    receipt = run(changed).receipt
    assert (receipt["unchanged"], receipt["stored"]) == (19, 2)
    assert sorted(server.embedded) == sorted([PROBE, "text: a new text", f"text: {TEXTS[20]}"])
    check(address, numbered(changed))


def test_equal_texts_are_paid_for_once(server: OpenAIServer, address: DatabaseAddress, run: Run) -> None:
    texts = ["same", "other", "same", "same"]
    receipt = run(texts).receipt
    assert (receipt["stored"], receipt["reused"]) == (2, 2)
    assert sorted(server.embedded) == sorted([PROBE, "text: same", "text: other"])
    check(address, numbered(texts))


def test_rate_limits_and_failures_on_the_way_are_survived(
    server: OpenAIServer, address: DatabaseAddress, run: Run
) -> None:
    limited = Reply(429, {"code": "rate_limit_exceeded"}, {"retry-after-ms": "5"})
    failed = Reply(503, headers=limited.headers)
    server.script.extend([limited, Reply(), limited, limited, failed, limited, Reply(), limited])
    answer = run(TEXTS)
    assert (answer.code, answer.receipt["stored"]) == (0, 300)
    assert [seen.status for seen in server.seen].count(429) == 5
    check(address, numbered(TEXTS))


def test_refused_inputs_end_as_rejects(server: OpenAIServer, address: DatabaseAddress, run: Run) -> None:
    server.refuses = lambda text: "forbidden" in text
    texts = [*TEXTS[:150], "forbidden one", *TEXTS[150:200], "forbidden two"]
    answer = run(texts)
    receipt = answer.receipt
    assert (answer.code, receipt["read"], receipt["stored"], receipt["rejected"]) == (3, 202, 200, 2)
    check(address, {key: text for key, text in numbered(texts).items() if "forbidden" not in text})
    store = open_store(address, "test")
    rejects = {reject["record_id"]: (reject["reason"], reject["detail"]) for reject in store.rejects()}
    store.close()
    assert set(rejects) == {"r150", "r201"}
    assert all(reason == "not_encodable" and "forbidden" not in detail for reason, detail in rejects.values())
    server.refuses = lambda text: False
    assert run(texts).receipt["stored"] == 2
    check(address, numbered(texts))


def test_too_many_refused_inputs_end_the_run(server: OpenAIServer, address: DatabaseAddress, run: Run) -> None:
    server.refuses = lambda text: "forbidden" in text
    answer = run([*TEXTS[:10], *(f"forbidden {i}" for i in range(10))], "--max-rejects", "3")
    assert answer.code == 8
    assert "--max-rejects allows 3" in answer.err


def said(answer: Answer) -> str:
    return answer.out + answer.err


def test_wrong_key_is_told_and_never_shown(
    server: OpenAIServer, address: DatabaseAddress, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", WRONG_KEY)
    answer = run(TEXTS[:5])
    assert answer.code == 4
    assert f"{server.url} refuses the API key: HTTP 401 (invalid_api_key)." in answer.err
    assert "Set OPENAI_API_KEY to a valid key." in answer.err
    assert json.loads(answer.out)["error"]["exit_code"] == 4
    assert WRONG_KEY not in said(answer)
    assert WRONG_KEY[:12] not in said(answer)
    (run_row,) = execute(address, "SELECT state, model, phase, receipt FROM kdb_fast_runs")
    assert run_row[0] == "failed"
    assert WRONG_KEY[:12] not in str(run_row)
    assert index_rows(address) == {}
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert run(TEXTS[:5]).code == 0


def test_no_key_for_the_real_api_is_told_before_anything_is_done(
    server: OpenAIServer, address: DatabaseAddress, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL")
    monkeypatch.delenv("OPENAI_API_KEY")
    answer = run(TEXTS[:5])
    assert answer.code == 2
    assert "There is no OpenAI API key. Set OPENAI_API_KEY" in answer.err


def test_key_that_is_revoked_ends_the_run_without_waiting_for_other_requests(
    server: OpenAIServer, address: DatabaseAddress
) -> None:
    held = threading.Event()
    server.script.extend([Reply(), Reply(hold=held), Reply(401, {"code": "invalid_api_key"})])
    records = records_of(TEXTS)
    with pytest.raises(ProviderKeyError, match="refuses the API key") as caught:
        reindex(address, lambda: ListSource(records), ReindexOptions(provider="openai", workers=2))
    try:
        assert 200 not in [seen.status for seen in server.seen[1:]], "the other request is still being answered"
        assert caught.value.exit_code == 4
        assert caught.value.receipt["state"] == "failed"  # type: ignore[attr-defined]
        assert KEY not in str(caught.value)
        assert engine_processes() == []
    finally:
        held.set()
    eventually(lambda: not any(t.name.startswith("provider-") and t.is_alive() for t in threading.enumerate()))
    receipt = reindex(address, lambda: ListSource(records), ReindexOptions(provider="openai"))
    assert receipt["stored"] == 300
    for row in index_rows(address).values():
        assert row.vector is not None
        assert cosine(row.vector, server_vectors([row.content])[0][:DIMENSIONS]) >= EXACT


def test_several_requests_are_in_flight(server: OpenAIServer, address: DatabaseAddress) -> None:
    waiting = threading.Event()
    server.script.append(Reply())
    server.script.extend([Reply(hold=waiting)] * 3)
    most = []

    def look() -> None:
        most.append(eventually(lambda: server.most_in_flight if server.most_in_flight >= 3 else 0))
        waiting.set()

    thread = threading.Thread(target=look)
    thread.start()
    receipt = reindex(address, lambda: ListSource(records_of(TEXTS)), ReindexOptions(provider="openai", workers=3))
    thread.join()
    assert (most, receipt["stored"], receipt["workers"]) == ([3], 300, 3)


def test_index_of_another_dimension_is_refused(server: OpenAIServer, database: DatabaseAddress) -> None:
    store = open_store(database, "test")
    store.prepare(12)
    store.close()
    with pytest.raises(SchemaError, match="holds vectors of 12 dimensions; the model gives 384"):
        reindex(database, lambda: ListSource(records_of(["text"])), ReindexOptions(provider="openai"))
    assert server.seen == []


def test_search_engine_with_the_same_provider_carries_on(
    server: OpenAIServer, address: DatabaseAddress, run: Run
) -> None:
    run(TEXTS[:50])
    with OpenAIProvider() as provider, SearchEngine(address, provider) as search:
        assert [(s.indexed, s.stale) for s in search.get_status("Note")] == [(50, 0)]
        search.index_record("Note", "own", "something of another kind")
        assert [(s.indexed, s.stale) for s in search.get_status("Note")] == [(51, 0)]
        results = search.search("another kind", limit=1)
        assert [result.id for result in results] == ["own"]
        with search.transaction():
            search.delete_record("Note", "own")
    check(address, numbered(TEXTS[:50]))
