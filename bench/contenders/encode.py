"""The encoder alone: N pinned processes that embed shards as the workers do."""

from __future__ import annotations

import multiprocessing
import os
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from kdb_fast.embedding.batching import TOKEN_BUDGET
from kdb_fast.embedding.encoder import Encoder, EncoderSpec
from kdb_fast.embedding.models.lookup import Model, resolve
from kdb_fast.embedding.offline import import_for
from kdb_fast.engine.sharding import WINDOW_ROWS, cut_shards
from kdb_fast.errors import KdbFastError
from kdb_fast.ipc.slab import BLOB_BYTES, Row
from kdb_fast.records import Record
from kdb_fast.resources import cpu_list
from kdb_fast.settings import DEFAULT_BATCH_SIZE, DEFAULT_MODEL

from .. import data
from ..contender import Skip
from ..measure import Sampler
from .ceiling import Ceiling


def encode(params: dict[str, Any]) -> dict[str, Any]:
    """Embed a data set with one encoder on each CPU.

    Shards are cut as the pipeline cuts them and dealt out in turn. With ``ceiling``, matrix products are measured on
    each CPU between its shards, so many seconds each time; their time does not count.
    """
    model = resolve(DEFAULT_MODEL)
    cpus = (cpu_list() or list(range(os.cpu_count() or 1)))[: params.get("workers") or None]
    spec = EncoderSpec(model, params.get("batch_size", DEFAULT_BATCH_SIZE), params.get("token_budget", TOKEN_BUDGET))
    prepared: dict[str, Any] = {}
    if "precision" in params:
        spec, prepared = _prepared(spec, params)
    shards = _shards(params, model)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ.update(OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    ceiling = params.get("ceiling", 0.0)
    context = multiprocessing.get_context("spawn")
    children = []
    for number, cpu in enumerate(cpus):
        ours, theirs = context.Pipe()
        process = context.Process(
            target=_child, args=(theirs, spec, cpu, shards[number :: len(cpus)], ceiling), daemon=True
        )
        process.start()
        theirs.close()
        children.append((process, ours))
    for _, pipe in children:
        pipe.recv()  # loaded and warm
    sampler = Sampler(lambda: {str(process.pid): int(process.pid or 0) for process, _ in children}, 0.2)
    with sampler.running():
        for _, pipe in children:
            pipe.send("go")
        reports = [pipe.recv() for _, pipe in children]
    sampler.take()
    for process, pipe in children:
        pipe.send("end")
        process.join(10)
    return {
        "seconds": max(r["seconds"] for r in reports),
        "records": sum(r["records"] for r in reports),
        "tokens": sum(r["tokens"] for r in reports),
        "padded_tokens": sum(r["padded_tokens"] for r in reports),
        "workers": len(cpus),
        "worker_seconds": [r["seconds"] for r in reports],
        "gflops_by_worker": [r["gflops"] for r in reports],
        "possible_gflop": sum(max(r["gflops"].values(), default=0.0) * r["seconds"] for r in reports),
        "worker_pss_bytes": max(sampler.peaks.values()),
        "worker_rss_bytes": max(r["rss"] for r in reports),
        **prepared,
    }


def _prepared(spec: EncoderSpec, params: dict[str, Any]) -> tuple[EncoderSpec, dict[str, Any]]:
    """The lower precision, with what it took to choose it and how near it is to fp32. The first run of a session
    prepares it, the others find it beside the data set."""
    from kdb_fast.embedding.precision.choice import PrecisionSelector

    started = time.perf_counter()
    selector = PrecisionSelector(
        spec,
        index=f"benchmark {Path(params['data']).stem.split('-')[0]}",
        history=(),
        sample=lambda rows: list(data.read(params["data"], rows)),
        report=lambda text: None,
        directory=Path(params["data"]).parent / "prepared",
    )
    try:
        choice = selector.choose(params["precision"])
    except KdbFastError as error:
        raise Skip(f"{params['precision']}: {error.message.rstrip('.')}") from None
    assert choice.fidelity is not None
    return choice.spec, {
        "preparation_seconds": time.perf_counter() - started,
        "cosine_mean": choice.fidelity.cosine_mean,
        "overlap": choice.fidelity.overlap,
    }


def _shards(params: dict[str, Any], model: Model) -> list[list[str]]:
    from kdb_fast.embedding.encoder import CHARS_PER_TOKEN

    rows = [Row(Record(("Bench", str(i)), t)) for i, t in enumerate(data.read(params["data"], params["records"]))]
    return [
        [row.record.content for row in shard]
        for start in range(0, len(rows), WINDOW_ROWS)
        for shard in cut_shards(
            rows[start : start + WINDOW_ROWS], blob_bytes=BLOB_BYTES, read_chars=model.max_tokens * CHARS_PER_TOKEN
        )
    ]


def _child(pipe: Connection, spec: EncoderSpec, cpu: int, shards: list[list[str]], ceiling_seconds: float) -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {cpu})
    import_for(spec.model)
    encoder = Encoder(spec)
    encoder.self_test()
    out = np.empty((max((len(s) for s in shards), default=1), encoder.dimensions), dtype=np.float32)
    ceiling = Ceiling(ceiling_seconds) if ceiling_seconds else None
    pipe.send("ready")
    pipe.recv()
    seconds = 0.0
    tallies = []
    for shard in shards:
        started = time.perf_counter()
        tallies.append(encoder.encode(shard, out[: len(shard)]))
        seconds += time.perf_counter() - started
        if ceiling:
            ceiling.take()
    report = {
        "seconds": seconds,
        "gflops": ceiling.gflops() if ceiling else {},
        "records": sum(map(len, shards)),
        "tokens": sum(t.tokens for t in tallies),
        "padded_tokens": sum(t.padded_tokens for t in tallies),
        "rss": psutil.Process().memory_info().rss,
    }
    pipe.send(report)
    pipe.recv()  # stay, so that the memory can be read
