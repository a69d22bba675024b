"""``targets`` and ``uninstall``."""

from __future__ import annotations

import click

from ..records import storable_key
from .console import complain, print_json
from .groups import ListedCommands
from .options import database_option, in_schema, json_option, opened_database, state_schema_option


@click.group("targets", cls=ListedCommands)
def targets_group() -> None:
    """List, show and forget the tables whose vectors are kept up to date: the targets of `reindex --table`."""


@targets_group.command("list")
@database_option
@state_schema_option
@json_option
def targets_list(db: str | None, state_schema: str | None, as_json: bool) -> None:
    """List all targets with their rows that have a vector, and their newest run."""
    from ..stores.targets import statuses_in
    from .report import print_targets

    with opened_database(db, reads=True) as address:
        found, hidden = statuses_in(in_schema(address, state_schema))
    for note in hidden:
        complain(f"note: {note}")
    if as_json:
        print_json({"targets": [target.as_json() for target in found]})
    elif found or not hidden:
        print_targets(found)


@targets_group.command("show")
@click.argument("name")
@database_option
@state_schema_option
@json_option
def targets_show(name: str, db: str | None, state_schema: str | None, as_json: bool) -> None:
    """Show how a target was described, and what there is of it."""
    show_target(name, db, state_schema, as_json)


def show_target(name: str, db: str | None, state_schema: str | None, as_json: bool) -> None:
    """Print one target."""
    from ..stores.targets import status_in
    from .report import print_target

    with opened_database(db, reads=True) as address:
        found = status_in(in_schema(address, state_schema), name)
    if as_json:
        print_json(found.as_json())
    else:
        print_target(found)


@targets_group.command("drop")
@click.argument("name")
@database_option
@state_schema_option
@click.option(
    "--with-vectors", is_flag=True, help="Also the table or column of the vectors, where kdb-fast has made it."
)
@json_option
def targets_drop(name: str, db: str | None, state_schema: str | None, with_vectors: bool, as_json: bool) -> None:
    """Forget a target: its description, its runs and rejects, and what is known of its vectors.

    The vectors stay. They are then another program's: a target that is described anew leaves them alone.
    """
    from ..stores.targets import find_in, forget

    with opened_database(db, reads=True) as address:
        where, definition = find_in(in_schema(address, state_schema), name)
        removed = forget(where, definition, with_vectors=with_vectors)
    if as_json:
        print_json({"dropped": definition.name, "removed": removed})
    else:
        print(f"{storable_key(definition.name)} is forgotten" + "".join(f"; removed {name}" for name in removed))
        if not (with_vectors and {"table", "column"} & set(definition.created)):
            print(f"  stays: {definition.place_shown}{', which kdb-fast has not made' if with_vectors else ''}")


@click.command("uninstall")
@database_option
@state_schema_option
@click.option("--yes", is_flag=True, help="Do it; without, only say what would be removed and what would be left.")
@json_option
def uninstall_command(db: str | None, state_schema: str | None, yes: bool, as_json: bool) -> None:
    """Remove kdb-fast's own tables from a database: runs, rejects, targets and what is known of their vectors.

    Your tables and all vectors stay; the columns and tables that kdb-fast has made for vectors are named, with what
    removes them. Before it, `targets drop NAME --with-vectors` removes those of one target.
    """
    from ..stores.uninstall import look, uninstall

    with opened_database(db, reads=True) as address:
        found = (uninstall if yes else look)(in_schema(address, state_schema))
        name = address.display
    if as_json:
        print_json({"done": yes, **found._asdict()})
        return
    what = "removed" if yes else "would be removed"
    print(f"{name}: {what}: {', '.join(found.removed) or 'nothing'}")
    for left in found.left:
        print(f"  stays: {left}")
    if found.removed and not yes:
        print("  Nothing was done. To do it: the same with --yes")
