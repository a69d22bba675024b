from __future__ import annotations

import gc

import pytest

from kdb_fast.garbage import THRESHOLD, collecting_rarely


def test_a_callers_own_settings_come_back() -> None:
    before = gc.get_threshold()
    with collecting_rarely():
        assert gc.get_threshold() == (THRESHOLD, *before[1:])
    assert gc.get_threshold() == before
    with pytest.raises(RuntimeError), collecting_rarely():
        raise RuntimeError
    assert gc.get_threshold() == before
