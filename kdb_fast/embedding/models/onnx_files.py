"""Where an ONNX file keeps its weights: in itself, or in files beside it ("external data").

Read straight from the file's protobuf messages: this needs no ``onnx`` package and skips over the weights.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from ...errors import ModelError


def external_files(path: Path, model_file: str) -> list[str]:
    """Files beside the ONNX file in which it keeps tensors, relative to ``path``.

    Raises:
        ModelError: One is missing, is named by an absolute path or with ``..``, or is a link to elsewhere.
        OSError: A file cannot be read.
    """
    onnx_file = path / model_file
    # A hub's cache links every file into one directory of blobs, so beside the real ONNX file is inside, too.
    roots = (os.path.realpath(onnx_file.parent), os.path.dirname(os.path.realpath(onnx_file)))
    result = []
    for location in _external_locations(onnx_file):
        target = onnx_file.parent / location
        real = Path(os.path.realpath(target)) if stays_inside(location) else None
        if real is None or not any(real.is_relative_to(root) for root in roots):
            raise ModelError(
                f"{onnx_file} keeps data in {location!r}, outside of its directory.",
                remedy="Copy the data file beside the ONNX file, and let the ONNX file name it there.",
            )
        if not real.is_file():
            raise ModelError(
                f"{onnx_file} keeps data in {location!r}, which is missing.",
                remedy="Copy the data file beside the ONNX file.",
            )
        result.append(target.relative_to(path).as_posix())
    return result


def stays_inside(relative: str) -> bool:
    """Whether a relative path names something below the directory it starts from, by its text alone."""
    parts = PurePosixPath(relative)
    return bool(parts.parts) and not parts.is_absolute() and ".." not in parts.parts and "\x00" not in relative


# Where tensors may be: message → field number → message. The field numbers are those of onnx.proto.
_TENSOR_PATHS: dict[str, dict[int, str]] = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse tensor"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse tensor", 23: "sparse tensor"},
    "sparse tensor": {1: "tensor", 2: "tensor"},
    "tensor": {13: "external data"},
}


def _external_locations(onnx_file: Path) -> list[str]:
    try:
        with onnx_file.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return sorted(_walk(data, len(data)))
    except ValueError:
        raise ModelError(f"{onnx_file} is not a complete ONNX file.", remedy="Fetch the model again.") from None


def _walk(data: mmap.mmap, size: int) -> set[str]:
    locations: set[str] = set()
    stack = [("model", 0, size)]
    while stack:
        message, start, end = stack.pop()
        if message == "external data":
            entry = {field: data[a:b].decode() for field, a, b in _fields(data, start, end)}
            if entry.get(1) == "location":
                locations.add(entry.get(2, ""))
            continue
        inner = _TENSOR_PATHS[message]
        stack.extend((inner[field], a, b) for field, a, b in _fields(data, start, end) if field in inner)
    return locations


def _fields(data: mmap.mmap, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(number, start, end) of each length-delimited field of a protobuf message; ValueError if it is malformed."""
    while at < end:
        tag, at = _varint(data, at, end)
        match tag & 7:
            case 0:
                _, at = _varint(data, at, end)
            case 1:
                at += 8
            case 5:
                at += 4
            case 2:
                length, at = _varint(data, at, end)
                if at + length > end:
                    raise ValueError("a field is longer than its message")
                yield tag >> 3, at, at + length
                at += length
            case _:
                raise ValueError("unknown wire type")
    if at != end:
        raise ValueError("a field is longer than its message")


def _varint(data: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= end:
            break
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number has no end")
