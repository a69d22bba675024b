"""An ONNX model that can be changed: its constants by name, who computes and who reads a value, and a file for it.

``onnx`` is an optional package; it is imported when a model is read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import ModelError

Values = npt.NDArray[Any]

SMALL = 1024
"""Values up to which a constant stays in the file of the graph itself."""

ALIGNMENT = 65_536
"""Of larger constants in the file beside it, bytes: runtimes map it, and pages have up to 64 KiB (aarch64)."""


class OnnxGraph:
    """A model's graph. Large constants stay in their files until they are asked for.

    Raises:
        ModelError: The package onnx is missing, or cannot read the file.
    """

    def __init__(self, model_file: Path) -> None:
        try:
            import onnx
        except ImportError:
            raise ModelError(
                "--precision int8 needs the Python package onnx, which is not installed.",
                remedy="Run: pip install 'kdb-fast[int8]', or use --precision fp32.",
            ) from None
        try:
            self._model = onnx.load(str(model_file), load_external_data=False)
        except Exception as error:
            reason = " ".join(str(error).split())
            raise ModelError(
                f"{model_file.name} cannot be read as an ONNX model: {reason[:200]}", remedy="Use --precision fp32."
            ) from error
        self.directory = model_file.parent
        self.inputs = [value.name for value in self._model.graph.input]
        self.outputs = [value.name for value in self._model.graph.output]
        self.nodes: list[Any] = list(self._model.graph.node)
        self._constants: dict[str, Any] = {tensor.name: tensor for tensor in self._model.graph.initializer}
        self._fold()

    def _fold(self) -> None:
        """Make constants of nodes that hold one, hand one on, or transpose one."""
        from onnx import numpy_helper

        for node in self.nodes:
            given = {attribute.name: attribute for attribute in node.attribute}
            if node.op_type == "Constant" and "value" in given:
                tensor = numpy_helper.to_array(given["value"].t)
            elif node.op_type in ("Identity", "Transpose") and self.is_constant(node.input[0]):
                tensor = self.values(node.input[0])
                if node.op_type == "Transpose":
                    tensor = tensor.transpose(list(given["perm"].ints) if "perm" in given else None)
            else:
                continue
            if node.output[0] not in self.outputs:
                self.set_constant(node.output[0], tensor)
        self.nodes = [node for node in self.nodes if not self.is_constant(node.output[0])]

    # --- constants ---

    def is_constant(self, name: str) -> bool:
        return name in self._constants

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a constant."""
        return tuple(self._constants[name].dims)

    def is_float(self, name: str) -> bool:
        """Whether a constant is in float32."""
        from onnx import TensorProto

        return bool(self._constants[name].data_type == TensorProto.FLOAT)

    def values(self, name: str) -> Values:
        """A constant; not to be written to."""
        from onnx import TensorProto, helper, numpy_helper

        tensor = self._constants[name]
        if tensor.data_location != TensorProto.EXTERNAL:
            return np.asarray(numpy_helper.to_array(tensor))
        place = {entry.key: entry.value for entry in tensor.external_data}
        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type))
        count = math.prod(tensor.dims)
        file, offset = self.directory / place["location"], int(place.get("offset", 0))
        return np.memmap(file, dtype, "r", offset, (count,)).reshape(tuple(tensor.dims))

    def set_constant(self, name: str, values: npt.ArrayLike) -> str:
        """Add or replace a constant. Returns its name."""
        from onnx import numpy_helper

        self._constants[name] = numpy_helper.from_array(np.asarray(values, order="C"), name)
        return name

    # --- nodes ---

    def producers(self) -> dict[str, Any]:
        """The node that computes each value, by the value's name."""
        return {name: node for node in self.nodes for name in node.output if name}

    def readers(self) -> dict[str, list[Any]]:
        """The nodes that read each value; one that reads it twice is there twice."""
        result: dict[str, list[Any]] = {}
        for node in self.nodes:
            for name in node.input:
                result.setdefault(name, []).append(node)
        return result

    def node(self, kind: str, inputs: Sequence[str], output: str, domain: str = "", **attributes: Any) -> Any:
        """A node that is not yet part of the graph, named after its output."""
        from onnx import helper

        return helper.make_node(kind, list(inputs), [output], name=output, domain=domain, **attributes)

    def insert(self, before: Any, node: Any) -> None:
        """Put a node in front of another."""
        self.nodes.insert(self.nodes.index(before), node)

    def add_domain(self, domain: str, version: int) -> None:
        """Allow operators of a domain."""
        if all(used.domain != domain for used in self._model.opset_import):
            self._model.opset_import.add(domain=domain, version=version)

    # --- running and writing ---

    def tapped(self, names: Iterable[str]) -> bytes:
        """The model with these values, all in float32, as its only outputs. What is in files is still in them."""
        from onnx import TensorProto, helper

        model = self._written(self._used())
        del model.graph.output[:]
        model.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
        return bytes(model.SerializeToString(deterministic=True))

    def save(self, target: Path) -> list[Path]:
        """Write the model, its large constants beside it. Returns both files.

        Raises:
            OSError: A file cannot be written.
        """
        from onnx import TensorProto

        tensors = []
        data = target.with_name(target.name + "_data")
        with data.open("wb") as file:
            for tensor in self._used():
                if math.prod(tensor.dims) > SMALL:
                    values = self.values(tensor.name)
                    offset = -(-file.tell() // ALIGNMENT) * ALIGNMENT
                    file.seek(offset)
                    file.write(np.ascontiguousarray(values).data)
                    tensor = TensorProto(name=tensor.name, dims=tensor.dims, data_type=tensor.data_type)
                    tensor.data_location = TensorProto.EXTERNAL
                    for key, value in (("location", data.name), ("offset", offset), ("length", values.nbytes)):
                        tensor.external_data.add(key=key, value=str(value))
                tensors.append(tensor)
        target.write_bytes(self._written(tensors).SerializeToString(deterministic=True))
        return [target, data]

    def _used(self) -> list[Any]:
        read = {name for node in self.nodes for name in node.input} | set(self.outputs)
        return [tensor for name, tensor in self._constants.items() if name in read]

    def _written(self, tensors: Sequence[Any]) -> Any:
        model = type(self._model)()
        model.CopyFrom(self._model)
        for part, new in ((model.graph.node, self.nodes), (model.graph.initializer, tensors)):
            del part[:]
            part.extend(new)
        del model.graph.value_info[:]
        return model
