"""Run a model with OpenVINO behind the part of ONNX Runtime's session that FastEmbed uses.

The only importer of openvino besides :mod:`kdb_fast.quantise`; an optional package.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .errors import ModelError


def compile_model(model: Any, hint: str) -> Any:
    import openvino
    config = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY", "ENABLE_CPU_PINNING": False}
    return openvino.Core().compile_model(model, "CPU", config)
