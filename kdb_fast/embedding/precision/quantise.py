"""Static int8 for OpenVINO: dense layers that multiply uint8 activations by int8 weights.

Nothing is decided while it runs: every range is fixed beforehand from texts of the user's own, so a vector does not
depend on what else is in its batch. Four steps, each of which answers a known cause of error:

1. *Outlier channels are split.* In the feed-forward layers of BERT-like models single channels are 10 to 40 times
   as strong as all others, for one token a text. Each is replaced by copies of a fraction of its weight: the same
   function, and no channel stands out any more (Zhao et al. 2019, "outlier channel splitting").
2. *Scales move from activations to weights* (Xiao et al. 2022, "SmoothQuant"), by the exponent that gives the
   layer's own calibration tokens the least error.
3. *Activations* get one range a layer, uint8, in which zero is exact.
4. *Weights* get one scale for each output channel and are rounded one input channel at a time, each rounding
   making good for the errors of those before it (Frantar et al. 2022, "GPTQ").

Everything outside of dense layers (attention scores, softmax, layer norm, embeddings) stays in floating point (fp32, or
bf16 where the CPU can: ``EncoderSpec.unquantised_precision``): it is 2 % of the work. Measured on 63,000 package
records, MiniLM: see :data:`ALPHAS`.

The graph is changed here; what a scale, a step or a rounded weight is, quantised_weights.py computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ...errors import ModelError
from ...telemetry import import_openvino
from .quantised_weights import Floats, activation_grid, output_error, round_weights, smoothing, weight_scale

FORMAT = 2
"""Part of the digest. To be raised when the same texts would give other weights."""

ALPHAS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 1.0)
"""SmoothQuant's exponents to try. Most layers of MiniLM take 0.9 to 1; 0.5 for all of them halved the overlap."""

ROWS = 1024
"""Tokens a layer on which exponents are tried."""

MOMENT_ROWS = 16_384
"""Tokens of which second moments are taken, about: ten times MiniLM's widest layer. For all 40,000 they cost twice as
much as the model itself."""

BLOCK_ROWS = 512
"""Tokens whose second moments are summed at once: one text at a time, the time went into adding the 9 MB matrices."""

PASS_BYTES = 256 << 20
"""Memory for the statistics of one pass over the texts; a larger model needs more passes."""

OUTLIER = 5.0
"""A channel is split if it moves the output by more than this many times what the 99th percentile of them does."""

OUTLIER_PARTS = 2.0
"""Each part of a split channel moves the output by no more than this many times the 99th percentile."""

MAX_EXTRA = 64
"""Most copies in a layer: 4 % of MiniLM's 1,536 channels."""

MIN_CHANNELS = 64
"""Smaller products are left as they are: they cost nothing."""

ELEMENTWISE = frozenset(
    ("Add", "Subtract", "Multiply", "Divide", "Erf", "Gelu", "Tanh", "Relu", "Sigmoid", "Swish", "Power", "Convert")
)

Feed = dict[str, npt.NDArray[np.int64]]


@dataclass
class _Source:
    """An activation that feeds one or more dense layers, and what the calibration texts showed of it."""

    output: Any
    dense: list[Any] = field(default_factory=list)
    low: Floats = field(default_factory=lambda: np.zeros(0, np.float32))
    high: Floats = field(default_factory=lambda: np.zeros(0, np.float32))
    moments: Floats = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    rows: list[Floats] = field(default_factory=list)

    @property
    def channels(self) -> int:
        return int(self.output.get_partial_shape()[-1].get_length())


class Quantised(NamedTuple):
    """What was done: dense layers in int8, of them with split channels, calibration tokens."""

    layers: int
    split: int
    tokens: int


def quantise(
    model_file: Path, feeds: Sequence[Feed], target: Path, report: Callable[[str], None], threads: int = 1
) -> Quantised:
    """Write ``model_file`` with int8 dense layers to ``target`` (``.xml``; the weights beside it in ``.bin``).

    The same texts in the same order give the same bytes on the same machine.

    Args:
        model_file: The fp32 (or fp16) ONNX file.
        feeds: Inputs of the model by name, int64 [rows, tokens], without padding.
        target: File to write; its directory must exist.
        report: Called with one line for each step that takes time.
        threads: Threads that run the texts.

    Raises:
        ModelError: OpenVINO cannot read the model, or it has no dense layers in floating point.
    """
    openvino = import_openvino()
    model = read_onnx(model_file)
    sources = _find_sources(model)
    if not sources:
        raise ModelError(
            f"{model_file.name} has no dense layers in floating point; expected an unquantised model.",
            remedy="Use --precision fp32, or another model.",
        )
    tokens = sum(feed["input_ids"].size for feed in feeds)
    report(f"Calibrating {sum(len(s.dense) for s in sources)} dense layers on {tokens:,} tokens …")
    split = 0
    for group in _passes(sources):
        _observe(model, group, feeds, tokens, threads)
        for source in group:
            split += _split_outliers(source)
    model.validate_nodes_and_infer_types()
    for number, source in enumerate(sources):
        _quantise_source(source, f"q{number}")
        source.moments, source.rows = np.zeros((0, 0), np.float32), []
    model.validate_nodes_and_infer_types()
    openvino.save_model(model, str(target), compress_to_fp16=False)
    return Quantised(sum(len(s.dense) for s in sources), split, tokens)


def read_onnx(model_file: Path) -> Any:
    """The model as OpenVINO's graph. Raises ModelError if OpenVINO cannot read it."""
    openvino = import_openvino()
    try:
        return openvino.Core().read_model(str(model_file))
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ModelError(
            f"OpenVINO cannot read {model_file.name}: {reason[:200]}", remedy="Use --precision fp32."
        ) from error


# --- the graph ---


def _find_sources(model: Any) -> list[_Source]:
    sources: dict[tuple[str, int], _Source] = {}
    for node in model.get_ordered_ops():
        if _weight(node) is not None:
            output = node.input_value(0)
            source = sources.setdefault((output.get_node().get_name(), output.get_index()), _Source(output))
            source.dense.append(node)
    return list(sources.values())


def _weight(node: Any) -> Floats | None:
    """The weight [in, out] of a dense layer in fp32; None for any other node."""
    if node.get_type_name() != "MatMul":
        return None
    constant, attributes = node.input_value(1).get_node(), node.get_attributes()
    if constant.get_type_name() != "Constant" or attributes["transpose_a"]:
        return None
    values = np.asarray(constant.data)
    if values.dtype != np.float32 or values.ndim != 2 or min(values.shape) < MIN_CHANNELS:
        return None
    return values.T if attributes["transpose_b"] else values


def _set_weight(node: Any, weight: Floats, name: str) -> None:
    values = weight.T if node.get_attributes()["transpose_b"] else weight
    node.input(1).replace_source_output(_constant(values, name).output(0))


def _constant(values: Any, name: str) -> Any:
    # Names are given, never generated: generated ones count up in the process and would be part of the digest.
    opset13 = import_openvino().opset13
    return opset13.constant(np.ascontiguousarray(values), name=name)


def _producers(source: _Source) -> list[Any] | None:
    """Inputs that hold a constant with the source's channels, back to the dense layer that computes them.

    None if anything but elementwise steps lies between, or if anything else uses a value on the way.
    """
    inside: dict[str, Any] = {}
    constants, stack = [], [source.output.get_node()]
    while stack:
        node = stack.pop()
        if node.get_name() in inside:
            continue
        inside[node.get_name()] = node
        if _weight(node) is not None:
            constants.append(node.input(1))
            continue
        if node.get_type_name() not in ELEMENTWISE:
            return None
        for place in node.inputs():
            producer = place.get_source_output().get_node()
            if producer.get_type_name() != "Constant":
                stack.append(producer)
                continue
            shape = list(producer.shape)
            if shape and shape[-1] == source.channels == np.prod(shape):
                constants.append(place)
            elif np.prod(shape) != 1:
                return None
    users = {use.get_node().get_name() for node in inside.values() for use in node.output(0).get_target_inputs()}
    return constants if users <= inside.keys() | {node.get_name() for node in source.dense} else None


# --- what the texts show ---


def _passes(sources: list[_Source]) -> Iterator[list[_Source]]:
    group: list[_Source] = []
    size = 0
    for source in sources:
        need = 4 * source.channels * (source.channels + ROWS)
        if group and size + need > PASS_BYTES:
            yield group
            group, size = [], 0
        group.append(source)
        size += need
    if group:
        yield group


def _observe(model: Any, group: list[_Source], feeds: Sequence[Feed], tokens: int, threads: int) -> None:
    """Run the texts in fp32 and note extremes, second moments and some tokens of each source."""
    from .openvino_backend import compile_model

    openvino = import_openvino()
    opset13 = openvino.opset13
    tapped = openvino.Model([opset13.result(source.output) for source in group], model.get_parameters())
    request = compile_model(tapped, "f32", threads).create_infer_request()
    names = [node.get_friendly_name() for node in model.get_parameters()]
    for source in group:
        source.low, source.high = np.zeros((2, source.channels), np.float32)
        source.moments = np.zeros((source.channels, source.channels), np.float32)
    # Counted through all texts: one of so many of each text would be its first token above all.
    for_moments, for_trials = (max(1, tokens // most) for most in (MOMENT_ROWS, ROWS))
    seen = 0
    waiting: list[list[Floats]] = [[] for _ in group]
    for feed in feeds:
        request.infer({name: feed[name] for name in names})
        count = feed["input_ids"].size
        for number, source in enumerate(group):
            values = request.get_output_tensor(number).data.reshape(count, source.channels)
            np.minimum(source.low, values.min(axis=0), out=source.low)
            np.maximum(source.high, values.max(axis=0), out=source.high)
            waiting[number].append(values[-seen % for_moments :: for_moments].copy())
            source.rows.append(values[-seen % for_trials :: for_trials].copy())
        seen += count
        if seen == tokens or sum(map(len, waiting[0])) >= BLOCK_ROWS:
            for source, parts in zip(group, waiting, strict=True):
                block = np.concatenate(parts)
                source.moments += block.T @ block
            waiting = [[] for _ in group]


def _split_outliers(source: _Source) -> int:
    """Replace each channel that stands out by copies of a fraction of its weight. Returns how many were."""
    weight = np.concatenate([_need_weight(node) for node in source.dense], axis=1)
    effect = np.maximum(-source.low, source.high) * np.linalg.norm(weight, axis=1)
    usual = float(np.percentile(effect, 99))
    outliers = np.flatnonzero(effect > OUTLIER * usual) if usual > 0 else np.zeros(0, np.intp)
    constants = _producers(source) if len(outliers) else None
    if not constants:
        return 0
    parts = np.ones(source.channels, np.intp)
    parts[outliers] = np.ceil(effect[outliers] / usual / OUTLIER_PARTS)
    while (extra := int(parts.sum()) - source.channels) > MAX_EXTRA:
        parts[outliers] = np.maximum(1, parts[outliers] * MAX_EXTRA // extra)
    # Kernels work on blocks of 32 channels: what the last block has room for goes to the strongest.
    parts[outliers[np.argmax(effect[outliers])]] += -extra % 32
    index = np.concatenate([np.arange(source.channels), np.repeat(np.arange(source.channels), parts - 1)])
    for node in source.dense:
        _set_weight(
            node, _need_weight(node)[index] / parts[index, None].astype(np.float32), f"{node.get_friendly_name()}/split"
        )
    for place in constants:
        node = place.get_node()
        weight_of_producer = _weight(node)
        if weight_of_producer is not None:
            _set_weight(node, weight_of_producer[:, index], f"{node.get_friendly_name()}/copies")
        else:
            values = np.asarray(place.get_source_output().get_node().data)[..., index]
            place.replace_source_output(_constant(values, f"{node.get_friendly_name()}/copies").output(0))
    source.low, source.high = source.low[index], source.high[index]
    source.moments = source.moments[np.ix_(index, index)]
    source.rows = [rows[:, index] for rows in source.rows]
    return len(outliers)


def _need_weight(node: Any) -> Floats:
    weight = _weight(node)
    assert weight is not None
    return weight


# --- from fp32 to int8 ---


def _quantise_source(source: _Source, name: str) -> None:
    opset13 = import_openvino().opset13
    weights = [_need_weight(node) for node in source.dense]
    weight = np.concatenate(weights, axis=1)
    smooth = min(
        (smoothing(source.low, source.high, weight, alpha) for alpha in ALPHAS),
        key=lambda s: output_error(np.concatenate(source.rows), source.low, source.high, weight, s),
    )
    step, zero = activation_grid(source.low / smooth, source.high / smooth)
    low, high = (
        _constant(np.float32(v), f"{name}/{what}") for v, what in ((-zero * step, "low"), ((255 - zero) * step, "high"))
    )
    scaled = opset13.multiply(
        source.output, _constant((1 / smooth)[None, None, :], f"{name}/smooth"), name=f"{name}/smoothed"
    )
    activation = opset13.fake_quantize(scaled, low, high, low, high, 256, name=f"{name}/uint8")
    weight = weight * smooth[:, None]
    scale = weight_scale(weight)
    rounded = round_weights(weight, source.moments / np.outer(smooth, smooth), scale)
    at = 0
    for number, (node, part) in enumerate(zip(source.dense, weights, strict=True)):
        columns = slice(at, at := at + part.shape[1])
        label = f"{name}/{number}"
        integers = opset13.convert(_constant(rounded[:, columns], f"{label}/int8"), "f32", name=f"{label}/float")
        restored = opset13.multiply(integers, _constant(scale[None, columns], f"{label}/scale"), name=f"{label}/weight")
        product = opset13.matmul(activation, restored, False, False, name=f"{label}/product")
        for use in list(node.output(0).get_target_inputs()):
            use.replace_source_output(product.output(0))
