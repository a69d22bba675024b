"""Scripts and documents for who works on the code."""

from __future__ import annotations

import ast
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(shutil.which("git") is None, reason="no git here")
def test_no_commit_without_the_checks(tmp_path: Path) -> None:
    def git(*arguments: str) -> int:
        identity = ("-c", "user.name=t", "-c", "user.email=t@localhost", "-c", "commit.gpgsign=false")
        return subprocess.run(["git", *identity, *arguments], cwd=tmp_path, capture_output=True).returncode

    shutil.copytree(ROOT / "tools" / "hooks", tmp_path / "tools" / "hooks")
    check = tmp_path / "tools" / "check"
    check.write_text("#!/bin/sh\nexit 1\n")
    check.chmod(0o755)
    (line,) = [line for line in (ROOT / "Makefile").read_text().splitlines() if "core.hooksPath" in line]
    assert git("init") == git(*line.split()[1:]) == git("add", ".") == 0
    assert git("commit", "-m", "refused") != 0
    check.write_text("#!/bin/sh\ntest -x tools/check\n")
    assert git("commit", "-m", "accepted") == 0


def test_the_checks_say_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "check", tmp_path / "tools" / "check")
    done = subprocess.run([tmp_path / "tools" / "check"], capture_output=True, text=True, cwd="/", check=False)
    assert done.returncode == 1
    assert "make setup" in done.stderr


def test_every_shared_fixture_is_described() -> None:
    described = (ROOT / "tests" / "README.md").read_text()
    functions = [node for node in ast.parse((ROOT / "tests" / "conftest.py").read_text()).body
                 if isinstance(node, ast.FunctionDef)]  # fmt: skip
    names = [f.name for f in functions if any("fixture" in ast.unparse(d) for d in f.decorator_list)]
    assert len(names) > 8
    assert [name for name in names if f"`{name}`" not in described] == []
