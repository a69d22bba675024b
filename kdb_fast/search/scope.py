"""What a search may return: which entities, and which values of their fields."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ..catalog.definitions import Entity
from ..errors import UsageError
from ..origins import Maker
from .query import UNSTORABLE, Term


class Scope(NamedTuple):
    """Which rows of the index a search may return.

    Attributes:
        definitions: Entities of KameleonDB that are searched; a row of theirs counts only while its record
            lives and meets ``where``.
        names: The only entity names searched, or None for all but ``hidden``.
        hidden: Entities that KameleonDB has dropped.
        where: Logical field names with the values they must have.
        excluded: Terms that no row may hold; rankings by keyword have them in their query.
        maker: The model that has embedded the query: its rows only are ranked by vector. None: all rows.
    """

    definitions: tuple[Entity, ...]
    names: tuple[str, ...] | None
    hidden: tuple[str, ...]
    where: tuple[tuple[str, Any], ...]
    excluded: tuple[Term, ...] = ()
    maker: Maker | None = None

    def admits(self, entity: str) -> bool:
        return entity not in self.hidden if self.names is None else entity in self.names


def resolve_scope(definitions: Iterable[Entity], entities: Sequence[str], where: Mapping[str, Any] | None) -> Scope:
    """What a search may return. Raises UsageError if ``where`` has an unknown field or an unusable value."""
    every = list(definitions)
    hidden = tuple(d.name for d in every if not d.active)
    requested = tuple(dict.fromkeys(entities))
    searched = [d for d in every if d.active and (not requested or d.name in requested)]
    if not where:
        names = tuple(name for name in requested if name not in hidden) if requested else None
        return Scope(tuple(searched), names, hidden, ())
    known = {field.name for d in searched for field in d.fields}
    for name, value in where.items():
        if name not in known:
            having = ", ".join(sorted(known)) or "none"
            raise UsageError(f"No searched entity has a field {name!r}.", remedy=f"Fields that there are: {having}.")
        _check_value(name, value)
    matching = tuple(d for d in searched if where.keys() <= {field.name for field in d.fields})
    return Scope(matching, tuple(d.name for d in matching), hidden, tuple(where.items()))


def _check_value(name: str, value: Any) -> None:
    if value is not None and not isinstance(value, str | int | float):
        raise UsageError(
            f"The value of {name!r} is {type(value).__name__}; expected text, a number, true, false or null."
        )
    if isinstance(value, str) and UNSTORABLE.search(value):
        raise UsageError(f"The value of {name!r} holds a NUL character or a lone surrogate, which no field can hold.")
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"The value of {name!r} is {value}; expected a finite number.")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise UsageError(f"The value of {name!r} is beyond 64 bits; expected a smaller number.")


def holdable_scope(scope: Scope, missing_characters: Callable[[Iterable[str]], frozenset[str]]) -> Scope:
    """The scope without names that no row of this database can have; with no names where no field can have a value."""
    names = scope.names or ()
    values = [value for _, value in scope.where if isinstance(value, str)]
    missing = missing_characters([*names, *values])
    if not missing:
        return scope
    if any(not missing.isdisjoint(value) for value in values):
        return scope._replace(names=())
    return scope._replace(names=tuple(name for name in names if missing.isdisjoint(name)))


def parse_where(text: str | None) -> dict[str, Any] | None:
    """The fields of ``--where``, a JSON object; None without one.

    Raises:
        UsageError: It is something else.
    """
    if text is None:
        return None
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UsageError(f"--where is not JSON: {error}.", remedy='Expected an object: {"city": "Oslo"}') from None
    if not isinstance(value, dict):
        raise UsageError(f'--where is a JSON {type(value).__name__}; expected an object such as {{"city": "Oslo"}}.')
    return value
