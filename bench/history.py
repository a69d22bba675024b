"""``history.csv``: the main figures of every version that was measured, a row for each commit and machine."""

from __future__ import annotations

import csv
import io
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from . import machine
from .options import ROOT, say
from .results import Result, replace

NAME = "history.csv"
FIXED = ("date", "commit", "machine")
"""First columns; each of the others is a figure, empty where it was not measured."""


def main_figures(result: Result) -> dict[str, float]:
    """Column → median of what the chart of a part shows as ours. One part has one chart, so these are the figures
    that its page is about.
    """
    if result.chart is None:
        return {}
    part = result.part.partition("-")[0]  # data sets of one part have pages of their own
    _, unit, bars = result.chart
    return {column(part, bar.label, unit): bar.value.median for bar in bars if bar.ours}


def column(part: str, name: str, unit: str) -> str:
    """Name of a figure's column."""
    return f"{part}: {name}{f' ({unit})' if unit else ''}"


def record(figures: Mapping[str, float], about: Mapping[str, Any], out: Path) -> None:
    """Write figures into the row of this commit and machine in ``history.csv`` of ``out``; a new one goes to the end.

    Args:
        figures: Column → value.
        about: The machine, see :func:`bench.machine.describe`.
        out: Directory of the results.
    """
    commit = measured_commit()
    if commit is None:
        say(f"{NAME}: no row, since this is no checkout of git")
    elif figures:
        today = datetime.now(UTC).strftime("%Y-%m-%d")
        write(out / NAME, merged(read(out / NAME), today, commit, machine_name(about), figures))


def merged(
    rows: list[dict[str, str]], date: str, commit: str, machine: str, figures: Mapping[str, float]
) -> list[dict[str, str]]:
    """The rows with these figures in the row of this commit and machine."""
    values = {name: f"{float(f'{value:.4g}'):g}" for name, value in figures.items()}
    key = {"commit": commit, "machine": machine}
    for row in rows:
        if row.items() >= key.items():
            row.update(values, date=date)
            return rows
    return [*rows, {"date": date, **key, **values}]


def read(path: Path) -> list[dict[str, str]]:
    """Rows of the file, oldest first, without empty cells; none where there is no file."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return [{name: cell for name, cell in row.items() if cell} for row in csv.DictReader(file)]


def write(path: Path, rows: list[dict[str, str]]) -> None:
    """Replace the file; its columns are those of the rows, figures in the order of their names."""
    figures = sorted({name for row in rows for name in row} - set(FIXED))
    text = io.StringIO()
    writer = csv.DictWriter(text, [*FIXED, *figures], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    replace(path, text.getvalue())


def measured_commit() -> str | None:
    """The commit that is checked out, with ``+`` where the package differs from it; None without git."""
    try:
        commit = _git("rev-parse", "--short=7", "HEAD")
        return commit + ("+" if _git("status", "--porcelain", "--", "kdb_fast") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def machine_name(about: Mapping[str, Any]) -> str:
    """The processor, its kind, how many cores may be used, and what memory where that is limited."""
    limit = about.get("memory_limit_gib")
    return f"{about['cpu']} ({machine.kind(about)}), {about['cores']} cores" + (f", {limit} GiB" if limit else "")


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
