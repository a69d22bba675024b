"""What this CPU and its packages can compute: the precisions, and which library runs int8."""

from __future__ import annotations

import importlib.util
import os

from ...resources import WITHOUT_CPU_FLAGS, cpu_flags
from ..encoder import EncoderSpec
from . import openvino_backend

CPU_FLAGS = {
    "int8": ("avx2",),
    "bf16": ("avx512_bf16", "amx_bf16"),
}
"""Any of these in /proc/cpuinfo makes a precision worth while. Without them OpenVINO computes bf16 in fp32. No flag of
aarch64 is here, since nothing was measured there."""

VNNI = ("avx512_vnni", "avx_vnni", "amx_int8")
"""Any of these makes OpenVINO's int8 worth while: 2.72 and 2.74 times fp32 (contacts and tickets) on Zen 4, where ONNX
Runtime's is 2.70 and 2.49; 2.38 and 2.16 on Ice Lake, where that is 2.05 and 1.76. Without them it is slower than fp32
(0.8 times), and ONNX Runtime's 1.69 and 1.62 times as fast."""


def unsupported(precision: str) -> str:
    """Why this machine cannot use a precision, as a clause; '' if it can."""
    if reason := missing_instructions(precision, cpu_flags()):
        away = os.environ.get(WITHOUT_CPU_FLAGS, "").strip()
        return f"{reason}, with {away} set aside ({WITHOUT_CPU_FLAGS})" if away else reason
    if precision == "bf16" and not openvino_backend.installed():
        return "the Python package openvino is not installed (pip install 'kdb-fast[openvino]')"
    if precision == "int8" and importlib.util.find_spec("onnx") is None:
        return "the Python package onnx is not installed (pip install 'kdb-fast[int8]')"
    return ""


def missing_instructions(precision: str, flags: frozenset[str]) -> str:
    """Why a CPU with these flags cannot use a precision, as a clause; '' if it can."""
    return _none_of({"int8": "AVX2", "bf16": "BF16"}[precision], CPU_FLAGS[precision], flags)


def missing_for(spec: EncoderSpec, flags: frozenset[str]) -> str:
    """Why a CPU with these flags cannot run an encoder as it was prepared, as a clause; '' if it can."""
    needed = {spec.precision, spec.unquantised_precision} - {"fp32"}
    reasons = [missing_instructions(precision, flags) for precision in sorted(needed)]
    if spec.precision == "int8" and spec.on_openvino:
        reasons.append(_none_of("VNNI", VNNI, flags))
    return next(filter(None, reasons), "")


def int8_on_openvino() -> bool:
    """Whether int8 is to be run by OpenVINO here: where there is VNNI, and the package. Else by ONNX Runtime."""
    return not cpu_flags().isdisjoint(VNNI) and openvino_backend.installed()


def _none_of(kind: str, wanted: tuple[str, ...], flags: frozenset[str]) -> str:
    if not flags.isdisjoint(wanted):
        return ""
    return f"this CPU has no {kind} instructions ({'none of ' if len(wanted) > 1 else ''}{', '.join(wanted)})"
