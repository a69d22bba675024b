"""What made the vectors of an index: a row is ranked only against a query that the same model has embedded."""

from __future__ import annotations

import base64
import hashlib
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

BY_NAME = "name:"
"""Beginning of the fingerprint of a provider that is the caller's own: nothing but its name tells its model."""

NAME_CHARS = 100
"""Of a model's name the index keeps so many characters: KameleonDB's column."""


class Origin(NamedTuple):
    """What a row says of its vector.

    Attributes:
        fingerprint: That of the model; None where another program has written the row.
        model: Name of the model; None if nothing tells it.
        dimensions: Length of the vector, if the row tells it.
    """

    fingerprint: str | None
    model: str | None
    dimensions: int | None


class IndexModel(NamedTuple):
    """What made the vectors of an index; None for what is not known."""

    name: str | None
    dimensions: int | None
    fingerprint: str | None

    @classmethod
    def of(cls, origin: Origin) -> IndexModel:
        return cls(origin.model, origin.dimensions, origin.fingerprint)


class Maker(NamedTuple):
    """A model that embeds: its fingerprint, its name and the length of its vectors."""

    fingerprint: str
    model: str
    dimensions: int

    @property
    def by_name(self) -> bool:
        """Whether its name is all that is known of it."""
        return self.fingerprint.startswith(BY_NAME)

    def has_made(self, origin: Origin) -> bool:
        """Whether a vector of this origin may be compared with those of this model.

        By fingerprint, in whatever precision, where both sides have one that follows from the model itself; else by
        name.
        """
        theirs = origin.fingerprint
        if origin.dimensions not in (None, self.dimensions):
            return False
        if theirs and not self.by_name and not theirs.startswith(BY_NAME):
            return same_model(theirs, self.fingerprint)
        return origin.model is not None and same_name(origin.model, self.model)


class QueryVector(NamedTuple):
    """Embedding of a query, float32, shape (dimensions,), and the model that made it.

    None instead of a model: it may be compared with every row.
    """

    vector: npt.NDArray[np.float32]
    maker: Maker | None


def prefixed(fingerprint: str, prefix: str) -> str:
    """The fingerprint of a model that reads ``prefix`` before each text; without one it is the model's own."""
    if not prefix:
        return fingerprint
    # Six letters and digits of five bits each: with all else that may follow it must fit in 64 characters.
    return f"{fingerprint}-p{base64.b32encode(hashlib.sha256(prefix.encode()).digest())[:6].decode().lower()}"


def base_of(fingerprint: str) -> str:
    """The fingerprint without prefix and precision."""
    return fingerprint.partition("-")[0]


def same_model(fingerprint: str, other: str) -> bool:
    """Whether two fingerprints differ at most in prefix and precision: then vectors of both may be compared."""
    return base_of(fingerprint) == base_of(other)


def same_name(one: str, other: str) -> bool:
    """Whether two names mean one model: without the publisher, in any case; the index keeps NAME_CHARS characters."""
    first, second = (name.lower()[:NAME_CHARS].rpartition("/")[2] for name in (one, other))
    return first == second
