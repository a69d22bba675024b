"""Documents name only what is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import kdb_fast

PACKAGE = Path(kdb_fast.__file__).parent
ROOT = PACKAGE.parent
DOCUMENTS = sorted(
    path for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("tests/**/*.md")) if path.is_file()
)


def headings(document: Path) -> set[str]:
    """The anchors that GitHub gives a document's headings."""
    titles = re.findall(r"^#+ (.*)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_a_document_links_to_is_there(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            path, _, anchor = target.partition("#")
            linked = document.parent / path if path else document
            assert linked.exists(), target
            assert not anchor or anchor in headings(linked), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_that_a_document_names_are_there(document: Path) -> None:
    """By the end of their paths; ``kdb_fast/…`` is named with or without the package."""
    there = {
        path.relative_to(ROOT).as_posix()
        for folder in ("kdb_fast", "tests", "bench", "tools", "docs")
        for path in (ROOT / folder).rglob("*.*")
    } | {path.name for path in ROOT.iterdir()}
    quoted = " ".join(re.findall(r"`([^`\n]+)`", document.read_text(encoding="utf-8")))
    for name in re.findall(r"(?<![\w/.…])[\w/-]+\.(?:py|md|toml|json|csv)\b", quoted):
        others = name.startswith("kameleondb/")  # the package's of that name, not ours
        assert others or any(path == name or path.endswith(f"/{name}") for path in there), name


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_targets_of_make_that_a_document_names_are_there(document: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([a-z]+)", document.read_text(encoding="utf-8"), re.MULTILINE)) <= targets
