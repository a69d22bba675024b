"""What tests of the SearchEngine share: embedding providers that cost nothing, and addresses in SQLAlchemy's form."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import numpy.typing as npt
import pytest
from openai_server import hashed

from kdb_fast.db.address import DatabaseAddress

Vector = npt.NDArray[np.float32]

EXACT = 0.99999
"""Least cosine between two computations of one vector."""


class Hashes:
    """A user's own provider: each text has a direction of its own, as random as its hash.

    Attributes:
        embedded: Texts given to ``embed``.
        batches: Lists of texts given to ``embed_batch``.
    """

    model_name = "hashes"

    def __init__(self, dimensions: int = 16) -> None:
        self.dimensions = dimensions
        self.embedded: list[str] = []
        self.batches: list[list[str]] = []

    def vectors(self, texts: Sequence[str]) -> Vector:
        return hashed(texts, self.dimensions)

    def embed(self, text: str) -> list[float]:
        self.embedded.append(text)
        return [float(number) for number in self.vectors([text])[0]]

    def embed_batch(self, texts: list[str]) -> list[list[float]]:
        self.batches.append(list(texts))
        rows: list[list[float]] = self.vectors(texts).tolist()
        return rows


class Words(Hashes):
    """A provider for which texts with the same words are near; one without any word has no direction."""

    model_name = "words"

    def vectors(self, texts: Sequence[str]) -> Vector:
        sums = [sum((_word(w, self.dimensions) for w in re.findall(r"\w+", t.lower())), np.zeros(1)) for t in texts]
        return np.array([np.broadcast_to(s, self.dimensions) for s in sums], np.float32)


@functools.cache
def _word(word: str, dimensions: int) -> Any:
    return hashed([word], dimensions)[0]


def sqlalchemy_url(address: DatabaseAddress) -> str:
    """The URL of a test database for SQLAlchemy."""
    if address.dialect == "sqlite":
        return f"sqlite:///{address.conninfo}"
    from psycopg.conninfo import conninfo_to_dict

    parts = conninfo_to_dict(address.conninfo)
    where = f"{parts['dbname']}?host={quote(str(parts['host']), safe='')}&port={parts['port']}"
    return f"postgresql+psycopg://{parts['user']}@/{where}"


def new_database(kind: str, request: pytest.FixtureRequest, folder: Path) -> DatabaseAddress:
    """An empty database of this dialect."""
    if kind == "sqlite":
        path = folder / "index.db"
        return DatabaseAddress("sqlite", str(path), f"sqlite:///{path}")
    address: DatabaseAddress = request.getfixturevalue("database")
    return address
