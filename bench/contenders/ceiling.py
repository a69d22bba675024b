"""How fast a core multiplies: what no encoder in fp32 can exceed."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

ROWS, INNER, COLUMNS = 512, 384, 1536
"""The largest product of all-MiniLM-L6-v2, for a batch of 512 tokens."""

FLOP = 2 * ROWS * INNER * COLUMNS


class Ceiling:
    """Products in this process, a slice of time after the other, by NumPy's BLAS and by ONNX Runtime in turn.

    What is measured beside it is interrupted for the slices: what else slows the machine down slows down both alike.
    """

    def __init__(self, seconds: float) -> None:
        """
        Args:
            seconds: Of a slice.
        """
        self._slice = seconds
        self._products = {"numpy": _numpy(), "onnxruntime": _onnxruntime()}
        self._work = {name: [0, 0.0] for name, product in self._products.items() if product}
        for name in self._work:
            self._multiply(name, seconds)  # warm up
        self._work = {name: [0, 0.0] for name in self._work}

    def take(self) -> None:
        """One slice of each."""
        for name in self._work:
            count, seconds = self._multiply(name, self._slice)
            self._work[name][0] += count
            self._work[name][1] += seconds

    def gflops(self) -> dict[str, float]:
        """Mean rate of each over all slices, GFLOP/s."""
        return {name: count * FLOP / seconds / 1e9 for name, (count, seconds) in self._work.items() if seconds}

    def _multiply(self, name: str, slice_seconds: float) -> tuple[int, float]:
        product = self._products[name]
        assert product is not None
        count, started = 0, time.perf_counter()
        while (passed := time.perf_counter() - started) < slice_seconds:
            product()
            count += 1
        return count, passed


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
