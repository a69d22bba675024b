"""The size of the package's pieces."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import kdb_fast

PACKAGE = Path(kdb_fast.__file__).parent
ROOT = PACKAGE.parent
MOST_LINES = {"module": 400, "class": 300}


def too_large() -> Iterator[str]:
    """Modules and classes beyond MOST_LINES, as ARCHITECTURE.md would name them."""
    for path in sorted(PACKAGE.rglob("*.py")):
        text, name = path.read_text(encoding="utf-8"), path.relative_to(PACKAGE).as_posix()
        if len(text.splitlines()) > MOST_LINES["module"]:
            yield name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > MOST_LINES["class"]:
                    yield node.name


def excused() -> set[str]:
    """What ARCHITECTURE.md says is larger, each with a reason."""
    _, _, section = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8").partition("\n## Larger than the rest\n")
    return set(re.findall(r"^\* `([^`]+)`: .+", section.partition("\n## ")[0], re.MULTILINE))


def test_what_is_large_has_a_reason() -> None:
    assert set(too_large()) == excused()
