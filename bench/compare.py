"""This version against another checkout of it, run in turn: is it no worse?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from .measure import pairwise
from .options import Options
from .results import Requirement
from .runner import Contender, Outcome

OTHER = "other version: "

LEAST_RATIO = 0.97
"""Of the other version's speed. One pair differs by more: at least 15 are needed to see 3 %."""

MOST_CPU = 1.03
"""Of the processor time that the other version's processes take: it shows what waiting hides, and spreads less."""


def other(contender: Contender, options: Options) -> list[Contender]:
    """The same job by the other version's code, if one was given."""
    if options.against is None:
        return []
    return [replace(contender, label=OTHER + contender.label, ours=False, root=options.against)]


def no_worse(outcomes: Mapping[str, Outcome]) -> list[Requirement]:
    """For each job that another version did too: as fast, and with as much processor time."""
    found = []
    for label, theirs in outcomes.items():
        if not label.startswith(OTHER):
            continue
        ours = outcomes[label.removeprefix(OTHER)]
        name, pairs = ours.contender.label, f"{len(ours.runs)} pairs"
        found.append(Requirement(f"{name}: speed, {pairs}", ours.ratio(theirs), LEAST_RATIO, unit="×"))
        cpu = pairwise(ours.values("cpu_seconds"), theirs.values("cpu_seconds"))
        found.append(Requirement(f"{name}: processor time, {pairs}", cpu, MOST_CPU, True, "×"))
    return found
