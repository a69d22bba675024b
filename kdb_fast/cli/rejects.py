"""``rejects list``, ``rejects clear`` and ``rejects retry``."""

from __future__ import annotations

from pathlib import Path

import click

from ..errors import EXIT_OK, EXIT_REJECTS, UsageError
from ..records import number_of
from .console import print_json
from .groups import ListedCommands
from .options import (
    RunArguments,
    cluster_option,
    database_option,
    in_schema,
    json_option,
    opened_database,
    provider_option,
    run_options,
    state_schema_option,
)

target_option = click.option("--target", metavar="NAME", help="Only this target: see `kdb-fast targets list`.")


def _check_one(entity: str | None, target: str | None) -> None:
    if entity is not None and target is not None:
        raise UsageError("--entity and --target exclude each other.")


@click.group("rejects", cls=ListedCommands)
def rejects_group() -> None:
    """Show, retry and forget the records that could not be stored."""


@rejects_group.command("list")
@database_option
@click.option("--entity", help="Only this entity.")
@target_option
@state_schema_option
@click.option("--limit", type=click.IntRange(min=1), default=100, show_default=True, help="Show at most so many.")
@json_option
def rejects_list(
    db: str | None, entity: str | None, target: str | None, state_schema: str | None, limit: int, as_json: bool
) -> None:
    """List rejected records with the reason, those of the newest run first."""
    from ..indexing.rejects import list_all
    from .report import print_rejects

    _check_one(entity, target)
    with opened_database(db, reads=True) as address:
        rows = list_all(in_schema(address, state_schema), entity, target)
    if as_json:
        print_json({"total": len(rows), "rejects": [row.as_json() for row in rows[:limit]]})
    else:
        print_rejects(rows, limit)


@rejects_group.command("clear")
@database_option
@click.option("--entity", help="Only this entity.")
@target_option
@state_schema_option
@json_option
def rejects_clear(
    db: str | None, entity: str | None, target: str | None, state_schema: str | None, as_json: bool
) -> None:
    """Forget rejected records of KameleonDB, or of a target. The records themselves stay as they are; a reindex would
    reject them again."""
    from ..indexing.rejects import clear_of, clear_rejects

    _check_one(entity, target)
    with opened_database(db, reads=True) as address:
        if target is not None:
            count = clear_of(in_schema(address, state_schema), target)
        else:
            count = clear_rejects(address, entity)
    if as_json:
        print_json({"cleared": count})
    else:
        print(f"{number_of(count, 'reject')} forgotten")


@rejects_group.command("retry")
@database_option
@run_options(
    click.option("--model", metavar="NAME", help="Any FastEmbed model. Default: that of the newest run."),
    click.option("--model-path", type=click.Path(path_type=Path, file_okay=False), help="Directory of a model."),
    provider_option,
    cluster_option,
)
def rejects_retry(arguments: RunArguments) -> int:
    """Read the entities with rejected records again, and store what can be stored now.

    This is a reindex of these entities, so unchanged records are skipped. Lines of files that became no record cannot
    be tried again: they are not in the database. Those of a target are tried again by each kdb-fast reindex NAME.
    """
    from ..indexing.rejects import retry_rejects
    from .report import print_retried

    options = arguments.options()
    with arguments.running(reads=True) as (address, progress):
        result = retry_rejects(address, options, progress, model=arguments.model)
    if arguments.as_json:
        print_json(result.as_json())
    else:
        print_retried(result, address.display)
    left = result.remaining or result.lines_of_inserts or result.lines_of_files
    return EXIT_REJECTS if left else EXIT_OK
