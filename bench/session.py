"""What a part needs while it runs: data sets as files, and a database."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import data, database, tokens
from .options import Options, say


@dataclass(frozen=True)
class DataSet:
    """A data set in a file."""

    name: str
    path: Path
    stats: tokens.TokenStats

    @property
    def records(self) -> int:
        return self.stats.records

    @property
    def line(self) -> str:
        return f"Records `{self.name}`: {self.stats.describe()}."

    def params(self, records: int | None = None) -> dict[str, Any]:
        """Parameters for a contender: the file and how many of its records to take (a sample: the first ones)."""
        return {"data": str(self.path), "records": min(records or self.records, self.records)}


class Session:
    """Made by :func:`session`.

    Attributes:
        lines: What the data sets and the database are, for the result.
    """

    def __init__(self, options: Options, work: Path, stack: contextlib.ExitStack) -> None:
        self.options, self.work, self._stack = options, work, stack
        self.lines: list[str] = []
        self._conninfo: str | None = None

    def dataset(self, name: str, records: int) -> DataSet:
        """Make a data set, and say how many tokens a record has."""
        texts = data.SETS[name](records, self.options.seed)
        path = self.work / f"{name}-{records}.jsonl"
        data.write(path, texts)
        result = DataSet(name, path, tokens.stats(texts))
        say(f"  {result.line}")
        self.lines.append(result.line)
        return result

    @property
    def conninfo(self) -> str:
        """A PostgreSQL of this part's own, started on first use."""
        if self._conninfo is None:
            say("  starting PostgreSQL …")
            self._conninfo = self._stack.enter_context(database.server())
            names = ", ".join(f"{name} {version}" for name, version in database.versions(self._conninfo).items())
            self.lines.append(f"Database: {names}, embedded, default settings, on the same machine.")
        return self._conninfo

    def reset(self) -> None:
        """Drop all tables."""
        database.reset(self.conninfo)

    @property
    def runs(self) -> int:
        return 1 if self.options.quick else self.options.runs


@contextlib.contextmanager
def session(options: Options) -> Iterator[Session]:
    """A work directory and, when asked for, a database; both go away with the block."""
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="kdb-fast-bench-"))
        yield Session(options, Path(directory), stack)
