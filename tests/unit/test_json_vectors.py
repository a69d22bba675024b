"""Vectors as JSON text: any JSON reader gets the vector back."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kdb_fast.stores.sqlite.json_vectors import BLOCK_NUMBERS, json_vectors

SMALLEST = float(np.finfo(np.float32).smallest_subnormal)
EDGES = [0.0, -0.0, 0.99999994, -0.99999994, 1.0, -1.0, 5e-9, -4.9e-9, 1e-8, SMALLEST, -SMALLEST, 0.1, 3.4e38]


def parsed(matrix: np.ndarray) -> np.ndarray:
    return np.array([json.loads(text) for text in json_vectors(matrix)], dtype=np.float64).reshape(matrix.shape)


@given(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=2, max_dims=2, max_side=12),
        elements=st.floats(-1, 1, width=32, allow_subnormal=True) | st.sampled_from([e for e in EDGES if abs(e) <= 1]),
    )
)
def test_numbers_up_to_one_come_back_within_one_unit_of_the_eighth_decimal(matrix: np.ndarray) -> None:
    assert np.abs(parsed(matrix) - matrix).max(initial=0) <= 5.1e-9


@given(hnp.arrays(np.float32, (3, 4), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)))
def test_a_row_with_a_large_number_comes_back_exactly(matrix: np.ndarray) -> None:
    large = np.abs(matrix).max(axis=1) >= 1
    assert (parsed(matrix)[large] == matrix[large].astype(np.float64)).all()


@pytest.mark.parametrize("value", EDGES)
def test_edge_values_keep_value_and_sign(value: float) -> None:
    (number,) = json.loads(json_vectors(np.array([[value]], dtype=np.float32))[0])
    assert number == pytest.approx(float(np.float32(value)), abs=5.1e-9)
    assert np.signbit(number) == np.signbit(value)


def test_small_and_large_rows_may_be_mixed_in_one_matrix() -> None:
    matrix = np.array([[0.25, -0.5], [2.5, 0.1], [0.125, 0.0]], dtype=np.float32)
    texts = json_vectors(matrix)
    assert texts[0] == "[ 0.25000000,-0.50000000]"
    assert json.loads(texts[1]) == [2.5, float(np.float32(0.1))]
    assert json.loads(texts[2]) == [0.125, 0.0]


def test_rows_keep_their_order_over_several_blocks() -> None:
    dimensions = 64
    rows = 2 * BLOCK_NUMBERS // dimensions + 3
    matrix = np.random.default_rng(7).uniform(-1, 1, (rows, dimensions)).astype(np.float32)
    assert np.abs(parsed(matrix) - matrix).max() <= 5.1e-9


def test_a_slice_that_is_not_contiguous_is_read_as_it_looks() -> None:
    matrix = np.random.default_rng(8).uniform(-1, 1, (6, 8)).astype(np.float32)[::2, ::2]
    assert np.abs(parsed(matrix) - matrix).max() <= 5.1e-9


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="NaN or infinity"):
        json_vectors(np.array([[0.5, value]], dtype=np.float32))


def test_an_empty_matrix_gives_no_text_and_no_dimensions_an_empty_array() -> None:
    assert json_vectors(np.empty((0, 4), dtype=np.float32)) == []
    assert json_vectors(np.empty((2, 0), dtype=np.float32)) == ["[]", "[]"]
