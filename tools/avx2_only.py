"""Run a command as on a CPU with AVX2 and nothing newer: the very kernels that run there, at this CPU's speed.

usage: python tools/avx2_only.py COMMAND…

What NumPy, ONNX Runtime and OpenVINO ask the processor (``cpuid``) is answered without AVX-512, VNNI, BF16 and AMX, in
the command and what it starts, kdb-fast's workers too, and kdb-fast is told the same. So the libraries take the kernels
of such a CPU: their values are right to the last bit, and their speed shows what is worth while there; the clock, the
caches and the memory stay this machine's. Needs Linux on x86-64, gcc and binutils. No part of the package.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path

LIBRARIES = {
    "numpy": ("../numpy.libs/*.so*", "_core/*.so"),
    "onnxruntime": ("capi/onnxruntime_pybind11_state*.so",),
    "openvino": ("libs/libopenvino.so*", "libs/libopenvino_intel_cpu_plugin.so"),
}
"""Packages whose libraries choose kernels by ``cpuid``, and where in them those libraries are."""

FLAGS = "avx512* avx_* amx_*"
"""For KDB_FAST_WITHOUT_CPU_FLAGS."""


def missing() -> str:
    """What is needed and not there, as a clause; '' if nothing is."""
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        return "only on Linux on x86-64 can another CPU be played"
    absent = [program for program in ("gcc", "objdump") if not shutil.which(program)]
    return f"{' and '.join(absent)} not installed, of which a CPU with AVX2 only is made" if absent else ""


def environment(packages: Collection[str] = tuple(LIBRARIES)) -> dict[str, str]:
    """Variables under which these packages, in a program, see a CPU with AVX2 only.

    Raises:
        subprocess.CalledProcessError: The compiler or the disassembler failed.
    """
    source = Path(__file__).with_suffix(".c")
    libraries = sorted({path.resolve() for path in _libraries(packages)})
    stamps = [f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in libraries]
    digest = hashlib.sha256("\n".join([source.read_text(), *stamps]).encode()).hexdigest()[:16]
    # Kept in the environment whose libraries it is about: to disassemble them takes half a minute. The linker takes
    # spaces and colons for the ends of names.
    usable = os.access(sys.prefix, os.W_OK) and not re.search("[ :]", sys.prefix)
    parent = sys.prefix if usable else tempfile.gettempdir()
    directory = Path(parent) / f".avx2_only-{os.getuid()}-{digest}"
    audit, places = directory / "audit.so", directory / "places"
    if not places.exists():
        directory.mkdir(mode=0o700, exist_ok=True)
        subprocess.run(["gcc", "-O1", "-Wall", "-shared", "-fPIC", "-o", str(audit), str(source)], check=True)
        written = places.with_suffix(f".{os.getpid()}")
        written.write_text("".join(f"{at} {path}\n" for path in libraries for at in _cpuids(path)))
        written.rename(places)
    return {
        "LD_AUDIT": str(audit),
        "LD_PRELOAD": ":".join(filter(None, (str(audit), os.environ.get("LD_PRELOAD")))),
        "AVX2_ONLY_PLACES": str(places),
        "KDB_FAST_WITHOUT_CPU_FLAGS": FLAGS,
    }


def _libraries(packages: Collection[str]) -> list[Path]:
    found: list[Path] = []
    for package in packages:
        spec = importlib.util.find_spec(package)
        for root in (spec.submodule_search_locations or ()) if spec else ():
            found += [path for pattern in LIBRARIES[package] for path in Path(root).glob(pattern)]
    return found


def _cpuids(library: Path) -> list[str]:
    """Addresses, in hexadecimal, of the instruction in a library's code."""
    code = subprocess.run(
        ["objdump", "--disassemble", "--no-show-raw-insn", str(library)], check=True, capture_output=True, text=True
    ).stdout
    return re.findall(r"^ *([0-9a-f]+):\s+cpuid\s*$", code, re.MULTILINE)


if __name__ == "__main__":
    if reason := missing():
        sys.exit(reason)
    os.execvpe(sys.argv[1], sys.argv[1:], {**os.environ, **environment()})
