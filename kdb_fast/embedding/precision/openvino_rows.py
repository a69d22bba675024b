"""Let dense layers see real tokens only, and few different numbers of rows.

Attention wants texts × tokens, all of one width. Everything else works row by row: here the tokens of all texts of a
batch are laid one after the other, without padding, as soon as a dense layer needs them, and attention gets them back
as texts × tokens. So the width may be rounded up to a multiple of WIDTH_CLASS at next to no cost, and OpenVINO's
kernels of attention have no rest to compute apart: in int8 31 tokens took 16 % longer a token than 32, and 47 than 48.

OpenVINO compiles kernels for every number of rows that a dense layer meets: 15 ms and 5 to 8 MB each for MiniLM in
int8, 4 ms and under 1 MB in bf16. Batches of texts of all lengths have hundreds of such numbers; a worker in int8 grew
to 740 MB, and a third of its time went into compiling. So the rows are filled up to one of SIZES. The values do not
change by a bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ...telemetry import import_openvino

BATCH_TOKENS = 512
"""Real tokens of a batch for OpenVINO. ONNX Runtime's TOKEN_BUDGET counts padding, and is another measurement."""

SIZES = {
    "int8": (32, *range(64, 385, 64), 416, *range(448, BATCH_TOKENS + 1, 16)),
    "bf16": tuple(range(8, BATCH_TOKENS + 1, 8)),
}
"""Numbers of rows that are filled up to, by precision; BATCH_TOKENS is the last. Most batches have 449 to 512 rows.

Of all rows computed 2.3 to 2.5 % are filled up with in int8, 0.6 to 0.7 % in bf16. Five more sizes would make that
1.5 to 1.9 %, for 40 MB more.
"""

STEP = 256
"""Beyond SIZES (one long text), a multiple of this."""

ROW_BY_ROW = frozenset(
    ("Add", "Subtract", "Multiply", "Divide", "Erf", "Gelu", "Tanh", "Relu", "Sigmoid", "Swish", "Power", "Convert",
     "FakeQuantize", "MVN")
)  # fmt: skip

FILL, CUT = "kdb_fast_fill", "kdb_fast_cut"
"""Inputs that :func:`pad_rows` adds: row numbers, int64 [filled rows] and [texts, tokens].

Computed in the graph from the shape of the texts, OpenVINO 2026.4 went on with those of an earlier batch.
"""


WIDTH_CLASS = 16
"""Widths are rounded up to a multiple of this, so a text has the same width in every batch.

OpenVINO sums 16 values at a time and the rest apart, so padding a row beyond the next multiple of 16 changes the order
of a sum: by 3e-6 in fp32, but in int8 such a difference can round to another step. Measured on three sets of texts,
MiniLM, widths up to 304: every difference had crossed a multiple of 16, and the number of rows never mattered.
"""


def filled_rows(tokens: int, precision: str) -> int:
    """Rows that dense layers compute for so many tokens."""
    return next((size for size in SIZES[precision] if size >= tokens), -(-tokens // STEP) * STEP)


def row_numbers(mask: npt.NDArray[np.int64], precision: str) -> dict[str, npt.NDArray[np.int64]]:
    """The inputs FILL and CUT for a batch.

    Args:
        mask: 1 where a token is, 0 where padding is, int64 [texts, width]. A text without any gets nothing of use.
        precision: A key of SIZES.
    """
    real = mask != 0
    places = np.flatnonzero(real)
    # Filled up with the first row again: it is as harmless.
    fill = np.full(filled_rows(len(places), precision), places[0], np.int64)
    fill[: len(places)] = places
    # Padding is a copy of its own text's first token, so that NaN in one text never reaches another.
    lengths = real.sum(axis=1)
    firsts = np.minimum(np.cumsum(lengths) - lengths, len(places) - 1)
    cut = np.repeat(firsts[:, None], mask.shape[1], axis=1)
    cut[real] = np.arange(len(places))
    return {FILL: fill, CUT: cut}


def pad_rows(model: Any) -> Any:
    """A form of ``model`` that takes :func:`row_numbers` as well; ``model`` itself if it has no dense layers.

    Dense layers are products with a constant matrix whose input is [texts, tokens, channels].
    """
    openvino = import_openvino()
    op = openvino.opset13
    fill_rows, cut_rows = op.parameter([-1], np.int64), op.parameter([-1, -1], np.int64)
    flat: set[tuple[str, int]] = set()
    filled_up: dict[tuple[str, int], Any] = {}
    cut: dict[tuple[str, int], Any] = {}

    def fill(output: Any) -> Any:
        if _key(output) not in filled_up:
            rows = op.reshape(output, np.array([1, -1, _channels(output)], np.int64), False)
            filled_up[_key(output)] = op.gather(rows, fill_rows, np.int64(1)).output(0)
        return filled_up[_key(output)]

    def restore(output: Any) -> Any:
        if _key(output) not in cut:
            rows = op.gather(output, cut_rows, np.int64(1))
            cut[_key(output)] = op.squeeze(rows, np.array([0], np.int64)).output(0)
        return cut[_key(output)]

    for node in model.get_ordered_ops():
        if _is_dense(node):
            if _key(node.input_value(0)) not in flat and not _enter(node, flat, fill):
                continue
            flat.add(_key(node.output(0)))
            continue
        inputs = node.inputs()
        known = [_key(place.get_source_output()) in flat for place in inputs]
        if not any(known):
            continue
        others = [place for place, is_flat in zip(inputs, known, strict=True) if not is_flat]
        if node.get_type_name() in ROW_BY_ROW and all(_fits(place) or _has_rows(place) for place in others):
            for place in others:
                if not _fits(place):
                    place.replace_source_output(fill(place.get_source_output()))
            flat.add(_key(node.output(0)))
            continue
        for place, is_flat in zip(inputs, known, strict=True):
            if is_flat:
                place.replace_source_output(restore(place.get_source_output()))
    if not flat:
        return model
    changed = openvino.Model(model.get_results(), [*model.get_parameters(), fill_rows, cut_rows])
    for place, name in zip(changed.inputs[-2:], (FILL, CUT), strict=True):
        place.get_tensor().set_names({name})
    return changed


def _enter(dense: Any, flat: set[tuple[str, int]], fill: Any) -> bool:
    """Fill up the rows before ``dense``, and before what prepares its input value by value."""
    place, chain = dense.input(0), []
    while True:
        node = place.get_source_output().get_node()
        if node.get_type_name() not in ("FakeQuantize", "Multiply") or not all(_fits(p) for p in node.inputs()[1:]):
            break
        chain.append(node)
        place = node.input(0)
    if not _has_rows(place):
        return False
    source = place.get_source_output()
    place.replace_source_output(fill(source))
    flat.update(_key(node.output(0)) for node in chain)
    return True


def _has_rows(place: Any) -> bool:
    shape = place.get_source_output().get_partial_shape()
    return (
        shape.rank.get_length() == 3 and shape[-1].is_static and not _is_constant(place.get_source_output().get_node())
    )


def _key(output: Any) -> tuple[str, int]:
    return output.get_node().get_name(), output.get_index()


def _channels(output: Any) -> int:
    return int(output.get_partial_shape()[-1].get_length())


def _is_dense(node: Any) -> bool:
    if node.get_type_name() != "MatMul" or node.get_attributes()["transpose_a"]:
        return False
    weight = node.input_value(1)
    return weight.get_partial_shape().rank.get_length() == 2 and _is_constant(weight.get_node())


def _is_constant(node: Any) -> bool:
    if node.get_type_name() == "Constant":
        return True
    inputs = node.inputs()
    return bool(inputs) and all(_is_constant(place.get_source_output().get_node()) for place in inputs)


def _fits(place: Any) -> bool:
    """Whether an input is a constant that goes with [rows, channels] as it did with [texts, tokens, channels]."""
    source = place.get_source_output()
    node = source.get_node()
    if node.get_type_name() != "Constant":
        rank = source.get_partial_shape().rank
        return _is_constant(node) and rank.is_static and rank.get_length() <= 1
    shape = list(node.shape)
    if len(shape) <= 2:
        return True
    if np.prod(shape[:-1]) != 1:
        return False
    opset13 = import_openvino().opset13
    place.replace_source_output(opset13.constant(np.asarray(node.data).reshape(shape[-1:])).output(0))
    return True
