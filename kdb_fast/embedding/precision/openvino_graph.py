"""The form of attention that OpenVINO computes fastest; what is computed stays the same."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...telemetry import import_openvino

HEADS, HEADS_TRANSPOSED = [0, 2, 1, 3], [0, 2, 3, 1]
"""Orders of axes: [texts, tokens, heads, size] to [texts, heads, tokens, size], and to [texts, heads, size, tokens]."""


def keep_heads(model: Any) -> None:
    """Have products of attention turn the keys' last axes (``transpose_b``) instead of a transposition before them.

    OpenVINO's kernel of attention makes heads of queries and values by itself, and of keys only in this form.
    """
    op = import_openvino().opset13
    for product in model.get_ordered_ops():
        if product.get_type_name() != "MatMul" or any(product.get_attributes().values()):
            continue
        turned = product.input_value(1).get_node()
        if turned.get_type_name() != "Transpose" or _constant(turned.input_value(1)) != HEADS_TRANSPOSED:
            continue
        heads = op.transpose(turned.input_value(0), np.array(HEADS, np.int64))
        same = op.matmul(product.input_value(0), heads, False, True)
        same.set_friendly_name(product.get_friendly_name())
        product.output(0).replace(same.output(0))


def _constant(output: Any) -> list[int] | None:
    node = output.get_node()
    return [int(value) for value in node.data] if node.get_type_name() == "Constant" else None
