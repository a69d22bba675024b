"""The process and its terminal: standard streams, arguments and errors, shown so that nothing breaks or leaks."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import math
import os
import re
import select
import sys
import traceback
from datetime import UTC, date, datetime, time
from typing import Any

from ..errors import KdbFastError, ResourceError
from ..records import shell_word, storable_key

EXHAUSTED = frozenset(
    (errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOMEM, errno.EAGAIN, errno.EROFS)
)
"""Errors of the operating system that speak about limits of the machine, not about kdb-fast."""

MESSAGE_CHARS = 8000
DETAIL_CHARS = 500
"""Characters of an error that nobody expected: it may quote a record."""


STALLED_SECONDS = 2.0
"""A reader of standard error that takes nothing for so long, such as a stopped pager, is waited for no longer."""


class _Unfailing(io.FileIO):
    """Standard error that drops what cannot be written: progress and warnings must never end or hold up a job."""

    _wait = STALLED_SECONDS

    def write(self, data: Any) -> int:
        try:
            if self._takes():
                # No more at once than a pipe that takes something is sure to take.
                return super().write(memoryview(data)[: select.PIPE_BUF]) or len(data)
        except OSError:  # its reader has gone, the disk is full, the terminal was closed
            pass
        return len(data)

    def _takes(self) -> bool:
        poll = select.poll()
        poll.register(self.fileno(), select.POLLOUT)
        takes = bool(poll.poll(1000 * self._wait))
        self._wait = STALLED_SECONDS if takes else 0.0
        return takes


def open_standard_streams() -> None:
    """Make the standard streams such that a job depends on none of them.

    A process that was started with closed ones (``>&-``) gets the null device in their place: otherwise the next file
    or socket that is opened, a database's perhaps, would be where libraries print. What standard error cannot take is
    dropped.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
            os.set_inheritable(number, True)
    # sys.stdin stays None: an input that cannot be read must not look like an empty one.
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
    sys.stderr = io.TextIOWrapper(
        io.BufferedWriter(_Unfailing(2, "wb", closefd=False)), encoding=sys.stderr.encoding, line_buffering=True
    )
    for stream in (sys.stdout, sys.stderr):
        # What the terminal's encoding does not have is written as an escape.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def flush_or_discard(stream: Any) -> None:
    """Write what is still in a stream's buffer; where that fails, send it nowhere, or it would fail again at exit."""
    try:
        stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def reader_has_gone() -> bool:
    """Whether standard output is a pipe or a socket that nobody reads any more."""
    poll = select.poll()
    try:
        poll.register(sys.stdout.fileno(), select.POLLOUT)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except (OSError, ValueError):
        return False


def print_json(value: object) -> None:
    """Print what a command answers with ``--json``: one line.

    Times are ISO 8601, in UTC where they have a zone; bytes are hexadecimal digits; what JSON has no form for is text.
    """
    print(json.dumps(_plain(value)))


def _plain(value: Any) -> Any:
    """A value with nothing in it that JSON does not have."""
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if isinstance(value, (bytes, memoryview)):
        return bytes(value).hex()
    if isinstance(value, datetime) and value.tzinfo:
        with contextlib.suppress(OverflowError):  # at either end of the calendar
            value = value.astimezone(UTC)
    if isinstance(value, (date, time)):
        return value.isoformat()
    known = value is None or isinstance(value, (str, int)) or (isinstance(value, float) and math.isfinite(value))
    return value if known else str(value)


def complain(text: str) -> None:
    """Print to standard error, without what could move a terminal's cursor; a closed one is no error."""
    lines = (storable_key(line, MESSAGE_CHARS) for line in text.split("\n"))
    with contextlib.suppress(OSError):
        print("\n".join(lines), file=sys.stderr, flush=True)


def unexpected(error: Exception, arguments: list[str]) -> KdbFastError:
    """What to say of an exception that nobody expected: a limit of the machine, or a defect of kdb-fast."""
    if isinstance(error, MemoryError):
        return ResourceError(
            "Memory ran out.",
            remedy="Use fewer --workers, or raise the limit (ulimit -v, the container's). What was committed is safe.",
        )
    if isinstance(error, OSError) and error.errno in EXHAUSTED:
        where = f" ({error.filename})" if error.filename else ""
        return ResourceError(
            f"The system refused to write or open something: {error.strerror}{where}.",
            remedy="Free disk space, or raise the limits (ulimit -a shows them). What was committed is safe.",
        )
    # Where it happened, without the values: they could be records or secrets.
    complain("".join(traceback.format_tb(error.__traceback__)).rstrip())
    detail = without_secrets(" ".join(str(error).split()), arguments)[:DETAIL_CHARS]
    return KdbFastError(
        f"Unexpected {type(error).__name__}: {detail}.",
        remedy="This is a defect of kdb-fast: please report it with the lines above. What was committed is safe.",
    )


def without_secrets(text: str, arguments: list[str]) -> str:
    """``text`` without the passwords of the addresses that were given, and without the key of an API."""
    from ..db.address import parse_address, redact

    environment = (os.environ.get("KDB_FAST_DB"), os.environ.get("KAMELEONDB_URL"))
    for url in [*(_option_and_value(argument)[1] for argument in arguments), *environment]:
        with contextlib.suppress(KdbFastError):
            text = redact(text, parse_address(url)) if url else text
    key = os.environ.get("OPENAI_API_KEY")
    return text.replace(key, "********") if key else text


_VARIABLES = {"--source": "SOURCE"}
"""What stands for an address of this option that has a password; for others KDB_FAST_DB. Where the variable is not set
the shell says so; an empty ``--db`` would mean the default database."""


def command_line(arguments: list[str]) -> str:
    """A command to be typed again; an address that may hold a password is left out."""
    words, before = ["kdb-fast"], ""
    for argument in arguments:
        option, value = _option_and_value(argument)
        if "://" in value and ("@" in value or "password" in value) and _may_hold_a_secret(value):
            variable = _VARIABLES.get(option or before, "KDB_FAST_DB")
            words += [*([option] if option else []), f'"${{{variable}:?}}"']
        else:
            words.append(shell_word(argument))
        before = argument
    return " ".join(words)


def _option_and_value(argument: str) -> tuple[str, str]:
    """Both of ``--option=value``; '' and the argument for another one."""
    option, equals, value = argument.partition("=")
    return (option, value) if equals and re.fullmatch(r"--[a-z-]+", option) else ("", argument)


def _may_hold_a_secret(url: str) -> bool:
    from ..db.address import parse_address, secrets_of

    try:
        return bool(secrets_of(parse_address(url)))
    except KdbFastError:
        return True


_NAMED_COMMAND = re.compile(r"\bkdb-fast (reindex|insert|search|status|(?:rejects|targets) [a-z]+)\b(?: --db …)?")

_database: list[str] = []
"""``--db`` and its value, as the command that runs was given them."""


def remember(arguments: list[str]) -> None:
    """Keep the database that a command line names, for :func:`with_database`."""
    _database.clear()
    for number, argument in enumerate(arguments):
        if argument == "--":
            return
        if argument.startswith("--db=") or (argument == "--db" and number + 1 < len(arguments)):
            _database[:] = ["--db", argument.removeprefix("--db=") if "=" in argument else arguments[number + 1]]


def with_database(text: str) -> str:
    """``text`` whose commands name the database that this command was given, so that they can be typed as they are.

    One that the environment names needs no naming.
    """
    if not _database:
        return text
    option = command_line(_database).removeprefix("kdb-fast ")
    return _NAMED_COMMAND.sub(lambda found: f"kdb-fast {found[1]} {option}", text)
