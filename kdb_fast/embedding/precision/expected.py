"""How much faster the lower precisions are on each kind of CPU: what was measured (``bench/results/embed*.json``)."""

from __future__ import annotations

from typing import NamedTuple

from ...resources import cpu_flags, cpu_kind
from . import openvino_backend


class Measured(NamedTuple):
    """Times fp32, the least of contacts and tickets, encoder alone, with all-MiniLM-L6-v2."""

    cpu: str
    faster: dict[str, float]


MEASURED = {
    "AVX-512 VNNI BF16": Measured("AMD EPYC (Zen 4)", {"int8": 2.6, "bf16": 1.7}),
}
"""By kind of CPU; int8 by OpenVINO where there is VNNI."""


def expected() -> str:
    """What this CPU can be expected to gain by a lower precision, as a clause."""
    kind = cpu_kind(cpu_flags())
    measured = MEASURED.get(kind)
    if measured is None:
        return f"this CPU ({kind}): no lower precision was measured on its kind"
    faster = ", ".join(f"{precision} ≈ {times:.1f}×" for precision, times in measured.faster.items())
    missing = "" if openvino_backend.installed() or kind == "AVX2" else ", with the package openvino"
    return f"this CPU ({kind}): {faster} of fp32, as measured on {measured.cpu}{missing}"
