"""Options that several commands have, and what a command does with them: the frame of a run."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..settings import DEFAULT_BATCH_SIZE, DEFAULT_MODEL, ReindexOptions

if TYPE_CHECKING:
    from ..db.address import DatabaseAddress
    from ..indexing.progress import Progress

F = TypeVar("F", bound=Callable[..., Any])
Option = Callable[[Callable[..., int]], Callable[..., int]]


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
    return click.option("--model", metavar="NAME", help=f"Any FastEmbed model. [default: {DEFAULT_MODEL}]")(command)


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


def provider_of(provider: str | None, base_url: str | None) -> str:
    """Naming the address is naming the provider."""
    return provider or ("openai" if base_url else "fastembed")


def state_schema_option(command: F) -> F:
    """``--state-schema``."""
    return click.option(
        "--state-schema",
        metavar="SCHEMA",
        help="PostgreSQL: the schema of kdb-fast's own tables. Default: where the target is kept; for a new one where "
        "they are already, else the first of the search_path.",
    )(command)


def in_schema(address: DatabaseAddress, schema: str | None) -> DatabaseAddress:
    """The address with the schema of our own tables, where one is named."""
    return address if schema is None or address.dialect == "sqlite" else replace(address, schema=schema)


@contextlib.contextmanager
def opened_database(url: str | None, *, reads: bool = False) -> Iterator[DatabaseAddress]:
    """The opened database of ``--db``; warns when a password stands on the command line.

    Args:
        reads: The command only reads, so it must not make an embedded server's data.
    """
    from ..db.address import SOURCE, opened, parse_address

    context = click.get_current_context()
    by_environment = context.get_parameter_source("db") is click.core.ParameterSource.ENVIRONMENT
    address = parse_address(url, "KDB_FAST_DB" if by_environment else "--db")
    _warn_of_secrets(url, address)
    if source := context.params.get("source"):
        _warn_of_secrets(source, parse_address(source, SOURCE))
    with opened(address, create=not reads) as ready:
        yield ready


def _warn_of_secrets(url: str | None, address: DatabaseAddress) -> None:
    """Say what others of this machine or the network could see of an address and what is sent there."""
    from ..db.address import secrets_of, unverified_server

    if url and any(url in argument for argument in sys.argv) and secrets_of(address):
        instead = "KDB_FAST_DB or PGPASSWORD" if address.given_as == "--db" else "PGPASSWORD"
        print(
            "warning: the password on the command line can be read by other users of this machine; "
            f"set {instead} instead.",
            file=sys.stderr,
        )
    if exposed := unverified_server(address):
        print(
            f"warning: nothing proves that {exposed} is the server that is meant, or hides what is sent to it; "
            "add ?sslmode=verify-full to the address.",
            file=sys.stderr,
        )


batch_size_option: Option = click.option(
    "--batch-size", default=DEFAULT_BATCH_SIZE, show_default=True, help="Most rows of one model run."
)


class Workers(click.ParamType):  # type: ignore[type-arg]  # not generic before click 8.3
    """A number, or ``all``: None, as where the option is left out."""

    name = "N|all"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        if str(value).lower() == "all":
            return None
        try:
            return int(value)
        except ValueError:
            self.fail(f"expected a number or all, not {value!r}", param, ctx)


workers_option: Option = click.option(
    "--workers",
    type=Workers(),
    metavar="N|all",
    help="Embedding processes. Default: all, one for each CPU this process may use, or the cluster has.",
)
cluster_option: Option = click.option(
    "--cluster",
    metavar="ADDRESS",
    help="Embed on the CPUs of a Ray cluster: auto, ray://HOST:10001 or HOST:6379; --workers limits how many.",
)
no_progress_option: Option = click.option("--no-progress", is_flag=True, help="Print no progress.")
max_rejects_option: Option = click.option(
    "--max-rejects", default="1%", show_default=True, metavar="N|P%", help="Stop when more are unfit."
)


@dataclass(frozen=True, kw_only=True)
class RunArguments:
    """What the options of a command that embeds were given."""

    db: str | None
    batch_size: int
    workers: int | None
    model: str | None
    model_path: Path | None
    provider: str | None
    base_url: str | None
    as_json: bool
    no_progress: bool
    dimensions: int | None = None
    cluster: str | None = None

    def options(self, **more: Any) -> ReindexOptions:
        """The settings of the run, with those that only some commands have.

        Raises:
            UsageError: One of them makes no sense.
        """
        return ReindexOptions(
            model=DEFAULT_MODEL if self.model is None else self.model,
            model_path=self.model_path,
            provider=provider_of(self.provider, self.base_url),
            base_url=self.base_url or None,
            dimensions=self.dimensions or None,
            batch_size=self.batch_size,
            workers=self.workers,
            cluster=self.cluster,
            **more,
        )

    @contextlib.contextmanager
    def running(self, *, reads: bool = False) -> Iterator[tuple[DatabaseAddress, Progress]]:
        """The opened database, and what shows the progress; both are closed at the end.

        Args:
            reads: As for :func:`opened_database`.
        """
        from . import bars

        with (
            contextlib.closing(bars.choose(not self.no_progress)) as progress,
            opened_database(self.db, reads=reads) as address,
        ):
            yield address, progress


def run_options(*own: Option) -> Option:
    """The options of a command that embeds, with its ``own`` in the middle, as its help lists them.

    The command is called with a RunArguments, and by name with what its own options and arguments were given.
    """

    def decorate(command: Callable[..., int]) -> Callable[..., int]:
        def called(**values: Any) -> int:
            of_run = {field.name for field in fields(RunArguments)} & values.keys()
            return command(RunArguments(**{name: values.pop(name) for name in of_run}), **values)

        result: Callable[..., int] = functools.update_wrapper(called, command)
        options: list[Option] = [batch_size_option, workers_option, *own, json_option, no_progress_option]
        for option in reversed(options):
            result = option(result)
        return result

    return decorate
