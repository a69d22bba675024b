"""Tables of any kind on the command line: the options of ``reindex`` that describe a target, and ``targets``."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import click

from ..errors import UsageError
from ..records import storable_key
from .console import shell_word
from .groups import group
from .options import F, RunArguments, database_option, json_option, opened_database, provider_of

if TYPE_CHECKING:
    from ..db.address import DatabaseAddress
    from ..indexing.progress import Progress
    from ..receipt import Receipt
    from ..settings import ReindexOptions


def state_schema_option(command: F) -> F:
    """``--state-schema``."""
    return click.option(
        "--state-schema",
        metavar="SCHEMA",
        help="PostgreSQL: the schema of kdb-fast's own tables. Default: where they are already, else the first of the "
        "search_path.",
    )(command)


def table_options(command: Callable[..., int]) -> Callable[..., int]:
    """The options that describe a target; the command is called with a :class:`TableArguments`, ``table``."""

    def called(**values: Any) -> int:
        names = {field.name for field in fields(TableArguments)}
        return command(table=TableArguments(**{name: values.pop(name) for name in names}), **values)

    return group(
        "Any table",
        click.option(
            "--table", metavar="TABLE", help="The table that is read, as SQL names it: articles, shop.articles."
        ),
        click.option(
            "--text",
            multiple=True,
            metavar="COLUMN",
            help="A column that is embedded, or an SQL expression; repeat it: they are joined by a blank line. "
            "Default: all text.",
        ),
        click.option("--template", metavar="TEXT", help="The text, such as '{title}: {body}', instead of --text."),
        click.option("--filter", metavar="SQL", help="Only the rows that meet this condition."),
        click.option(
            "--key",
            multiple=True,
            metavar="COLUMN",
            help="A column that tells rows apart; repeat it. Default: the primary key.",
        ),
        click.option(
            "--query", metavar="SQL", help="A SELECT that is read, instead of a table; needs --key and --into."
        ),
        click.option("--vector", metavar="COLUMN", help="The column of the vectors. [with --into: embedding]"),
        click.option(
            "--into", metavar="TABLE", help="A table for the vectors beside what is read; made where it is missing."
        ),
        click.option("--with-source", is_flag=True, help="With --into: make a view TABLE_with_source that joins both."),
        click.option("--vec0", is_flag=True, help="With --into, on SQLite: a table of sqlite-vec."),
        click.option(
            "--source",
            metavar="URL",
            help="Another database that is read, such as a replica. Its password is not kept: use PGPASSWORD or "
            "~/.pgpass.",
        ),
        click.option("--create", is_flag=True, help="Add the column of --vector where it is missing."),
        click.option(
            "--replace", is_flag=True, help="Overwrite vectors that another program has written, for this run."
        ),
        click.option(
            "--vacuum", is_flag=True, help="PostgreSQL: free what a run leaves behind of rows, while it goes on."
        ),
        click.option(
            "--name",
            metavar="NAME",
            help="Name under which all this is kept, for `reindex NAME`. Default: the table's.",
        ),
        state_schema_option,
    )(functools.update_wrapper(called, command))


@dataclass(frozen=True, kw_only=True)
class TableArguments:
    """What the options that describe a target were given."""

    table: str | None
    text: tuple[str, ...]
    template: str | None
    filter: str | None
    key: tuple[str, ...]
    query: str | None
    vector: str | None
    into: str | None
    with_source: bool
    vec0: bool
    source: str | None
    create: bool
    replace: bool
    vacuum: bool
    name: str | None
    state_schema: str | None

    @property
    def describing(self) -> list[str]:
        """The options that describe something and were given, as the command line writes them."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return [
            f"--{name.replace('_', '-')}"
            for name, value in given.items()
            if value not in (None, (), False) and name not in _NAMING
        ]

    def check(self, names: tuple[str, ...], from_file: str | None) -> None:
        """Raise UsageError for what makes no sense beside each other."""
        if from_file is not None and (self.describing or self.name):
            raise UsageError(f"--from and {(self.describing or ['--name'])[0]} exclude each other.")
        if self.name is not None and names:
            raise UsageError("--name and a NAME exclude each other.", remedy="Name the target once.")
        if self.describing and not (self.table or self.query or self.name or names):
            raise UsageError(
                f"{self.describing[0]} belongs to a table.",
                remedy="Name it with --table, or name the target that is to be changed.",
            )

    def find_name(self, address: DatabaseAddress, names: tuple[str, ...], progress: Progress) -> str | None:
        """Name of the target that is meant, '' for that of its table; None where entities of KameleonDB are meant.

        Raises:
            UsageError: Several are.
        """
        if self.name is not None or ((self.table or self.query) and not names):
            return self.name or ""
        if not names:
            return None
        from ..catalog.definitions import active_entities
        from ..stores.targets import kept_in
        from ..tables.describe import find_kept, no_target

        _, kept = kept_in(in_schema(address, self.state_schema))
        found = [target for name in names if (target := find_kept(name, kept, address.dialect))]
        if found and len(names) > 1:
            raise UsageError(
                f"{storable_key(found[0].name)} is a target, which is brought up to date alone.",
                remedy=f"Run: kdb-fast reindex {shell_word(found[0].name)}",
            )
        if self.describing:
            if not found:
                raise no_target(names[0], kept)
            return found[0].name
        if not kept:
            return None
        entities = active_entities(address)
        if not found and not entities:
            raise no_target(names[0], kept)
        if found and found[0].name in entities:
            progress.note(
                f"{storable_key(found[0].name)} is an entity of KameleonDB, and that is brought up to date; for the "
                f"target of this name: kdb-fast reindex --name {shell_word(found[0].name)}"
            )
            return None
        return found[0].name if found else None

    def reindex(
        self,
        address: DatabaseAddress,
        name: str,
        arguments: RunArguments,
        options: ReindexOptions,
        precision: str | None,
        progress: Progress,
    ) -> Receipt:
        """The run.

        Args:
            name: Of the target; '' for that of its table.
            precision: As it was given.
        """
        from ..indexing.tables import RunOptions, reindex_table

        provider = None
        if arguments.provider or arguments.base_url:
            provider = provider_of(arguments.provider, arguments.base_url)
        run = RunOptions(**{field: getattr(options, field) for field in RunOptions.__annotations__})  # type: ignore[typeddict-item]
        return reindex_table(
            address,
            self.table,
            text=self.text,
            template=self.template,
            filter=self.filter,
            key=self.key,
            query=self.query,
            vector=self.vector,
            into=self.into,
            with_source=self.with_source,
            vec0=self.vec0,
            source=self.source,
            create=self.create,
            replace=self.replace,
            vacuum=self.vacuum,
            name=name or None,
            state_schema=self.state_schema,
            model=arguments.model,
            provider=provider,
            base_url=arguments.base_url,
            dimensions=arguments.dimensions,
            precision=precision,
            progress=progress,
            **run,
        )


_NAMING = ("name", "state_schema")
"""Options that say which target is meant, and not what it is."""


def in_schema(address: DatabaseAddress, schema: str | None) -> DatabaseAddress:
    """The address with the schema of our own tables, where one is named."""
    return address if schema is None or address.dialect == "sqlite" else replace(address, schema=schema)


@click.group("targets")
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
        found = statuses_in(in_schema(address, state_schema))
    if as_json:
        print(json.dumps({"targets": [target.as_json() for target in found]}, default=str))
    else:
        print_targets([target.as_json() for target in found])


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
    from ..stores.targets import statuses_in
    from .report import print_target

    with opened_database(db, reads=True) as address:
        (found,) = statuses_in(in_schema(address, state_schema), name)
    if as_json:
        print(json.dumps(found.as_json(), default=str))
    else:
        print_target(found.as_json())


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
        print(json.dumps({"dropped": definition.name, "removed": removed}))
    else:
        print(f"{storable_key(definition.name)} is forgotten" + "".join(f"; removed {name}" for name in removed))


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
        print(json.dumps({"done": yes, **found._asdict()}))
        return
    what = "removed" if yes else "would be removed"
    print(f"{name}: {what}: {', '.join(found.removed) or 'nothing'}")
    for left in found.left:
        print(f"  stays: {left}")
    if found.removed and not yes:
        print("  Nothing was done. To do it: the same with --yes")
