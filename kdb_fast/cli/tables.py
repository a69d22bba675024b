"""Tables of any kind on the command line: the options of ``reindex`` that describe a target."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from ..errors import UsageError
from ..records import shell_word, storable_key
from ..settings import INDEX_POLICIES
from .groups import group
from .options import RunArguments, in_schema, provider_of, state_schema_option

if TYPE_CHECKING:
    from ..db.address import DatabaseAddress
    from ..indexing.progress import Progress
    from ..receipt import Receipt
    from ..settings import ReindexOptions


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
            help="A column that tells rows apart; repeat it. Of a file also with a type: id:bigint. Default: the "
            "primary key; of a file, id.",
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
        click.option("--chunk", type=int, metavar="TOKENS", help="With --into: cut texts into pieces of so long."),
        click.option("--overlap", type=int, metavar="TOKENS", help="Tokens that two neighbouring pieces share."),
        click.option(
            "--document-prefix",
            metavar="TEXT",
            help="Read before each text by the model. Default: what it asks for.",
        ),
        click.option("--query-prefix", metavar="TEXT", help="Read before each query by the model."),
        click.option("--keyword/--no-keyword", default=None, help="Keep the words of the texts, for keyword search."),
        click.option(
            "--language",
            metavar="NAME",
            help="Of --keyword. Default: the database's; on SQLite english or simple.",
        ),
        click.option(
            "--index",
            type=click.Choice((*INDEX_POLICIES, "")),
            metavar="|".join(INDEX_POLICIES),
            help="What is done with the indexes of the vectors; none: make none. Default: keep those of a column, and "
            "defer those of a table of vectors where that pays.",
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


class FileArguments(NamedTuple):
    """What the options that describe a file were given."""

    path: str | None
    format: str | None
    delimiter: str | None
    encoding: str | None


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
    chunk: int | None
    overlap: int | None
    document_prefix: str | None
    query_prefix: str | None
    keyword: bool | None
    language: str | None
    index: str | None
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
            if value not in (None, ()) and (value is not False or name == "keyword") and name not in _NAMING
        ]

    def check(self, names: tuple[str, ...], file: FileArguments, entity: str | None) -> None:
        """Raise UsageError for what makes no sense beside each other."""
        for option, value in (("format", file.format), ("delimiter", file.delimiter), ("encoding", file.encoding)):
            if value is not None and (file.path is None or entity is not None):
                raise UsageError(f"--{option} belongs to --from with --into.")
        if entity is not None:
            if names:
                raise UsageError("--from with --entity NAME takes no entity arguments.")
            if self.describing or self.name:
                raise UsageError(f"--entity and {(self.describing or ['--name'])[0]} exclude each other.")
            return
        if file.path is not None:
            for option, given in (("table", self.table), ("query", self.query), ("filter", self.filter)):
                if given is not None:
                    raise UsageError(f"--from and --{option} exclude each other.")
            if not (self.into or self.name or len(names) == 1):
                raise UsageError("--from needs --entity NAME, or --into TABLE for a table of vectors.")
        if self.name is not None and names:
            raise UsageError("--name and a NAME exclude each other.", remedy="Name the target once.")
        if self.describing and not (self.table or self.query or file.path or self.name or names):
            raise UsageError(
                f"{self.describing[0]} belongs to a table.",
                remedy="Name it with --table, or name the target that is to be changed.",
            )

    def find_name(
        self, address: DatabaseAddress, names: tuple[str, ...], progress: Progress, file: FileArguments
    ) -> tuple[DatabaseAddress, str] | None:
        """Name of the target that is meant, '' for that of its table, and the database, with the schema of our own
        tables where that is known; None where entities of KameleonDB are meant.

        Raises:
            UsageError: Several are.
            SchemaError: There is no such target, and no such entity.
        """
        address = in_schema(address, self.state_schema)
        if self.name is not None or ((self.table or self.query or file.path) and not names):
            return address, self.name or ""
        if not names:
            return None
        from ..catalog.definitions import active_entities
        from ..stores.targets import kept_in

        homes = kept_in(address)
        found = next((target for name in names if (target := homes.find(name))), None)
        if found and len(names) > 1:
            raise UsageError(
                f"{storable_key(found.definition.name)} is a target, which is brought up to date alone.",
                remedy=f"Run: kdb-fast reindex {shell_word(found.definition.name)}",
            )
        if self.describing or file.path is not None:
            found = homes.one(names[0])
            return found.where(address), found.definition.name
        if not (homes.meant or homes.notes):
            return None
        entities = active_entities(address)
        if found is None:
            if names[0] not in entities and (homes.notes or not entities):
                homes.one(names[0])  # says that there is none
            return None
        if found.definition.name in entities:
            name = found.definition.name
            progress.note(
                f"{storable_key(name)} is an entity of KameleonDB, and that is brought up to date; for the target of "
                f"this name: kdb-fast reindex --name {shell_word(name)}"
            )
            return None
        return found.where(address), found.definition.name

    def reindex(
        self,
        address: DatabaseAddress,
        name: str,
        arguments: RunArguments,
        options: ReindexOptions,
        precision: str | None,
        progress: Progress,
        file: FileArguments,
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
            from_file=file.path,
            file_format=file.format,
            delimiter=file.delimiter,
            encoding=file.encoding,
            chunk=self.chunk,
            overlap=self.overlap,
            document_prefix=self.document_prefix,
            query_prefix=self.query_prefix,
            keyword=self.keyword,
            language=self.language,
            index=self.index,
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
