"""``kdb-fast kameleondb …``: KameleonDB's own command line, with :mod:`kdb_fast.kameleondb` installed.

Its Typer application runs as it is, but for the commands that read many records, index or search: those are here, with
its options, its output formats and ours added. Typer keeps the functions of commands, so they are replaced there.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, BinaryIO, NoReturn

import typer

from ..errors import EXIT_OK, EXIT_REJECTS, KdbFastError, RecordError, UsageError
from ..kameleondb import installation as integration
from ..kameleondb.patching import Replaced, needed
from ..kameleondb.providers import address_of, embedding_of
from ..receipt import InsertReceipt
from ..records import shell_word
from ..settings import DEFAULT_BATCH_SIZE

BATCH_SIZE_HELP = "Most rows of one model run."

BatchSize = Annotated[int, typer.Option("--batch-size", help=BATCH_SIZE_HELP)]


def run(arguments: list[str]) -> int:
    """Run a command line of KameleonDB's and return its exit code.

    Raises:
        MissingPackageError: KameleonDB is not installed.
        SchemaError: It lacks a name that is needed.
        KdbFastError: What one of our own functions raised.
    """
    with _installed() as app:
        try:
            typer.main.get_command(app).main(args=arguments, prog_name="kameleondb")
        except SystemExit as ended:
            return ended.code if isinstance(ended.code, int) else EXIT_OK
    return EXIT_OK


@contextlib.contextmanager
def _installed() -> Iterator[typer.Typer]:
    app, context = needed("kameleondb.cli.main", "app", "CLIContext")
    formatter = needed("kameleondb.cli.output", "OutputFormatter", "OutputFormatter.print_error")[0]
    (get_db,) = needed("kameleondb.cli.context", "CLIContext.get_db")
    replaced = Replaced()
    before = integration.installed()
    integration.install()
    try:
        replaced.set(context, "get_db", _with_embeddings(get_db))
        replaced.set(formatter, "print_error", _passing_ours(formatter.print_error))
        data = _group(app, "data", replaced)
        embeddings = _group(app, "embeddings", replaced)
        cache = _group(embeddings, "cache", replaced)
        for group, name, function in (
            (data, "insert", data_insert),
            (app, "search", search),
            (embeddings, "reindex", embeddings_reindex),
            (embeddings, "status", embeddings_status),
            (embeddings, "cancel", embeddings_cancel),
            (cache, "status", cache_status),
            (cache, "clear", cache_clear),
        ):
            _command(group, name, function, replaced)
        yield app
    finally:
        replaced.undo()
        if not before:
            integration.uninstall()


def _group(parent: typer.Typer, name: str, replaced: Replaced) -> typer.Typer:
    """The group of commands of this name; a new one where there is none."""
    for info in parent.registered_groups:
        if info.name == name and info.typer_instance is not None:
            return info.typer_instance
    replaced.set(parent, "registered_groups", list(parent.registered_groups))
    group = typer.Typer(help={"embeddings": "Embeddings management", "cache": "Cache of embeddings"}[name])
    parent.add_typer(group, name=name)
    return group


def _command(group: typer.Typer, name: str, function: Callable[..., None], replaced: Replaced) -> None:
    """Make ``function`` the command of this name, in the place of the one that is there."""
    for info in group.registered_commands:
        if info.name == name:
            replaced.set(info, "callback", function)
            return
    replaced.set(group, "registered_commands", list(group.registered_commands))
    group.command(name)(function)


def _with_embeddings(original: Any) -> Any:
    def get_db(context: Any) -> Any:
        db = original(context)
        if hasattr(db, "_embeddings_enabled"):
            db._embeddings_enabled = integration.embeddings_on()
        return db

    return get_db


def _passing_ours(original: Any) -> Any:
    def print_error(formatter: Any, error: Exception) -> None:
        """Its commands catch every exception, print it and exit with 1: ours and an exit's own code go on."""
        if isinstance(error, (KdbFastError, typer.Exit)):
            raise error
        original(formatter, error)

    return print_error


@contextlib.contextmanager
def _database(context: typer.Context) -> Iterator[tuple[Any, Any]]:
    """KameleonDB and its formatter of output; its own errors are printed as its commands do."""
    from kameleondb.cli.output import OutputFormatter
    from kameleondb.exceptions import KameleonDBError
    from sqlalchemy.exc import SQLAlchemyError

    formatter = OutputFormatter(context.obj.json_output)
    try:
        yield context.obj.get_db(), formatter
    except (KameleonDBError, SQLAlchemyError) as error:
        formatter.print_error(error)
        raise typer.Exit(1) from None
    finally:
        context.obj.close()


@contextlib.contextmanager
def _progress() -> Iterator[Any]:
    from . import bars

    shown = bars.choose()
    try:
        yield shown
    finally:
        shown.close()


def data_insert(
    ctx: typer.Context,
    entity_name: Annotated[str, typer.Argument(help="Entity name")],
    data_json: Annotated[str | None, typer.Argument(help="Records as JSON; - or nothing reads standard input")] = None,
    from_file: Annotated[str | None, typer.Option("--from-file", "-f", help="Read a file; - is standard input")] = None,
    batch: Annotated[bool, typer.Option("--batch", help="Show a count, for one record too")] = False,
    created_by: Annotated[str | None, typer.Option("--created-by", help="Who creates the records")] = None,
    batch_size: BatchSize = DEFAULT_BATCH_SIZE,
) -> None:
    """Insert records into an entity, and index them in the same go.

    The input is one JSON object, JSON Lines or a JSON array: which, is seen from it.

    Examples:

        kameleondb data insert Contact '{"name": "John"}'

        kameleondb data insert Contact --from-file contacts.jsonl

        kameleondb data insert Contact < contacts.json --batch-size 100
    """
    source = _source(data_json, from_file)
    with _database(ctx) as (db, formatter), _progress() as progress:
        entity = db.entity(entity_name)
        if db._search_engine is None:
            with contextlib.ExitStack() as stack:
                ids = entity.insert_many(_records(source, stack), created_by=created_by)
            receipt = InsertReceipt(inserted=len(ids), ids=tuple(ids[:5]))
        else:
            receipt = _insert(db, entity_name, source, created_by, batch_size, progress)
        progress.close()
        _show_inserted(formatter, receipt, batch)


def _source(inline: str | None, file: str | None) -> Path | str | BinaryIO:
    if inline is not None and file is not None:
        raise UsageError("Records are given twice, as an argument and with --from-file.", remedy="Leave out one.")
    if file not in (None, "-"):
        return Path(str(file))
    if inline not in (None, "-"):
        return io.BytesIO(str(inline).encode("utf-8", "surrogateescape"))
    if sys.stdin is not None and sys.stdin.isatty():
        raise UsageError(
            "There is nothing to insert.",
            remedy="Give JSON as an argument, name a file with --from-file, or pipe it in.",
        )
    return "-"


def _records(source: Path | str | BinaryIO, stack: contextlib.ExitStack) -> list[dict[str, Any]]:
    """All records of an input, for KameleonDB's own insert_many, which stores all or none."""
    from ..sources.json_records import iter_json_records

    if isinstance(source, Path):
        try:
            source = stack.enter_context(source.open("rb"))
        except OSError as error:
            raise UsageError(f"Cannot read {source}: {error.strerror}.", remedy="Is the path right?") from None
    stream: Any = sys.stdin.buffer if isinstance(source, str) else source
    records = []
    for line, record in iter_json_records(stream):
        if not isinstance(record, dict):
            raise RecordError(f"Line {line}: {record.detail}.", remedy="Nothing was inserted.")
        records.append(record)
    return records


def _insert(
    db: Any, entity: str, source: Path | str | BinaryIO, created_by: str | None, batch_size: int, progress: Any
) -> InsertReceipt:
    from ..indexing.insert import insert
    from .report import print_rejected_lines

    address = address_of(db)
    if address is None:
        raise UsageError("An SQLite database in memory ends with this command.", remedy="Use sqlite:///file.db.")
    embedding, options = embedding_of(db._search_engine.embedding_provider, batch_size)
    try:
        receipt = insert(address, entity, source, options, progress, created_by=created_by, embedding=embedding)
    except KdbFastError as error:
        progress.close()
        print_rejected_lines(error.receipt)
        error.carry_on = _reindex_command(entity)
        raise
    progress.close()
    print_rejected_lines(receipt)
    return receipt


def _reindex_command(entity: str | None) -> str:
    return " ".join(["kdb-fast kameleondb embeddings reindex", *([shell_word(entity)] if entity else [])])


def _show_inserted(formatter: Any, receipt: InsertReceipt, batch: bool) -> None:
    inserted, rejected = receipt.inserted, receipt.rejected
    more = {name: count for name, count in (("rejected", rejected), ("pending", receipt.pending)) if count}
    if inserted == 1 and not batch and not rejected:
        formatter.print_success("Inserted record", {"id": receipt.ids[0], **more})
    elif inserted or not rejected:
        formatter.print_success(f"Inserted {inserted} records", {"count": inserted, "ids": list(receipt.ids), **more})
    else:
        formatter.print_error(Exception(f"Inserted no record: {rejected} rejected"))
    if rejected:
        raise typer.Exit(EXIT_REJECTS)


def embeddings_reindex(
    ctx: typer.Context,
    entity: Annotated[str | None, typer.Argument(help="Entity to reindex (omit for all)")] = None,
    force: Annotated[bool, typer.Option("--force", help="Embed unchanged records too")] = False,
    batch_size: BatchSize = DEFAULT_BATCH_SIZE,
    background: Annotated[bool, typer.Option("--background", help="Not there yet")] = False,
) -> None:
    """Reindex embeddings for an entity or all entities.

    What is new or has changed is embedded, in worker processes; what was deleted leaves the index. Interrupted? The
    same command carries on.

    Examples:

        kameleondb embeddings reindex

        kameleondb embeddings reindex Contact --batch-size 100
    """
    if background:
        _not_yet("embeddings reindex --background")
    with _database(ctx) as (db, formatter), _progress() as progress:
        try:
            result = db.reindex_embeddings(entity, batch_size, force=force, progress=progress)
        except KdbFastError as error:
            error.carry_on = _reindex_command(entity)
            raise
        progress.close()
        formatter.print_success(f"Reindexed {result['indexed']} records", result)
        if result["rejected"]:
            raise typer.Exit(EXIT_REJECTS)


def embeddings_status(ctx: typer.Context) -> None:
    """Show embedding configuration and indexing status.

    Examples:

        kameleondb embeddings status

        kameleondb --json embeddings status
    """
    with _database(ctx) as (db, formatter):
        engine = db._search_engine
        if engine is None:
            formatter.print_data({"enabled": False})
            return
        provider = engine.embedding_provider
        kind = type(provider).__name__.removesuffix("Provider").lower()
        about = {"provider": kind, "model": provider.model_name, "dimensions": int(provider.dimensions)}
        rows = db.embedding_status()
        if formatter.json_mode:
            formatter.print_data({"enabled": True, **about, "indexed_entities": rows})
        else:
            formatter.print_success("Embeddings: enabled", about)
            formatter.print_table("Indexed Entities", rows, ["entity", "indexed", "pending", "last_updated"])


def search(
    ctx: typer.Context,
    query: Annotated[str, typer.Argument(help="Search query text")],
    entity: Annotated[str | None, typer.Option("--entity", "-e", help="Entity name to search")] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", help="Maximum results to return")] = 10,
    min_score: Annotated[
        float, typer.Option("--threshold", "-t", help="Minimum score; the highest there is, is 0.0328")
    ] = 0.0,
    where: Annotated[
        str | None, typer.Option("--where", "-w", help='Exact values of fields as JSON: {"status": "open"}')
    ] = None,
) -> None:
    """Search records by meaning and by keyword, with optional filters.

    Examples:

        kameleondb search "customer complaint about shipping"

        kameleondb search "bug report" --entity Ticket --where '{"status": "open"}'
    """
    from ..search.scope import parse_where

    values = parse_where(where)
    with _database(ctx) as (db, formatter):
        results = db.search(query, entity=entity, limit=limit, min_score=min_score, where=values)
        if formatter.json_mode:
            formatter.print_data(
                {"query": query, "entity": entity, "where": values, "count": len(results), "results": results}
            )
            return
        rows = [{**found, "score": f"{found['score']:.4f}", "text": found["matched_text"][:80]} for found in results]
        formatter.print_table(f"Search Results: {query}", rows, ["entity", "id", "score", "text"])


def embeddings_cancel() -> None:
    """Stop a reindex in the background (not there yet)."""
    _not_yet("embeddings cancel")


def cache_status() -> None:
    """Show the cache of embeddings (not there yet)."""
    _not_yet("embeddings cache status")


def cache_clear() -> None:
    """Empty the cache of embeddings (not there yet)."""
    _not_yet("embeddings cache clear")


def _not_yet(command: str) -> NoReturn:
    raise UsageError(
        f"`{command}` is not there yet: kdb-fast has neither a reindex in the background nor a cache of embeddings.",
        remedy="Run `embeddings reindex` in the foreground; it skips what is unchanged.",
    )
