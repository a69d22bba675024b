"""What the help lists: options in groups, so that a long one stays readable, and commands with a whole sentence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

Option = Callable[[Callable[..., int]], Callable[..., int]]

GROUP = "kdb_fast_group"
"""Attribute of a parameter: the title under which the help lists it."""

REST = "Run"
"""Title of the options that are in no group; the last."""


def group(title: str, *options: Option) -> Option:
    """These options, under a title."""

    def decorate(command: Callable[..., int]) -> Callable[..., int]:
        for option in reversed(options):
            before = len(_parameters(command))
            command = option(command)
            for parameter in _parameters(command)[before:]:
                setattr(parameter, GROUP, title)
        return command

    return decorate


def _parameters(command: Callable[..., int]) -> list[Any]:
    """The parameters that click has noted, the last one decorated last."""
    found: list[Any] = getattr(command, "__click_params__", [])
    return found


class GroupedCommand(click.Command):
    """A command whose help lists its options by group, in the order in which they stand."""

    def format_options(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        titles: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(context):
            record = parameter.get_help_record(context)
            if record is not None and not isinstance(parameter, click.Argument):
                titles.setdefault(getattr(parameter, GROUP, REST), []).append(record)
        for title in (*(title for title in titles if title != REST), REST):
            with formatter.section(title):
                formatter.write_dl(titles[title])


class ListedCommands(click.Group):
    """Commands whose help lists each with the whole first sentence of its own."""

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        found = [(name, self.get_command(context, name)) for name in self.list_commands(context)]
        with formatter.section("Commands"):
            formatter.write_dl([(name, _first_sentence(command.help or "")) for name, command in found if command])


def _first_sentence(text: str) -> str:
    sentence, end, _ = " ".join(text.split()).partition(". ")
    return sentence + end.strip()
