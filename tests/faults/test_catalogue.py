"""``CATALOGUE.md``: every case has its row, and every test that a row names exists."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path
from typing import NamedTuple

import pytest

TESTS = Path(__file__).parents[1]
SECTIONS = {"A": 20, "B": 49, "C": 28, "D": 13, "E": 14, "K": 15, "M": 6, "P": 10, "R": 7, "S": 8, "T": 17, "X": 29}
"""Cases of each section; X is security."""

TEST = re.compile(r"`([\w/]+\.py)::([\w:]+)`")


class Case(NamedTuple):
    """A row: severity 0 (silent loss or wrong data) to 3 (cosmetic)."""

    name: str
    severity: int
    what: str
    behaviour: str
    evidence: str

    @property
    def tests(self) -> list[tuple[str, str]]:
        """(file below ``tests``, name) of the tests that hold it."""
        return TEST.findall(self.evidence)


def read_catalogue() -> list[Case]:
    cases = []
    for line in Path(__file__).with_name("CATALOGUE.md").read_text(encoding="utf-8").splitlines():
        if re.match(r"\| [A-Z]\d", line):
            name, severity, what, behaviour, evidence = (cell.strip() for cell in line.strip("|").split(" | "))
            cases.append(Case(name, int(severity.removeprefix("S")), what, behaviour, evidence))
    return cases


CASES = read_catalogue()


@functools.cache
def defined(file: str) -> frozenset[str]:
    """Tests of a file, as pytest names them, without running it."""
    names: set[str] = set()
    for node in ast.parse((TESTS / file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.ClassDef):
            names |= {f"{node.name}::{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return frozenset(name for name in names if name.split("::")[-1].startswith("test_"))


def test_every_case_has_one_row() -> None:
    assert [case.name for case in CASES] == [f"{s}{n}" for s, last in SECTIONS.items() for n in range(1, last + 1)]
    for case in CASES:
        assert 0 <= case.severity <= 3
        assert case.what
        assert case.behaviour


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_tests_that_a_case_names_exist(case: Case) -> None:
    assert "TODO" not in case.evidence
    for file, name in case.tests:
        assert (TESTS / file).is_file(), file
        assert name in defined(file), f"{file} has no {name}"
    assert re.sub(TEST, "", case.evidence).count("::") == 0, "a name that cannot be read"
    if case.severity <= 1:
        assert case.tests, "a case that loses data, hangs or harms must have a test"
    else:
        assert case.tests or case.evidence.startswith(("cannot occur: ", "on purpose: ", "documented: "))
