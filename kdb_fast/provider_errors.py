"""What can go wrong with an embedding provider. No message holds a key or a record's text.

ResourceError (7)
└── ProviderError         7  cannot be reached, is out of quota, or does not answer as it should
    └── ProviderKeyError  4  the key is refused
UsageError (2)
├── ProviderInputError    2  a text that the provider cannot embed; a ValueError too
├── OptionError           2  an option makes no sense; a ValueError too, as in KameleonDB
└── MissingPackageError   2  an optional package is not installed; an ImportError too
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .errors import ResourceError, UsageError


class ProviderError(ResourceError):
    """An embedding provider cannot be reached, is out of quota, or does not answer as it should."""


class ProviderKeyError(ProviderError):
    """The API refuses the key, or the key may not use the model."""

    exit_code = 4


class ProviderInputError(UsageError, ValueError):
    """The provider cannot embed one of the texts, or several.

    Attributes:
        index: Position of the first such text in what was given.
        reason: Why, without the text.
        refused: Every such position that is known, with its reason.
    """

    def __init__(self, index: int, reason: str, refused: Mapping[int, str] | None = None) -> None:
        self.index, self.reason = index, reason
        self.refused = dict(refused or {index: reason})
        more = f" Refused as well: {len(self.refused) - 1} more." if len(self.refused) > 1 else ""
        super().__init__(f"Text {index} cannot be embedded: {reason}.{more}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.index, self.reason, self.refused)

    @classmethod
    def of(cls, refused: Mapping[int, str]) -> ProviderInputError:
        """The error for these positions with their reasons; at least one."""
        first = min(refused)
        return cls(first, refused[first], refused)


class OptionError(UsageError, ValueError):
    """An option of a provider makes no sense."""


class MissingPackageError(UsageError, ImportError):
    """A package of an optional extra is not installed."""
