"""Every error that a user may see, and the exit code of each.

KdbFastError                70  internal error: a defect of kdb-fast
├── UnexpectedError         70  any other exception that ended a run
├── UsageError               2  the command or an option makes no sense
│   ├── ProviderInputError   2  a text that an embedding provider cannot embed; a ValueError too
│   ├── OptionError          2  an option of a provider makes no sense; a ValueError too, as in KameleonDB
│   └── MissingPackageError  2  an optional package is not installed; an ImportError too
├── RecordError              3  a record that a library caller passed cannot be stored
├── RefusedError             4  refused before anything was done
│   ├── SchemaError          4  a table, column, extension or right is not what it must be
│   └── ModelError           4  a model is missing, damaged or unfit
├── DatabaseError            5  the database cannot be reached or was lost
├── ClusterError             5  the Ray cluster cannot be reached, or has no host left
├── LockedError              6  another run holds the index
├── ResourceError            7  disk, memory, shared memory or processes ran out
│   └── ProviderError        7  an embedding provider cannot be reached, has no quota left, or answers wrongly
│       └── ProviderKeyError 4  the key is refused
├── RejectLimitError         8  more records were rejected than allowed
└── StoppedError   129/130/143  a signal stopped the run after a clean drain: SIGHUP, SIGINT, SIGTERM

A message says what was found and what was expected; ``remedy`` says what to do about it. No message of a
provider's error holds a key or a record's text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from .receipt import Receipt

EXIT_OK = 0
EXIT_REJECTS = 3
"""A run came to its end, but the index may not hold all: records were rejected, or the input changed while it was
read or has not as many records as it must (``--expect-count``)."""


EXIT_PIPE = 141
"""The reader of standard output has gone (``| head``): what a shell says of a process that SIGPIPE ended."""


PIPED = "kdb-fast … -"
"""In a remedy: this command, reading standard input. The command line puts its own arguments there."""


class KdbFastError(Exception):
    """Base of all errors that kdb-fast raises on purpose.

    Args:
        message: What happened, in one sentence, with what was found and what was expected.
        remedy: What the user can do about it, in one sentence; may name a command.

    Attributes:
        receipt: Of the run that it ended; None where none had begun.
        completed_by_reindex: The run has inserted records, which a reindex indexes: the same command again would
            insert them twice.
        carry_on: The command that carries on; '' for the same again.
        file: The file that could not be read as it is; None where it is not about one.
    """

    exit_code = 70
    receipt: Receipt | None = None
    completed_by_reindex = False
    carry_on = ""
    file: Path | None = None

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message} {self.remedy}".rstrip()


class UnexpectedError(KdbFastError):
    """An exception that nobody expected has ended a run. Its message may quote a record, so it is not in this one.

    Args:
        cause: That exception.
    """

    def __init__(self, cause: Exception) -> None:
        super().__init__(f"{type(cause).__name__} ended the run.")
        self.cause = self.__cause__ = cause


class SearchWarning(UserWarning):
    """A search has left rows out of the ranking by vector, since another model has made theirs."""


class UsageError(KdbFastError):
    """The command or one of its options makes no sense."""

    exit_code = 2


class RecordError(KdbFastError, ValueError):
    """A record that a library caller passed cannot be stored; nothing of its batch was."""

    exit_code = 3


class RefusedError(KdbFastError):
    """Refused before the start: nothing was changed."""

    exit_code = 4


class SchemaError(RefusedError):
    """A table, column, extension or right is not what kdb-fast needs."""


class ModelError(RefusedError):
    """A model is missing, damaged or cannot be used here."""


class DatabaseError(KdbFastError):
    """The database cannot be reached, or the connection was lost for good."""

    exit_code = 5


class ClusterError(KdbFastError):
    """The Ray cluster cannot be reached, or has had no host that can embed for as long as the run may wait."""

    exit_code = 5


class LockedError(KdbFastError):
    """Another run is writing the same index."""

    exit_code = 6


class ResourceError(KdbFastError):
    """The machine ran out of something: memory, shared memory, disk, processes."""

    exit_code = 7


class RejectLimitError(KdbFastError):
    """More records were rejected than ``--max-rejects`` allows."""

    exit_code = 8


class StoppedError(KdbFastError):
    """A signal stopped the run; what had been embedded is committed.

    Args:
        signum: The signal that asked for the stop; the exit code is 128 + signum.
    """

    def __init__(self, message: str, *, remedy: str = "", signum: int = 2) -> None:
        super().__init__(message, remedy=remedy)
        self.exit_code = 128 + signum


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
