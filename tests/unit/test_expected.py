"""What the plan says of this CPU, and that it is what the results say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cpus import RECORDED, pretend

from bench import machine
from bench.options import RESULTS
from bench.results import page_name
from kdb_fast.embedding.precision.expected import MEASURED, expected
from kdb_fast.resources import cpu_flags, cpu_kind

PAGES = {machine.kind(found["machine"]): found for path in RESULTS.glob("embed*.json")
         if (found := json.loads(path.read_text()))}  # fmt: skip


@pytest.mark.parametrize("kind", MEASURED)
def test_what_is_expected_was_measured_on_that_kind_of_cpu(kind: str) -> None:
    assert PAGES[kind]
    for precision, times in MEASURED[kind].faster.items():
        least = min(r["measured"][0] for r in PAGES[kind]["requirements"] if f" {precision} ÷ fp32" in r["text"])
        assert abs(least - times) <= 0.06, precision


def test_kinds_of_real_cpus() -> None:
    kinds = {cpu: cpu_kind(flags.split()) for cpu, (flags, _) in RECORDED.items()}
    assert list(kinds.values()) == [
        "AVX2", "AVX-512 VNNI BF16", "AVX-512", "AVX-512 VNNI", "AMX", "AVX-VNNI", "Arm", "Arm", "without AVX2"
    ]  # fmt: skip


def test_the_plan_says_what_was_measured_or_that_nothing_was(monkeypatch: pytest.MonkeyPatch) -> None:
    if cpu_kind(cpu_flags()) in MEASURED:
        assert "int8 ≈ " in expected()
        assert "as measured on " in expected()
    pretend("not even AVX2", monkeypatch)
    assert expected() == "this CPU (without AVX2): no lower precision was measured on its kind"


def test_results_of_another_kind_of_cpu_are_written_beside(tmp_path: Path) -> None:
    def page(*flags: str) -> str:
        about = {"cpu": "Some CPU", "cores": 2, "flags": flags}
        name = page_name("embed", about, tmp_path)
        (tmp_path / f"{name}.json").write_text(json.dumps({"machine": about}))
        return name

    assert page("avx2", "avx512f", "avx512_vnni", "avx512_bf16") == "embed"
    assert page("avx2") == "embed.avx2"
    assert page("avx2", "avx512f", "avx512_vnni") == "embed.avx-512-vnni"
    assert page("avx2", "avx512f", "avx512_vnni", "avx512_bf16") == "embed"
    assert page("avx2") == "embed.avx2"
