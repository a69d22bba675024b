"""The OpenAI provider against a real HTTP server that keeps the API's limits and misbehaves as told."""

from __future__ import annotations

import logging
import os
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from openai_server import KEY, MODEL, Items, OpenAIServer, Reply, hashed, shortened

from kdb_fast.embedding.encoder import PROBE, Encoder, EncoderSpec, Tally
from kdb_fast.embedding.models.lookup import Model
from kdb_fast.embedding.providers.encoder import ProviderEncoder
from kdb_fast.embedding.providers.factory import get_provider
from kdb_fast.embedding.providers.openai.provider import OpenAIProvider
from kdb_fast.embedding.providers.openai.requests import MAX_BACKOFF_SECONDS
from kdb_fast.errors import KdbFastError, ModelError, ProviderError, ProviderInputError, ProviderKeyError

DIMENSIONS = 16
Build = Callable[..., OpenAIProvider]


@pytest.fixture(autouse=True)
def _no_settings_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("OPENAI_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    with OpenAIServer() as server:
        yield server


class Time:
    """A clock that only goes on when somebody sleeps; ``waits`` are the sleeps in seconds."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.waits: list[float] = []

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def build(server: OpenAIServer, time: Time) -> Iterator[Build]:
    """Builds providers for the server that do not really wait."""
    built: list[OpenAIProvider] = []

    def build(**options: Any) -> OpenAIProvider:
        options = {"dimensions": DIMENSIONS, "api_key": KEY, "base_url": server.url, **options}
        built.append(OpenAIProvider(**options, sleep=time.sleep, clock=time.clock))
        return built[-1]

    yield build
    for provider in built:
        provider.close()


def expected(texts: Sequence[str], dimensions: int = DIMENSIONS) -> npt.NDArray[np.float32]:
    return shortened(hashed(texts), dimensions)


def rate_limited(**headers: str) -> Reply:
    return Reply(429, {"code": "rate_limit_exceeded"}, {k.replace("_", "-"): v for k, v in headers.items()})


def error_of(provider: OpenAIProvider, texts: list[str]) -> KdbFastError:
    with pytest.raises(KdbFastError) as caught:
        provider.embed_batch(texts)
    return caught.value


# --- what is asked and what comes back ---


def test_vectors_are_the_servers_in_the_order_of_the_texts(server: OpenAIServer, build: Build) -> None:
    texts = ["one", "two", "drei", "四", "one"]
    vectors = build().embed_batch(texts)
    assert np.array_equal(np.array(vectors, np.float32), expected(texts))
    assert all(isinstance(number, float) for number in vectors[0])
    (request,) = server.seen
    assert request.body == {
        "model": MODEL, "input": texts, "dimensions": DIMENSIONS, "encoding_format": "base64"
    }  # fmt: skip
    assert request.headers["authorization"] == f"Bearer {KEY}"
    assert "openai-organization" not in request.headers


def test_one_text_and_no_text(server: OpenAIServer, build: Build) -> None:
    provider = build()
    assert provider.embed_batch([]) == []
    assert server.seen == []
    assert np.array_equal(np.array([provider.embed("one")], np.float32), expected(["one"]))
    result = provider.embed_with_metadata("two")
    assert (result.text, result.model, result.dimensions) == ("two", MODEL, DIMENSIONS)


def test_order_does_not_depend_on_the_order_of_the_answer(server: OpenAIServer, build: Build) -> None:
    server.always = Reply(change=lambda items: items[::-1])
    texts = [f"text {i}" for i in range(50)]
    assert np.array_equal(build(max_inputs=7).embed_matrix(texts), expected(texts))


def test_environment_gives_key_and_address(server: OpenAIServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n")
    monkeypatch.setenv("OPENAI_BASE_URL", server.url + "/")
    with get_provider("openai", dimensions=DIMENSIONS, organization="org-1") as provider:
        assert len(provider.embed("one")) == DIMENSIONS
    assert server.seen[0].headers["openai-organization"] == "org-1"


def test_server_without_a_key_needs_none() -> None:
    with OpenAIServer(key=None) as server, OpenAIProvider(base_url=server.url, dimensions=DIMENSIONS) as provider:
        assert len(provider.embed("one")) == DIMENSIONS
        assert "authorization" not in server.seen[0].headers


def test_lists_are_taken_where_the_server_does_not_know_base64(server: OpenAIServer, build: Build) -> None:
    server.always_lists = True
    assert np.allclose(build().embed_matrix(["one", "two"]), expected(["one", "two"]))
    server.always_lists, server.unknown_fields = False, {"encoding_format"}
    provider = build()
    for _ in range(2):
        assert np.allclose(provider.embed_matrix(["one", "two"]), expected(["one", "two"]))
    assert [request.status for request in server.seen] == [200, 400, 200, 200]  # it asks once


def test_server_that_cannot_shorten_is_asked_for_its_own_length(server: OpenAIServer, build: Build) -> None:
    server.unknown_fields = {"dimensions"}
    assert np.array_equal(build(dimensions=64).embed_matrix(["one"]), expected(["one"], 64))
    error = error_of(build(dimensions=16), ["one"])
    assert isinstance(error, ModelError)
    assert "64 numbers; expected 16" in str(error)


# --- limits ---


def test_requests_keep_to_the_limit_of_inputs(server: OpenAIServer, build: Build) -> None:
    texts = [f"text {i}" for i in range(4100)]
    vectors = build().embed_matrix(texts)
    assert sorted(len(request.texts) for request in server.seen) == [4, 2048, 2048]
    assert {request.status for request in server.seen} == {200}
    assert np.array_equal(vectors[4000:], expected(texts[4000:]))


@pytest.mark.parametrize("text", ["word " * 4500, "汉" * 7500])
def test_requests_keep_to_the_limit_of_tokens(text: str, server: OpenAIServer, build: Build) -> None:
    server.tokens = lambda text: -(-len(text.encode()) // 3)
    texts = [f"{i} {text}" for i in range(75)]
    vectors = build().embed_matrix(texts)
    assert {request.status for request in server.seen} == {200}
    assert len(server.seen) == 3
    assert vectors.shape == (75, DIMENSIONS)


def test_texts_of_more_tokens_than_thought_go_in_halves(server: OpenAIServer, build: Build) -> None:
    server.tokens = lambda text: len(text)  # a token a byte: the worst there is
    texts = [f"{i:04d}" + "0f" * 4000 for i in range(60)]
    assert np.array_equal(build().embed_matrix(texts), expected(texts))
    assert sorted(text for text in server.embedded if text != PROBE) == texts  # none was paid for twice
    assert len(server.seen) <= 2 + 3


def test_long_text_is_cut_at_the_longest_length_that_the_server_takes(server: OpenAIServer, build: Build) -> None:
    encoder = ProviderEncoder(build())
    out = np.empty((3, DIMENSIONS), np.float32)
    text = "wörd " * 20_000
    for bytes_per_token, longest in [(4, 4 * 8191), (3, 2 * 8191), (1, 8191)]:
        server.tokens = lambda text, size=bytes_per_token: -(-len(text.encode()) // size)  # type: ignore[misc]
        tally = encoder.encode(["short", text, "short as well"], out)
        kept = text.encode()[:longest].decode(errors="ignore")
        assert np.array_equal(out, expected(["short", kept, "short as well"]))
        assert tally.truncated == 1


def test_cut_does_not_depend_on_the_other_texts(server: OpenAIServer, build: Build) -> None:
    server.tokens = lambda text: -(-len(text) // 3)
    texts = [f"{i} " + "word " * (1000 * i) for i in range(1, 9)]
    provider = build()
    alone = np.array([provider.embed(text) for text in texts], np.float32)
    assert np.array_equal(provider.embed_matrix(texts), alone)


def test_window_may_be_smaller(server: OpenAIServer, build: Build) -> None:
    provider = build(max_input_tokens=100)
    assert np.array_equal(provider.embed_matrix(["x" * 1000]), expected(["x" * 400]))


def test_empty_text_is_refused_before_anything_is_sent(server: OpenAIServer, build: Build) -> None:
    error = error_of(build(), ["one", "", "two"])
    assert isinstance(error, ProviderInputError)
    assert (error.index, error.reason) == (1, "it is empty, which the API refuses")
    assert server.seen == []


# --- several requests at once ---


def test_several_requests_are_in_flight(server: OpenAIServer, build: Build) -> None:
    server.barrier = threading.Barrier(3)  # nobody is answered before three are there
    texts = [f"text {i}" for i in range(6)]
    assert np.array_equal(build(concurrency=3, max_inputs=1).embed_matrix(texts), expected(texts))
    assert server.most_in_flight == 3


def test_no_more_requests_are_in_flight_than_allowed_whoever_asks(server: OpenAIServer, build: Build) -> None:
    server.always = Reply(seconds=0.01)
    provider = build(concurrency=2, max_inputs=1)
    texts = [f"text {i}" for i in range(8)]
    threads = [threading.Thread(target=provider.embed_batch, args=(texts,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(server.embedded) == 24
    assert server.most_in_flight <= 2


def test_first_error_ends_all_requests(server: OpenAIServer, build: Build) -> None:
    error = error_of(build(api_key="sk-wrong", max_inputs=1, concurrency=2), [f"text {i}" for i in range(200)])
    assert isinstance(error, ProviderKeyError)
    assert len(server.seen) < 200


def test_first_error_wakes_those_that_wait(
    server: OpenAIServer, new_threads: Callable[[str], list[threading.Thread]]
) -> None:
    server.barrier = threading.Barrier(2)
    server.script.extend([rate_limited(retry_after="300"), Reply(401)])
    with OpenAIProvider(api_key=KEY, base_url=server.url, max_inputs=1) as provider:  # this one really waits
        assert isinstance(error_of(provider, ["one", "two"]), ProviderKeyError)
    for thread in new_threads("kdb-fast-openai"):
        thread.join(20)
    assert not new_threads("kdb-fast-openai")
    assert len(server.seen) == 2


# --- waiting and trying again ---


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry_after_ms": "250", "retry_after": "9"}, 0.25),
        ({"retry_after": "7"}, 7),
        ({"retry_after": "1.5"}, 1.5),
        ({"retry_after": "Fri, 01 Jan 2038 00:00:20 GMT", "date": "Fri, 01 Jan 2038 00:00:00 GMT"}, 20),
        ({"x_ratelimit_reset_requests": "6m0s"}, 360),
        (
            {
                "x_ratelimit_remaining_requests": "99", "x_ratelimit_reset_requests": "3m",
                "x_ratelimit_remaining_tokens": "0", "x_ratelimit_reset_tokens": "12.5s",
            },
            12.5,
        ),
    ],
)  # fmt: skip
def test_wait_is_the_servers(
    headers: dict[str, str], seconds: float, server: OpenAIServer, build: Build, time: Time
) -> None:
    server.script.append(rate_limited(**headers))
    assert np.array_equal(build().embed_matrix(["one"]), expected(["one"]))
    assert time.waits == [pytest.approx(seconds)]


def test_server_errors_are_tried_again_after_growing_waits(server: OpenAIServer, build: Build, time: Time) -> None:
    statuses = [500, 502, 503, 504, 529, 408]
    server.script.extend(Reply(status, body=b"<html>Bad gateway</html>") for status in statuses)
    assert np.array_equal(build().embed_matrix(["one"]), expected(["one"]))
    assert len(time.waits) == len(statuses)
    for n, wait in enumerate(time.waits, start=1):
        assert 0 <= wait <= min(MAX_BACKOFF_SECONDS, 0.5 * 2**n)


def test_trying_again_has_an_end(server: OpenAIServer, build: Build, time: Time) -> None:
    server.always = Reply(503)
    error = error_of(build(max_retries=2), ["one"])
    assert isinstance(error, ProviderError)
    assert error.exit_code == 7
    assert "3 attempts; the last was HTTP 503" in str(error)
    assert len(server.seen) == 3


def test_wait_beyond_the_deadline_is_not_begun(server: OpenAIServer, build: Build, time: Time) -> None:
    server.always = rate_limited(retry_after="3600")
    error = error_of(build(), ["one"])
    assert "asks to wait 3,600 seconds" in str(error)
    assert time.waits == []


def test_all_waits_of_a_request_together_have_a_limit(server: OpenAIServer, build: Build, time: Time) -> None:
    server.always = rate_limited(retry_after="250")
    assert isinstance(error_of(build(max_retries=100), ["one"]), ProviderError)
    assert time.waits == [250, 250]


def test_rate_limit_holds_for_the_other_requests_too(server: OpenAIServer, build: Build, time: Time) -> None:
    server.script.append(rate_limited(retry_after="8"))
    provider = build()
    sent_meanwhile: list[int] = []

    def sleep(seconds: float) -> None:
        time.waits.append(seconds)
        if len(time.waits) == 1:  # while the first request waits, another one comes
            provider.embed("two")
            sent_meanwhile.append(len(server.seen))
        time.now = max(time.now, 1008.0)

    provider._api._requests.sleep = sleep
    provider.embed("one")
    assert time.waits == [8, 8]
    assert sent_meanwhile == [2]


def test_connection_that_breaks_is_tried_again(server: OpenAIServer, build: Build, time: Time) -> None:
    server.script.extend([Reply(cut=0), Reply(cut=20)])
    assert np.array_equal(build().embed_matrix(["one"]), expected(["one"]))
    assert len(time.waits) == 2


def test_slow_answer_is_not_waited_for(server: OpenAIServer, build: Build, time: Time) -> None:
    release = threading.Event()
    server.script.append(Reply(hold=release))
    try:
        assert np.array_equal(build(timeout=0.3).embed_matrix(["one"]), expected(["one"]))
    finally:
        release.set()
    assert len(time.waits) == 1


def test_server_that_is_not_there(build: Build, time: Time) -> None:
    with OpenAIServer() as gone:
        url = gone.url
    error = error_of(build(base_url=url, max_retries=1), ["one"])
    assert isinstance(error, ProviderError)
    assert url in str(error)
    assert "ConnectError" in str(error)
    assert len(time.waits) == 1


# --- what waiting does not change ---


@pytest.mark.parametrize(
    ("reply", "kind", "says"),
    [
        (Reply(401, {"code": "invalid_api_key"}), ProviderKeyError, "refuses the API key: HTTP 401 (invalid_api_key)"),
        (Reply(403, {"code": "unsupported_country"}), ProviderKeyError, "does not let this key use"),
        (Reply(404, {"code": "model_not_found"}), ModelError, f"knows no embedding model {MODEL}"),
        (Reply(402), ProviderError, "no quota left: HTTP 402"),
        (Reply(429, {"code": "insufficient_quota"}), ProviderError, "no quota left: HTTP 429 (insufficient_quota)"),
        (Reply(307, headers={"location": "/elsewhere"}), ProviderError, "answered HTTP 307; expected 200"),
        (Reply(405, body=b"no"), ProviderError, "answered HTTP 405; expected 200"),
    ],
)
def test_final_answer_is_not_tried_again(
    reply: Reply, kind: type[KdbFastError], says: str, server: OpenAIServer, build: Build, time: Time
) -> None:
    server.always = reply
    error = error_of(build(), ["one", "two"])
    assert isinstance(error, kind)
    assert says in str(error)
    assert error.remedy
    assert len(server.seen) == 1
    assert time.waits == []


def test_exit_codes_tell_a_refused_key_from_a_server_that_is_down(server: OpenAIServer, build: Build) -> None:
    assert error_of(build(api_key="sk-wrong"), ["one"]).exit_code == 4
    assert error_of(build(model="no-such-model"), ["one"]).exit_code == 4


def test_key_is_nowhere_to_be_seen(server: OpenAIServer, build: Build, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    wrong = "sk-proj-Wrong9876543210zyxwvu"
    other = "anotherKindOfKey0123"
    shown: list[str] = []
    for key, prepare in [
        (other, Reply(400, {"message": f"{other} may not do this"})),
        (wrong, None),
        (KEY, Reply(400, {"message": f"{KEY} may not do this"})),
        (KEY, Reply(403, {"message": KEY, "code": KEY + " "})),
        (KEY, Reply(500, {"message": KEY})),
        (KEY, Reply(418, {"message": KEY})),
        (KEY, Reply(body=KEY.encode())),
        (KEY, Reply(cut=3)),
    ]:
        server.always = prepare
        provider = build(api_key=key, max_retries=1)
        error = error_of(provider, ["one", "two"])
        shown += [str(error), repr(error), repr(provider), repr(vars(provider)), repr(vars(provider._api))]
        shown.append("".join(traceback.format_exception(error)))
    assert caplog.records
    shown += [record.getMessage() for record in caplog.records]
    assert not [text for text in shown if KEY in text or other in text or "Wrong9876" in text]


# --- refused inputs ---


def test_refused_text_is_found_among_many(server: OpenAIServer, build: Build) -> None:
    server.refuses = lambda text: "bad" in text
    texts = [f"text {i}" for i in range(300)]
    texts[123] = "a bad secret"
    provider = build()
    error = error_of(provider, texts)
    assert isinstance(error, ProviderInputError)
    assert (error.index, set(error.refused)) == (123, {123})
    assert "Text 123 cannot be embedded: the API refuses it, HTTP 400" in str(error)
    assert "secret" not in str(error)


def test_all_other_texts_are_embedded_once(server: OpenAIServer, build: Build) -> None:
    server.refuses = lambda text: "bad" in text
    texts = [f"text {i}" for i in range(300)]
    texts[5] = texts[123] = "a bad one"
    texts[200] = ""
    texts[201] = "\ud800"
    out = np.full((300, DIMENSIONS), 7, np.float32)
    tally, refused = ProviderEncoder(build()).encode_each(texts, out)
    good = [i for i in range(300) if i not in (5, 123, 200, 201)]
    assert list(refused) == [5, 123, 200, 201]
    assert np.array_equal(out[good], expected([texts[i] for i in good]))
    assert not out[list(refused)].any()
    embedded = [text for text in server.embedded if text != PROBE]
    assert sorted(embedded) == sorted(texts[i] for i in good)
    assert tally.tokens == sum(-(-len(text) // 4) for text in embedded)
    assert len(server.seen) < 50


def test_server_that_refuses_everything_is_no_matter_of_the_text(server: OpenAIServer, build: Build) -> None:
    server.always = Reply(400, {"message": "dimensions must be one of 256, 512.", "code": "invalid_value"})
    error = error_of(build(), [f"text {i}" for i in range(100)])
    assert isinstance(error, ModelError)
    assert "refuses every request" in str(error)
    assert "dimensions must be one of 256, 512." in str(error)
    assert len(server.seen) == 2


def test_request_larger_than_the_limit_of_a_minute_goes_in_halves(server: OpenAIServer, build: Build) -> None:
    server.script.append(Reply(429, {"message": "Request too large for this model", "code": "rate_limit_exceeded"}))
    server.script.append(Reply())  # the probe
    server.script.append(Reply(413, body=b"too large"))
    texts = [f"text {i}" for i in range(8)]
    assert np.array_equal(build().embed_matrix(texts), expected(texts))
    assert [len(request.texts) for request in server.seen] == [8, 1, 4, 2, 2, 4]


# --- damaged answers ---


def without_last(items: Items) -> Items:
    return items[:-1]


def twice_first(items: Items) -> Items:
    return [items[0], *items[:-1]]


def with_nan(items: Items) -> Items:
    return [items[0] | {"embedding": [float("nan")] * DIMENSIONS}, *items[1:]]


def beyond_float32(items: Items) -> Items:
    return [items[0] | {"embedding": [1e39] * DIMENSIONS}, *items[1:]]


def without_embedding(items: Items) -> Items:
    return [{"index": i} for i in range(len(items))]


DAMAGED = {
    "missing": Reply(change=without_last),
    "twice": Reply(change=twice_first),
    "empty": Reply(change=lambda items: []),
    "no embedding": Reply(change=without_embedding),
    "nan": Reply(change=with_nan),
    "beyond float32": Reply(change=beyond_float32),
    "not base64": Reply(change=lambda items: [item | {"embedding": "###"} for item in items]),
    "html": Reply(body=b"<html>sign in</html>"),
    "other json": Reply(body=b"[1, 2]"),
    "nothing": Reply(body=b""),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_answer_is_asked_for_again(damage: str, server: OpenAIServer, build: Build, time: Time) -> None:
    server.script.append(DAMAGED[damage])
    assert np.array_equal(build().embed_matrix(["one", "two"]), expected(["one", "two"]))
    assert len(time.waits) == 1


@pytest.mark.parametrize("damage", ["missing", "html"])
def test_answer_that_stays_damaged_is_an_error(damage: str, server: OpenAIServer, build: Build) -> None:
    server.always = DAMAGED[damage]
    error = error_of(build(), ["one", "two"])
    assert isinstance(error, ProviderError)
    assert ("1 vectors for 2 texts" if damage == "missing" else "no list of embeddings") in str(error)
    assert len(server.seen) == 3


def test_vector_that_is_never_finite_is_a_matter_of_its_text(server: OpenAIServer, build: Build) -> None:
    server.always = DAMAGED["nan"]
    out = np.empty((2, DIMENSIONS), np.float32)
    _, refused = ProviderEncoder(build()).encode_each(["one", "two"], out)
    assert refused == {0: "the API gives a vector that is not finite"}
    assert not out[0].any()
    assert np.array_equal(out[1:], expected(["two"]))
    assert len(server.seen) == 3


def test_vector_of_another_length_is_an_error_at_once(server: OpenAIServer, build: Build, time: Time) -> None:
    server.always = Reply(change=lambda items: [item | {"embedding": [0.5] * 5} for item in items])
    error = error_of(build(), ["one"])
    assert isinstance(error, ModelError)
    assert "5 numbers; expected 16" in str(error)
    assert time.waits == []


# --- the engines' side ---


def test_tokens_are_the_servers_count_else_an_estimate(server: OpenAIServer, build: Build) -> None:
    encoder = ProviderEncoder(build(max_inputs=2))
    out = np.empty((3, DIMENSIONS), np.float32)
    server.tokens = lambda text: 100
    assert encoder.encode(["one", "two", "three"], out) == Tally(300, 300, 0)
    server.counts_tokens = False
    assert encoder.encode(["12345678", "1", "12345"], out) == Tally(5, 5, 0)


def test_self_test_finds_what_is_wrong_before_the_run(server: OpenAIServer, build: Build) -> None:
    ProviderEncoder(build()).self_test()
    assert server.embedded == [PROBE]
    with pytest.raises(ProviderKeyError):
        ProviderEncoder(build(api_key="sk-wrong")).self_test()
    server.always = Reply(change=lambda items: [item | {"embedding": [0.0] * DIMENSIONS} for item in items])
    with pytest.raises(ModelError, match="zero or not finite"):
        ProviderEncoder(build()).self_test()


def test_closed_provider_says_so(build: Build) -> None:
    with build() as provider:
        provider.embed("one")
    with pytest.raises(KdbFastError, match="closed"):
        provider.embed("one")
    with pytest.raises(KdbFastError, match="closed"):
        provider.probe()


def test_real_vectors_keep_their_meaning(minilm: Model) -> None:
    encoder = Encoder(EncoderSpec(minilm, 100))
    texts = ["A man is eating food.", "Someone has a meal.", "Interest rates rose in March."]
    with (
        OpenAIServer(vectors=encoder.embed) as server,
        OpenAIProvider(dimensions=256, api_key=KEY, base_url=server.url, max_inputs=1) as provider,
    ):
        vectors = provider.embed_matrix(texts)
    assert np.allclose(vectors, shortened(encoder.embed(texts), 256), atol=1e-6)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2]
