"""The soak of ``make soak`` in a minute: see ``soak.py``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from soak_figures import MUST_BE_NOTHING

SECONDS = 30
"""How long things go wrong; the start, the last runs and the oracle take the rest of the minute."""


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.usefixtures("minilm")
def test_a_minute_of_faults_loses_nothing(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    soak = Path(__file__).with_name("soak.py")
    done = subprocess.run(
        [sys.executable, str(soak), "--verbose", "--seconds", str(SECONDS), "--records", "400", "--json", str(file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=220,
    )
    assert file.exists(), done.stdout[-5000:]
    figures = json.loads(file.read_text())
    assert {name: figures[name] for name in MUST_BE_NOTHING if figures[name]} == {}, done.stdout[-5000:]
    assert figures["oracle"] == "agrees"
    assert figures["good"]
    assert done.returncode == 0
    # It was no idle minute.
    assert sum(figures["faults"].values()) >= 8, done.stdout[-5000:]
    assert len(figures["faults"]) >= 4, done.stdout[-5000:]
    assert figures["runs"] >= 3
    assert figures["targets"] == ["index", "column", "table"]
    assert figures["rows_committed"] > 0
