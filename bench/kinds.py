"""``python -m bench.kinds``: writes what ``embed*.json`` in bench/results say of each kind of CPU.

Into README, a table a kind, and into what the plan of a run says (``expected.py``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from . import machine
from .measure import Spread, pairwise, spread
from .options import RESULTS, ROOT
from .results import replace

README = ROOT / "README.md"
EXPECTED = ROOT / "kdb_fast/embedding/precision/expected.py"
BEGIN, END = "<!-- written by python -m bench.kinds -->", "<!-- end -->"

FIRST = 30_000
"""Records of an index that is made for the first time."""

ALONE = "encoder alone"
"""Label of fp32 on the page ``embed``."""


class Figures(NamedTuple):
    """Of a precision, on one data set.

    Attributes:
        rate: Records a second.
        times: As many times as fast as fp32, run by run.
        preparation: Seconds that the first run of an index takes to prepare it and compare it with fp32.
        cosine, overlap: Mean cosine with fp32, and the share of the 10 nearest that are the same.

    The last three are None where the page was measured before they were.
    """

    rate: Spread
    times: Spread
    preparation: float | None = None
    cosine: float | None = None
    overlap: float | None = None

    def first(self) -> str:
        """Seconds for the first FIRST records, preparation included, database and index apart."""
        return "" if self.preparation is None else f"{self.preparation + FIRST / self.rate.median:.0f} s"


def figures(fp32: Sequence[Mapping[str, Any]], runs: Sequence[Mapping[str, Any]]) -> Figures:
    """What the reports of a precision's runs say, and those of fp32 that were made in turn with them.

    Only the first run of a session prepares: the longest preparation is the one.
    """
    rate = spread(run["records"] / run["seconds"] for run in runs)
    times = pairwise([run["seconds"] for run in fp32], [run["seconds"] for run in runs])
    if runs == fp32:
        return Figures(rate, times, 0.0, 1.0, 1.0)
    compared = [run for run in runs if "cosine_mean" in run]
    if not compared:
        return Figures(rate, times)
    return Figures(
        rate,
        times,
        max(run["preparation_seconds"] for run in compared),
        median(run["cosine_mean"] for run in compared),
        median(run["overlap"] for run in compared),
    )


def pages() -> dict[str, Path]:
    """Kind of CPU → its page of the part ``embed``; the kind of ``embed.json`` first."""
    found = sorted(RESULTS.glob("embed*.json"), key=lambda path: path.stem)
    return {machine.kind(json.loads(path.read_text())["machine"]): path for path in found}


def table(page: Path) -> str:
    """README's table of one kind."""
    result = json.loads(page.read_text())
    about, raw = result["machine"], result["raw"]
    played = ", a CPU of another kind" if about.get("played") else ""
    lines = [
        f"**{machine.kind(about)}** ({about['cpu']}, family/model {about['cpu_family_model']}, "
        f"{about['cores']} cores{played}; [{page.stem}](bench/results/{page.stem}.md)):",
        "",
        f"| | contacts | tickets | against fp32 | mean cosine | 10 nearest | first {FIRST:,} contacts, tickets |",
        "|---|---|---|---|---|---|---|",
    ]
    for label in (ALONE, "bf16", "int8"):
        each = _of(raw, label)
        if not each:
            lines.append(f"| {label} | not on this kind | | | | | |")
            continue
        rates = [f"{of.rate.median:,.0f} records/s" for of in each]
        near = ["", "", ""]
        if label != ALONE:
            near = [
                " and ".join(of.times.text(2, "×") for of in each),
                " and ".join(f"{of.cosine:.5f}" for of in each if of.cosine),
                " and ".join(f"{100 * of.overlap:.1f} %" for of in each if of.overlap),
            ]
        cells = [
            "fp32" if label == ALONE else label,
            *rates,
            *near,
            ", ".join(filter(None, (of.first() for of in each))),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _of(raw: Mapping[str, Any], label: str) -> list[Figures]:
    """Figures of a precision on contacts and on tickets; none where it did not run."""
    sets = [raw[name] for name in ("contacts", "tickets")]
    return [figures(one[ALONE]["runs"], one[label]["runs"]) for one in sets if one[label].get("runs")]


def section() -> str:
    """What stands in README between the marks."""
    return "\n".join(["", *(table(page) for page in pages().values())])


def written(text: str) -> str:
    """README with the section as measured.

    Raises:
        ValueError: The marks are not there.
    """
    changed, count = re.subn(
        f"(?<={re.escape(BEGIN)}\n).*?(?={re.escape(END)})", lambda _: section(), text, flags=re.DOTALL
    )
    if count != 1:
        raise ValueError(f"{BEGIN} … {END} is {count} times in README.md; expected once")
    return changed


def times_written(text: str) -> str:
    """``expected.py`` with the ratios as measured: the lesser of contacts and tickets."""
    found = pages()
    for kind, page in found.items():
        plain = kind.removesuffix(" kernels")
        if plain != kind and plain in found:
            continue  # a CPU of that kind was measured itself
        raw = json.loads(page.read_text())["raw"]
        least = {p: min(of.times.median for of in each) for p in ("int8", "bf16") if (each := _of(raw, p))}
        entry = rf'(?<=^    "{plain}": Measured\()(".*", )\{{.*\}}'
        ratios = ", ".join(f'"{p}": {times:.1f}' for p, times in least.items())
        text = re.sub(entry, rf"\1{{{ratios}}}", text, flags=re.MULTILINE)
    return text


if __name__ == "__main__":
    replace(README, written(README.read_text(encoding="utf-8")))
    replace(EXPECTED, times_written(EXPECTED.read_text(encoding="utf-8")))
