"""Finding what is to be replaced in KameleonDB, replacing it, and putting it back."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

from ..errors import MissingPackageError, SchemaError

_NOWHERE = object()


def needed(module: str, *names: str) -> list[Any]:
    """The things of these dotted names in a module of KameleonDB's.

    Raises:
        MissingPackageError: KameleonDB, or a package that it needs, is not installed.
        SchemaError: One of them is missing.
    """
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        name = error.name or ""
        if name.startswith("kameleondb.") and importlib.util.find_spec("kameleondb"):
            raise _lacks(name) from None
        raise MissingPackageError(
            f"KameleonDB is not installed: there is no package {name}.",
            remedy="Run: pip install 'kdb-fast[kameleondb]'",
        ) from None
    things = []
    for name in names:
        try:
            things.append(functools.reduce(getattr, name.split("."), found))
        except AttributeError:
            raise _lacks(f"{module}.{name}") from None
    return things


def _lacks(name: str) -> SchemaError:
    return SchemaError(
        f"This KameleonDB has no {name}, which kdb-fast needs.",
        remedy="Release 0.2.0 and its development branch have it; `kdb-fast reindex` works with any.",
    )


class Replaced:
    """Attributes that were replaced, to be put back exactly as they were."""

    def __init__(self) -> None:
        self._before: list[tuple[Any, str, Any]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Replace an attribute of a module, class or object, or add it."""
        self._before.append((owner, name, vars(owner).get(name, _NOWHERE)))
        setattr(owner, name, value)

    def undo(self) -> None:
        """Put everything back, the last first."""
        while self._before:
            owner, name, value = self._before.pop()
            if value is _NOWHERE:
                delattr(owner, name)
            else:
                setattr(owner, name, value)


def plain_method(function: Any) -> Any:
    """A plain function in place of a bound method: Python binds it to the instance that it is called on."""

    @functools.wraps(function)
    def method(db: Any, *arguments: Any, **named: Any) -> Any:
        return function(db, *arguments, **named)

    return method
