"""``bench million``: what a larger number of records is compared with."""

from __future__ import annotations

import pytest

from bench.part_million import _beside

ROUNDS = [10.0, 20.0, 40.0, 100.0, 200.0, 400.0]
"""Two rounds of the fewest: before the second size, between it and the third, behind that."""


@pytest.mark.parametrize(("place", "mean"), [(1, [15.0, 150.0]), (2, [30.0, 300.0])])
def test_a_size_is_compared_with_the_fewest_before_and_behind_it(place: int, mean: list[float]) -> None:
    assert _beside(ROUNDS, place, sizes=3) == mean


def test_two_sizes_have_one_pair_a_round() -> None:
    assert _beside(ROUNDS[:4], 1, sizes=2) == [15.0, 70.0]
