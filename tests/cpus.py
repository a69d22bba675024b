"""CPUs other than this one: what tests may take away of its instructions, and flags of real ones.

Taking instructions away shows what kdb-fast chooses there. What a CPU with AVX2 and nothing newer computes is seen by
``tools/avx2_only.py``, which takes them away from the libraries as well.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kdb_fast.embedding.precision.support import VNNI
from kdb_fast.resources import WITHOUT_CPU_FLAGS, cpu_flags

TAKEN_AWAY = {
    "all that this CPU has": "",
    "VNNI without BF16": "avx512_bf16 amx_bf16",
    "AVX-512 without VNNI": "avx512_vnni avx512_bf16 avx_vnni* amx_*",
    "AVX2 only": "avx512* avx_* amx_*",
    "not even AVX2": "avx2 avx512* avx_* amx_*",
}
"""Value of KDB_FAST_WITHOUT_CPU_FLAGS that leaves a CPU like this."""

GIVEN = os.environ.get(WITHOUT_CPU_FLAGS, "")
"""What whoever started the tests takes away already: they are then tried as if on that CPU."""

LEFT = {
    "VNNI without BF16": frozenset(VNNI),
    "AVX-512 without VNNI": frozenset({"avx512f"}),
    "AVX2 only": frozenset({"avx2"}),
    "not even AVX2": frozenset({"avx2"}),
}
"""What this CPU must have for that: one of them."""

RECORDED = {
    "AMD EPYC 7xx3 (Zen 3), family 25, model 1": ("avx fma avx2 bmi2 vaes vpclmulqdq", {"int8"}),
    "AMD EPYC 9xx4 (Zen 4), family 25, model 17": (
        "avx fma avx2 avx512f avx512dq avx512bw avx512vl avx512_bf16 avx512vbmi avx512_vbmi2 avx512_vnni avx512_bitalg",
        {"int8", "bf16"},
    ),
    "Intel Xeon, Skylake-SP": ("avx fma avx2 avx512f avx512dq avx512cd avx512bw avx512vl", {"int8"}),
    "Intel Xeon, Cascade Lake": ("avx fma avx2 avx512f avx512dq avx512cd avx512bw avx512vl avx512_vnni", {"int8"}),
    "Intel Xeon, Sapphire Rapids": (
        "avx fma avx2 avx_vnni avx512f avx512bw avx512vl avx512_bf16 avx512_vnni amx_bf16 amx_tile amx_int8",
        {"int8", "bf16"},
    ),
    "Intel Core, Alder Lake": ("avx fma avx2 avx_vnni gfni vaes", {"int8"}),
    "Raspberry Pi 4 (Cortex-A72)": ("fp asimd evtstrm crc32 cpuid", set()),
    "AWS Graviton 3 (Neoverse V1)": ("fp asimd aes atomics asimdhp asimdrdm asimddp sve i8mm bf16 dgh rng", set()),
    "a kernel that does not say": ("", set()),
}
"""Flags in /proc/cpuinfo of real CPUs (those that matter), and the precisions beside fp32 that are offered there."""


def take_away(flags: str, patch: pytest.MonkeyPatch) -> None:
    """Let kdb-fast, and the commands that this test starts, do without these, instead of what was taken away before; ''
    for all that this CPU has. Nothing is ever added."""
    patch.setenv(WITHOUT_CPU_FLAGS, f"{GIVEN} {flags}")


def pretend(cpu: str, patch: pytest.MonkeyPatch) -> None:
    """Let kdb-fast see a CPU of TAKEN_AWAY. Skips the test where this one has less than that."""
    take_away("", patch)
    if cpu in LEFT and cpu_flags().isdisjoint(LEFT[cpu]):
        pytest.skip(f"{cpu!r} was not tried: this CPU has none of {', '.join(sorted(LEFT[cpu]))}")
    take_away(TAKEN_AWAY[cpu], patch)


# --- numerics of another CPU ---

PROGRAM = """
import json, sys
from dataclasses import replace
from pathlib import Path
import numpy as np
from kdb_fast.embedding.encoder import Encoder, EncoderSpec
from kdb_fast.embedding.models.lookup import resolve
from kdb_fast.embedding.offline import import_fastembed

name, path, prepared, out, *texts = sys.argv[1:]
import_fastembed()
spec = EncoderSpec(resolve(name, Path(path)), 100)
if prepared:
    spec = replace(spec, precision="int8", prepared=Path(prepared))
np.save(out, Encoder(spec).embed(texts))
"""


@functools.cache
def _tool() -> Any:
    """tools/avx2_only.py, as a module."""
    file = Path(__file__).parent.parent / "tools" / "avx2_only.py"
    spec = importlib.util.spec_from_file_location("avx2_only", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def needs_avx2_only(what: str) -> None:
    """Skip the test where no CPU with AVX2 and nothing newer can be played.

    Args:
        what: What is not run then, for the reason.
    """
    if reason := _tool().missing():
        pytest.skip(f"{what} was not run: {reason}")


def avx2_environment() -> dict[str, str]:
    """Variables under which NumPy and ONNX Runtime see a CPU with AVX2 and nothing newer."""
    variables: dict[str, str] = _tool().environment(("numpy", "onnxruntime"))
    return variables


def embed_with_avx2(
    texts: Sequence[str], out: Path, model: str, path: Path, prepared: Path | None = None
) -> npt.NDArray[np.float32]:
    """Vectors that a CPU with AVX2 and nothing newer computes with ONNX Runtime.

    Args:
        texts: Few and short.
        out: A file to write.
        model, path: Name and directory of the model.
        prepared: The quantised model, for int8.
    """
    environment = {**os.environ, **avx2_environment()}
    command = [sys.executable, "-c", PROGRAM, model, str(path), str(prepared or ""), str(out), *texts]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    vectors: npt.NDArray[np.float32] = np.load(out)
    return vectors
