"""The form that OpenVINO's graphs of int8 take: another order of the same computation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kdb_fast.embedding.precision.openvino_backend import compile_model, installed
from kdb_fast.embedding.precision.openvino_graph import keep_heads
from kdb_fast.telemetry import import_openvino

pytestmark = pytest.mark.skipif(not installed(), reason="openvino is not installed")

STATE = np.random.default_rng(3).standard_normal((2, 16, 24)).astype(np.float32)


def attention() -> Any:
    """Two heads of 12, keys transposed as an exporter does."""
    openvino = import_openvino()
    op = openvino.opset13
    state = op.parameter([-1, -1, 24], np.float32)
    parts = op.reshape(state, np.array([0, 0, 2, 12]), True)
    heads = [op.transpose(parts, np.array(order)) for order in ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3])]
    shares = op.softmax(op.matmul(heads[0], heads[1], False, False), -1)
    context = op.transpose(op.matmul(shares, heads[2], False, False), np.array([0, 2, 1, 3]))
    return openvino.Model([op.reshape(context, np.array([0, 0, 24]), True)], [state])


def test_keys_keep_their_heads_and_the_values_stay() -> None:
    model = attention()
    expected = compile_model(model, "f32")(STATE)[0]
    keep_heads(model)
    orders = [node.input_value(1).get_node().data.tolist() for node in model.get_ops()
              if node.get_type_name() == "Transpose"]  # fmt: skip
    assert orders == [[0, 2, 1, 3]] * 4
    np.testing.assert_allclose(compile_model(model, "f32")(STATE)[0], expected, atol=1e-6)
