"""Providers without a network: what is accepted as one, what is asked for and how answers are read."""

from __future__ import annotations

import base64
import json
import math
import os
import pickle
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdb_fast.embedding.encoder import Encoder, EncoderSpec, Tally
from kdb_fast.embedding.models.lookup import Model
from kdb_fast.embedding.providers.base import EmbeddingProvider, EmbeddingResult
from kdb_fast.embedding.providers.custom import adapted, as_provider
from kdb_fast.embedding.providers.encoder import ProviderEncoder
from kdb_fast.embedding.providers.factory import get_provider
from kdb_fast.embedding.providers.fastembed import FastEmbedProvider
from kdb_fast.embedding.providers.openai.answers import OddAnswerError, decode, duration, read_problem, server_wait
from kdb_fast.embedding.providers.openai.inputs import MAX_INPUT_TOKENS, cut_bytes, pack, shorter
from kdb_fast.embedding.providers.openai.provider import OpenAIProvider
from kdb_fast.errors import (
    KdbFastError,
    MissingPackageError,
    ModelError,
    OptionError,
    ProviderError,
    ProviderInputError,
    UsageError,
)


@pytest.fixture(autouse=True)
def _no_settings_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("OPENAI_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


class Own:
    """A user's own provider: has the methods, derives from nothing."""

    dimensions: Any = 2
    model_name: Any = "own-model"

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def embed(self, text: str) -> list[float]:
        return self.embed_batch([text])[0]

    def embed_batch(self, texts: list[str]) -> list[list[float]]:
        self.calls.append(texts)
        return [[float(len(text)), 1.0] for text in texts]


class Derived(EmbeddingProvider):
    @property
    def dimensions(self) -> int:
        return 2

    @property
    def model_name(self) -> str:
        return "derived"

    def embed(self, text: str) -> list[float]:
        return [float(len(text)), 1.0]

    def embed_batch(self, texts: list[str]) -> list[list[float]]:
        return [self.embed(text) for text in texts]


# --- what is accepted as a provider ---


def test_own_object_with_the_methods_is_a_provider() -> None:
    own: object = Own()
    assert as_provider(own) is own
    assert get_provider(own) is own


def test_derived_provider_has_metadata_and_can_be_closed() -> None:
    with Derived() as provider:
        assert provider.embed_with_metadata("four") == EmbeddingResult("four", [4.0, 1.0], "derived", 2)
    with pytest.raises(AttributeError):
        provider.embed_with_metadata("four").model = "other"  # type: ignore[misc]


def test_object_that_is_no_provider_is_told_what_is_missing() -> None:
    with pytest.raises(UsageError) as caught:
        as_provider(object())
    for name in ("object is no embedding provider", "embed()", "embed_batch()", "dimensions", "model_name"):
        assert name in str(caught.value)
    own = Own()
    own.embed_batch = None  # type: ignore[method-assign, assignment]
    with pytest.raises(UsageError, match=r"missing: embed_batch\(\)\."):
        as_provider(own)


@pytest.mark.parametrize(("name", "value"), [("dimensions", 0), ("dimensions", "384"), ("dimensions", None),
                                             ("model_name", ""), ("model_name", None)])  # fmt: skip
def test_property_that_makes_no_sense_is_named(name: str, value: object) -> None:
    own = Own()
    setattr(own, name, value)
    with pytest.raises(UsageError, match=f"missing: {name}"):
        as_provider(own)


def test_numpy_number_of_dimensions_is_accepted() -> None:
    own = Own()
    own.dimensions = np.int64(2)
    assert ProviderEncoder(as_provider(own)).dimensions == 2


def test_class_is_not_taken_for_its_instance() -> None:
    with pytest.raises(UsageError, match="Own is a class"):
        as_provider(Own)


def test_unknown_name_is_a_value_error() -> None:
    with pytest.raises(ValueError, match=r"no embedding provider 'cohere'; expected fastembed, openai"):
        get_provider("cohere")


def test_options_for_a_provider_that_is_built_are_refused() -> None:
    with pytest.raises(UsageError, match="dimensions would have no effect"):
        get_provider(Own(), dimensions=3)


def test_missing_package_is_an_import_error_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(ImportError, match=r"pip install 'kdb-fast\[openai\]'") as caught:
        get_provider("openai", api_key="sk-1")
    assert isinstance(caught.value, MissingPackageError)
    assert caught.value.exit_code == 2
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install kdb-fast"):
        get_provider("fastembed")


# --- fingerprints ---


def openai(**options: Any) -> str:
    with OpenAIProvider(**{"api_key": "sk-1", **options}) as provider:
        return provider.fingerprint()


def test_fingerprint_is_of_what_makes_the_vectors() -> None:
    base = openai()
    assert len(base) == 16
    assert int(base, 16) >= 0
    assert openai(api_key="sk-2", timeout=5, concurrency=1, base_url="https://api.openai.com/v1/") == base
    different = [
        openai(model="text-embedding-3-large"),
        openai(dimensions=512),
        openai(base_url="http://localhost:8000/v1"),
        openai(max_input_tokens=512),
    ]
    assert len({base, *different}) == 5


def test_fingerprint_of_an_own_provider_tells_class_model_and_dimensions_apart() -> None:
    own, same, other_model, wider = Own(), Own(), Own(), Own()
    other_model.model_name, wider.dimensions = "other", 3
    prints = [adapted(p).fingerprint() for p in (own, same, other_model, wider, Derived())]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 4


# --- what a provider says of itself ---


def test_own_object_is_wrapped_once_and_goes_by_its_own_class() -> None:
    own = Own()
    provider = adapted(own)
    assert adapted(provider) is provider
    assert provider.named_class is Own
    assert provider.maker() == (provider.fingerprint(), "own-model", 2)
    assert provider.maker().by_name
    derived = Derived()
    assert adapted(derived) is derived


@pytest.mark.parametrize("kind", [Own, Derived])
def test_of_an_own_provider_the_least_is_expected(kind: type[Any]) -> None:
    provider = adapted(kind())
    assert provider.worker_spec() is None
    assert provider.concurrent_calls == 1
    assert provider.read_chars == 2_000_000
    own = kind()
    own.max_tokens = 512
    assert adapted(own).read_chars == 1024


def test_own_provider_names_the_most_texts_of_a_call() -> None:
    own: Any = Own()
    own.max_batch = 3
    encode(own, ["x"] * 7)
    assert [len(call) for call in own.calls] == [3, 3, 1]
    own.max_batch = None
    encode(own, ["x"] * 7)
    assert len(own.calls[-1]) == 7


def test_our_providers_know_their_window_and_how_they_are_run(minilm: Model) -> None:
    local = FastEmbedProvider(minilm.name, batch_size=7)
    assert local.worker_spec() == EncoderSpec(minilm, 7)
    assert (local.limits_of, local.max_tokens) == ("fastembed", minilm.max_tokens)
    assert local.read_chars == EncoderSpec(minilm, 7).read_chars == 24 * minilm.max_tokens
    with OpenAIProvider(api_key="sk-1", max_input_tokens=100) as api:
        assert (api.limits_of, api.concurrent_calls, api.read_chars) == ("openai", 8, 200)
        assert api.worker_spec() is None


# --- the encoder of an own provider ---


def encode(provider: Any, texts: Sequence[Any]) -> tuple[np.ndarray[Any, Any], Tally, dict[int, str]]:
    out = np.full((len(texts), 2), 7, np.float32)
    tally, refused = ProviderEncoder(provider).encode_each(texts, out)
    return out, tally, refused


@pytest.mark.parametrize("kind", [Own, Derived])
def test_own_provider_fills_the_matrix(kind: type[Any]) -> None:
    texts = ["x" * n for n in range(150)]
    out, tally, refused = encode(kind(), texts)
    assert out.tolist() == [[n, 1] for n in range(150)]
    assert tally == Tally(sum(math.ceil(n / 4) for n in range(150)), tally.tokens, 0)
    assert refused == {}


def test_own_provider_gets_no_more_texts_than_it_takes() -> None:
    own = Own()
    encode(own, ["x"] * 150)
    assert [len(call) for call in own.calls] == [64, 64, 22]


def test_texts_that_are_no_text_never_reach_a_provider() -> None:
    own = Own()
    out, _, refused = encode(own, ["one", "\ud800", "three", 4])
    assert own.calls == [["one", "three"]]
    assert out.tolist() == [[3, 1], [0, 0], [5, 1], [0, 0]]
    assert list(refused) == [1, 3]


def test_refused_text_leaves_the_others_alone() -> None:
    class Picky(Own):
        def embed_batch(self, texts: list[str]) -> list[list[float]]:
            for i, text in enumerate(texts):
                if text == "bad":
                    raise ProviderInputError(i, "it is bad")
            return super().embed_batch(texts)

    out, _, refused = encode(Picky(), ["one", "bad", "three", "bad"])
    assert out.tolist() == [[3, 1], [0, 0], [5, 1], [0, 0]]
    assert refused == {1: "it is bad", 3: "it is bad"}
    with pytest.raises(ProviderInputError) as caught:
        ProviderEncoder(as_provider(Picky())).encode(["one", "bad"], np.empty((2, 2), np.float32))
    assert caught.value.index == 1


def test_vector_that_is_not_finite_is_refused() -> None:
    own = Own()
    own.embed_batch = lambda texts: [[1.0, 2.0], [math.nan, 1.0], [1e39, 1.0]]  # type: ignore[method-assign]
    out, _, refused = encode(own, ["a", "b", "c"])
    assert out.tolist() == [[1, 2], [0, 0], [0, 0]]
    assert list(refused) == [1, 2]


@pytest.mark.parametrize("vectors", [[[1.0, 2.0]], [[1.0], [2.0]], [[1.0, 2.0], [1.0]], [[1.0, "x"], [1.0, 2.0]], None])
def test_answer_of_another_shape_is_an_error(vectors: Any) -> None:
    own = Own()
    own.embed_batch = lambda texts: vectors  # type: ignore[method-assign]
    with pytest.raises(ProviderError, match=r"Own\.embed_batch gave"):
        encode(own, ["a", "b"])


def test_failure_of_an_own_provider_keeps_its_cause_but_not_its_text() -> None:
    def fail(texts: list[str]) -> list[list[float]]:
        raise RuntimeError(f"cannot embed {texts[0]}")

    own = Own()
    own.embed_batch = fail  # type: ignore[method-assign]
    with pytest.raises(ProviderError) as caught:
        encode(own, ["a secret"])
    assert str(caught.value) == "The embedding provider Own failed with RuntimeError."
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_self_test_refuses_a_provider_without_direction() -> None:
    own = Own()
    ProviderEncoder(as_provider(own)).self_test()
    own.embed_batch = lambda texts: [[0.0, 0.0]]  # type: ignore[method-assign]
    with pytest.raises(ModelError, match="zeros"):
        ProviderEncoder(as_provider(own)).self_test()


@pytest.mark.parametrize("shape", [(2, 2), (1, 3)])
def test_matrix_of_another_shape_is_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match="expected float32 of"):
        ProviderEncoder(as_provider(Own())).encode(["one"], np.empty(shape, np.float32))


def test_refused_texts_survive_pickling() -> None:
    error = ProviderInputError.of({5: "b", 2: "a"})
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.index, copy.reason, copy.refused, str(copy)) == (2, "a", {5: "b", 2: "a"}, str(error))
    assert isinstance(copy, ValueError)


# --- FastEmbed ---


@pytest.fixture(scope="module")
def fastembed(minilm: Model) -> FastEmbedProvider:
    return FastEmbedProvider(minilm.name)


def test_fastembed_gives_the_encoders_vectors(fastembed: FastEmbedProvider, minilm: Model) -> None:
    texts = ["A man is eating food.", "", "汉字"]
    matrix = fastembed.embed_matrix(texts)
    assert matrix.dtype == np.float32
    assert np.array_equal(matrix, Encoder(EncoderSpec(minilm, 100)).embed(texts))
    assert fastembed.embed_batch(texts) == matrix.tolist()
    assert np.allclose(fastembed.embed(texts[0]), matrix[0], atol=1e-6)
    assert fastembed.embed_batch([]) == []


def test_fastembed_tells_its_model(fastembed: FastEmbedProvider, minilm: Model) -> None:
    assert (fastembed.dimensions, fastembed.model_name) == (384, minilm.name)
    assert fastembed.spec == EncoderSpec(minilm, 100)
    assert fastembed.fingerprint() == minilm.fingerprint()
    assert repr(fastembed) == f"FastEmbedProvider('{minilm.name}')"


def test_fastembed_encoder_leaves_out_what_is_no_text(fastembed: FastEmbedProvider) -> None:
    encoder = ProviderEncoder(fastembed)
    encoder.self_test()
    assert encoder.max_tokens == fastembed.spec.model.max_tokens
    out = np.full((3, 384), 7, np.float32)
    tally, refused = encoder.encode_each(["one", "\udfff", "two"], out)
    assert list(refused) == [1]
    assert not out[1].any()
    assert np.allclose(out[[0, 2]], fastembed.embed_matrix(["one", "two"]), atol=1e-6)
    assert tally.tokens == 6
    assert encoder.encode(["one"], out[:1]) == Tally(3, 3, 0)
    assert encoder.encode([], out[:0]) == Tally(0, 0, 0)


def test_fastembed_refuses_a_text_that_is_none(fastembed: FastEmbedProvider) -> None:
    with pytest.raises(ProviderInputError, match="Text 1 cannot be embedded: it is NoneType, expected a string"):
        fastembed.embed_batch(["one", None])  # type: ignore[list-item]
    with pytest.raises(UsageError, match="expected a list of strings"):
        fastembed.embed_batch("one")  # type: ignore[arg-type]


def test_fastembed_model_is_not_touched_before_it_is_needed(monkeypatch: pytest.MonkeyPatch, minilm: Model) -> None:
    resolved: list[str] = []

    def resolve(name: str, path: Path | None) -> Model:
        resolved.append(name)
        return minilm

    monkeypatch.setattr("kdb_fast.embedding.providers.fastembed.resolve", resolve)
    provider = get_provider("fastembed")
    assert isinstance(provider, FastEmbedProvider)
    assert provider.model_name == "BAAI/bge-small-en-v1.5"
    assert resolved == []
    threads = [threading.Thread(target=lambda: provider.dimensions) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert resolved == ["BAAI/bge-small-en-v1.5"]


def test_fastembed_finds_a_model_in_another_directory(minilm: Model, tmp_path: Path) -> None:
    assert FastEmbedProvider(minilm.name, minilm.path.parent).dimensions == 384
    assert FastEmbedProvider(model=minilm.name, model_path=minilm.path).dimensions == 384
    with pytest.raises(ModelError, match="not a directory"):
        FastEmbedProvider(minilm.name, tmp_path).dimensions  # noqa: B018


def test_fastembed_option_that_would_have_no_effect_is_refused() -> None:
    with pytest.raises(OptionError, match="no option cuda"):
        get_provider("fastembed", cuda=True)
    for size in (0, 1001):
        with pytest.raises(ValueError, match=f"batch_size is {size}; expected 1 to 1,000"):
            get_provider("fastembed", batch_size=size)
    with pytest.raises(ValueError, match="threads is 0; expected at least 1"):
        get_provider("fastembed", threads=0)
    assert get_provider("fastembed", batch_size=1000).model_name


# --- options of the OpenAI provider ---


def test_openai_defaults_are_kameleondbs() -> None:
    with get_provider("openai", api_key="sk-1") as provider:
        assert isinstance(provider, OpenAIProvider)
        assert (provider.model_name, provider.dimensions) == ("text-embedding-3-small", 384)
        assert provider.base_url == "https://api.openai.com/v1"
        assert repr(provider) == (
            "OpenAIProvider('text-embedding-3-small', dimensions=384, base_url='https://api.openai.com/v1')"
        )


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"api_key": None}, "no OpenAI API key"),
        ({"api_key": " "}, "no OpenAI API key"),
        ({"api_key": "sk-secret\nsk-secret"}, "api_key is empty or holds a space, a line break"),
        ({"api_key": "sk-sécret"}, "api_key is empty or holds"),
        ({"organization": "a b"}, "organization is empty or holds"),
        ({"model": ""}, "model is ''"),
        ({"dimensions": 0}, "dimensions is 0"),
        ({"dimensions": True}, "dimensions is True"),
        ({"max_retries": -1}, "max_retries is -1"),
        ({"concurrency": 0}, "concurrency is 0"),
        ({"max_inputs": 0}, "max_inputs is 0; expected a whole number from 1 to 2,048"),
        ({"max_inputs": 2049}, "max_inputs is 2049; expected a whole number from 1 to 2,048"),
        ({"timeout": 0}, "timeout is 0"),
        ({"base_url": "api.openai.com"}, "base_url is not an HTTP address"),
        ({"base_url": "ftp://host/v1"}, "base_url is not an HTTP address"),
        ({"base_url": "https://"}, "base_url is not an HTTP address"),
        ({"base_url": "http://host:port/v1"}, "base_url is not an HTTP address"),
        ({"base_url": "https://user:sk-secret@host/v1"}, "base_url holds a user"),
        ({"base_url": "https://host/v1?key=sk-secret"}, "base_url holds a user, a query"),
    ],
)
def test_option_that_makes_no_sense_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError) as caught:
        OpenAIProvider(**{"api_key": "sk-1", **options})
    assert says in str(caught.value)
    assert "secret" not in str(caught.value)


def test_provider_speaks_through_a_transport_of_the_callers() -> None:
    def handle(request: httpx.Request) -> httpx.Response:
        texts = json.loads(request.content)["input"]
        data = [{"index": i, "embedding": [float(len(text)), 1.0]} for i, text in enumerate(texts)]
        return httpx.Response(200, json={"data": data})

    with OpenAIProvider(api_key="sk-1", dimensions=2, transport=httpx.MockTransport(handle)) as provider:
        assert provider.embed_batch(["one", "three"]) == [[3, 1], [5, 1]]


# --- requests ---


@given(st.text(max_size=60), st.integers(0, 100))
def test_cut_keeps_whole_characters_up_to_the_limit(text: str, limit: int) -> None:
    kept = cut_bytes(text, limit)
    size = len(kept.encode())
    assert text.startswith(kept)
    assert size <= limit
    assert kept == text or size + len(text[len(kept)].encode()) > limit


@given(
    st.lists(st.text(min_size=1, max_size=40), max_size=40),
    st.sets(st.integers(0, 39)),
    st.integers(1, 7),
    st.integers(1, 12),
)
def test_requests_hold_every_text_once_in_order(
    texts: list[str], leave_out: set[int], max_inputs: int, max_input_tokens: int
) -> None:
    requests = list(pack(texts, leave_out, max_inputs=max_inputs, max_input_tokens=max_input_tokens))
    inputs = [one for request in requests for one in request]
    assert [one.row for one in inputs] == [row for row in range(len(texts)) if row not in leave_out]
    assert all(0 < len(request) <= max_inputs for request in requests)
    for one in inputs:
        assert one.text == cut_bytes(texts[one.row], 4 * max_input_tokens)
        assert one.cut == (one.text != texts[one.row])


def test_requests_hold_at_most_300_000_tokens_by_the_estimate() -> None:
    sizes = [len(request) for request in pack(["x" * 2000] * 700, ())]  # 1,000 tokens each
    assert sizes == [300, 300, 100]
    sizes = [len(request) for request in pack(["x" * 10**6] * 40, ())]  # one window each, however long
    assert sizes == [300_000 // MAX_INPUT_TOKENS, 40 - 300_000 // MAX_INPUT_TOKENS]


def test_refused_text_is_cut_step_by_step_to_what_must_fit() -> None:
    lengths = []
    text = shorter("x" * 1000, 100)
    while text is not None:
        lengths.append(len(text))
        text = shorter(text, 100)
    assert lengths == [400, 200, 100]


# --- answers ---


def answer(*embeddings: Any, **usage: int) -> bytes:
    data = [{"index": i, "embedding": e} for i, e in enumerate(embeddings)]
    return json.dumps({"data": data, "usage": usage}).encode()


def test_vectors_are_read_from_base64_and_from_lists() -> None:
    packed = base64.b64encode(np.array([0.5, -2.0], "<f4").tobytes()).decode()
    vectors, tokens = decode(answer(packed, [3, 4.5], total_tokens=9), 2, 2, "m")
    assert vectors.dtype == np.float32
    assert vectors.tolist() == [[0.5, -2.0], [3, 4.5]]
    assert tokens == 9


def test_answer_without_index_or_usage_is_in_order() -> None:
    vectors, tokens = decode(b'{"data": [{"embedding": [1]}, {"embedding": [2]}]}', 2, 1, "m")
    assert vectors.tolist() == [[1], [2]]
    assert tokens == 0


@pytest.mark.parametrize(
    "content",
    [
        b"", b"null", b"[]", b"{}", b'{"data": 1}', b'{"data": []}', b'{"data": [1]}', b"\xff\xfe", b"[" * 100_000,
        b'{"data": [{"index": 0}]}',
        b'{"data": [{"index": 1, "embedding": [1]}]}',
        b'{"data": [{"index": "0", "embedding": [1]}]}',
        b'{"data": [{"index": 0.0, "embedding": [1]}]}',
        b'{"data": [{"index": 0, "embedding": null}]}',
        b'{"data": [{"index": 0, "embedding": []}]}',
        b'{"data": [{"index": 0, "embedding": ["x"]}]}',
        b'{"data": [{"index": 0, "embedding": {"a": 1}}]}',
        b'{"data": [{"index": 0, "embedding": "AAA="}]}',
        b'{"data": [{"index": 0, "embedding": "\xc3\xa9"}]}',
        b'{"data": [{"index": 0, "embedding": [1]}], "usage": 5}',
    ],
)  # fmt: skip
def test_damaged_answer_is_told_from_a_good_one(content: bytes) -> None:
    with pytest.raises(OddAnswerError):
        decode(content, 1, 1, "m")


@given(st.binary(max_size=200))
def test_no_answer_breaks_the_reader(content: bytes) -> None:
    with pytest.raises(OddAnswerError):
        decode(content, 1, 1, "m")
    assert read_problem(500, content).status == 500


@pytest.mark.parametrize(
    ("content", "shown", "message"),
    [
        (b'{"error": {"message": "m", "type": "t", "code": "c", "param": "p"}}', "HTTP 400 (c)", "m"),
        (b'{"error": {"message": "m", "type": "t", "code": null}}', "HTTP 400 (t)", "m"),
        (b'{"object": "error", "message": "m", "type": "BadRequestError", "code": 400}',
         "HTTP 400 (BadRequestError)", "m"),
        (b'{"error": "model not loaded"}', "HTTP 400", "model not loaded"),
        (b'{"detail": "m"}', "HTTP 400", "m"),
        (b'{"error": {"message": "m", "code": "the text itself, quoted"}}', "HTTP 400", "m"),
        (b"<html>", "HTTP 400", ""),
        (b"[]", "HTTP 400", ""),
    ],
)  # fmt: skip
def test_problem_is_read_in_the_forms_that_servers_have(content: bytes, shown: str, message: str) -> None:
    problem = read_problem(400, content)
    assert (str(problem), problem.message) == (shown, message)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("1s", 1), ("6m0s", 360), ("12ms", 0.012), ("1h2m3.5s", 3723.5), ("7.66s", 7.66), ("1d", 86400),
     ("", None), ("5", None), ("s", None), ("1x", None), ("-1s", None), ("1s later", None)],
)  # fmt: skip
def test_duration_is_read_as_the_api_writes_it(text: str, seconds: float | None) -> None:
    assert duration(text) == (None if seconds is None else pytest.approx(seconds))


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "-5"}, None),
        ({"retry-after": "0"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after-ms": "soon", "retry-after": "2"}, 2),
        ({"retry-after": "Thu, 01 Jan 1970 00:00:00 GMT"}, None),
        ({"retry-after": "soon", "x-ratelimit-reset-tokens": "2s", "x-ratelimit-reset-requests": "5ms"}, 2),
    ],
)
def test_wait_that_makes_no_sense_is_ignored(headers: dict[str, str], seconds: float | None) -> None:
    assert server_wait(headers) == seconds


def test_errors_of_providers_are_kdb_fasts_own() -> None:
    for kind in (ProviderError, ProviderInputError, OptionError, MissingPackageError):
        assert issubclass(kind, KdbFastError)
    assert [ProviderError("").exit_code, ProviderInputError(0, "").exit_code] == [7, 2]
