"""``kdb-fast`` and the library with servers that speak OpenAI's embeddings API, as each really answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from compatible_servers import LENGTH, SERVERS, CompatibleServer, LlamaCpp, LMStudio, Ollama, vectors
from kameleon import Answer
from openai_server import OpenAIServer, hashed, shortened
from servers import index_rows

from kdb_fast import cli
from kdb_fast.db.address import DatabaseAddress, parse_address
from kdb_fast.embedding.providers.factory import get_provider
from kdb_fast.embedding.providers.openai.provider import OpenAIProvider
from kdb_fast.errors import ModelError

TEXTS = [f"text number {i}" for i in range(70)]
LONG = "a long story of a kettle " * 400
"""10,000 bytes, 2,500 tokens of the servers' counting."""


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest) -> Iterator[CompatibleServer]:
    with request.param() as started:
        yield started


@pytest.fixture
def address(tmp_path: Path) -> DatabaseAddress:
    return parse_address(f"sqlite:///{tmp_path}/a.db")


@pytest.fixture
def command(tmp_path: Path, address: DatabaseAddress, capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    def run(*arguments: str, texts: Sequence[str] = ()) -> Answer:
        if texts:
            lines = [json.dumps({"id": f"r{i}", "text": text}) for i, text in enumerate(texts)]
            (tmp_path / "n.jsonl").write_text("\n".join(lines))
            arguments = ("reindex", "--from", str(tmp_path / "n.jsonl"), "--entity", "N", "--no-progress", *arguments)
        capsys.readouterr()
        code = cli.run([*arguments, "--json", "--db", address.display])
        return Answer(code, *capsys.readouterr())

    return run


def check(address: DatabaseAddress, texts: Sequence[str]) -> None:
    rows = index_rows(address)
    assert len(rows) == len(texts)
    for i, text in enumerate(texts):
        row = rows["N", f"r{i}"]
        assert row.vector is not None
        np.testing.assert_allclose(row.vector, vectors([f"text: {text}"])[0], atol=1e-6)


def test_a_new_index_has_the_length_that_the_server_gives(
    server: CompatibleServer, address: DatabaseAddress, command: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ("--model", "nomic-embed-text")
    answer = command("--base-url", server.url, *model, texts=TEXTS)
    assert (answer.code, answer.json["stored"], answer.json["dimensions"]) == (0, len(TEXTS), LENGTH), answer.err
    check(address, TEXTS)
    asked = len(server.seen)
    monkeypatch.setenv("OPENAI_BASE_URL", f"{server.url}/")
    again = command("--provider", "openai", *model, texts=TEXTS)
    assert (again.json["unchanged"], len(server.seen)) == (len(TEXTS), asked), "nothing is asked where nothing changed"
    found = command("search", f"text: {TEXTS[7]}", "--mode", "vector", "--limit", "1")
    assert [result["id"] for result in found.json["results"]] == ["r7"], found.err


@pytest.mark.parametrize("server", [Ollama, LlamaCpp, LMStudio], indirect=True)
def test_a_base_url_without_its_version_is_completed(
    server: CompatibleServer, address: DatabaseAddress, command: Callable[..., Answer]
) -> None:
    for url in (server.root, f"{server.root}/", f"{server.url}/embeddings", server.url):
        answer = command("--base-url", url, "--model", "nomic-embed-text", texts=TEXTS[:20])
        assert answer.code == 0, answer.err
        check(address, TEXTS[:20])
    assert answer.json["unchanged"] == 20, "it is one server, however its address is written"


@pytest.mark.parametrize("server", SERVERS[:5], indirect=True)
def test_a_text_beyond_a_small_window_is_cut_and_counted(
    server: CompatibleServer, address: DatabaseAddress, command: Callable[..., Answer]
) -> None:
    texts = [LONG if i % 7 == 3 else text for i, text in enumerate(TEXTS[:30])]
    answer = command("--base-url", server.url, "--model", "nomic-embed-text", texts=texts)
    receipt = answer.json
    assert (answer.code, receipt["stored"] + receipt["reused"], receipt["rejected"]) == (0, 30, 0), answer.err
    assert receipt["truncated"] >= 1
    cut = [text for text in server.embedded if text.startswith("text: a long story")]
    assert all(1000 <= len(text) <= 4 * 512 for text in cut)


def test_a_server_that_takes_few_inputs_is_asked_for_few_from_then_on(server: CompatibleServer) -> None:
    with OpenAIProvider("nomic-embed-text", base_url=server.url, concurrency=1, max_inputs=64) as provider:
        matrix = provider.embed_matrix(TEXTS[:64])
        np.testing.assert_allclose(matrix, vectors(TEXTS[:64]), atol=1e-6)
        refused = sum(seen.status != 200 for seen in server.seen)
        provider.embed_matrix([f"{text}!" for text in TEXTS[:64]])
    assert sum(seen.status != 200 for seen in server.seen) == refused
    assert provider.dimensions == LENGTH


def test_the_library_takes_the_length_of_the_server(server: CompatibleServer) -> None:
    with get_provider("openai", base_url=server.url, model="nomic-embed-text", dimensions=None) as provider:
        assert "dimensions=None" in repr(provider)
        assert (provider.dimensions, len(provider.embed("one"))) == (LENGTH, LENGTH)
    with get_provider("openai", base_url=server.url, model="nomic-embed-text", dimensions=256) as provider:
        with pytest.raises(ModelError, match="gave a vector of 768 numbers; expected 256") as caught:
            provider.embed("one")
        assert "--dimensions 768" in caught.value.remedy


def test_fingerprints_tell_models_and_lengths_apart_and_not_how_an_address_is_written() -> None:
    def made(model: str, dimensions: int, url: str) -> str:
        with OpenAIProvider(model, dimensions, base_url=url) as provider:
            return provider.fingerprint()

    same = {made("m", 8, f"http://h:1{path}") for path in ("", "/", "/v1", "/v1/", "/v1/embeddings")}
    assert len(same) == 1
    assert len({*same, made("m", 9, "http://h:1"), made("n", 8, "http://h:1")}) == 3


def test_another_length_is_asked_for_and_kept_by_the_index(
    address: DatabaseAddress, command: Callable[..., Answer]
) -> None:
    with OpenAIServer(lambda texts: hashed(texts, LENGTH), key=None) as server:
        url = ("--provider", "openai", "--base-url", server.url)
        assert command(*url, "--dimensions", "100", texts=TEXTS[:5]).json["dimensions"] == 100
        again = command(*url, texts=[*TEXTS[:5], "new"])
        assert (again.json["dimensions"], again.json["unchanged"], again.json["stored"]) == (100, 5, 1)
        vector = index_rows(address)["N", "r5"].vector
        assert vector is not None
        np.testing.assert_allclose(vector, shortened(hashed(["text: new"], LENGTH), 100)[0], atol=1e-6)


def test_a_server_that_ignores_the_length_of_openais_default_gives_its_own(
    address: DatabaseAddress, command: Callable[..., Answer]
) -> None:
    with CompatibleServer() as server:
        answer = command("--provider", "openai", "--base-url", server.url, texts=TEXTS[:5])
    assert (answer.code, answer.json["dimensions"]) == (0, LENGTH), answer.err
    check(address, TEXTS[:5])


def test_what_the_server_says_of_a_model_is_told(command: Callable[..., Answer]) -> None:
    with Ollama() as server:
        answer = command("--base-url", server.url, "--model", "no-such-model", texts=TEXTS[:5])
    assert answer.code == 4
    assert 'model "no-such-model" not found, try pulling it first' in answer.err


@pytest.mark.parametrize("option", [("--base-url", "http://h:1/v1"), ("--dimensions", "8")])
def test_options_of_an_api_are_refused_for_a_model_of_this_machine(
    command: Callable[..., Answer], option: tuple[str, str]
) -> None:
    answer = command(*option, "--provider", "fastembed", texts=TEXTS[:1])
    assert (answer.code, f"{option[0]} belongs to --provider openai" in answer.err) == (2, True)


def test_a_key_is_sent_to_a_server_that_wants_one_and_never_shown(
    command: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    with OpenAIServer(key="local-secret-1") as server:
        url = ("--base-url", server.url)
        assert "asks for an API key" in command(*url, texts=TEXTS[:2]).err
        monkeypatch.setenv("OPENAI_API_KEY", "local-secret-2")
        refused = command(*url, texts=TEXTS[:2])
        assert (refused.code, "local-secret-2" in refused.err + refused.out) == (4, False)
        monkeypatch.setenv("OPENAI_API_KEY", "local-secret-1")
        assert command(*url, texts=TEXTS[:2]).code == 0
