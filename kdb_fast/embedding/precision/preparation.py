"""CHILD ×1, for a while: quantise a model for a user's records, and measure a precision on them.

In a process of its own, so that its memory (a second copy of the model, statistics of its layers) is given back, and so
that a crash in native code is a message. Uses the same functions as the workers.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import KdbFastError
from ...ipc.child import enter_child
from ...resources import usable_cpus
from ..encoder import Encoder, EncoderSpec
from ..models.files import sha256_of
from .fidelity import compare

CALIBRATION_TEXTS = 300
"""More changed nothing: 300 texts of 16 tokens gave cosines of 0.9995, 300 of 100 tokens 0.9992."""

CALIBRATION_TOKENS = 5_000
"""Bound on the calibration texts together. Four times as many gave no more (docs/performance.md)."""

MEASURED_TOKENS = 15_000
"""Bound on the texts on which fidelity is measured: 4 s of a core in fp32, while another quantises."""

LEAST_MEASURED = 64
"""… but never fewer texts than this."""

if TYPE_CHECKING:
    from .quantise import Calibrated

OPENVINO_MODEL, ONNX_MODEL, MANIFEST = "model.xml", "model.onnx", "prepared.json"


def run(connection: Connection, spec: EncoderSpec, texts: Sequence[str], directory: Path, stderr: Any) -> None:
    """Entry point. Sends ("note", text)…, then ("done", directory, fidelity as dict) or ("failed", text, remedy).

    Args:
        connection: Pipe to the parent.
        spec: The precision; with ``prepared``, only measured.
        texts: Texts of the user's own: the first are for calibration, the rest for the measurement.
        directory: Where prepared models are kept.
        stderr: See :func:`kdb_fast.ipc.child.enter_child`.
    """
    enter_child(stderr)
    try:
        done = quantise_and_measure(spec, texts, directory, lambda text: connection.send(("note", text)))
        connection.send(("done", *done))
    except KdbFastError as error:
        connection.send(("failed", error.message, error.remedy))
    except BaseException as error:
        connection.send(("failed", f"{type(error).__name__}: {' '.join(str(error).split())}", ""))
    os._exit(0)


def quantise_and_measure(
    spec: EncoderSpec, texts: Sequence[str], directory: Path, report: Callable[[str], None]
) -> tuple[Path | None, dict[str, Any]]:
    """Quantise (int8 without ``spec.prepared``) and measure.

    Returns:
        The prepared model's file (None for a precision that needs none), and the fields of a Fidelity.

    Raises:
        ModelError: The model cannot be read or quantised, or the result depends on the batch.
    """
    exact = Encoder(replace(spec, precision="fp32", prepared=None, on_openvino=False, threads=1))
    tokens = exact.token_ids(texts)
    calibration = _first_within(tokens, CALIBRATION_TOKENS, min(CALIBRATION_TEXTS, len(texts) // 2))
    held_out = texts[calibration:]
    held_out = held_out[: max(LEAST_MEASURED, _first_within(tokens[calibration:], MEASURED_TOKENS, len(held_out)))]
    prepared: Path | None = spec.prepared
    calibrated = None
    if spec.precision == "int8" and prepared is None:
        from .quantise import calibrate

        model_file = spec.model.path / spec.model.model_file
        # With all CPUs; what comes then takes one, and the other computes what the result is compared with.
        calibrated = calibrate(model_file, exact.batches(tokens[:calibration]), report, usable_cpus())

    def make_lower() -> Encoder:
        nonlocal prepared
        if calibrated is not None:
            prepared = _quantise(spec, calibrated, directory)
        lower = Encoder(replace(spec, prepared=prepared, threads=1))
        lower.self_test()
        report(f"Comparing {spec.precision} with fp32 on {len(held_out):,} of the records …")
        return lower

    fidelity = compare(exact, make_lower, held_out)
    return prepared, asdict(fidelity)


def _quantise(spec: EncoderSpec, calibrated: Calibrated, directory: Path) -> Path:
    from .quantise import FORMAT, quantise

    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".new-", dir=directory))
    try:
        target = work / (OPENVINO_MODEL if spec.on_openvino else ONNX_MODEL)
        files = {file.name: sha256_of(file) for file in quantise(calibrated, target)}
        fingerprint = prepared_fingerprint(spec.fingerprint(), spec.precision, files)
        manifest = {
            "base": spec.fingerprint(),
            "model": spec.model.name,
            "precision": spec.precision,
            "format": FORMAT,
            "files": files,
            "fingerprint": fingerprint,
        }
        (work / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        place = directory / fingerprint
        try:
            work.rename(place)
        except OSError:  # another run has prepared the same: the same texts give the same bytes
            if not place.is_dir():
                raise
        return place / target.name
    finally:
        shutil.rmtree(work, ignore_errors=True)


def prepared_model(directory: Path) -> Path:
    """File of the quantised model in a directory of what was prepared."""
    return next(file for name in (OPENVINO_MODEL, ONNX_MODEL) if (file := directory / name).exists())


def prepared_fingerprint(base: str, precision: str, files: dict[str, str]) -> str:
    """``base-precision-`` and 16 hex digits that follow from the bytes of the quantised model's files."""
    canonical = json.dumps(files, sort_keys=True, separators=(",", ":"))
    return f"{base}-{precision}-{hashlib.sha256(canonical.encode()).hexdigest()[:16]}"


def _first_within(tokens: Sequence[Sequence[int]], budget: int, most: int) -> int:
    """How many of the first ``most`` texts stay within ``budget`` tokens together; at least 1."""
    total = np.cumsum([len(ids) for ids in tokens[:most]])
    return max(1, int(np.searchsorted(total, budget, side="right")))
