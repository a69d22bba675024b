"""What a person is shown of times and programs."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import click
import pytest

from kdb_fast.cli import demo, report
from kdb_fast.cli.commands import cli


@pytest.fixture
def kathmandu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A quarter of an hour beside the others."""
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "Asia/Kathmandu")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.parametrize("moment", [datetime(2026, 1, 2, 3, 4, 5, 600, UTC), "2026-01-02 03:04:05.600"])
def test_times_of_both_databases_are_those_of_the_place(kathmandu: None, moment: datetime | str) -> None:
    assert report._moment(moment) == "2026-01-02 08:49:05"
    assert report._moment(None) == "never"


def test_values_are_shown_as_sql_and_json_write_them() -> None:
    values = [None, True, ["a", None], {"ü": 1}, b"\x00\xff", 0.5, datetime(2026, 1, 2, tzinfo=UTC)]
    shown = ["NULL", "true", '["a", null]', '{"ü": 1}', "00ff", "0.5", "2026-01-02 00:00:00+00:00"]
    assert [report._of_database(value) for value in values] == shown


def test_the_help_lists_commands_with_whole_sentences() -> None:
    context = click.Context(cli)
    found = [cli.get_command(context, name) for name in cli.list_commands(context)]
    groups = [cli, *(command for command in found if isinstance(command, click.Group))]
    assert len(groups) == 4
    for group in groups:
        _, _, listed = group.get_help(click.Context(group)).partition("Commands:")
        assert listed
        assert "..." not in listed


def test_the_program_is_called_as_the_shell_finds_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    beside = tmp_path / ".venv" / "bin"
    beside.mkdir(parents=True)
    monkeypatch.setattr(sys, "executable", str(beside / "python"))
    monkeypatch.setenv("PATH", "")
    monkeypatch.chdir(tmp_path)
    assert demo._program() == "kdb-fast"
    (beside / "kdb-fast").touch(0o755)
    assert demo._program() == ".venv/bin/kdb-fast"
    monkeypatch.setenv("PATH", str(beside))
    assert demo._program() == "kdb-fast"
