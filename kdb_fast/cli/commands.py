"""The group of all commands."""

from __future__ import annotations

from importlib import import_module

import click

from .. import __version__
from .groups import ListedCommands
from .options import database_option, json_option, no_progress_option

ELSEWHERE = {
    "reindex": "indexing.reindex_command",
    "targets": "targets.targets_group",
    "insert": "indexing.insert_command",
    "rejects": "rejects.rejects_group",
    "search": "searching.search_command",
    "status": "searching.status_command",
    "models": "models.models_group",
    "uninstall": "targets.uninstall_command",
}
"""Module and name of the commands that are not in this module."""

HELP = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class _Commands(ListedCommands):
    """Imports the module of a command when the command is asked for: a search needs one of them."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in ELSEWHERE:
            module, name = ELSEWHERE[cmd_name].split(".")
            self.commands[cmd_name] = getattr(import_module(f".{module}", __package__), name)
        return super().get_command(ctx, cmd_name)


@click.group(cls=_Commands, context_settings=HELP, no_args_is_help=True)
@click.version_option(__version__, prog_name="kdb-fast")
def cli() -> None:
    """Re-embed a table of text at the speed of this machine, and search it.

    \b
    Try it:      kdb-fast demo
    Main job:    kdb-fast reindex --db postgresql://user@host/dbname
    Any table:   kdb-fast reindex --table articles --vector embedding --db …
    Ask:         kdb-fast search "angry customer" --db …

    \b
    Exit codes:  0 all stored, 2 usage, 3 finished but records were rejected, the input
                 changed or its number is not the expected one, 4 refused before the start,
                 5 database, 6 another run holds the index, 7 out of a resource, 8 too many
                 rejects, 70 internal error; stopped after what was embedded is written:
                 129 the terminal closed, 130 Ctrl-C, 143 SIGTERM;
                 141 the reader of the output has gone
    """


@cli.command(
    "kameleondb",
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="ARGS…")
def kameleondb_command(arguments: tuple[str, ...]) -> int:
    """Run KameleonDB's own command line on kdb-fast: alias kameleondb='kdb-fast kameleondb'.

    Its data insert, embeddings reindex, embeddings status and search use kdb-fast's engine; all else is as it was.
    KAMELEONDB_URL names the database; with KAMELEONDB_EMBEDDINGS=0 nothing is indexed.
    """
    # Before KameleonDB's command line is imported, which needs its packages.
    from ..kameleondb.patching import needed

    needed("kameleondb")
    needed("typer")
    from .kameleondb import run as run_kameleondb

    return run_kameleondb(list(arguments))


@cli.command("demo")
@database_option
@no_progress_option
@json_option
def demo_command(db: str | None, no_progress: bool, as_json: bool) -> int:
    """Index the documentation of Python's standard library, and ask it a few questions."""
    from .demo import run_demo

    return run_demo(db, show=not no_progress, as_json=as_json)


for command in ELSEWHERE:
    cli.add_command(click.Command(command))  # its name, until it is asked for
