"""What a person is shown of times and programs."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta, timezone
from datetime import time as dt_time
from pathlib import Path

import click
import pytest

from kdb_fast.cli import demo, report
from kdb_fast.cli.commands import cli
from kdb_fast.cli.console import print_json
from kdb_fast.records import local_time


@pytest.fixture
def kathmandu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A quarter of an hour beside the others."""
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "Asia/Kathmandu")
        time.tzset()
        yield
    time.tzset()


def test_times_are_those_of_the_place_with_its_zone(kathmandu: None) -> None:
    assert local_time(datetime(2026, 1, 2, 3, 4, 5, 600, UTC)) == "2026-01-02 08:49:05 +0545"


def test_times_in_json_are_iso_8601_with_their_zone(kathmandu: None, capsys: pytest.CaptureFixture[str]) -> None:
    east = timezone(timedelta(hours=2))
    times = [
        datetime(2026, 1, 2, 3, 4, 5, 600, UTC),
        datetime(2026, 1, 2, 3, tzinfo=east),
        datetime.min.replace(tzinfo=east),
    ]
    local = [datetime(2026, 1, 2, 3), date(2026, 1, 2), dt_time(3, 4)]
    print_json({"times": times, "of_a_column_without_zone": local})
    assert json.loads(capsys.readouterr().out) == {
        "times": ["2026-01-02T03:04:05.000600+00:00", "2026-01-02T01:00:00+00:00", "0001-01-01T00:00:00+02:00"],
        "of_a_column_without_zone": ["2026-01-02T03:00:00", "2026-01-02", "03:04:00"],
    }


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
