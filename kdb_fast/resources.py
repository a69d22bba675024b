"""CPUs and memory that this process may really use: affinity, cgroup v1 and v2, and the host; what the CPUs can do; and
how often Python looks for garbage."""

from __future__ import annotations

import contextlib
import gc
import math
import os
from collections.abc import Collection, Iterator
from fnmatch import fnmatchcase
from pathlib import Path

CGROUP_ROOT = Path("/sys/fs/cgroup")
PROC_CGROUP = Path("/proc/self/cgroup")
PROC_STATUS = Path("/proc/self/status")
PROC_CPUINFO = Path("/proc/cpuinfo")
WITHOUT_CPU_FLAGS = "KDB_FAST_WITHOUT_CPU_FLAGS"
"""Environment variable: patterns such as ``avx512_* amx_*`` of instructions not to be used, so that the choices for a
lesser CPU can be tried. It can take away only: nothing is computed with instructions that the CPU lacks."""

CPU_KINDS = {
    "AMX": {"amx_int8"},
    "AVX-512 VNNI BF16": {"avx512_vnni", "avx512_bf16"},
    "AVX-512 VNNI": {"avx512_vnni"},
    "AVX-VNNI": {"avx_vnni"},
    "AVX-512": {"avx512f"},
    "AVX2": {"avx2"},
    "Arm": {"asimd"},
}
"""Kinds of CPU by the flags of /proc/cpuinfo that all of a kind have, the best first."""

V1_NO_LIMIT = 1 << 60
"""cgroup v1 writes 9223372036854771712 (2^63 less a page) for "no limit"; nothing real is near 2^60."""

GARBAGE_THRESHOLD = 50_000
"""Objects more than were freed, after which the youngest are searched for cycles: about 5 MB, three windows of records.

Records, rows and keys are tuples that live for seconds and form no cycles, yet with Python's own threshold every 700 of
them start a search. On 100,000 records with a free encoder the parent needs 1.4 s of CPU time instead of 1.7."""


def usable_cpus() -> int:
    """CPUs this process may run on at the same time: affinity, cut by the CPU quota of every cgroup above it."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    # 1.5 CPUs carry two workers better than one: the second gets half a core, not none.
    return max(1, min(allowed, math.ceil(quota))) if quota else max(1, allowed)


def cpu_list() -> list[int]:
    """Numbers of the CPUs this process may run on; empty where the system has no affinity."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def cpu_flags() -> frozenset[str]:
    """What the first CPU can do, in the kernel's words, less WITHOUT_CPU_FLAGS; empty where it does not say."""
    unwanted = os.environ.get(WITHOUT_CPU_FLAGS, "").split()
    with contextlib.suppress(OSError), PROC_CPUINFO.open(encoding="ascii", errors="replace") as file:
        for line in file:
            name, _, value = line.partition(":")
            if name.strip() in ("flags", "Features"):  # x86, aarch64
                return frozenset(f for f in value.split() if not any(fnmatchcase(f, u) for u in unwanted))
    return frozenset()


def cpu_kind(flags: Collection[str]) -> str:
    """The kind of a CPU with these flags, by what decides how fast an encoder is: ``AVX-512 VNNI BF16``, ``AVX2``."""
    return next((kind for kind, needed in CPU_KINDS.items() if needed.issubset(flags)), "without AVX2")


def cpu_quota() -> float | None:
    """The smallest CPU quota of this cgroup and those above it, in CPUs; None if there is none."""
    quotas = []
    for directory in _cgroups("cpu"):
        text = _read(directory / "cpu.max")
        if text:
            parts = text.split()
            if len(parts) == 2 and parts[0] != "max" and parts[0].isdigit() and int(parts[1]) > 0:
                quotas.append(int(parts[0]) / int(parts[1]))
            continue
        quota, period = _read(directory / "cpu.cfs_quota_us"), _read(directory / "cpu.cfs_period_us")
        if quota and period and quota.lstrip("-").isdigit() and int(quota) > 0 and int(period) > 0:
            quotas.append(int(quota) / int(period))
    return min(quotas) if quotas else None


def memory_limit() -> int | None:
    """The smallest memory limit of this cgroup and those above it, in bytes; None if there is none."""
    limits = [limit for limit, _ in _memory_limits()]
    return min(limits) if limits else None


def available_memory() -> int:
    """Bytes that can still be allocated: the host's available memory, and for each cgroup its limit less its use.

    The page cache of a cgroup counts as available: the kernel drops it before it kills.
    """
    import psutil

    values = [int(psutil.virtual_memory().available)]
    values += [max(0, limit - used) for limit, used in _memory_limits()]
    return min(values)


def _memory_limits() -> list[tuple[int, int]]:
    """(limit, bytes in use without page cache) of each cgroup that has a limit."""
    found = []
    for directory in _cgroups("memory"):
        limit = _read(directory / "memory.max") or _read(directory / "memory.limit_in_bytes")
        if not limit or not limit.isdigit() or int(limit) >= V1_NO_LIMIT:
            continue
        used = _read(directory / "memory.current") or _read(directory / "memory.usage_in_bytes") or "0"
        cache = 0
        for line in (_read(directory / "memory.stat") or "").splitlines():
            name, _, value = line.partition(" ")
            if name in ("inactive_file", "total_inactive_file"):
                cache = int(value)
        found.append((int(limit), max(0, int(used) - cache)))
    return found


def _cgroups(controller: str) -> list[Path]:
    """Directories of this process's cgroup for a controller and of all above it, in v1 and v2."""
    result: list[Path] = []
    for line in (_read(PROC_CGROUP) or "").splitlines():
        number, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if names == "" and number == "0":
            base = CGROUP_ROOT
        elif controller in names.split(","):
            base = CGROUP_ROOT / names
            if not base.exists():
                base = CGROUP_ROOT / controller
        else:
            continue
        parts = [p for p in path.split("/") if p and p != ".."]
        # In a container the path may be the host's, which does not exist here: then the root is the container's own.
        candidates = [base.joinpath(*parts[:n]) for n in range(len(parts), -1, -1)]
        result += [c for c in candidates if c.is_dir()]
    return list(dict.fromkeys(result))


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def peak_rss_bytes(pid: int | None = None) -> int:
    """Largest resident memory that this process has had so far, or another one, in bytes; 0 where another one's cannot
    be read."""
    # Not getrusage on Linux: its peak is handed on by exec, so a small command started by a large program
    # would report the memory of that program.
    for line in (_read(PROC_STATUS if pid is None else Path(f"/proc/{pid}/status")) or "").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    if pid is not None:
        return 0
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def oom_kills() -> int:
    """How often the kernel has killed a process of this cgroup (or one above it) because memory ran out."""
    total = 0
    for directory in _cgroups("memory"):
        text = _read(directory / "memory.events") or _read(directory / "memory.oom_control") or ""
        for line in text.splitlines():
            name, _, value = line.partition(" ")
            if name == "oom_kill" and value.isdigit():
                total = max(total, int(value))
    return total


def collect_rarely() -> None:
    """Look for garbage in cycles less often from now on, in this process."""
    gc.set_threshold(GARBAGE_THRESHOLD, *gc.get_threshold()[1:])


@contextlib.contextmanager
def collecting_rarely() -> Iterator[None]:
    """As :func:`collect_rarely` within the block; a caller's own process gets its settings back."""
    before = gc.get_threshold()
    collect_rarely()
    try:
        yield
    finally:
        gc.set_threshold(*before)
