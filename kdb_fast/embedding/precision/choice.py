"""Which precision a run computes in: what this CPU can do, and what is good enough for these records.

A lower precision is used only after it was compared with fp32 on records of the user's own. What was prepared and
measured is kept, so the next run of the same index asks nothing: ``prepared/FINGERPRINT/`` in kdb-fast's data directory
holds a quantised model, and one small file of measurements for each index.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ...errors import ModelError, StoppedError
from ...ipc.spawning import describe_exit, spawn, tail
from ...paths import default_data_dir
from ...receipt import Fidelity
from ...records import shell_word
from ...resources import cpu_flags
from ..batching import TOKEN_BUDGET
from ..encoder import EncoderSpec
from ..models.files import check_private, sha256_of
from .openvino_rows import BATCH_TOKENS
from .preparation import MANIFEST, OPENVINO_MODEL, prepared_fingerprint, prepared_model, run
from .support import int8_on_openvino, missing_instructions, unsupported

SAMPLE_RECORDS = 1000
"""Records read: the first 300 for calibration, of the others up to 15,000 tokens for the comparison."""

LEAST_RECORDS = 100
"""With fewer records nothing can be said about a precision, and nothing is gained either."""

FLOORS = {"bf16": (0.9999, 0.98), "int8": (0.997, 0.94)}
"""Least mean cosine and least overlap of the 10 nearest. Measured: bf16 0.99999 and 0.994, int8 0.9993 and 0.965."""

LEAST_SPEED = 1.1
"""``auto`` takes a precision only if it is at least this much faster than fp32 on this machine."""

PREPARE_SECONDS = 900.0
"""Deadline. It takes some ten seconds for MiniLM."""

Report = Callable[[str], None]


@dataclass(frozen=True)
class Choice:
    """The precision of a run.

    Attributes:
        spec: For the workers.
        fingerprint: Of the vectors.
        why: For the plan's line.
        fidelity: None for fp32.
    """

    spec: EncoderSpec
    fingerprint: str
    why: str
    fidelity: Fidelity | None = None


def _unquantised_suffix(spec: EncoderSpec) -> str:
    """Ending of names for int8 whose unquantised part is not computed in fp32: its vectors are others."""
    return "" if spec.unquantised_precision == "fp32" else f"-{spec.unquantised_precision}"


class PrecisionSelector:
    """Finds the precision for one index.

    Args:
        spec: The model in fp32.
        index: What names the index: measurements on one are not used for another.
        history: Fingerprints of earlier runs on it, the newest first.
        sample: Reads up to so many texts of the user's own.
        report: Called with one line for each step that takes time.
        should_stop: Asked several times a second; preparation ends when it says so.
        directory: Where prepared models and measurements are kept; None for kdb-fast's data directory.
    """

    def __init__(
        self,
        spec: EncoderSpec,
        *,
        index: str,
        history: Sequence[str],
        sample: Callable[[int], list[str]],
        report: Report,
        should_stop: Callable[[], bool] = lambda: False,
        directory: Path | None = None,
    ) -> None:
        self._spec, self._history, self._report, self._should_stop = spec, history, report, should_stop
        self._index = hashlib.sha256(index.encode()).hexdigest()[:16]
        self._sample = sample
        self._texts: list[str] | None = None
        self._directory = (directory or default_data_dir() / "prepared").absolute()

    def choose(self, precision: str, floor: float | None = None) -> Choice:
        """The spec and fingerprint to run with.

        Args:
            precision: As in ReindexOptions.
            floor: Least mean cosine with fp32; None for FLOORS.

        Raises:
            ModelError: The precision that was asked for cannot be used here, or is not close enough to fp32.
        """
        if precision == "fp32":
            return self._exact("fp32")
        if precision != "auto":
            if reason := unsupported(precision):
                raise ModelError(f"--precision {precision}: {reason}.", remedy="Use --precision fp32 or auto.")
            return self._lower(precision, floor)
        reasons = []
        for candidate in ("int8", "bf16"):  # the fastest first
            try:
                if reason := unsupported(candidate):
                    reasons.append(f"{candidate}: {reason}")
                    continue
                choice = self._lower(candidate, floor)
            except ModelError as error:
                reasons.append(f"{candidate}: {error.message}")
                continue
            assert choice.fidelity is not None
            if choice.fidelity.speed >= LEAST_SPEED:
                return choice
            reasons.append(f"{candidate}: only {choice.fidelity.speed:.2f} times as fast as fp32")
        for reason in reasons:
            self._report(f"Not {reason.rstrip('.')}.")
        return self._exact("fp32 (auto: nothing faster is good enough here)")

    def _exact(self, why: str) -> Choice:
        return Choice(self._spec, self._spec.fingerprint(), why)

    def _lower(self, precision: str, floor: float | None) -> Choice:
        spec = replace(self._spec, precision=precision, on_openvino=precision == "bf16" or int8_on_openvino())
        fidelity = None
        if precision == "int8":
            if known := self._find_prepared():
                spec = replace(spec, prepared=known, on_openvino=known.name == OPENVINO_MODEL)
            if spec.on_openvino and not missing_instructions("bf16", cpu_flags()):
                spec = replace(spec, unquantised_precision="bf16")
        spec = replace(spec, token_budget=BATCH_TOKENS if spec.on_openvino else TOKEN_BUDGET)
        if precision != "int8" or spec.prepared:
            fidelity = self._read_fidelity(spec)
        kept = fidelity is not None
        if fidelity is None:
            spec, fidelity = self._prepare(spec)
            self._write_fidelity(spec, fidelity)
        least, least_overlap = FLOORS[precision]
        if floor is not None:
            least, least_overlap = floor, 0.0
        if fidelity.cosine_mean < least or fidelity.overlap < least_overlap:
            which, again = "these records", ""
            if kept:  # not compared anew each time: with auto, every run would begin with that
                which = "the records of an earlier run"
                again = f" If they have changed since, compare again: rm {shell_word(str(self._fidelity_file(spec)))}"
            raise ModelError(
                f"{precision} is not close enough to fp32 on {which}: {fidelity.describe()}; "
                f"expected a mean cosine of at least {least:g}"
                + (f" and {least_overlap:.0%} of the nearest" if least_overlap else "")
                + ".",
                remedy=f"Use --precision fp32 (or auto), or lower --min-fidelity.{again}",
            )
        return Choice(spec, self._fingerprint(spec), f"{precision}: {fidelity.describe()}", fidelity)

    def _fingerprint(self, spec: EncoderSpec) -> str:
        if spec.prepared is None:
            return spec.fingerprint(spec.precision)
        return spec.prepared.parent.name + _unquantised_suffix(spec)

    # --- what is kept ---

    def _find_prepared(self) -> Path | None:
        """File of the quantised model with which this index was made, or of one that was measured on it; verified, and
        fit for this machine."""
        try:
            present = [entry for entry in self._directory.iterdir() if (entry / MANIFEST).is_file()]
        except FileNotFoundError:
            return None
        check_private(self._directory)
        newest_first = sorted(present, key=lambda entry: (entry / MANIFEST).stat().st_mtime, reverse=True)
        used = [entry for number in self._history for entry in newest_first if number.startswith(entry.name)]
        measured = [entry for entry in newest_first if any(entry.glob(f"fidelity-{self._index}*.json"))]
        return next((prepared_model(entry) for entry in [*used, *measured] if self._is_good(entry)), None)

    def _is_good(self, entry: Path) -> bool:
        from .quantise import FORMAT

        try:
            manifest = json.loads((entry / MANIFEST).read_text())
            base, files = manifest["base"], manifest["files"]
            if base != self._spec.fingerprint() or manifest["format"] != FORMAT:
                return False
            if prepared_fingerprint(base, manifest["precision"], files) != entry.name:
                raise ValueError("its fingerprint is another")
            if OPENVINO_MODEL in files and not int8_on_openvino():
                return False
            for name, expected in files.items():
                if sha256_of(entry / name) != expected:
                    raise ValueError(f"{name} has changed")
        except (OSError, ValueError, KeyError, TypeError) as error:
            self._report(f"The prepared model {entry} is damaged and is not used: {error}.")
            return False
        return True

    def _fidelity_file(self, spec: EncoderSpec) -> Path:
        directory = spec.prepared.parent if spec.prepared else self._directory / spec.fingerprint(spec.precision)
        return directory / f"fidelity-{self._index}{_unquantised_suffix(spec)}.json"

    def _read_fidelity(self, spec: EncoderSpec) -> Fidelity | None:
        with contextlib.suppress(OSError, ValueError, TypeError):
            return Fidelity(**json.loads(self._fidelity_file(spec).read_text()))
        return None

    def _write_fidelity(self, spec: EncoderSpec, fidelity: Fidelity) -> None:
        file = self._fidelity_file(spec)
        try:
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            temporary = file.with_suffix(f".{os.getpid()}")
            temporary.write_text(json.dumps(asdict(fidelity)) + "\n")
            temporary.replace(file)
        except OSError as error:
            self._report(f"The comparison with fp32 cannot be kept, so the next run repeats it: {error}.")

    # --- the child ---

    def _prepare(self, spec: EncoderSpec) -> tuple[EncoderSpec, Fidelity]:
        texts = self._own_texts()
        if not texts:
            raise ModelError(
                f"No record with a text was found to compare {spec.precision} with fp32.",
                remedy="Use --precision fp32: that run says what is wrong with the records.",
            )
        if len(texts) < LEAST_RECORDS:
            raise ModelError(
                f"{len(texts)} records are too few to compare {spec.precision} with fp32; "
                f"expected at least {LEAST_RECORDS} different ones.",
                remedy="Use --precision fp32.",
            )
        prepared, fidelity = self._run_child(spec, texts)
        return replace(spec, prepared=prepared), Fidelity(**fidelity)

    def _own_texts(self) -> list[str]:
        if self._texts is None:
            self._texts = list(dict.fromkeys(self._sample(SAMPLE_RECORDS)))
        return self._texts

    def _run_child(self, spec: EncoderSpec, texts: list[str]) -> tuple[Path | None, dict[str, Any]]:
        process, connection, stderr = spawn(
            "prepare", run, lambda: (spec, texts, self._directory), credentials=False, threads=1
        )
        deadline = time.monotonic() + PREPARE_SECONDS
        try:
            while True:
                if self._should_stop():
                    raise StoppedError("Stopped while the model was prepared; nothing was written.")
                if time.monotonic() > deadline:
                    raise ModelError(f"Preparing {spec.precision} took longer than {PREPARE_SECONDS:.0f} s.")
                if not connection.poll(0.1):
                    continue
                try:
                    kind, *values = connection.recv()
                except (EOFError, OSError):
                    process.join(10)
                    how = f"the process {describe_exit(process.exitcode)}.{tail(stderr)}"
                    raise ModelError(
                        f"Preparing {spec.precision} failed: {how}",
                        remedy="Use --precision fp32.",
                    ) from None
                if kind == "note":
                    self._report(values[0])
                elif kind == "failed":
                    raise ModelError(values[0], remedy=values[1] or "Use --precision fp32.")
                else:
                    return values[0], values[1]
        finally:
            process.kill()
            process.join(10)
            connection.close()
            os.close(stderr)
