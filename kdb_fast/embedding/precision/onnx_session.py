"""ONNX Runtime's sessions for int8."""

from __future__ import annotations

from pathlib import Path
from typing import Any

DISABLED = ["SkipLayerNormFusion"]
"""Optimisations left out. The kernel of SkipLayerNormalization takes 1.03 ms for 504 tokens × 384 channels, the
addition and the kernel of LayerNormalization together 0.19 ms."""

TANH_GELU = "optimization.enable_gelu_approximation"
"""GELU by its usual approximation with tanh, off by 0.0005 at most: far less than a step of its quantised values."""

FOLDER = "session.model_external_initializers_file_folder_path"


def open_session(model: Path | bytes, threads: int, folder: Path | None = None, *, exact: bool = False) -> Any:
    """A session on this CPU.

    Args:
        model: Its file, or its bytes.
        threads: Of a run.
        folder: Of bytes: where the files are that hold their large constants.
        exact: GELU as the model has it.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if not exact:
        options.add_session_config_entry(TANH_GELU, "1")
    if folder:
        options.add_session_config_entry(FOLDER, str(folder))
    source = model if isinstance(model, bytes) else str(model)
    return onnxruntime.InferenceSession(
        source, options, providers=["CPUExecutionProvider"], disabled_optimizers=DISABLED
    )
