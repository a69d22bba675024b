"""The command line: options → settings → the engine → what a person or a program reads. Here: from arguments to an
exit code, with one line for every error."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from pathlib import Path

import click

from ..errors import EXIT_OK, EXIT_PIPE, PIPED, KdbFastError, UnexpectedError, UsageError
from .commands import cli
from .console import (
    command_line,
    complain,
    flush_or_discard,
    open_standard_streams,
    print_json,
    reader_has_gone,
    remember,
    unexpected,
    with_database,
)

__all__ = ["cli", "kameleondb_main", "main", "run"]


def main() -> None:
    """Entry point of ``kdb-fast``: runs the command and ends the process with its exit code."""
    open_standard_streams()
    sys.exit(run(sys.argv[1:], alone=True))


def kameleondb_main() -> None:
    """Entry point for a KameleonDB that hands its command line over: ``kdb-fast kameleondb`` with its arguments."""
    open_standard_streams()
    sys.exit(run(["kameleondb", *sys.argv[1:]], alone=True))


def run(arguments: list[str], *, alone: bool = False) -> int:
    """Run a command line and return its exit code; every error becomes one line on standard error.

    Args:
        alone: The process ends after it, so what the command does not need may be left out of it for good.
    """
    try:
        return _run(arguments, alone)
    finally:
        flush_or_discard(sys.stdout)
        flush_or_discard(sys.stderr)


def _run(arguments: list[str], alone: bool) -> int:
    as_json = "--json" in arguments or (arguments[:1] == ["kameleondb"] and "-j" in arguments)
    remember(arguments)
    try:
        result = cli.main(args=arguments, prog_name="kdb-fast", standalone_mode=False, obj=alone)
        sys.stdout.flush()
        return result if isinstance(result, int) else EXIT_OK
    except click.exceptions.NoArgsIsHelpError as error:
        error.show(sys.stdout)
        return EXIT_OK
    except click.ClickException as error:
        message = error.format_message()
        message += "" if message[-1:] in ".?!" else "."
        return _fail(UsageError(message, remedy=_usage_hint(error)), as_json, arguments)
    except UnexpectedError as error:
        known = unexpected(error.cause, arguments)
        known.receipt, known.carry_on = error.receipt, error.carry_on
        known.remedy = f"{known.remedy} {error.remedy}".rstrip()
        return _fail(known, as_json, arguments)
    except KdbFastError as error:
        return _fail(error, as_json, arguments)
    except (KeyboardInterrupt, click.Abort):
        from ..errors import StoppedError

        stopped = StoppedError("Stopped at once; the transaction in progress was rolled back.")
        return _fail(stopped, as_json, arguments)
    except (SystemExit, Exception) as error:
        if isinstance(error, SystemExit):  # what click makes of a broken pipe
            error = BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
        if isinstance(error, BrokenPipeError) and reader_has_gone():
            # `| head`: nothing more to say, and what was committed stays.
            return EXIT_PIPE
        return _fail(unexpected(error, arguments), as_json, arguments)


def _usage_hint(error: click.ClickException) -> str:
    context = getattr(error, "ctx", None)
    if context is None:
        return ""
    hint = f"See: {context.command_path} --help"
    short = isinstance(error, click.NoSuchOption) and not error.option_name.startswith("--")
    if short and any(parameter.name == "query" for parameter in context.command.params):
        # A query such as -20 is taken for options.
        hint = f'A query that begins with a dash goes behind --: {context.command_path} -- "-word …". {hint}'
    return hint


def _reading_a_pipe(arguments: list[str], file: Path | None) -> list[str]:
    """The command with standard input in place of its file."""
    if file is None:
        return arguments
    piped = ["-" if not argument.startswith("-") and Path(argument) == file else argument for argument in arguments]
    return ["--from=-" if a.startswith("--from=") and Path(a.removeprefix("--from=")) == file else a for a in piped]


def _fail(error: KdbFastError, as_json: bool, arguments: list[str]) -> int:
    receipt = error.receipt
    if PIPED in error.remedy:
        piped = _reading_a_pipe(arguments, error.file)
        error.remedy = error.remedy.replace(PIPED, command_line(piped))
    else:
        error.remedy = with_database(error.remedy)
    line = str(error)
    if receipt is not None:
        line += f" Safe in the database: {receipt.written:,} new and {receipt.unchanged:,} unchanged records."
        line += f" To carry on: {error.carry_on or command_line(arguments)}"
    complain(f"kdb-fast: {line}")
    if as_json:
        problem = {"type": type(error).__name__, "message": error.message, "remedy": error.remedy,
                   "exit_code": error.exit_code}  # fmt: skip
        with contextlib.suppress(OSError):  # the exit code and standard error say it as well
            print_json({**(receipt.as_json() if receipt else {}), "error": problem})
            sys.stdout.flush()
    return error.exit_code
