"""``bench/results/history.csv``: a row for each commit that measured, and what the benchmarks write into it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from bench import history
from bench.chart import Bar
from bench.measure import Spread
from bench.options import RESULTS
from bench.results import Result

ABOUT = {"cpu": "Some CPU", "cores": 2, "flags": ["avx2"]}
ROWS = history.read(RESULTS / history.NAME)


def result(part: str, **bars: float) -> Result:
    """Bars of ours, and one of another contender."""
    shown = [Bar(name, Spread(value, value / 2, value * 2), True) for name, value in bars.items()]
    return Result(part, "?", chart=("Rows", "rows/s", [*shown, Bar("theirs", Spread(9.0, 9.0, 9.0))]))


@pytest.fixture
def commit(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """The commit that is checked out; may be changed."""
    found: list[str | None] = ["aaaaaaa"]
    monkeypatch.setattr(history, "measured_commit", lambda: found[0])
    return found


def test_main_figures_are_the_bars_of_the_chart_that_are_ours() -> None:
    assert history.main_figures(result("stress-mixed", fp32=2.5)) == {"stress: fp32 (rows/s)": 2.5}
    assert history.main_figures(Result("demo", "?")) == {}


def test_each_commit_and_machine_has_one_row(tmp_path: Path, commit: list[str | None]) -> None:
    history.record(history.main_figures(result("engine", load=12_345.6)), ABOUT, tmp_path)
    history.record(history.main_figures(result("scale", one=0.12345)), ABOUT, tmp_path)
    history.record({"engine: load (rows/s)": 7.0}, ABOUT | {"cores": 4, "memory_limit_gib": 3.0}, tmp_path)
    commit[0] = "bbbbbbb+"
    history.record({"engine: load (rows/s)": 8.0}, ABOUT, tmp_path)
    history.record({"engine: load (rows/s)": 9.0}, ABOUT, tmp_path)
    history.record({}, ABOUT, tmp_path)
    rows = history.read(tmp_path / history.NAME)
    assert [date.fromisoformat(row.pop("date")) for row in rows]
    assert rows == [
        {
            "commit": "aaaaaaa",
            "machine": "Some CPU (AVX2), 2 cores",
            "engine: load (rows/s)": "12350",
            "scale: one (rows/s)": "0.1235",
        },
        {"commit": "aaaaaaa", "machine": "Some CPU (AVX2), 4 cores, 3.0 GiB", "engine: load (rows/s)": "7"},
        {"commit": "bbbbbbb+", "machine": "Some CPU (AVX2), 2 cores", "engine: load (rows/s)": "9"},
    ]
    assert [path.name for path in tmp_path.iterdir()] == [history.NAME]


def test_without_git_no_row_is_written(tmp_path: Path, commit: list[str | None]) -> None:
    commit[0] = None
    history.record({"engine: load (rows/s)": 7.0}, ABOUT, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(shutil.which("git") is None, reason="no git here")
def test_a_package_that_differs_from_its_commit_is_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> None:
        identity = ("-c", "user.name=t", "-c", "user.email=t@localhost", "-c", "commit.gpgsign=false")
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    monkeypatch.setattr(history, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert history.measured_commit() is None
    (tmp_path / "kdb_fast").mkdir()
    (tmp_path / "kdb_fast" / "a.py").write_text("")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    clean = history.measured_commit()
    assert re.fullmatch("[0-9a-f]{7,}", str(clean))
    (tmp_path / "notes").write_text("beside the package")
    assert history.measured_commit() == clean
    (tmp_path / "kdb_fast" / "a.py").write_text("changed")
    assert history.measured_commit() == f"{clean}+"


def test_the_kept_file_is_as_the_benchmarks_write_it(tmp_path: Path) -> None:
    history.write(tmp_path / history.NAME, ROWS)
    assert (tmp_path / history.NAME).read_text() == (RESULTS / history.NAME).read_text()
    assert len({(row["commit"], row["machine"]) for row in ROWS}) == len(ROWS) >= 24
    for row in ROWS:
        assert date.fromisoformat(row["date"])
        assert re.fullmatch(r"[0-9a-f]{7,}\+?", row["commit"])
        figures = [row[name] for name in row if name not in history.FIXED]
        assert figures
        assert all(float(figure) >= 0 for figure in figures)  # of the gate's, unaccounted records are 0


@pytest.mark.parametrize("page", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_the_figures_of_every_page_are_in_a_row(page: Path) -> None:
    """Who commits measured pages commits their row."""
    found: dict[str, Any] = json.loads(page.read_text())
    if found["chart"] is None:
        pytest.skip("a page without a chart has no figures that are followed")
    title, unit, bars = found["chart"]
    chart = (title, unit, [Bar(label, Spread(*value), ours) for label, value, ours in bars])
    figures = history.main_figures(Result(found["part"], "?", chart=chart))
    (row,) = history.merged([], "", "", "", figures)
    machine = history.machine_name(found["machine"])
    assert figures
    for name in figures:
        assert row[name] in [other.get(name) for other in ROWS if other["machine"] == machine], name
