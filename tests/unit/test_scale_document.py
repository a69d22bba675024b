"""The figures of docs/scale.md follow from the measured ones of bench/results, within TOLERANCE."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
RECORDS = 1e9
TOLERANCE = 0.15
"""Figures are rounded, and a part that is measured again may move them: beyond this the document is to be changed."""

PRICE = {"A": 0.82112 / 16, "G": 1.120471 / 15}
"""Of a core for an hour, as the document says."""


def raw(part: str) -> Any:
    return json.loads((ROOT / f"bench/results/{part}.json").read_text())["raw"]


def middle(contender: Any, figure: Callable[[dict[str, Any]], float]) -> float:
    return median(figure(run) for run in contender["runs"])


def rate_of_a_core(records: str, precision: str) -> float:
    data = raw("embed")["contacts" if records == "contacts" else "tickets"]
    run = data["encoder alone" if precision == "fp32" else precision]
    unit = "tokens" if records == "of 128 tokens" else "records"
    rate = middle(run, lambda r: float(r[unit] / r["seconds"] / r["workers"]))
    return rate / 128 if unit == "tokens" else rate


def rate_of_a_parent() -> float:
    simulated = raw("cluster")["simulated"]
    return median(middle(simulated[f"{n} CPUs"], lambda r: r["rows_per_second"]) for n in ("256", "512", "1,024"))


def rows(title: str) -> list[list[str]]:
    """Cells of the table below a heading, without its head."""
    text = (ROOT / "docs/scale.md").read_text(encoding="utf-8")
    section = re.split(r"^## ", text.partition(f"\n## {title}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def number(cell: str) -> float:
    return float(re.sub(r"[$,]| TB| rows/s| bytes| core-hours", "", cell) or 0)


def check(said: Iterable[str], figures: Iterable[float]) -> None:
    for cell, figure in zip(said, figures, strict=True):
        assert number(cell) == pytest.approx(figure, rel=TOLERANCE, abs=1.5), cell


def test_hosts_hours_and_cost() -> None:
    table = rows("Hosts, hours, cost")
    assert len(table) == 9
    for records, precision, *said in table:
        rate, parent = rate_of_a_core(records, precision), rate_of_a_parent()
        hours, shortest = RECORDS / rate / 3600, RECORDS / parent / 3600
        fed = parent / rate
        costs = [hours * price for price in PRICE.values()]
        check(said, [rate, hours, fed, fed / 16, max(hours / 64, shortest), *costs])


def test_bytes_on_disk() -> None:
    measured = raw("bytes")
    hnsw = {type: measured["contacts"][f"column, {type}(384)"]["runs"][0] for type in ("vector", "halfvec")}
    table = rows("Disk")
    assert len(table) == 5
    for place, *said in table:
        found = measured["tickets" if "tickets" in place else "contacts"]
        label = re.sub(r"[`]|, (contacts|tickets).*", "", place).replace("column ", "column, ")
        (run,) = found[label]["runs"]
        graph = hnsw["halfvec" if "halfvec" in place else "vector"]
        load = run["load"]
        sizes = [load["rows"] + load["toast"], load["keys"], load["noted"], load["gin"], graph["index"]["hnsw"]]
        figures = [size / run["records"] for size in (*sizes, run["log_load"], graph["log_index"])]
        check(said, [*figures, sum(figures[:5]) * RECORDS / 1e12])


def test_memory_and_time_of_a_build() -> None:
    table = rows("Building the index")
    assert len(table) == 6
    for column, type in enumerate(("vector", "halfvec"), 1):
        (run,) = raw("bytes")["contacts"][f"column, {type}(384)"]["runs"]
        small, whole = run["small_memory"], run["records"] / run["index_seconds"]
        row = run["small_memory_bytes"] / small["rows"]
        said = [cells[column] for cells in table]
        hours = 2 * RECORDS / whole / 3600
        check(said, [row, row * RECORDS / 1e12, small["in_memory"], small["on_disk"], whole, hours])
