"""The command line: options → settings → the engine → what a person or a program reads."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from . import __version__
from .console import (
    command_line,
    complain,
    flush_or_discard,
    open_standard_streams,
    reader_has_gone,
    remember,
    unexpected,
    with_database,
)
from .errors import EXIT_OK, EXIT_PIPE, EXIT_REJECTS, PIPED, KdbFastError, UnexpectedError, UsageError
from .settings import DEFAULT_BATCH_SIZE, DEFAULT_MODEL, PRECISIONS, ExpectedCount, ReindexOptions, RejectLimit

if TYPE_CHECKING:
    from .database import DatabaseAddress
    from .receipt import Receipt

F = TypeVar("F", bound=Callable[..., Any])

HELP = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


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
        return _fail(UsageError(error.format_message(), remedy=_usage_hint(error)), as_json, arguments)
    except UnexpectedError as error:
        known = unexpected(error.cause, arguments)
        known.receipt, known.carry_on = error.receipt, error.carry_on
        known.remedy = f"{known.remedy} {error.remedy}".rstrip()
        return _fail(known, as_json, arguments)
    except KdbFastError as error:
        return _fail(error, as_json, arguments)
    except (KeyboardInterrupt, click.Abort):
        from .errors import StoppedError

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
            print(json.dumps({**(receipt.as_json() if receipt else {}), "error": problem}), flush=True)
    return error.exit_code


def database_option(command: F) -> F:
    """``--db``, with its environment variable."""
    return click.option(
        "--db",
        envvar="KDB_FAST_DB",
        metavar="URL",
        help="postgresql://…, sqlite:///file.db or embedded:DIR (a private PostgreSQL; the default, in your data "
        "directory). Environment: KDB_FAST_DB.",
    )(command)


def json_option(command: F) -> F:
    """``--json``: exactly one object on standard output."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")(command)


def model_options(command: F) -> F:
    """``--model`` and ``--model-path``."""
    command = click.option(
        "--model-path",
        type=click.Path(path_type=Path, file_okay=False),
        help="Directory of a model to use instead of looking it up.",
    )(command)
    return click.option(
        "--model", default=DEFAULT_MODEL, show_default=True, metavar="NAME", help="Any FastEmbed model."
    )(command)


BASE_URL_HELP = (
    "Address of a server that speaks OpenAI's embeddings API (Ollama, vLLM, text-embeddings-inference, llama.cpp, LM "
    "Studio), such as http://localhost:11434/v1; it needs no key unless the server does. Environment: OPENAI_BASE_URL."
)


def provider_option(command: F) -> F:
    """``--provider`` and ``--base-url``; naming the address is naming the provider."""
    command = click.option("--base-url", metavar="URL", help=BASE_URL_HELP)(command)
    return click.option(
        "--provider",
        type=click.Choice(["fastembed", "openai"]),
        help="What gives the vectors: a model on this machine, or an API; OpenAI's own needs OPENAI_API_KEY. "
        "[default: fastembed; openai with --base-url, but not with OPENAI_BASE_URL alone]",
    )(command)


def dimensions_option(command: F) -> F:
    """``--dimensions``."""
    return click.option(
        "--dimensions",
        type=int,
        metavar="N",
        help="Length of a vector to ask an API for. Default: that of the index; for a new one what the model gives "
        "(OpenAI's own text-embedding-3 models: 384).",
    )(command)


def _provider(provider: str | None, base_url: str | None) -> str:
    return provider or ("openai" if base_url else "fastembed")


@contextlib.contextmanager
def database(url: str | None, *, reads: bool = False) -> Iterator[DatabaseAddress]:
    """The opened database of ``--db``; warns when a password stands on the command line.

    Args:
        reads: The command only reads, so it must not make an embedded server's data.
    """
    from .database import opened, parse_address, secrets_of, unverified_server

    address = parse_address(url)
    if url and any(url in argument for argument in sys.argv) and secrets_of(address):
        print(
            "warning: the password on the command line can be read by other users of this machine; "
            "set KDB_FAST_DB or PGPASSWORD instead.",
            file=sys.stderr,
        )
    if exposed := unverified_server(address):
        print(
            f"warning: nothing proves that {exposed} is the server that is meant, or hides what is sent to it; "
            "add ?sslmode=verify-full to the address.",
            file=sys.stderr,
        )
    with opened(address, create=not reads) as ready:
        yield ready


@click.group(context_settings=HELP, no_args_is_help=True)
@click.version_option(__version__, prog_name="kdb-fast")
def cli() -> None:
    """Re-embed a table of text at the speed of this machine, and search it.

    \b
    Try it:      kdb-fast demo
    Main job:    kdb-fast reindex --db postgresql://user@host/dbname
    Ask:         kdb-fast search "angry customer" --db …

    \b
    Exit codes:  0 all stored, 2 usage, 3 finished but records were rejected, the input
                 changed or its number is not the expected one, 4 refused before the start,
                 5 database, 6 another run holds the index, 7 out of a resource, 8 too many
                 rejects, 70 internal error; stopped after what was embedded is written:
                 129 the terminal closed, 130 Ctrl-C, 143 SIGTERM;
                 141 the reader of the output has gone
    """


@cli.command()
@click.argument("entities", nargs=-1, metavar="[ENTITY]…")
@database_option
@click.option(
    "--from",
    "from_file",
    metavar="FILE",
    help="Read a JSON Lines file (- for standard input) instead of KameleonDB's tables.",
)
@click.option("--entity", help="With --from: the entity that the records belong to.")
@click.option("--id-field", default="id", show_default=True, help="With --from: the field that holds the key.")
@click.option("--field", "fields", multiple=True, help="With --from: a field to embed; repeat it. Default: all text.")
@click.option("--batch-size", default=DEFAULT_BATCH_SIZE, show_default=True, help="Most rows of one model run.")
@click.option("--workers", type=int, help="Embedding processes. Default: one for each CPU this process may use.")
@model_options
@provider_option
@dimensions_option
@click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    default="fp32",
    show_default=True,
    help="int8 and bf16 are faster and nearly as exact; auto takes the fastest that is close enough to fp32.",
)
@click.option(
    "--min-fidelity",
    type=float,
    metavar="COSINE",
    help="Least mean cosine with fp32. [default: int8 0.997, bf16 0.9999]",
)
@click.option("--force", is_flag=True, help="Embed every record, also the unchanged ones.")
@click.option("--limit", type=int, help="Read at most so many records.")
@click.option("--max-rejects", default="1%", show_default=True, metavar="N|P%", help="Stop when more are unfit.")
@click.option("--expect-count", metavar="N[+]", help="Exit with 3 unless exactly N (N+: at least N) records were read.")
@click.option("--wait", default=0.0, metavar="SECONDS", help="Wait for another run to end instead of stopping.")
@json_option
@click.option("--no-progress", is_flag=True, help="Print no progress.")
def reindex(
    entities: tuple[str, ...],
    db: str | None,
    from_file: str | None,
    entity: str | None,
    id_field: str,
    fields: tuple[str, ...],
    batch_size: int,
    workers: int | None,
    model: str,
    model_path: Path | None,
    provider: str | None,
    base_url: str | None,
    dimensions: int | None,
    precision: str,
    min_fidelity: float | None,
    force: bool,
    limit: int | None,
    max_rejects: str,
    expect_count: str | None,
    wait: float,
    as_json: bool,
    no_progress: bool,
) -> int:
    """Embed what is new or has changed, and bring the search index up to date.

    Reads all entities of KameleonDB, or the named ones, or a file. Interrupted? The same command carries on:
    what is stored is skipped.
    """
    options = ReindexOptions(
        entities=entities,
        model=model,
        model_path=model_path,
        provider=_provider(provider, base_url),
        base_url=base_url,
        dimensions=dimensions,
        precision=precision,
        min_fidelity=min_fidelity,
        batch_size=batch_size,
        workers=workers,
        force=force,
        limit=limit,
        wait=wait,
        max_rejects=RejectLimit.parse(max_rejects),
    )
    expected = ExpectedCount.parse(expect_count) if expect_count is not None else None
    if from_file is None and (entity or fields):
        raise UsageError("--entity and --field belong to --from.", remedy="Name entities of KameleonDB as arguments.")
    if from_file is not None and (entities or not entity):
        raise UsageError("--from needs --entity NAME, and takes no entity arguments.")
    from . import bars
    from .report import print_receipt
    from .sources import SourceSpec

    progress = bars.choose(not no_progress)
    try:
        with database(db) as address:
            if from_file is not None:
                from .database import create_sqlite

                create_sqlite(address)
            receipt = run_reindex(
                address,
                SourceSpec(entities, from_file, entity, id_field, fields, limit),
                options,
                progress,
            )
            name = address.display
    finally:
        progress.close()
    missed = expected.missed(receipt.read + receipt.empty) if expected else ""
    if missed:
        receipt = replace(receipt, warnings=(*receipt.warnings, missed))
    if as_json:
        print(json.dumps(receipt.as_json()))
    else:
        print_receipt(receipt, name)
    return EXIT_REJECTS if missed else _exit_code(receipt)


def _exit_code(receipt: Receipt) -> int:
    """Of a run that came to its end."""
    return EXIT_REJECTS if receipt.rejected or receipt.input_changed else EXIT_OK


def run_reindex(*arguments: Any) -> Receipt:
    """:func:`kdb_fast.reindex.reindex`, imported when it is needed."""
    from .reindex import reindex

    return reindex(*arguments)


@cli.command()
@click.argument("entity")
@click.argument("file", required=False, metavar="[FILE|-]")
@database_option
@click.option("--batch-size", default=DEFAULT_BATCH_SIZE, show_default=True, help="Most rows of one model run.")
@click.option("--workers", type=int, help="Embedding processes. Default: one for each CPU this process may use.")
@model_options
@provider_option
@dimensions_option
@click.option("--max-rejects", default="1%", show_default=True, metavar="N|P%", help="Stop when more are unfit.")
@json_option
@click.option("--no-progress", is_flag=True, help="Print no progress.")
def insert(
    entity: str,
    file: str | None,
    db: str | None,
    batch_size: int,
    workers: int | None,
    model: str,
    model_path: Path | None,
    provider: str | None,
    base_url: str | None,
    dimensions: int | None,
    max_rejects: str,
    as_json: bool,
    no_progress: bool,
) -> int:
    """Create records of an ENTITY of KameleonDB from JSON, and index them in the same go.

    FILE is JSON Lines, one JSON array or one object, with the entity's fields; without it, or as -, standard input is
    read. Every record gets a new id.

    A record is created before it is embedded. After an interrupted run do not insert the same records again, or
    they are there twice: `kdb-fast reindex ENTITY` indexes what was created, and the message says up to which line
    that is.
    """
    if file is None and sys.stdin is not None and sys.stdin.isatty():
        raise UsageError("There is nothing to insert.", remedy="Name a FILE, or pipe JSON Lines into the command.")
    options = ReindexOptions(
        model=model,
        model_path=model_path,
        provider=_provider(provider, base_url),
        base_url=base_url,
        dimensions=dimensions,
        batch_size=batch_size,
        workers=workers,
        max_rejects=RejectLimit.parse(max_rejects),
    )
    from . import bars
    from . import insert as inserting
    from .report import print_inserted, print_rejected_lines

    progress = bars.choose(not no_progress)
    try:
        with database(db) as address:
            receipt = inserting.insert(address, entity, file or "-", options, progress)
            name = address.display
    except KdbFastError as error:
        progress.close()
        if not as_json:
            print_rejected_lines(error.receipt)
        if error.completed_by_reindex:
            error.carry_on = _reindex_instead(entity, db)
        raise
    finally:
        progress.close()
    if as_json:
        print(json.dumps(receipt.as_json()))
    else:
        print_rejected_lines(receipt)
        print_inserted(receipt, entity, name)
    return _exit_code(receipt)


def _reindex_instead(entity: str, db: str | None) -> str:
    """The reindex that completes an insert, with its options for database and model."""
    context = click.get_current_context()
    command = ["reindex", entity]
    for name, value in [
        ("db", db),
        *((n, context.params[n]) for n in ("model", "model_path", "provider", "base_url", "dimensions")),
    ]:
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            command += [f"--{name.replace('_', '-')}", str(value)]
    return command_line(command)


@cli.group()
def rejects() -> None:
    """Show, retry and forget the records that could not be stored."""


@rejects.command("list")
@database_option
@click.option("--entity", help="Only this entity.")
@click.option("--limit", type=click.IntRange(min=1), default=100, show_default=True, help="Show at most so many.")
@json_option
def rejects_list(db: str | None, entity: str | None, limit: int, as_json: bool) -> None:
    """List rejected records with the reason, those of the newest run first."""
    from .rejects import list_rejects
    from .report import print_rejects

    with database(db, reads=True) as address:
        rows = list_rejects(address, entity)
    if as_json:
        print(json.dumps({"total": len(rows), "rejects": rows[:limit]}, default=str))
    else:
        print_rejects(rows, limit)


@rejects.command("clear")
@database_option
@click.option("--entity", help="Only this entity.")
@json_option
def rejects_clear(db: str | None, entity: str | None, as_json: bool) -> None:
    """Forget rejected records. The records themselves stay as they are; a reindex would reject them again."""
    from .rejects import clear_rejects

    with database(db, reads=True) as address:
        count = clear_rejects(address, entity)
    print(json.dumps({"cleared": count}) if as_json else f"{count:,} rejects forgotten")


@rejects.command("retry")
@database_option
@click.option("--batch-size", default=DEFAULT_BATCH_SIZE, show_default=True, help="Most rows of one model run.")
@click.option("--workers", type=int, help="Embedding processes. Default: one for each CPU this process may use.")
@click.option("--model", metavar="NAME", help="Any FastEmbed model. Default: that of the newest run.")
@click.option("--model-path", type=click.Path(path_type=Path, file_okay=False), help="Directory of a model.")
@provider_option
@json_option
@click.option("--no-progress", is_flag=True, help="Print no progress.")
def rejects_retry(
    db: str | None,
    batch_size: int,
    workers: int | None,
    model: str | None,
    model_path: Path | None,
    provider: str | None,
    base_url: str | None,
    as_json: bool,
    no_progress: bool,
) -> int:
    """Read the entities with rejected records again, and store what can be stored now.

    This is a reindex of these entities, so unchanged records are skipped. Lines of files that became no record cannot
    be tried again: they are not in the database.
    """
    from . import bars
    from .rejects import retry_rejects
    from .report import print_retried

    options = ReindexOptions(
        model_path=model_path,
        provider=_provider(provider, base_url),
        base_url=base_url,
        batch_size=batch_size,
        workers=workers,
    )
    progress = bars.choose(not no_progress)
    try:
        with database(db, reads=True) as address:
            result = retry_rejects(address, options, progress, model=model)
            name = address.display
    finally:
        progress.close()
    if as_json:
        print(json.dumps(result.as_json()))
    else:
        print_retried(result, name)
    left = result.remaining or result.lines_of_inserts or result.lines_of_files
    return EXIT_REJECTS if left else EXIT_OK


@cli.command()
@click.argument("query")
@database_option
@click.option("--entity", "entities", multiple=True, help="Only this entity; repeat it for several.")
@click.option("--mode", type=click.Choice(["hybrid", "vector", "keyword"]), default="hybrid", show_default=True)
@click.option("--limit", default=10, show_default=True)
@click.option("--where", metavar="JSON", help='Exact values of fields, such as {"city": "Oslo"}.')
@click.option(
    "--min-score",
    default=0.0,
    show_default=True,
    help="Leave out results below this score. A record at place n of a ranking gets 1/(60+n) from it: the highest is "
    "2/61 = 0.03278 (first by meaning and by keyword), in the modes vector and keyword 1/61 = 0.01639.",
)
@click.option("--model", metavar="NAME", help="Model that embeds the query. Default: that of the index.")
@click.option("--model-path", type=click.Path(path_type=Path, file_okay=False), help="Directory of a model.")
@click.option("--provider", type=click.Choice(["fastembed", "openai"]), help="Default: the one of the index's model.")
@click.option("--base-url", metavar="URL", help=BASE_URL_HELP)
@json_option
def search(
    query: str,
    db: str | None,
    entities: tuple[str, ...],
    mode: str,
    limit: int,
    where: str | None,
    min_score: float,
    model: str | None,
    model_path: Path | None,
    provider: str | None,
    base_url: str | None,
    as_json: bool,
) -> None:
    """Search the index by meaning, by keyword, or both (reciprocal rank fusion).

    In QUERY, "two words" in quotes stay together, -word excludes (after --: kdb-fast search -- "-word …"), and or
    means either. A record that holds an identifier of the query (ERR_CONN_1111, nginx.conf, "a phrase") comes first.
    """
    from .query import import_ahead, run_search
    from .report import print_results, printable
    from .retrieval import check_query, parse_where

    check_query(query, mode, min_score)
    alone = click.get_current_context().obj
    with database(db, reads=True) as address:
        results, missed = run_search(
            address,
            query,
            mode=mode,
            entities=entities,
            limit=limit,
            where=parse_where(where),
            min_score=min_score,
            model_name=model,
            model_path=model_path,
            provider=provider,
            base_url=base_url,
            meanwhile=import_ahead if alone else lambda: None,
        )
    for part in missed:
        complain(f"warning: {printable(str(part), 1000)}")
    if as_json:
        left_out = [part._asdict() for part in missed]
        print(json.dumps({"query": query, "mode": mode, "results": results, "left_out": left_out}, default=str))
    else:
        print_results(query, results)


@cli.command()
@database_option
@json_option
def status(db: str | None, as_json: bool) -> None:
    """Show for each entity what is indexed, pending, stale and rejected."""
    from .query import run_status
    from .report import print_status

    with database(db, reads=True) as address:
        result = run_status(address)
        name = address.display
    if as_json:
        print(json.dumps(result, default=str))
    else:
        print_status(result, name)


@cli.command(add_help_option=False, context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="ARGS…")
def kameleondb(arguments: tuple[str, ...]) -> int:
    """Run KameleonDB's own command line on kdb-fast: alias kameleondb='kdb-fast kameleondb'.

    Its data insert, embeddings reindex, embeddings status and search use kdb-fast's engine; all else is as it was.
    KAMELEONDB_URL names the database; with KAMELEONDB_EMBEDDINGS=0 nothing is indexed.
    """
    # Before KameleonDB's command line is imported, which needs its packages.
    from .kameleondb import needed

    needed("kameleondb")
    needed("typer")
    from .kameleondb_cli import run as run_kameleondb

    return run_kameleondb(list(arguments))


@cli.group()
def models() -> None:
    """List, fetch and find embedding models."""


@models.command("list")
@json_option
def models_list(as_json: bool) -> None:
    """List all models that can be named, and which are on this machine."""
    from .models import supported
    from .report import print_models

    entries = supported()
    if as_json:
        print(json.dumps({"models": [entry._asdict() for entry in entries]}))
    else:
        print_models(entries)


@models.command("pull")
@click.argument("name", default=DEFAULT_MODEL)
@json_option
def models_pull(name: str, as_json: bool) -> None:
    """Fetch a model, check it and make it ready."""
    from .models import pull

    model = pull(name, report=lambda text: print(text, file=sys.stderr))
    if as_json:
        print(json.dumps({"name": model.name, "path": str(model.path), "fingerprint": model.fingerprint()}))
    else:
        print(f"{model.name}: {model.path}")


@models.command("path")
@click.argument("name", default=DEFAULT_MODEL)
def models_path(name: str) -> None:
    """Print the directory of a model that is on this machine."""
    from .errors import ModelError
    from .models import installed

    for model in installed():
        if model.name.lower() == name.lower():
            print(model.path)
            return
    raise ModelError(f"The model {name} is not on this machine.", remedy=f"Fetch it: kdb-fast models pull {name}")


@cli.command()
@database_option
@click.option("--no-progress", is_flag=True, help="Print no progress.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def demo(db: str | None, no_progress: bool, as_json: bool) -> int:
    """Index the documentation of Python's standard library, and ask it a few questions."""
    from .demo import run_demo

    return run_demo(db, show=not no_progress, as_json=as_json)


if __name__ == "__main__":
    main()
