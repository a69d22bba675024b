from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kdb_fast.embedding.batching import MAX_PADDING, TOKEN_BUDGET, plan_batches
from kdb_fast.embedding.encoder import _OnnxBackend, mean_pool

LENGTHS = hnp.arrays(np.int64, st.integers(0, 150), elements=st.integers(1, 600))


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 2000), st.integers(1, 150))
def test_batches_hold_every_row_once_within_budget_cap_and_padding(lengths: np.ndarray, budget: int, cap: int) -> None:
    batches = list(plan_batches(lengths, budget, cap))
    assert sorted(int(i) for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = int(lengths[batch].max())
        assert 1 <= len(batch) <= cap
        if len(batch) > 1:
            assert len(batch) * longest <= budget
            padded = len(batch) * longest
            assert padded - int(lengths[batch].sum()) <= MAX_PADDING * padded + 1e-9


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 2000), st.integers(1, 150))
def test_batches_go_from_long_to_short_and_equal_rows_keep_their_order(
    lengths: np.ndarray, budget: int, cap: int
) -> None:
    order = [int(i) for batch in plan_batches(lengths, budget, cap) for i in batch]
    assert order == sorted(range(len(lengths)), key=lambda i: -int(lengths[i]))


@settings(deadline=None)
@given(st.integers(1, 500), st.integers(1, 400), st.integers(1, 200))
def test_rows_of_one_length_fill_their_batches(n: int, length: int, cap: int) -> None:
    sizes = [len(b) for b in plan_batches(np.full(n, length, dtype=np.int64), TOKEN_BUDGET, cap)]
    full = min(cap, max(1, TOKEN_BUDGET // length))
    assert sizes == [full] * (n // full) + ([n % full] if n % full else [])


def test_a_row_longer_than_the_budget_stands_alone() -> None:
    batches = [b.tolist() for b in plan_batches(np.array([4000, 10, 5000]), 1024, 100)]
    assert batches == [[2], [0], [1]]


def test_a_batch_ends_before_padding_would_be_more_than_its_share() -> None:
    batches = [b.tolist() for b in plan_batches(np.array([100, 99, 98, 10, 10]), 1024, 100)]
    assert batches == [[0, 1, 2], [3, 4]]


def reference(hidden: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Mean over marked tokens, then unit length, in float64 and without tricks."""
    result = np.zeros((hidden.shape[0], hidden.shape[2]))
    for row in range(hidden.shape[0]):
        marked = hidden[row].astype(np.float64)[mask[row].astype(bool)]
        mean = marked.mean(axis=0)
        norm = np.sqrt((mean**2).sum())
        result[row] = mean / norm if norm else mean
    return result


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(1, 40), st.integers(1, 48))
def test_mean_pooling_is_that_of_a_float64_reference(seed: int, rows: int, tokens: int, dimensions: int) -> None:
    random = np.random.default_rng(seed)
    hidden = random.normal(size=(rows, tokens, dimensions)).astype(np.float32)
    # Real models give unequal dimensions: some are a hundred times the others.
    hidden *= random.choice([1.0, 100.0], size=dimensions).astype(np.float32)
    lengths = random.integers(1, tokens + 1, size=rows)
    mask = (np.arange(tokens) < lengths[:, None]).astype(np.int64)
    expected = reference(hidden, mask)
    pooled = mean_pool(hidden, mask)
    assert pooled.dtype == np.float32
    assert pooled.shape == (rows, dimensions)
    # Sums that cancel lose digits relative to what was added up.
    mean = np.einsum("rt,rtd->rd", mask, hidden.astype(np.float64)) / lengths[:, None]
    cancelled = np.abs(hidden).max() / np.linalg.norm(mean, axis=1)
    np.testing.assert_allclose(pooled, expected, atol=2e-7 * max(1.0, float(cancelled.max()) * tokens**0.5))


def test_mean_pooling_gives_unit_length() -> None:
    hidden = np.random.default_rng(0).normal(size=(8, 20, 384)).astype(np.float32)
    pooled = mean_pool(hidden, np.ones((8, 20), dtype=np.int64))
    np.testing.assert_allclose(np.linalg.norm(pooled.astype(np.float64), axis=1), 1.0, atol=1e-6)


@pytest.mark.parametrize("fill", [0.0, 1e4, -3.0])
def test_padding_has_no_part_in_a_vector(fill: float) -> None:
    hidden = np.random.default_rng(1).normal(size=(1, 4, 16)).astype(np.float32)
    padded = np.full((1, 9, 16), fill, dtype=np.float32)
    padded[:, :4] = hidden
    mask = np.array([[1, 1, 1, 1, 0, 0, 0, 0, 0]], dtype=np.int64)
    np.testing.assert_allclose(mean_pool(padded, mask), mean_pool(hidden, mask[:, :4]), atol=1e-7)


def test_a_row_without_tokens_gives_zeros_and_not_nan() -> None:
    pooled = mean_pool(np.ones((1, 3, 4), dtype=np.float32), np.zeros((1, 3), dtype=np.int64))
    assert (pooled == 0).all()


@pytest.mark.parametrize(("direction", "second"), [("right", [7, 0, 0]), ("left", [0, 0, 7])])
def test_a_batch_is_padded_on_the_models_side(direction: str, second: list[int]) -> None:
    tokenizer = SimpleNamespace(padding={"pad_id": 0, "direction": direction}, no_padding=lambda: None)
    inner = SimpleNamespace(tokenizer=tokenizer, _preprocess_onnx_input=lambda feed: feed)
    inputs = [SimpleNamespace(name=name) for name in ("input_ids", "attention_mask", "token_type_ids")]
    backend = _OnnxBackend(inner, SimpleNamespace(get_inputs=lambda: inputs))
    feed, mask = backend.batch([[3, 0, 5], [7]], 3)
    assert feed["input_ids"].tolist() == [[3, 0, 5], second]
    assert mask.tolist() == [[1, 1, 1], [int(token == 7) for token in second]]
    assert feed["attention_mask"] is mask
    assert not feed["token_type_ids"].any()
    assert feed["input_ids"].dtype == mask.dtype == np.int64
