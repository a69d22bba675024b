"""How fast the machine can multiply: what no encoder in fp32 can exceed."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from kdb_fast.resources import cpu_list

ROWS, INNER, COLUMNS = 512, 384, 1536
"""The largest product of all-MiniLM-L6-v2, for a batch of 512 tokens."""

FLOP = 2 * ROWS * INNER * COLUMNS


def ceiling(params: dict[str, Any]) -> dict[str, Any]:
    """GFLOP/s of fp32 matrix products on every CPU at the same time, one thread each.

    NumPy's BLAS and ONNX Runtime take turns for ``seconds`` each; of each process the best slice of the faster one
    counts, so the ceiling is high rather than low.
    """
    os.environ.update(OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    cpus = (cpu_list() or list(range(os.cpu_count() or 1)))[: params.get("workers") or None]
    context = multiprocessing.get_context("spawn")
    children = []
    for cpu in cpus:
        ours, theirs = context.Pipe()
        process = context.Process(target=_child, args=(theirs, cpu, params["seconds_each"]), daemon=True)
        process.start()
        theirs.close()
        children.append((process, ours))
    for _, pipe in children:
        pipe.recv()
    started = time.perf_counter()
    for _, pipe in children:
        pipe.send("go")
    reports: list[dict[str, float]] = [pipe.recv() for _, pipe in children]
    seconds = time.perf_counter() - started
    for process, _ in children:
        process.join(10)
    best = [max(report.values()) for report in reports]
    return {
        "seconds": seconds,
        "records": len(cpus),
        "gflops": sum(best),
        "gflops_by_cpu": best,
        "numpy": [report.get("numpy", 0.0) for report in reports],
        "onnxruntime": [report.get("onnxruntime", 0.0) for report in reports],
    }


def _child(pipe: Connection, cpu: int, seconds: float) -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {cpu})
    products = {"numpy": _numpy(), "onnxruntime": _onnxruntime()}
    for product in products.values():
        if product:
            product()
    pipe.send("ready")
    pipe.recv()
    pipe.send({name: _best(product, seconds) for name, product in products.items() if product})


def _best(product: Callable[[], Any], seconds: float) -> float:
    """GFLOP/s of the best of ten slices of time."""
    best = 0.0
    for _ in range(10):
        count, started = 0, time.perf_counter()
        while (passed := time.perf_counter() - started) < seconds / 10:
            product()
            count += 1
        best = max(best, count * FLOP / passed / 1e9)
    return best


def _matrices() -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    return (
        rng.standard_normal((ROWS, INNER), dtype=np.float32),
        rng.standard_normal((INNER, COLUMNS), dtype=np.float32),
    )


def _numpy() -> Callable[[], Any]:
    a, b = _matrices()
    out = np.empty((ROWS, COLUMNS), dtype=np.float32)
    return lambda: np.matmul(a, b, out=out)


def _onnxruntime() -> Callable[[], Any] | None:
    """A graph of one MatMul whose second matrix is a weight; None without the package that writes graphs."""
    try:
        from onnx import TensorProto, helper, numpy_helper
    except ImportError:
        return None
    import onnxruntime

    a, b = _matrices()
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["a", "b"], ["c"])],
        "product",
        [helper.make_tensor_value_info("a", TensorProto.FLOAT, [ROWS, INNER])],
        [helper.make_tensor_value_info("c", TensorProto.FLOAT, [ROWS, COLUMNS])],
        [numpy_helper.from_array(b, "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"a": a})
