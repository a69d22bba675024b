"""Libraries that report their use to their makers do not do so for kdb-fast.

ONNX Runtime keeps an identifier and a database in ``~/.cache/Microsoft`` and sends events in the background; the model
hub's client asks its server about the program that runs it, and keeps the answer; OpenVINO writes to ``~/intel`` and
sends an event when it is imported.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

VARIABLES = ("ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY")
"""Environment variables that turn it off. ONNX Runtime reads its own when it is imported, and not again."""


def turn_off() -> None:
    """Set VARIABLES, for this process and those that it starts. A value that the user has set stays, ``0`` too."""
    for name in VARIABLES:
        if not os.environ.get(name):
            os.environ[name] = "1"


def import_openvino() -> Any:
    """The package openvino, the only way in which kdb-fast imports it.

    No environment variable keeps it from reporting its import, but where its package for reports is not installed it
    reports nothing. So that package cannot be imported meanwhile. Where the caller's program has imported openvino
    before, nothing is changed.

    Raises:
        ImportError: The package is not installed.
    """
    if "openvino" in sys.modules:
        return sys.modules["openvino"]
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "openvino_telemetry"}
    for name in before:
        del sys.modules[name]
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # as the import system documents it
    try:
        return importlib.import_module("openvino")
    finally:
        del sys.modules["openvino_telemetry"]
        sys.modules.update(before)
