"""Run a model with OpenVINO behind the part of ONNX Runtime's session that the encoder uses.

openvino is an optional package; it is imported by :func:`kdb_fast.telemetry.import_openvino` only.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ...errors import ModelError
from ...telemetry import import_openvino
from .openvino_rows import CUT, FILL, pad_rows, row_numbers


class Input(NamedTuple):
    """Name of an input, as ONNX Runtime's ``NodeArg`` has it."""

    name: str


def installed() -> bool:
    """Whether the package is there; imports nothing."""
    return importlib.util.find_spec("openvino") is not None


def compile_model(model: Any, hint: str, threads: int = 1) -> Any:
    """An OpenVINO model for this CPU.

    Args:
        model: OpenVINO's graph, or a path to one (``.xml`` or ``.onnx``).
        hint: ``f32`` or ``bf16``: how to compute what is not quantised.
        threads: Threads of a run.
    """
    config = {
        "INFERENCE_PRECISION_HINT": hint,
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "ENABLE_CPU_PINNING": False,  # the worker is pinned already
    }
    return import_openvino().Core().compile_model(model, "CPU", config)


class OpenVinoSession:
    """A compiled model with ``get_inputs`` and ``run`` of ``onnxruntime.InferenceSession``.

    Args:
        path: The model's file.
        precision: What the user asked for, for messages.
        hint, threads: See :func:`compile_model`.

    Raises:
        ModelError: OpenVINO is missing or cannot read the model.
    """

    def __init__(self, path: Path, *, precision: str, hint: str, threads: int) -> None:
        try:
            model = pad_rows(import_openvino().Core().read_model(str(path)))
            compiled = compile_model(model, hint, threads)
        except ImportError:
            raise ModelError(
                f"--precision {precision} needs the Python package openvino, which is not installed.",
                remedy="Run: pip install 'kdb-fast[openvino]', or use --precision fp32.",
            ) from None
        except Exception as error:
            reason = " ".join(str(error).split())
            raise ModelError(
                f"OpenVINO cannot load {path.name}: {reason[:200]}", remedy="Use --precision fp32."
            ) from error
        self._precision = precision
        self._request = compiled.create_infer_request()
        self._names = [node.get_any_name() for node in compiled.inputs]

    def get_inputs(self) -> list[Input]:
        """The inputs of the graph."""
        return [Input(name) for name in self._names if name not in (FILL, CUT)]

    def run(self, outputs: None, feed: Mapping[str, npt.NDArray[Any]]) -> list[npt.NDArray[np.float32]]:
        """The graph's first output. It is a view that the next run overwrites."""
        # Inputs are handed over without a copy; `infer` returns when they have been read.
        if FILL in self._names:
            mask = feed.get("attention_mask")
            mask = np.ones_like(feed["input_ids"]) if mask is None else mask
            feed = {**feed, **row_numbers(mask, self._precision)}
        self._request.infer({name: feed[name] for name in self._names}, share_inputs=True)
        return [self._request.get_output_tensor(0).data]
