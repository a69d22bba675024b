"""Fixtures of the tests that run once on each kind of database."""

from __future__ import annotations

from pathlib import Path

import pytest
from search_engines import new_database

from kdb_fast.database import DatabaseAddress


@pytest.fixture(params=["postgresql", "sqlite"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> DatabaseAddress:
    """An empty database of each kind."""
    return new_database(request.param, request, tmp_path)
