"""What the plan says of this CPU, and that it is what the results say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cpus import RECORDED, pretend

from bench import kinds, machine
from bench.results import measured, page_name
from bench.runner import Contender, Outcome, earlier
from kdb_fast.embedding.precision import openvino_backend
from kdb_fast.embedding.precision.expected import MEASURED, expected
from kdb_fast.embedding.precision.support import CPU_FLAGS
from kdb_fast.resources import WITHOUT_CPU_FLAGS, cpu_flags, cpu_kind

PAGES = {kind: json.loads(path.read_text()) for kind, path in kinds.pages().items()}
MEASURED_AS = {kind: kind if kind in PAGES else f"{kind} kernels" for kind in MEASURED}
"""A kind, or its kernels on a CPU that has newer ones too (tools/avx2_only.py)."""


@pytest.mark.parametrize("kind", MEASURED)
def test_what_is_expected_was_measured_on_that_kind_of_cpu(kind: str) -> None:
    page = PAGES[MEASURED_AS[kind]]
    for precision, times in MEASURED[kind].faster.items():
        least = min(r["measured"][0] for r in page["requirements"] if f" {precision} ÷ fp32" in r["text"])
        assert abs(least - times) <= 0.06, precision
    assert ("kernels" in MEASURED[kind].how) == bool(page["machine"].get("played"))


def test_every_page_is_expected_by_its_kind() -> None:
    assert set(PAGES) - {machine.KERNELS} <= set(MEASURED_AS.values())
    assert machine.KERNELS.removesuffix(" kernels") in MEASURED


def test_readme_and_plan_have_the_figures_of_every_kind() -> None:
    """``python -m bench.kinds`` writes them, after ``python -m bench embed``."""
    source = kinds.EXPECTED.read_text(encoding="utf-8")
    assert kinds.times_written(source) == source
    readme = kinds.README.read_text(encoding="utf-8")
    assert kinds.written(readme) == readme
    for kind in PAGES:
        assert f"\n**{kind}** (" in readme
    with pytest.raises(ValueError, match="0 times"):
        kinds.written("no marks")


def test_kinds_of_real_cpus() -> None:
    kinds = {cpu: cpu_kind(flags.split()) for cpu, (flags, _) in RECORDED.items()}
    assert list(kinds.values()) == [
        "AVX2", "AVX-512 VNNI BF16", "AVX-512", "AVX-512 VNNI", "AMX", "AVX-VNNI", "Arm", "Arm", "without AVX2"
    ]  # fmt: skip


def test_the_plan_says_what_was_measured_or_that_nothing_was(monkeypatch: pytest.MonkeyPatch) -> None:
    if cpu_kind(cpu_flags()) in MEASURED:
        assert "int8 ≈ " in expected()
        assert "as measured " in expected()
        assert " with all-MiniLM-L6-v2" in expected("BAAI/bge-small-en-v1.5")
        assert " with all-MiniLM-L6-v2" not in expected()
    pretend("not even AVX2", monkeypatch)
    assert expected().startswith("this CPU (without AVX2, with ")
    assert expected().endswith(" set aside): only fp32 is offered on its kind")


@pytest.mark.parametrize("cpu", RECORDED)
def test_the_plan_says_something_of_every_real_cpu(cpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flags, offered = RECORDED[cpu]
    monkeypatch.delenv(WITHOUT_CPU_FLAGS, raising=False)
    monkeypatch.setattr("kdb_fast.embedding.precision.expected.cpu_flags", lambda: frozenset(flags.split()))
    monkeypatch.setattr("kdb_fast.embedding.precision.expected.unsupported", lambda precision: "")
    kind = cpu_kind(flags.split())
    said = expected()
    assert said.startswith(f"this CPU ({kind}): ")
    assert {precision for precision in CPU_FLAGS if precision in said} == offered
    assert ("only fp32 is offered" in said) == (not offered)
    assert ("as measured" in said) == (kind in MEASURED)
    assert ("--precision auto compares" in said) == bool(offered and kind not in MEASURED)


def test_the_plan_says_which_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    if not (cpu_kind(cpu_flags()) in MEASURED and "avx512_bf16" in cpu_flags()):
        pytest.skip("bf16 without its package was not tried: this CPU has none")
    monkeypatch.setattr(openvino_backend, "installed", lambda: False)
    assert expected().endswith(", but the Python package openvino is not installed (pip install 'kdb-fast[openvino]')")


def test_results_of_another_kind_of_cpu_are_written_beside(tmp_path: Path) -> None:
    def page(*flags: str, played: bool = False) -> str:
        about = {"cpu": "Some CPU", "cores": 2, "flags": flags, "played": played}
        name = page_name("embed", about, tmp_path)
        (tmp_path / f"{name}.json").write_text(json.dumps({"machine": about}))
        return name

    assert page("avx2", "avx512f", "avx512_vnni", "avx512_bf16") == "embed"
    assert page("avx2") == "embed.avx2"
    assert page("avx2", played=True) == "embed.avx2-kernels"
    assert page("avx2", "avx512f", "avx512_vnni") == "embed.avx-512-vnni"
    assert page("avx2", "avx512f", "avx512_vnni", "avx512_bf16") == "embed"
    assert page("avx2") == "embed.avx2"


def test_what_the_first_records_take_has_the_preparation_of_the_first_run() -> None:
    fp32 = [{"records": 600, "seconds": 4.0}, {"records": 600, "seconds": 6.0}]
    near = {"records": 600, "cosine_mean": 0.999, "overlap": 0.97}
    int8 = [near | {"seconds": 2.0, "preparation_seconds": 9.0}, near | {"seconds": 2.0, "preparation_seconds": 0.3}]
    found = kinds.figures(fp32, int8)
    assert (found.rate.median, found.times, found.cosine) == (300.0, (2.5, 2.0, 3.0), 0.999)
    assert found.first() == "109 s"
    assert kinds.figures(fp32, fp32).first() == "240 s"
    assert kinds.figures(fp32, [{"records": 1, "seconds": 1.0}] * 2).first() == "", "of a page from before"


def test_more_runs_stand_beside_those_of_the_page(tmp_path: Path) -> None:
    about = {"cpu": "Some CPU", "cores": 2, "flags": ["avx2"]}
    assert measured("embed", about, tmp_path) == {}
    page = {"machine": about, "raw": {"tickets": {"int8": {"note": "", "runs": [{"n": 1}]}, "bf16": {"skipped": "no"}}}}
    (tmp_path / "embed.json").write_text(json.dumps(page))
    labels = ("int8", "bf16", "another")
    outcomes = {label: Outcome(Contender(label, "encode"), [{"n": 2}]) for label in labels}
    earlier(outcomes, measured("embed", about, tmp_path)["tickets"])
    assert [outcomes[label].runs for label in labels] == [[{"n": 1}, {"n": 2}], [{"n": 2}], [{"n": 2}]]
    assert measured("embed", about | {"flags": ["avx2", "avx512f"]}, tmp_path) == {}
