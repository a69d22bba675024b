"""How much faster the lower precisions are on each kind of CPU: what was measured (``bench/results/embed*.json``)."""

from __future__ import annotations

import os
from typing import NamedTuple

from ...resources import WITHOUT_CPU_FLAGS, cpu_flags, cpu_kind
from ...settings import DEFAULT_MODEL
from .support import CPU_FLAGS, missing_instructions, unsupported


class Measured(NamedTuple):
    """Times fp32, the least of contacts and tickets, encoder alone, with DEFAULT_MODEL."""

    how: str
    faster: dict[str, float]


MEASURED = {
    "AVX-512 VNNI BF16": Measured("on AMD EPYC (Zen 4)", {"int8": 2.8, "bf16": 1.8}),
    "AVX-512 VNNI": Measured("on Intel Xeon (Ice Lake)", {"int8": 2.2}),
    "AVX2": Measured("with AVX2's kernels on AMD EPYC (Zen 4)", {"int8": 1.7}),
}
"""By kind of CPU; int8 by OpenVINO where there is VNNI."""


def expected(model: str = DEFAULT_MODEL) -> str:
    """What this CPU can be expected to gain by a lower precision, as a clause.

    Args:
        model: Name of the one that will be run.
    """
    flags = cpu_flags()
    kind = cpu_kind(flags)
    away = os.environ.get(WITHOUT_CPU_FLAGS, "").strip()
    this = f"this CPU ({kind}{f', with {away} set aside' if away else ''})"
    offered = [precision for precision in CPU_FLAGS if not missing_instructions(precision, flags)]
    if not offered:
        return f"{this}: only fp32 is offered on its kind"
    not_installed = next(filter(None, map(unsupported, offered)), "")
    but = f", but {not_installed}" if not_installed else ""
    if measured := MEASURED.get(kind):
        faster = ", ".join(f"{precision} ≈ {times:.1f}×" for precision, times in measured.faster.items())
        another = "" if model == DEFAULT_MODEL else f" with {DEFAULT_MODEL.rpartition('/')[2]}"
        return f"{this}: {faster} of fp32, as measured {measured.how}{another}{but}"
    return (
        f"{this}: {' and '.join(offered)} not measured on its kind; --precision auto compares "
        f"{'it' if len(offered) == 1 else 'them'} with fp32{but}"
    )
