"""The numbers behind a lower precision: batches of one width class, overlap, quantisation grids."""

from __future__ import annotations

import numpy as np
import pytest

from kdb_fast.embedding.batching import pack_batches
from kdb_fast.embedding.encoder import Encoder
from kdb_fast.embedding.precision.fidelity import PART, compare, overlap, unit
from kdb_fast.embedding.precision.observation import BLOCK_ROWS, Observed
from kdb_fast.embedding.precision.openvino_rows import SIZES, STEP, row_numbers
from kdb_fast.embedding.precision.preparation import prepared_fingerprint
from kdb_fast.embedding.precision.quantised_weights import (
    DAMPING,
    LARGEST,
    PAIR,
    activation_grid,
    output_error,
    round_weights,
    smoothing,
    weight_scale,
)
from kdb_fast.errors import ModelError, UsageError
from kdb_fast.origins import same_model
from kdb_fast.settings import ReindexOptions

RNG = np.random.default_rng(7)


def test_rows_of_a_batch_have_one_width_class() -> None:
    lengths = RNG.integers(1, 300, size=500)
    batches = list(pack_batches(lengths, 512, 40, 16))
    assert sorted(np.concatenate(batches).tolist()) == list(range(500))
    for rows in batches:
        assert len(set((-(-lengths[rows] // 16)).tolist())) == 1
        assert len(rows) <= 40
        assert lengths[rows].sum() <= 512


def test_batches_are_packed_tightly() -> None:
    lengths = RNG.integers(33, 49, size=400)
    batches = list(pack_batches(lengths, 512, 100, 16))
    assert len(batches) <= lengths.sum() / 512 * 1.04
    assert [len(rows) for rows in pack_batches(np.array([700, 690]), 512, 100, 16)] == [1, 1]


@pytest.mark.parametrize("precision", ["bf16", "int8"])
@pytest.mark.parametrize("lengths", [[1], [64] * 8, [3, 70, 1, 41], [513], [700, 2, 655]])
@pytest.mark.parametrize("left", [False, True])
def test_row_numbers_fill_up_and_cut_again(lengths: list[int], left: bool, precision: str) -> None:
    width = -(-max(lengths) // 16) * 16
    mask = (np.arange(width)[None, :] < np.array(lengths)[:, None]).astype(np.int64)
    mask = mask[:, ::-1] if left else mask
    fill, cut = row_numbers(mask, precision).values()
    assert len(fill) >= sum(lengths)
    assert len(fill) in SIZES[precision] or len(fill) % STEP == 0
    values = RNG.standard_normal((len(lengths), width, 3))
    restored = values.reshape(-1, 3)[fill][cut]
    assert np.array_equal(restored[mask == 1], values[mask == 1])
    # Padding holds a token of its own text.
    for text, row in enumerate(restored):
        own = {tuple(token) for token in values[text][mask[text] == 1]}
        assert {tuple(token) for token in row} == own


def test_row_numbers_stay_within_the_rows_also_for_a_text_without_tokens() -> None:
    mask = np.array([[1] * 8, [0] * 8], dtype=np.int64)
    fill, cut = row_numbers(mask, "bf16").values()
    assert len(fill) == 8
    assert cut[0].tolist() == list(range(8))
    assert cut.max() < len(fill)


def test_overlap_leaves_the_query_out_and_counts_shared_neighbours() -> None:
    first = unit(RNG.standard_normal((60, 16)).astype(np.float32))
    assert overlap(first[:20], first, first) == 1.0
    # The nearest of each are exchanged for the farthest.
    assert overlap(first[:20], first, -first) < 0.05
    noisy = unit(first + 0.05 * RNG.standard_normal(first.shape).astype(np.float32))
    assert 0.6 < overlap(first[:20], first, noisy) < 1.0


class CountingEncoder:
    """Gives a text of digits a vector that follows from it."""

    dimensions = 8

    def __init__(self, noise: float = 0.0) -> None:
        self.noise, self.seen = noise, list[str]()

    def embed(self, texts: list[str]) -> np.ndarray:
        self.seen += texts
        vectors = [np.random.default_rng(int(text)).standard_normal(8) for text in texts]
        return np.array(vectors, np.float32) + np.float32(self.noise)


@pytest.mark.parametrize("count", [64, 100, 700])
def test_each_record_is_compared_once_and_in_fp32_computed_once(count: int) -> None:
    texts = [str(10 ** (i % 3) * 1000 + i) for i in range(count)]
    exact, lower = CountingEncoder(), CountingEncoder(0.01)
    same = compare(exact, lambda: exact, texts)  # type: ignore[arg-type, return-value]
    assert (same.records, same.overlap) == (count, 1.0)
    assert same.cosine_min == pytest.approx(1.0, abs=1e-6)
    exact.seen.clear()
    found = compare(exact, lambda: lower, texts)  # type: ignore[arg-type, return-value]
    assert sorted(exact.seen) == sorted(texts)
    assert set(lower.seen) == set(texts)
    assert 0.99 < found.cosine_min < found.cosine_mean < 0.99999


def test_what_cannot_be_prepared_ends_the_comparison() -> None:
    def fails() -> Encoder:
        raise ModelError("It has no dense layers.")

    exact = CountingEncoder()
    with pytest.raises(ModelError, match="no dense layers"):
        compare(exact, fails, [str(i) for i in range(1000, 1000 + 100 * PART)])  # type: ignore[arg-type]
    assert len(exact.seen) < 100 * PART


def test_activation_grid_holds_zero_exactly_and_covers_the_range() -> None:
    low, high = np.array([-0.3, -1.7], np.float32), np.array([2.5, 0.4], np.float32)
    step, zero = activation_grid(low, high)
    assert 0 <= zero <= 255
    assert (0 - zero) * step <= low.min() + step
    assert (255 - zero) * step >= high.max() - step


def test_what_is_observed_in_parts_is_that_of_all_tokens() -> None:
    tokens = RNG.standard_normal((2 * BLOCK_ROWS + 300, 48)).astype(np.float32)
    shares = [Observed(48), Observed(48)]
    for number, part in enumerate(np.split(tokens, range(400, len(tokens), 400))):
        shares[number % 2].see(part, part[:2])
    for share in shares:
        share.sum_up()
    shares[0].add(shares[1])
    np.testing.assert_allclose(shares[0].moments, tokens.T @ tokens, rtol=1e-3, atol=1e-2)
    assert np.array_equal(shares[0].low, tokens.min(axis=0))
    assert np.array_equal(shares[0].high, tokens.max(axis=0))
    assert len(shares[0].rows) == 12
    shares[0].select(np.array([3, 3, 0]))
    assert shares[0].moments.shape == (3, 3)
    assert shares[0].low.tolist() == tokens.min(axis=0)[[3, 3, 0]].tolist()


def test_rounding_makes_good_for_its_errors() -> None:
    inputs = RNG.standard_normal((400, 64)).astype(np.float32) @ RNG.standard_normal((64, 64)).astype(np.float32)
    weight = RNG.standard_normal((64, 32)).astype(np.float32)
    scale = weight_scale(weight) * 8  # a coarse grid, so that the difference is plain
    rounded = round_weights(weight, inputs.T @ inputs, scale)
    assert rounded.dtype == np.int8
    nearest = np.clip(np.round(weight / scale), -127, 127)
    exact = inputs @ weight
    error = np.square(inputs @ (rounded * scale) - exact).sum()
    assert error < 0.7 * np.square(inputs @ (nearest * scale) - exact).sum()


def test_rounding_gives_the_integers_of_gptq() -> None:
    inputs = RNG.standard_normal((400, 96)).astype(np.float32) @ RNG.standard_normal((96, 96)).astype(np.float32)
    weight = RNG.standard_normal((96, 32)).astype(np.float32)
    moments, scale = inputs.T @ inputs, weight_scale(weight) * 2  # so no pair is too large
    # As the paper has it: the moments inverted, and each error at once taken off the channels that follow.
    order = np.argsort(-np.diag(moments))
    rest, hessian = weight[order].astype(float), moments[np.ix_(order, order)].astype(float)
    hessian[np.diag_indices(96)] += DAMPING * np.diag(hessian).mean()
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    expected = np.zeros(weight.shape, int)
    for i, place in enumerate(order):
        expected[place] = np.clip(np.round(rest[i] / scale), -LARGEST, LARGEST)
        rest[i + 1 :] -= np.outer(upper[i, i + 1 :], (rest[i] - expected[place] * scale) / upper[i, i])
    assert (round_weights(weight, moments, scale) == expected).mean() > 0.999  # but for ties


def test_the_error_of_an_output_is_near_what_it_comes_to() -> None:
    rows, weight = RNG.standard_normal((300, 64)).astype(np.float32), RNG.standard_normal((64, 32)).astype(np.float32)
    low, high, even = rows.min(axis=0), rows.max(axis=0), np.ones(64, np.float32)
    step, zero = activation_grid(low, high)
    rounded = (np.clip(np.round(rows / step) + zero, 0, 255) - zero) * step
    scale = weight_scale(weight)
    coarse = np.round(weight / scale) * scale
    error = np.square((rounded - rows) @ weight).sum() + 0.25 * np.square(rows @ (coarse - weight)).sum()
    assert output_error(rows, low, high, weight, even) == pytest.approx(error, rel=0.15)


def test_no_two_neighbours_of_one_sign_are_too_large_together() -> None:
    inputs = RNG.standard_normal((300, 65)).astype(np.float32)
    weight = np.abs(RNG.standard_normal((65, 16))).astype(np.float32) * RNG.choice([-1, 1], 16).astype(np.float32)
    rounded = round_weights(
        weight, inputs.T @ inputs, weight_scale(weight) / np.float32(3)
    )  # so that all of them are too large
    pairs = np.pad(rounded.astype(int), ((0, 1), (0, 0))).reshape(33, 2, 16)
    assert np.abs(pairs.sum(axis=1)).max() == PAIR
    assert np.abs(rounded.astype(int)).max() == LARGEST


def test_smoothing_keeps_the_geometric_mean() -> None:
    low, high = -np.abs(RNG.standard_normal(32)).astype(np.float32), np.full(32, 3.0, np.float32)
    divisor = smoothing(low, high, RNG.standard_normal((32, 8)).astype(np.float32), 0.8)
    assert divisor.dtype == np.float32
    assert np.exp(np.log(divisor).mean()) == pytest.approx(1.0, rel=1e-5)


def test_fingerprints_of_precisions_belong_to_one_model() -> None:
    files = {"model.xml": "a" * 64, "model.bin": "b" * 64}
    quantised = prepared_fingerprint("0123456789abcdef", "int8", files)
    assert same_model(quantised, "0123456789abcdef")
    assert same_model(quantised, "0123456789abcdef-bf16")
    assert not same_model(quantised, "fedcba9876543210")
    assert quantised != prepared_fingerprint("0123456789abcdef", "int8", {**files, "model.bin": "c" * 64})
    assert len(quantised) <= 64  # the column of the index


@pytest.mark.parametrize("options", [{"precision": "fp8"}, {"min_fidelity": 0.0}, {"min_fidelity": 1.5},
                                     {"precision": "int8", "provider": "openai"}])  # fmt: skip
def test_wrong_precision_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=r"precision|fidelity"):
        ReindexOptions(**options)  # type: ignore[arg-type]
