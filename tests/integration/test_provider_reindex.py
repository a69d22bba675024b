"""Whole runs through a provider's API, from the command line to the index, against a server on this machine."""

from __future__ import annotations

import json
import os
import re
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
from kdb_fast.db.address import DatabaseAddress
from kdb_fast.embedding.encoder import PROBE
from kdb_fast.embedding.models.lookup import Model
from kdb_fast.embedding.providers.fastembed import FastEmbedProvider
from kdb_fast.embedding.providers.openai.provider import OpenAIProvider
from kdb_fast.errors import ProviderKeyError, SchemaError
from kdb_fast.indexing.reindex import reindex
from kdb_fast.search.engine import SearchEngine
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
def find(address: DatabaseAddress, capsys: pytest.CaptureFixture[str]) -> Run:
    """``kdb-fast search --json``."""

    def find(query: str, *options: str) -> Answer:
        capsys.readouterr()
        url = sqlalchemy_url(address).replace("+psycopg", "")
        return Answer(cli.run(["search", query, "--db", url, "--json", *options]), *capsys.readouterr())

    return find


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
    rejects = {reject.record_id: (reject.reason, reject.detail) for reject in store.rejects()}
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
    server: OpenAIServer, address: DatabaseAddress, new_threads: Callable[[str], list[threading.Thread]]
) -> None:
    held = threading.Event()
    server.script.extend([Reply(), Reply(hold=held), Reply(401, {"code": "invalid_api_key"})])
    records = records_of(TEXTS)
    with pytest.raises(ProviderKeyError, match="refuses the API key") as caught:
        reindex(address, ListSource(records), ReindexOptions(provider="openai", workers=2))
    try:
        assert 200 not in [seen.status for seen in server.seen[1:]], "the other request is still being answered"
        assert caught.value.exit_code == 4
        assert caught.value.receipt is not None
        assert caught.value.receipt.state == "failed"
        assert KEY not in str(caught.value)
        assert engine_processes() == []
    finally:
        held.set()
    eventually(lambda: not new_threads("provider-"))
    receipt = reindex(address, ListSource(records), ReindexOptions(provider="openai"))
    assert receipt.stored == 300
    for row in index_rows(address).values():
        assert row.vector is not None
        assert cosine(row.vector, server_vectors([row.content])[0][:DIMENSIONS]) >= EXACT


def test_as_many_requests_are_in_flight_as_was_asked_for(server: OpenAIServer, address: DatabaseAddress) -> None:
    waiting = threading.Event()
    server.script.append(Reply())
    server.script.extend([Reply(hold=waiting)] * 6)
    most = []

    def look() -> None:
        most.append(eventually(lambda: server.most_in_flight if server.most_in_flight >= 6 else 0))
        waiting.set()

    thread = threading.Thread(target=look)
    thread.start()
    options = ReindexOptions(provider="openai", workers=6, batch_size=25)
    receipt = reindex(address, ListSource(records_of(TEXTS)), options)
    thread.join()
    assert (most, receipt.stored, receipt.workers) == ([6], 300, 6)


def sizes_of_requests(server: OpenAIServer) -> list[int]:
    """Inputs of each request that was answered, the largest first, without the probe's."""
    assert {seen.status for seen in server.seen} == {200}
    return sorted((len(seen.texts) for seen in server.seen if seen.texts != [PROBE]), reverse=True)


def test_batch_size_is_the_most_inputs_of_a_request(server: OpenAIServer, address: DatabaseAddress, run: Run) -> None:
    assert run(TEXTS, "--batch-size", "40").code == 0
    assert sizes_of_requests(server) == [40] * 7 + [20]
    check(address, numbered(TEXTS))
    del server.seen[:]
    assert run([f"{text}!" for text in TEXTS]).code == 0
    assert sizes_of_requests(server) == [100] * 3, "the default"


def test_requests_of_the_most_inputs_that_the_api_takes(server: OpenAIServer, tmp_path: Path) -> None:
    address = DatabaseAddress("sqlite", str(tmp_path / "index.db"), "")
    Path(address.conninfo).touch()
    texts = [f"text number {i}" for i in range(2 * 2048 + 904)]
    source = ListSource(records_of(texts), page_rows=1000)
    receipt = reindex(address, source, ReindexOptions(provider="openai", batch_size=2048))
    assert (receipt.read, receipt.stored, receipt.rejected) == (5000, 5000, 0)
    assert sizes_of_requests(server) == [2048, 2048, 904]
    rows = index_rows(address)
    for number in range(0, 5000, 97):
        vector = rows["Note", f"r{number}"].vector
        assert vector is not None
        np.testing.assert_allclose(vector, shortened(server_vectors([texts[number]]), DIMENSIONS)[0], atol=1e-6)


def test_requests_of_long_texts_keep_to_the_limit_of_tokens(server: OpenAIServer, tmp_path: Path) -> None:
    address = DatabaseAddress("sqlite", str(tmp_path / "index.db"), "")
    Path(address.conninfo).touch()
    server.tokens = lambda text: -(-len(text) // 2)  # as many as are allowed for
    texts = [f"{i} " + "word " * 600 for i in range(500)]
    options = ReindexOptions(provider="openai", batch_size=2048)
    receipt = reindex(address, ListSource(records_of(texts)), options)
    assert receipt.stored == 500
    sizes = sizes_of_requests(server)
    assert (sum(sizes), len(sizes)) == (500, 3)
    assert sizes[0] > 190


def test_index_of_another_dimension_is_refused(server: OpenAIServer, database: DatabaseAddress) -> None:
    store = open_store(database, "test")
    store.prepare(12)
    store.close()
    with pytest.raises(SchemaError, match="holds vectors of 12 dimensions; the model gives 384"):
        reindex(database, ListSource(records_of(["text"])), ReindexOptions(provider="openai"))
    assert server.seen == []


# -- kdb-fast search ---------------------------------------------------------------------------------------


def found_ids(answer: Answer) -> list[str]:
    assert answer.code == 0, answer.err
    return [result["id"] for result in answer.receipt["results"]]


def nearest(query: str, texts: Sequence[str]) -> list[str]:
    """Ids of the texts by the similarity of the server's vectors with the query's."""
    matrix = shortened(server_vectors([f"text: {text}" for text in texts]), DIMENSIONS)
    return [f"r{row}" for row in np.argsort(-(matrix @ shortened(server_vectors([query]), DIMENSIONS)[0]))]


@pytest.mark.parametrize("options", [[], ["--provider", "openai"], ["--model", MODEL]])
def test_query_is_embedded_by_the_model_of_the_index(
    server: OpenAIServer, run: Run, find: Run, options: list[str]
) -> None:
    run(TEXTS[:40])
    del server.seen[:]
    answer = find("nothing alike", "--mode", "vector", "--limit", "12", *options)
    assert found_ids(answer) == nearest("nothing alike", TEXTS[:40])[:12]
    assert answer.err == ""
    (request,) = server.seen
    assert (request.texts, request.body["model"], request.body["dimensions"]) == (["nothing alike"], MODEL, DIMENSIONS)
    assert found_ids(find(f"text: {TEXTS[7]}", "--limit", "1", *options)) == ["r7"]


def test_length_of_a_querys_vector_is_that_of_the_index(
    server: OpenAIServer, address: DatabaseAddress, find: Run
) -> None:
    with OpenAIProvider(dimensions=64) as provider, SearchEngine(address, provider) as search:
        search.index_records_batch([("Note", f"r{i}", text) for i, text in enumerate(TEXTS[:10])])
    assert found_ids(find(TEXTS[4], "--mode", "vector", "--limit", "1")) == ["r4"]
    assert server.seen[-1].body["dimensions"] == 64


def test_models_whose_vectors_cannot_be_compared_are_refused(
    server: OpenAIServer, address: DatabaseAddress, run: Run, find: Run, minilm: Model
) -> None:
    run(TEXTS[:5])
    del server.seen[:]
    for options in (["--provider", "fastembed"], ["--model", minilm.name], ["--model-path", str(minilm.path)]):
        answer = find("text", *options)
        assert answer.code in (2, 4), answer
        if "--model-path" not in options:
            assert f"holds vectors of the model {MODEL}, not of {minilm.name}; they cannot be compared" in answer.err
            assert re.search(rf"kdb-fast reindex --db \S+ --model {minilm.name}", answer.err)
    assert server.seen == []
    execute(address, "DELETE FROM kdb_search")
    execute(address, "DELETE FROM kdb_fast_runs")
    with SearchEngine(address, FastEmbedProvider(minilm.name)) as search:
        search.index_record("Note", "1", "a whale")
    answer = find("text", "--provider", "openai")
    assert answer.code == 4
    assert f"holds vectors of the model {minilm.name}, not of {MODEL}" in answer.err
    assert re.search(rf"kdb-fast reindex --db \S+ --provider openai --model {MODEL}", answer.err)
    assert server.seen == []
    assert found_ids(find("marine mammal")) == ["1"]


def test_each_row_is_compared_with_the_query_of_its_own_model(
    server: OpenAIServer, address: DatabaseAddress, run: Run, find: Run, minilm: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(TEXTS[:5])
    with SearchEngine(address, FastEmbedProvider(minilm.name)) as search:
        search.index_records_batch([("Sea", "1", "a whale"), ("Sea", "2", "a ledger of debts")])
    del server.seen[:]
    answer = find(f"text: {TEXTS[3]}", "--mode", "vector", "--limit", "7")
    assert (answer.err, len(server.seen)) == ("", 1)
    assert "r3" in found_ids(answer)[:2]
    assert {result["score"] for result in json.loads(answer.out)["results"][:2]} == {1 / 61}, "first of each model"
    assert json.loads(answer.out)["left_out"] == []
    assert found_ids(find("marine mammal", "--mode", "vector", "--entity", "Sea")) == ["1", "2"]
    assert len(server.seen) == 1, "the other model made nothing of what is searched"
    own = find("marine mammal", "--entity", "Sea", "--model", minilm.name, "--mode", "vector")
    assert (found_ids(own), own.err) == (["1", "2"], "")
    one = find("marine mammal", "--model", minilm.name, "--mode", "vector")
    assert found_ids(one) == ["1", "2"]
    note = f"5 rows of Note, embedded by the model {MODEL}: another one was asked for."
    assert one.err == f"warning: left out of the ranking by meaning: {note}\n"
    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.delenv("OPENAI_BASE_URL")
    lacking = find("marine mammal")
    assert found_ids(lacking)[0] == "1"
    assert f"5 rows of Note, embedded by the model {MODEL}: There is no OpenAI API key." in lacking.err


def test_vectors_of_another_address_of_the_model_are_left_out_and_counted(
    server: OpenAIServer, run: Run, find: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(TEXTS[:5])
    with OpenAIServer(server_vectors) as other:
        monkeypatch.setenv("OPENAI_BASE_URL", other.url)
        answer = find(f"text: {TEXTS[3]}", "--limit", "1")
        by_vector = find(f"text: {TEXTS[3]}", "--mode", "vector")
    assert found_ids(answer) == ["r3"], "by keyword"
    note = f"left out of the ranking by meaning: 5 rows of Note, embedded by the model {MODEL}: of other files, or at"
    assert answer.err.startswith(f"warning: {note}")
    (left_out,) = json.loads(answer.out)["left_out"]
    assert (left_out["entities"], left_out["model"], left_out["rows"]) == (["Note"], MODEL, 5)
    assert by_vector.code == 4
    assert note[1:] in by_vector.err


def test_search_without_a_key_says_so_and_by_keyword_needs_none(
    server: OpenAIServer, run: Run, find: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(TEXTS[:5])
    del server.seen[:]
    monkeypatch.delenv("OPENAI_BASE_URL")
    monkeypatch.delenv("OPENAI_API_KEY")
    answer = find("number 3")
    assert answer.code == 2
    assert "There is no OpenAI API key. Set OPENAI_API_KEY" in answer.err
    assert found_ids(find("number 3", "--mode", "keyword"))[0] == "r3"
    assert server.seen == []


def test_search_of_a_server_that_is_down_ends_soon(
    server: OpenAIServer, run: Run, find: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(TEXTS[:5])
    server.always = Reply(503, headers={"retry-after-ms": "5"})
    del server.seen[:]
    answer = find("number 3")
    assert (answer.code, len(server.seen)) == (7, 3)
    assert "gave no proper answer in 3 attempts; the last was HTTP 503" in answer.err


# -- SearchEngine ------------------------------------------------------------------------------------------


def test_batch_of_a_search_engine_is_requests_of_the_most_inputs(server: OpenAIServer, tmp_path: Path) -> None:
    with OpenAIProvider() as provider, SearchEngine(f"sqlite:///{tmp_path}/index.db", provider) as search:
        search.index_records_batch(("Note", f"r{i}", f"text number {i}") for i in range(2500))
        assert sizes_of_requests(server) == [2048, 452]
        del server.seen[:]
        search.index_records_batch(("Note", f"r{i}", f"text number {i} " + "word " * 2000) for i in range(60))
        assert sizes_of_requests(server) == [59, 1], "at most 300,000 tokens, two bytes each, in a request"


def test_requests_of_a_search_engines_batch_are_in_flight_together(
    server: OpenAIServer, address: DatabaseAddress
) -> None:
    server.barrier = threading.Barrier(4)  # nobody is answered before four are there
    with OpenAIProvider(max_inputs=25) as provider, SearchEngine(address, provider) as search:
        search.index_records_batch([("Note", f"r{i}", f"text: {text}") for i, text in enumerate(TEXTS[:200])])
    assert sizes_of_requests(server) == [25] * 8
    check(address, numbered(TEXTS[:200]))


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
