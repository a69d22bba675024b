"""A file that is open for reading, or standard input, and what becomes of the file meanwhile."""

from __future__ import annotations

import os
import shlex
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from ...errors import PIPED, UsageError
from ...records import storable_key

PATH_CHARS = 4096
"""Longest path of a file that Linux opens."""


class OpenedFile:
    """A file, standard input (``"-"``) or an open stream, which is not closed.

    Args:
        path: What to read.
        expected: What it should hold, for the message where standard input is closed.

    Attributes:
        path: Of the file; None for a stream.
        stream: To read from.
        display: Its name for a message.
        name: By which it is known again: its absolute path, or that it is standard input.
        word: Its path as a word of a shell, for a remedy.

    Raises:
        UsageError: It cannot be read.
    """

    def __init__(self, path: Path | str | BinaryIO, expected: str) -> None:
        self.path = Path(path) if isinstance(path, (str, Path)) and str(path) != "-" else None
        self.display = "standard input" if self.path is None else storable_key(str(self.path))
        self.name = self.display if self.path is None else storable_key(str(self.path.absolute()), PATH_CHARS)
        self.word = "FILE" if self.path is None else shlex.quote(str(self.path))
        self._before: os.stat_result | None = None
        if self.path is not None:
            self.stream: BinaryIO = self._open(self.path)
            self._before = os.fstat(self.stream.fileno())
        elif not isinstance(path, (str, Path)):
            self.stream = path
        elif sys.stdin is None:
            raise UsageError(f"Standard input is closed; expected {expected}.")
        else:
            self.stream = sys.stdin.buffer

    def _open(self, path: Path) -> BinaryIO:
        try:
            return open(path, "rb")
        except IsADirectoryError:
            directory = UsageError(
                f"Cannot read {self.display}: it is a directory; expected a file.",
                remedy=f"Read all of its files: cat {self.word}/*.jsonl | {PIPED}",
            )
            directory.file = path
            raise directory from None
        except (OSError, ValueError) as error:
            raise UsageError(
                f"Cannot read {self.display}: {getattr(error, 'strerror', None) or error}.",
                remedy="Is the path right, and may you read it?",
            ) from None

    @property
    def size(self) -> int | None:
        """Bytes of a regular file when it was opened; None for what is none, whose end is not known."""
        return self._before.st_size if self._before is not None and stat.S_ISREG(self._before.st_mode) else None

    def head(self, size: int) -> bytes:
        """The first bytes of a regular file, wherever it is read now."""
        return os.pread(self.stream.fileno(), size, 0)

    def checked(self, check: Callable[[], None]) -> None:
        """Call ``check``; where it refuses the file, close it, and let the error name it."""
        try:
            check()
        except BaseException as error:
            self.close()
            if isinstance(error, UsageError) and self.path is not None:
                error.file = self.path
            raise

    @property
    def change(self) -> str:
        """What happened to a regular file since it was opened; '' for nothing."""
        before = self._before
        if self.path is None or before is None or self.size is None:
            return ""
        try:
            after = os.stat(self.path)
        except OSError:
            return "was removed"
        if (after.st_dev, after.st_ino) != (before.st_dev, before.st_ino):
            return "was replaced by another file"
        if after.st_size != before.st_size:
            return f"changed its size from {before.st_size:,} to {after.st_size:,} bytes"
        return "was written to" if after.st_mtime_ns != before.st_mtime_ns else ""

    def close(self) -> None:
        """Close what was opened here."""
        if self.path is not None:
            self.stream.close()
