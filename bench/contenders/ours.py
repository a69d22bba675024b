"""kdb-fast's whole job, from the start of its processes to an index that is ready to search."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from kdb_fast.errors import KdbFastError
from kdb_fast.indexing.reindex import reindex
from kdb_fast.receipt import Receipt
from kdb_fast.settings import ReindexOptions

from .. import data, database, free_encoder
from ..contender import Skip
from ..source import FileSource
from ..watched import watched


def run(params: dict[str, Any]) -> tuple[Receipt, dict[str, Any]]:
    """One run of ``reindex``; returns the receipt and the report."""
    known = {field.name for field in dataclasses.fields(ReindexOptions)}
    options = ReindexOptions(**{name: value for name, value in params.items() if name in known})
    free = bool(params.get("free_encoder"))
    indexed = bool(params.get("build_index", True))
    address = database.address_of(params["conninfo"])
    # Each data set is an index of its own: a precision is prepared for, and compared on, its own records.
    address = dataclasses.replace(address, display=f"benchmark {Path(params['data']).stem.split('-')[0]}")
    with watched(worker_target=free_encoder.run if free else None, build_index=indexed) as watch:
        started = time.perf_counter()
        receipt = reindex(address, FileSource(params["data"], params["records"]), options)
        seconds = time.perf_counter() - started
    if address.dialect == "postgresql":
        database.verify(params["conninfo"], params["records"], indexed=indexed)
    return receipt, {
        "seconds": seconds,
        "seconds_after_start": watch.seconds_after_start,
        "records": receipt.written,
        "read": receipt.read,
        "unaccounted": params["records"] - sum(receipt.fates.values()),
        "embedded": receipt.stored,
        "tokens": receipt.tokens,
        "padded_tokens": receipt.padded_tokens,
        "workers": receipt.workers,
        "phases": vars(receipt.phases),
        "index": receipt.index,
        "precision": receipt.precision,
        "fidelity": receipt.as_json()["fidelity"],
        "peak_rss_by_process": receipt.peak_rss_by_process,
        "pss_by_process": watch.pss,
        "worker_pss_bytes": watch.worker_pss(),
        "warnings": list(receipt.warnings),
    }


def whole(params: dict[str, Any]) -> dict[str, Any]:
    """Whole ``reindex`` into a fresh table."""
    return run(params)[1]


def precision(params: dict[str, Any]) -> dict[str, Any]:
    """Whether a precision is there, and how near its vectors are to those in fp32.

    Skipped where kdb-fast refuses it, and where its vectors turn out to be those of fp32.
    """
    wanted = params["precision"]
    try:
        report = run(params)[1]
    except KdbFastError as error:
        raise Skip(f"{wanted}: {error.message.rstrip('.')}") from None
    except TypeError as error:
        raise Skip(f"{wanted}: {error}") from None
    found = _compare(params)
    if wanted != "fp32" and found["largest_difference"] == 0.0:
        raise Skip(f"{wanted}: this version gave the very vectors of fp32")
    return {**report, **found}


def _compare(params: dict[str, Any]) -> dict[str, Any]:
    """Cosine of what is stored with what the encoder gives in fp32."""
    from kdb_fast.search.commands import embed_queries
    from kdb_fast.settings import DEFAULT_MODEL

    texts = list(data.read(params["data"], params["records"]))
    with database.connect(params["conninfo"]) as connection:
        rows = connection.execute("SELECT record_id, embedding FROM kdb_search").fetchall()
    stored = np.array([np.asarray(_floats(vector), dtype=np.float32) for _, vector in rows])
    exact = embed_queries([texts[int(number)] for number, _ in rows], DEFAULT_MODEL, None)
    norms = np.linalg.norm(stored, axis=1) * np.linalg.norm(exact, axis=1)
    cosine = (stored * exact).sum(axis=1) / norms
    # Batches differ between the two, which changes the last bits in any precision.
    difference = float(np.abs(stored - exact).max())
    return {
        "cosine_mean": float(cosine.mean()),
        "cosine_least": float(cosine.min()),
        "largest_difference": difference if difference > 1e-5 else 0.0,
    }


def _floats(vector: Any) -> Any:
    return vector.to_numpy() if hasattr(vector, "to_numpy") else vector


def help_text(params: dict[str, Any]) -> dict[str, Any]:
    """Seconds of ``kdb-fast --help``, the median of several calls."""
    seconds = []
    for _ in range(params["records"]):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "kdb_fast", "--help"], capture_output=True, check=True)
        seconds.append(time.perf_counter() - started)
    return {"seconds": sum(seconds), "records": len(seconds), "median_seconds": float(np.median(seconds))}
