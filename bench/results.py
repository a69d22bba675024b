"""The result of a part: JSON for programs, Markdown and a chart for people."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from . import chart, machine
from .measure import Spread


@dataclass
class Table:
    """A table with a title; every cell is text."""

    title: str
    columns: Sequence[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        head = f"| {' | '.join(self.columns)} |\n|{'---|' * len(self.columns)}\n"
        return f"### {self.title}\n\n{head}" + "".join(f"| {' | '.join(row)} |\n" for row in self.rows)


@dataclass
class Requirement:
    """Something that must hold: ``measured`` is at least (or at most) ``bound``."""

    text: str
    measured: Spread
    bound: float
    at_most: bool = False
    unit: str = ""

    @property
    def met(self) -> bool:
        return self.measured.median <= self.bound if self.at_most else self.measured.median >= self.bound

    def row(self) -> list[str]:
        sign = "≤" if self.at_most else "≥"
        required = f"{sign} {self.bound:g}{self.unit}"
        return [self.text, self.measured.text(2, self.unit), required, "yes" if self.met else "**no**"]


@dataclass
class Result:
    """What a part found.

    Attributes:
        part: Name of the part.
        question: The one question that it answers.
        data: A line for each data set, with its tokens a record.
        caveats: What a reader must know before the numbers.
        chart: Title, unit and bars.
        raw: Every single measurement.
    """

    part: str
    question: str
    data: list[str] = field(default_factory=list)
    caveats: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    requirements: list[Requirement] = field(default_factory=list)
    chart: tuple[str, str, list[chart.Bar]] | None = None
    raw: dict[str, Any] = field(default_factory=dict)


def write(result: Result, about: dict[str, Any], out: Path) -> str:
    """``<part>.json``, ``<part>.md`` and ``<part>.svg`` in ``out``; the name, which :func:`page_name` gives."""
    out.mkdir(parents=True, exist_ok=True)
    name = page_name(result.part, about, out)
    plain = {"measured_at": datetime.now(UTC).strftime("%Y-%m-%d"), "machine": about, **asdict(result)}
    for requirement, found in zip(plain["requirements"], result.requirements, strict=True):
        requirement["met"] = found.met
    replace(out / f"{name}.json", json.dumps(plain, indent=1) + "\n")
    if result.chart:
        replace(out / f"{name}.svg", chart.draw(*result.chart))
    replace(out / f"{name}.md", markdown(result, about, plain["measured_at"], name))
    return name


def page_name(part: str, about: dict[str, Any], out: Path) -> str:
    """Name of a part's files: ``embed``; where those are of a CPU of another kind, beside them: ``embed.avx2``."""
    page = out / f"{part}.json"
    kind = machine.kind(about)
    if not page.exists() or machine.kind(json.loads(page.read_text())["machine"]) == kind:
        return part
    return f"{part}.{kind.lower().replace(' ', '-')}"


def measured(part: str, about: dict[str, Any], out: Path) -> dict[str, Any]:
    """``raw`` of a part's page of this kind of CPU; empty where there is none."""
    page = out / f"{page_name(part, about, out)}.json"
    raw: dict[str, Any] = json.loads(page.read_text())["raw"] if page.exists() else {}
    return raw


def markdown(result: Result, about: dict[str, Any], day: str, name: str) -> str:
    """The page of a part."""
    parts = [f"## {name}\n", f"{result.question}\n"]
    notes = [f"Measured on {day}.", *machine.lines(about), *result.data, *result.caveats]
    parts.append("".join(f"- {note}\n" for note in notes))
    if result.requirements:
        rows = [requirement.row() for requirement in result.requirements]
        parts.append(Table("Required", ("what", "measured", "required", "met"), rows).markdown())
    parts += [table.markdown() for table in result.tables]
    if result.chart:
        parts.append(f"![{result.chart[0]}]({name}.svg)\n")
    return "\n".join(parts)


def gather(out: Path, order: Sequence[str]) -> None:
    """``README.md`` in ``out``: the pages of all parts that have been run, in order."""
    head = (
        "# Results of the benchmarks\n\n"
        "Written by `python -m bench`; every number was measured. Values are the median of the runs with their range; "
        "contenders that are compared ran alternately, each run in a fresh process, and ratios were taken run by run. "
        "The `.json` files hold every single measurement, `history.csv` the main figures of every commit that was "
        "measured.\n"
    )
    pages = [
        path.read_text() for part in order for path in sorted([*out.glob(f"{part}.*md"), *out.glob(f"{part}-*.md")])
    ]
    replace(out / "README.md", "\n".join([head, *pages]))


def replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    work = path.with_name(f".{path.name}.new")
    work.write_text(text, encoding="utf-8")
    os.replace(work, path)
