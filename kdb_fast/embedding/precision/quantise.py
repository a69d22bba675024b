"""Static int8: dense layers that multiply uint8 activations by int8 weights.

Nothing is decided while it runs: every range is fixed beforehand from texts of the user's own, so a vector does not
depend on what else is in its batch. Four steps, each of which answers a known cause of error:

1. *Outlier channels are split.* In the feed-forward layers of BERT-like models single channels are 10 to 40 times
   as strong as all others, for one token a text. Each is replaced by copies of a fraction of its weight: the same
   function, and no channel stands out any more (Zhao et al. 2019, "outlier channel splitting").
2. *Scales move from activations to weights* (Xiao et al. 2022, "SmoothQuant"), by the exponent that gives the
   layer's own calibration tokens the least error.
3. *Activations* get one range a layer, uint8, in which zero is exact.
4. *Weights* get one scale for each output channel and are rounded one input channel at a time, each rounding
   making good for the errors of those before it (Frantar et al. 2022, "GPTQ"). No two neighbours of them are so
   large together that a CPU without VNNI would saturate (see quantised_weights.py): its products are those of any
   other CPU.

Everything outside of dense layers (attention scores, softmax, layer norm, embeddings, residuals) stays in floating
point (fp32, or bf16 where OpenVINO runs the model and the CPU can: ``EncoderSpec.unquantised_precision``). Layers with
the same input share its quantisation. The result has one of two forms:

* for ONNX Runtime, a dense layer is one ``MatMulIntegerToFloat``, which adds the bias as well;
* for OpenVINO, ``FakeQuantize`` and a product in floating point, which OpenVINO makes one of integers.

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
from ..encoder import Batch
from .observation import BLOCK_ROWS, ROWS, Observed, count_tokens, observe
from .onnx_graph import OnnxGraph
from .openvino_graph import keep_heads
from .quantised_weights import Floats, activation_grid, output_error, round_weights, smoothing, weight_scale

FORMAT = 4
"""Part of the digest. To be raised when the same texts would give other weights."""

ALPHAS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 1.0)
"""SmoothQuant's exponents to try. Most layers of MiniLM take 0.9 to 1; 0.5 for all of them halved the overlap."""

PASS_BYTES = 256 << 20
"""Memory for what one thread observes in one pass over the texts; a larger model needs more passes."""

MOST_THREADS = 2
"""That run the texts: each has statistics of its own, up to 230 MB for MiniLM, and what comes then takes one anyway."""

OUTLIER = 5.0
"""A channel is split if it moves the output by more than this many times what the 99th percentile of them does."""

OUTLIER_PARTS = 2.0
"""Each part of a split channel moves the output by no more than this many times the 99th percentile."""

MAX_EXTRA = 64
"""Most copies in a layer: 4 % of MiniLM's 1,536 channels."""

MIN_CHANNELS = 64
"""Smaller products are left as they are: they cost nothing."""

ELEMENTWISE = frozenset(("Add", "Sub", "Mul", "Div", "Erf", "Gelu", "Tanh", "Relu", "Sigmoid", "Pow", "Cast"))

CONTRIB, TOOLKIT = "com.microsoft", "org.openvinotoolkit"
"""Domains of ONNX Runtime's own operators, and of OpenVINO's."""

FLOAT = 1
"""ONNX's number of float32."""


@dataclass
class _Source:
    """An activation that feeds one or more dense layers, and what the calibration texts showed of it."""

    name: str
    channels: int
    dense: list[Any] = field(default_factory=list)
    observed: Observed = field(default_factory=lambda: Observed(0))


class Calibrated(NamedTuple):
    """A model whose dense layers can be quantised: what texts showed of it, with channels split that stand out."""

    graph: OnnxGraph
    sources: list[_Source]


def calibrate(
    model_file: Path, batches: Sequence[Batch], report: Callable[[str], None], threads: int = 1
) -> Calibrated:
    """Run texts through a model in fp32.

    Args:
        model_file: The fp32 ONNX file.
        batches: Texts as the model takes them.
        report: Called with one line for each step that takes time.
        threads: Most threads that run the texts.

    Raises:
        ModelError: The model cannot be read, or has no dense layers in fp32.
    """
    graph = OnnxGraph(model_file)
    sources = _find_sources(graph)
    if not sources:
        raise ModelError(
            f"{model_file.name} has no dense layers in fp32; expected an unquantised model.",
            remedy="Use --precision fp32, or another model.",
        )
    layers = sum(len(source.dense) for source in sources)
    report(f"Calibrating {layers} dense layers on {count_tokens(batches):,} tokens …")
    for group in _passes(sources):
        channels = {source.name: source.channels for source in group}
        observed = observe(graph, channels, batches, min(threads, MOST_THREADS))
        for source in group:
            source.observed = observed[source.name]
            _split_outliers(graph, source)
    return Calibrated(graph, sources)


def quantise(calibrated: Calibrated, target: Path) -> list[Path]:
    """Write the model with int8 dense layers to ``target``, its large constants beside it. Returns the files.

    The same texts in the same order give the same bytes on the same machine. The calibrated model is used up.

    Args:
        calibrated: The model.
        target: File to write, ``.onnx`` for ONNX Runtime or ``.xml`` for OpenVINO; its directory must exist.
    """
    graph, sources = calibrated
    for_openvino = target.suffix == ".xml"
    graph.add_domain(TOOLKIT if for_openvino else CONTRIB, 1)
    for number, source in enumerate(sources):
        _quantise_source(graph, source, f"q{number}", _openvino_form if for_openvino else _onnxruntime_form)
        source.observed = Observed(0)
    return _save_for_openvino(graph, target) if for_openvino else graph.save(target)


def _save_for_openvino(graph: OnnxGraph, target: Path) -> list[Path]:
    openvino = import_openvino()
    files = graph.save(target.with_suffix(".onnx"))
    model = openvino.Core().read_model(str(files[0]))
    keep_heads(model)
    openvino.save_model(model, str(target), compress_to_fp16=False)
    for file in files:
        file.unlink()
    return [target, target.with_suffix(".bin")]


# --- the graph ---


def _find_sources(graph: OnnxGraph) -> list[_Source]:
    sources: dict[str, _Source] = {}
    for node in graph.nodes:
        if _is_dense(graph, node):
            channels = graph.shape(node.input[1])[0]
            sources.setdefault(node.input[0], _Source(node.input[0], channels)).dense.append(node)
    return list(sources.values())


def _is_dense(graph: OnnxGraph, node: Any) -> bool:
    """Whether a node multiplies by a constant matrix in fp32 that is worth while."""
    if node.op_type != "MatMul" or graph.is_constant(node.input[0]) or not graph.is_constant(node.input[1]):
        return False
    shape = graph.shape(node.input[1])
    return len(shape) == 2 and min(shape) >= MIN_CHANNELS and graph.is_float(node.input[1])


def _producers(graph: OnnxGraph, source: _Source) -> list[tuple[Any, int]] | None:
    """Inputs (node and number) that hold a constant with the source's channels, back to the dense layer that computes
    them.

    None if anything but elementwise steps lies between, or if anything else uses a value on the way.
    """
    producers, readers = graph.producers(), graph.readers()
    inside: dict[str, Any] = {}
    constants: list[tuple[Any, int]] = []
    stack = [source.name]
    while stack:
        name = stack.pop()
        node = producers.get(name)
        if node is None or name in graph.outputs:
            return None
        if name in inside:
            continue
        inside[name] = node
        if _is_dense(graph, node):
            constants.append((node, 1))
            continue
        if node.op_type not in ELEMENTWISE:
            return None
        for number, place in enumerate(node.input):
            if not graph.is_constant(place):
                stack.append(place)
                continue
            shape = graph.shape(place)
            if shape and shape[-1] == source.channels == np.prod(shape):
                constants.append((node, number))
            elif np.prod(shape) != 1:
                return None
    known = {name for node in (*inside.values(), *source.dense) for name in node.output}
    users = {name for value in inside for node in readers.get(value, ()) for name in node.output}
    return constants if users <= known else None


# --- what the texts show ---


def _passes(sources: list[_Source]) -> Iterator[list[_Source]]:
    group: list[_Source] = []
    size = 0
    for source in sources:
        need = 4 * source.channels * (source.channels + ROWS + 2 * BLOCK_ROWS)
        if group and size + need > PASS_BYTES:
            yield group
            group, size = [], 0
        group.append(source)
        size += need
    if group:
        yield group


def _split_outliers(graph: OnnxGraph, source: _Source) -> None:
    """Replace each channel that stands out by copies of a fraction of its weight."""
    weight = np.concatenate([graph.values(node.input[1]) for node in source.dense], axis=1)
    effect = np.maximum(-source.observed.low, source.observed.high) * np.linalg.norm(weight, axis=1)
    usual = float(np.percentile(effect, 99))
    outliers = np.flatnonzero(effect > OUTLIER * usual) if usual > 0 else np.zeros(0, np.intp)
    constants = _producers(graph, source) if len(outliers) else None
    if not constants:
        return
    parts = np.ones(source.channels, np.intp)
    parts[outliers] = np.ceil(effect[outliers] / usual / OUTLIER_PARTS)
    while (extra := int(parts.sum()) - source.channels) > MAX_EXTRA:
        parts[outliers] = np.maximum(1, parts[outliers] * MAX_EXTRA // extra)
    # Kernels work on blocks of 32 channels: what the last block has room for goes to the strongest.
    parts[outliers[np.argmax(effect[outliers])]] += -extra % 32
    index = np.concatenate([np.arange(source.channels), np.repeat(np.arange(source.channels), parts - 1)])
    for node in source.dense:
        values = graph.values(node.input[1])[index] / parts[index, None].astype(np.float32)
        node.input[1] = graph.set_constant(f"{node.output[0]}/split", values)
    for node, number in constants:
        values = graph.values(node.input[number])[..., index]
        node.input[number] = graph.set_constant(f"{node.output[0]}/copies{number}", values)
    source.channels = len(index)
    source.observed.select(index)


# --- from fp32 to int8 ---


class _Layer(NamedTuple):
    """A dense layer with its integers."""

    name: str
    node: Any
    weight: npt.NDArray[np.int8]
    scale: Floats


_Form = Callable[[OnnxGraph, str, np.float32, np.float32, list[_Layer]], None]


def _quantise_source(graph: OnnxGraph, source: _Source, name: str, write: _Form) -> None:
    weights = [graph.values(node.input[1]) for node in source.dense]
    weight = np.concatenate(weights, axis=1)
    seen = source.observed
    smooth = min(
        (smoothing(seen.low, seen.high, weight, alpha) for alpha in ALPHAS),
        key=lambda s: output_error(seen.rows, seen.low, seen.high, weight, s),
    )
    step, zero = activation_grid(seen.low / smooth, seen.high / smooth)
    weight = weight * smooth[:, None]
    scale = weight_scale(weight)
    rounded = round_weights(weight, seen.moments / np.outer(smooth, smooth), scale)
    divisor = graph.set_constant(f"{name}/smooth", (1 / smooth).astype(np.float32))
    graph.insert(source.dense[0], graph.node("Mul", [source.name, divisor], f"{name}/smoothed"))
    columns = np.cumsum([part.shape[1] for part in weights])[:-1]
    parts = zip(source.dense, np.split(rounded, columns, axis=1), np.split(scale, columns), strict=True)
    write(graph, name, step, zero, [_Layer(f"{name}/{number}", *part) for number, part in enumerate(parts)])


def _onnxruntime_form(graph: OnnxGraph, name: str, step: np.float32, zero: np.float32, layers: list[_Layer]) -> None:
    grid = graph.set_constant(f"{name}/step", step), graph.set_constant(f"{name}/zero", np.uint8(zero))
    graph.insert(layers[0].node, graph.node("QuantizeLinear", [f"{name}/smoothed", *grid], f"{name}/uint8"))
    for layer in layers:
        weight = graph.set_constant(f"{layer.name}/int8", layer.weight)
        scale = graph.set_constant(f"{layer.name}/scale", layer.scale)
        output, bias = _take_bias(graph, layer.node)
        inputs = [f"{name}/uint8", weight, grid[0], scale, grid[1], *(("", bias) if bias else ())]
        graph.insert(layer.node, graph.node("MatMulIntegerToFloat", inputs, output, CONTRIB))
        graph.nodes.remove(layer.node)


def _openvino_form(graph: OnnxGraph, name: str, step: np.float32, zero: np.float32, layers: list[_Layer]) -> None:
    low = graph.set_constant(f"{name}/low", np.float32(-zero * step))
    high = graph.set_constant(f"{name}/high", np.float32((255 - zero) * step))
    inputs = [f"{name}/smoothed", low, high, low, high]
    graph.insert(layers[0].node, graph.node("FakeQuantize", inputs, f"{name}/uint8", TOOLKIT, levels=256))
    for layer in layers:
        weight = graph.set_constant(f"{layer.name}/int8", layer.weight)
        scale = graph.set_constant(f"{layer.name}/scale", layer.scale[None, :])
        graph.insert(layer.node, graph.node("Cast", [weight], f"{layer.name}/float", to=FLOAT))
        graph.insert(layer.node, graph.node("Mul", [f"{layer.name}/float", scale], f"{layer.name}/weight"))
        layer.node.input[:] = [f"{name}/uint8", f"{layer.name}/weight"]


def _take_bias(graph: OnnxGraph, dense: Any) -> tuple[str, str]:
    """(name of the result, constant) of the addition that alone reads a dense layer, which is taken away; (the layer's
    own result, '') if there is none."""
    output = dense.output[0]
    readers = graph.readers().get(output, [])
    if len(readers) == 1 and readers[0].op_type == "Add" and output not in graph.outputs:
        bias = next((name for name in readers[0].input if name != output), "")
        if graph.is_constant(bias) and graph.shape(bias) == graph.shape(dense.input[1])[1:]:
            graph.nodes.remove(readers[0])
            return str(readers[0].output[0]), bias
    return output, ""
