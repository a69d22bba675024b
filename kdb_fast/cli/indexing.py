"""``reindex`` and ``insert``."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from ..errors import EXIT_OK, EXIT_REJECTS, KdbFastError, UsageError
from ..settings import PRECISIONS, ExpectedCount, RejectLimit
from .console import command_line, print_json
from .groups import GroupedCommand, group
from .options import (
    RunArguments,
    cluster_option,
    database_option,
    dimensions_option,
    max_rejects_option,
    model_options,
    provider_option,
    run_options,
)
from .tables import FileArguments, TableArguments, table_options

if TYPE_CHECKING:
    from ..receipt import Receipt


@click.command("reindex", cls=GroupedCommand)
@click.argument("names", nargs=-1, metavar="[NAME]…")
@group("Database", database_option)
@table_options
@group(
    "A file",
    click.option(
        "--from",
        "from_file",
        metavar="FILE",
        help="Read a file (- for standard input): with --into CSV, TSV, Parquet or JSON, packed or not; with --entity "
        "JSON Lines, into KameleonDB's index.",
    ),
    click.option("--format", "file_format", metavar="FORMAT", help="csv, tsv, json or parquet. Default: as it looks."),
    click.option("--delimiter", metavar="CHARACTER", help="Between the fields of CSV. Default: as it looks."),
    click.option("--encoding", metavar="NAME", help="Of the file, with --into. Default: UTF-8."),
    click.option("--entity", help="The entity of KameleonDB that the records belong to."),
    click.option("--id-field", default="id", show_default=True, help="With --entity: the field that holds the key."),
    click.option(
        "--field", "fields", multiple=True, help="With --entity: a field to embed; repeat it. Default: all text."
    ),
)
@run_options(
    group(
        "Model",
        model_options,
        provider_option,
        dimensions_option,
        click.option(
            "--precision",
            type=click.Choice(PRECISIONS),
            help="int8 and bf16 are faster and nearly as exact; auto takes the fastest that is close enough to fp32. "
            "[default: fp32]",
        ),
        click.option(
            "--min-fidelity",
            type=float,
            metavar="COSINE",
            help="Least mean cosine with fp32. [default: int8 0.997, bf16 0.9999]",
        ),
    ),
    cluster_option,
    click.option("--force", is_flag=True, help="Embed every record, also the unchanged ones."),
    click.option("--limit", type=int, help="Read at most so many records."),
    max_rejects_option,
    click.option(
        "--expect-count", metavar="N[+]", help="Exit with 3 unless exactly N (N+: at least N) records were read."
    ),
    click.option("--wait", default=0.0, metavar="SECONDS", help="Wait for another run to end instead of stopping."),
)
def reindex_command(
    arguments: RunArguments,
    table: TableArguments,
    names: tuple[str, ...],
    from_file: str | None,
    file_format: str | None,
    delimiter: str | None,
    encoding: str | None,
    entity: str | None,
    id_field: str,
    fields: tuple[str, ...],
    precision: str | None,
    min_fidelity: float | None,
    force: bool,
    limit: int | None,
    max_rejects: str,
    expect_count: str | None,
    wait: float,
) -> int:
    """Embed what is new or has changed, and bring the vectors up to date.

    \b
    kdb-fast reindex                               all entities of KameleonDB
    kdb-fast reindex Contact Ticket                some of them
    kdb-fast reindex --table articles --text title --text body --vector embedding
                                                   a column of any table
    kdb-fast reindex articles                      the same again: it is kept under its name

    Interrupted? The same command carries on: what is stored is skipped.
    """
    options = arguments.options(
        entities=names,
        precision=precision or "fp32",
        min_fidelity=min_fidelity,
        force=force,
        limit=limit,
        wait=wait,
        max_rejects=RejectLimit.parse(max_rejects),
    )
    expected = ExpectedCount.parse(expect_count) if expect_count is not None else None
    if from_file is None and (entity or fields):
        raise UsageError("--entity and --field belong to --from.", remedy="Name entities of KameleonDB as arguments.")
    file = FileArguments(from_file, file_format, delimiter, encoding)
    table.check(names, file, entity)
    from ..indexing.reindex import reindex
    from ..sources import SourceSpec
    from .report import print_receipt

    with arguments.running() as (address, progress):
        target = table.find_name(address, names, progress, file) if entity is None else None
        if target is not None:
            where, name = target
            receipt = table.reindex(where, name, arguments, options, precision, progress, file)
        else:
            if from_file is not None:
                from ..db.sqlite_connection import create_sqlite

                create_sqlite(address)
            records = SourceSpec(names, from_file, entity, id_field, fields, limit)
            receipt = reindex(address, records, options, progress)
    missed = expected.missed(receipt.read + receipt.empty) if expected else ""
    if missed:
        receipt = replace(receipt, warnings=(*receipt.warnings, missed))
    if arguments.as_json:
        print_json(receipt.as_json())
    else:
        print_receipt(receipt, address.display)
    return EXIT_REJECTS if missed else _exit_code(receipt)


def _exit_code(receipt: Receipt) -> int:
    """Of a run that came to its end."""
    return EXIT_REJECTS if receipt.rejected or receipt.input_changed else EXIT_OK


@click.command("insert")
@click.argument("entity")
@click.argument("file", required=False, metavar="[FILE|-]")
@database_option
@run_options(model_options, provider_option, dimensions_option, cluster_option, max_rejects_option)
def insert_command(arguments: RunArguments, entity: str, file: str | None, max_rejects: str) -> int:
    """Create records of an ENTITY of KameleonDB from JSON, and index them in the same go.

    FILE is JSON Lines, one JSON array or one object, with the entity's fields; without it, or as -, standard input is
    read. Every record gets a new id.

    A record is created before it is embedded. After an interrupted run do not insert the same records again, or
    they are there twice: `kdb-fast reindex ENTITY` indexes what was created, and the message says up to which line
    that is.
    """
    if file is None and sys.stdin is not None and sys.stdin.isatty():
        raise UsageError("There is nothing to insert.", remedy="Name a FILE, or pipe JSON Lines into the command.")
    options = arguments.options(max_rejects=RejectLimit.parse(max_rejects))
    from ..indexing.insert import insert
    from .report import print_inserted, print_rejected_lines

    try:
        with arguments.running() as (address, progress):
            receipt = insert(address, entity, file or "-", options, progress)
    except KdbFastError as error:
        if not arguments.as_json:
            print_rejected_lines(error.receipt)
        if error.completed_by_reindex:
            error.carry_on = _reindex_instead(entity)
        raise
    if arguments.as_json:
        print_json(receipt.as_json())
    else:
        print_rejected_lines(receipt)
        print_inserted(receipt, entity, address.display)
    return _exit_code(receipt)


def _reindex_instead(entity: str) -> str:
    """The reindex that completes an insert, with its options for database and model."""
    context = click.get_current_context()
    command = ["reindex", entity]
    for name in ("db", "model", "model_path", "provider", "base_url", "dimensions", "cluster"):
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            command += [f"--{name.replace('_', '-')}", str(context.params[name])]
    return command_line(command)
