"""The encoder of all-MiniLM-L6-v2 as ONNX graphs, built from the published weights.

The plain one is what an exporter would write. The other, which embeds tables, differs in one thing: the first layer
looks its queries, keys and values up. They are linear in the sum of a word's and a position's embedding, up to the
layer norm's scale of that one token. So the product with the weights is taken here, once for each of the 30,522 words
and 512 positions, instead of for every token of every text: 3 of 72 products with 384 × 384 weights go away (a
feed-forward part counts as 8). The tables take 143 MB of disk; processes share the pages that they touch. Measured with
ONNX Runtime 1.32 on an AMD EPYC (Zen 4), one thread, 40 interleaved runs, median of paired ratios of the time: 0.969
(32 texts × 16 tokens), 0.975 (9 × 52), 0.977 (4 × 128), 0.968 (1 × 512); vectors differ by up to 1e-7. A query, which
must verify what it loads, is embedded by the plain one.

ONNX Runtime fuses bias + GELU and the scaled product of queries and keys by itself. Tried and left out (the same
measure, above 1 is slower): queries, keys and values in one 384 × 1152 product 1.007; tokens flattened to two
dimensions so that products become Gemm with bias 1.000; no bias of keys (softmax does not see it) and that of values
added to the output's 1.01 and 1.00. `Gelu` of opset 20 becomes the same kernel as the Erf pattern below, which more
tools can read.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ...errors import ModelError
from .files import DATA, PLAIN, TABLES

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

GRAPH_VERSION = "2"
"""Part of the fingerprint. To be raised when a change of the graph changes a vector by even one bit."""

LAYERS, HEADS, HIDDEN = 6, 12, 384
HEAD_SIZE = HIDDEN // HEADS
EPSILON = 1e-12
"""Of the layer norms, from the model's config.json."""

MASKED = -10_000.0
"""Added to the score of a padding token: exp() of it is 0 in float32, and it still fits into float16."""

OPSET, IR_VERSION = 17, 8
"""The first opset with LayerNormalization; every ONNX Runtime since 1.14 reads it."""

SMALL = 1024
"""Values up to which a tensor stays in the graph itself, so that the graph's shapes can be inferred from it alone."""

ALIGNMENT = 65_536
"""Of tensors in the data file, bytes: a mapping must begin on a page, and pages have up to 64 KiB (aarch64)."""

EMBEDDINGS = "embeddings"
PARTS = ("query", "key", "value")


def write_graphs(weights: Mapping[str, NDArray[np.float32]], path: Path) -> None:
    """Write the encoder to ``path``, and the plain one to ``path_plain``.

    Large tensors are in ``path_data``, which both read, but for the tables, which are in ``path_tables``. Runtimes map
    those files into memory instead of copying them, so all processes share them: 30 to 50 MB less a worker than with
    the tensors inside. The same weights and the same ``onnx`` package give the same graphs; the tables may differ in
    the last bit where NumPy's products do.

    Inputs ``input_ids``, ``attention_mask``: int64 [batch, sequence], sequence up to 512. All tokens are of the first
    segment, as the model was trained. Output ``last_hidden_state``: float32 [batch, sequence, 384].

    Args:
        weights: The checkpoint's tensors by their published names.
        path: File to write.

    Raises:
        ModelError: A tensor is missing.
        OSError: A file cannot be written.
    """
    plain, data, tables = (path.with_name(path.name + suffix) for suffix in (PLAIN, DATA, TABLES))
    written: dict[str, Any] = {}
    try:
        with data.open("wb") as data_file, tables.open("wb") as tables_file:
            plain.write_bytes(_GraphBuilder(weights, written, data_file, None).build())
            path.write_bytes(_GraphBuilder(weights, written, data_file, tables_file).build())
    except KeyError as error:
        raise ModelError(
            f"The weights of all-MiniLM-L6-v2 hold no tensor {error}.", remedy="Fetch the model again."
        ) from None


class _GraphBuilder:
    """Adds nodes in the order of the computation; every method returns the name of its result.

    ``written`` are the tensors that lie in files, by name; ``tables`` is None for the plain graph.
    """

    def __init__(
        self,
        weights: Mapping[str, NDArray[np.float32]],
        written: dict[str, Any],
        data: BinaryIO,
        tables: BinaryIO | None,
    ) -> None:
        self.weights, self.written = weights, written
        self.data, self.tables = data, tables
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self.numbers = itertools.count()

    def build(self) -> bytes:
        from onnx import TensorProto, helper

        self.floats("one", 1.0)
        self.floats("half", 0.5)
        self.floats("sqrt_2", math.sqrt(2.0))
        self.floats("score_scale", 1.0 / math.sqrt(HEAD_SIZE))
        self.floats("masked", MASKED)
        self.integers("index_0", [0])
        self.integers("index_1", [1])
        self.integers("index_2", [2])
        self.integers("mask_axes", [1, 2])
        self.integers("split_heads", [0, 0, HEADS, HEAD_SIZE])
        self.integers("merge_heads", [0, 0, HIDDEN])

        real = self.op("Cast", self.op("Unsqueeze", "attention_mask", "mask_axes"), to=TensorProto.FLOAT)
        mask = self.op("Mul", self.op("Sub", "one", real), "masked")  # [batch, 1, 1, sequence], used by every layer
        state, projected = self.embeddings()
        for layer in range(LAYERS):
            prefix = f"encoder.layer.{layer}"
            if layer or not projected:
                projected = [self.dense(state, f"{prefix}.attention.self.{part}") for part in PARTS]
            attended = self.dense(self.attention(projected, mask), f"{prefix}.attention.output.dense")
            state = self.norm(self.op("Add", attended, state), f"{prefix}.attention.output.LayerNorm")
            wide = self.gelu(self.dense(state, f"{prefix}.intermediate.dense"))
            narrow = self.dense(wide, f"{prefix}.output.dense")
            state = self.norm(self.op("Add", narrow, state), f"{prefix}.output.LayerNorm")
        self.nodes[-1].output[0] = "last_hidden_state"

        shape = ["batch", "sequence"]
        names = ("input_ids", "attention_mask")
        inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, shape) for name in names]
        output = helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, [*shape, HIDDEN])
        graph = helper.make_graph(self.nodes, "all-MiniLM-L6-v2", inputs, [output], self.initializers)
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="kdb-fast",
            producer_version=GRAPH_VERSION,
        )
        return bytes(model.SerializeToString(deterministic=True))

    def embeddings(self) -> tuple[str, list[str]]:
        """The first layer's input, and its queries, keys and values if they are looked up."""
        import numpy as np

        words = self.weights["embeddings.word_embeddings.weight"]
        segments = self.weights["embeddings.token_type_embeddings.weight"]
        positions = self.weights["embeddings.position_embeddings.weight"] + segments[0]
        length = self.op("Slice", self.op("Shape", "input_ids"), "index_1", "index_2", "index_0")

        def looked_up(name: str, of_words: Any, of_positions: Any, file: BinaryIO) -> str:
            word = self.op("Gather", self._initializer(f"{name}.words", of_words, "<f4", file), "input_ids")
            places = self._initializer(f"{name}.positions", of_positions, "<f4", file)
            return self.op("Add", word, self.op("Slice", places, "index_0", length, "index_0"))

        norm = "embeddings.LayerNorm"
        scale, bias = self.weights[f"{norm}.weight"], self.weights[f"{norm}.bias"]
        state = self.norm(looked_up(EMBEDDINGS, words, positions, self.data), norm)
        if self.tables is None:
            return state, []
        inverse_deviation = f"{norm}.inverse_deviation"  # [batch, sequence, 1]
        self.nodes[-1].output.extend([f"{norm}.mean", inverse_deviation])

        # The norm of x is (x − mean) · inverse deviation · scale + bias, and taking the mean away is linear, too.
        centred = np.eye(HIDDEN) - 1 / HIDDEN
        projected = []
        for part in PARTS:
            name = f"encoder.layer.0.attention.self.{part}"
            weight = self.weights[f"{name}.weight"].astype(np.float64).T
            product = centred @ (scale[:, None] * weight)
            sums = looked_up(name, words @ product, positions @ product, self.tables)
            constant = self._initializer(f"{name}.bias", bias @ weight + self.weights[f"{name}.bias"], "<f4")
            projected.append(self.op("Add", self.op("Mul", sums, inverse_deviation), constant))
        return state, projected

    def attention(self, projected: list[str], mask: str) -> str:
        def heads(part: str, order: list[int]) -> str:
            return self.op("Transpose", self.op("Reshape", part, "split_heads"), perm=order)

        queries, keys, values = projected
        products = self.op("MatMul", heads(queries, [0, 2, 1, 3]), heads(keys, [0, 2, 3, 1]))
        shares = self.op("Softmax", self.op("Add", self.op("Mul", products, "score_scale"), mask), axis=-1)
        context = self.op("MatMul", shares, heads(values, [0, 2, 1, 3]))
        return self.op("Reshape", self.op("Transpose", context, perm=[0, 2, 1, 3]), "merge_heads")

    def dense(self, state: str, name: str) -> str:
        product = self.op("MatMul", state, self.tensor(f"{name}.weight", transpose=True))
        return self.op("Add", product, self.tensor(f"{name}.bias"))

    def norm(self, state: str, name: str) -> str:
        scale, bias = self.tensor(f"{name}.weight"), self.tensor(f"{name}.bias")
        return self.op("LayerNormalization", state, scale, bias, axis=-1, epsilon=EPSILON)

    def gelu(self, state: str) -> str:
        normal = self.op("Add", self.op("Erf", self.op("Div", state, "sqrt_2")), "one")
        return self.op("Mul", self.op("Mul", state, normal), "half")

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        from onnx import helper

        name = f"{kind}_{next(self.numbers)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    def tensor(self, name: str, transpose: bool = False) -> str:
        # A checkpoint keeps a dense layer's weight as [out, in]; MatMul wants [in, out].
        values = self.weights[name]
        return self._initializer(name, values.T if transpose else values, "<f4")

    def floats(self, name: str, value: float) -> str:
        return self._initializer(name, value, "<f4")

    def integers(self, name: str, values: list[int]) -> str:
        return self._initializer(name, values, "<i8")

    def _initializer(self, name: str, values: Any, dtype: str, file: BinaryIO | None = None) -> str:
        import numpy as np
        from onnx import TensorProto

        if name in self.written:
            self.initializers.append(self.written[name])
            return name
        array = np.ascontiguousarray(np.asarray(values, dtype)).reshape(np.shape(values))
        tensor = TensorProto(name=name, dims=array.shape)
        tensor.data_type = TensorProto.FLOAT if dtype == "<f4" else TensorProto.INT64
        if array.size <= SMALL:
            tensor.raw_data = array.tobytes()
        else:
            self.written[name] = tensor
            file = file or self.data
            offset = -(-file.tell() // ALIGNMENT) * ALIGNMENT
            file.seek(offset)
            file.write(array.data)
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", Path(file.name).name), ("offset", offset), ("length", array.nbytes)):
                tensor.external_data.add(key=key, value=str(value))
        self.initializers.append(tensor)
        return name
