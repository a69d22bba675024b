from __future__ import annotations

import hashlib
import itertools
import json
import os
import pickle
import subprocess
import threading
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdb_fast.embedding.encoder import EncoderSpec
from kdb_fast.embedding.models import cache as model_cache
from kdb_fast.embedding.models import fetching as model_fetching
from kdb_fast.embedding.models import files as model_files
from kdb_fast.embedding.models import hub, minilm, minilm_graph, onnx_files
from kdb_fast.embedding.models import lookup as models
from kdb_fast.embedding.models import manifest as model_manifest
from kdb_fast.embedding.models.catalogue import CatalogueEntry
from kdb_fast.embedding.models.files import Model
from kdb_fast.errors import ModelError

BGE = "BAAI/bge-small-en-v1.5"
ONNX_FILE = b"\x08\x08"  # the smallest ONNX file: ir_version = 8
TOKENIZER_CONFIG = {"model_max_length": 512, "max_length": 128}


def write_model(directory: Path, model_file: str = "model_optimized.onnx", content: bytes = ONNX_FILE) -> Path:
    (directory / model_file).parent.mkdir(parents=True, exist_ok=True)
    (directory / model_file).write_bytes(content)
    (directory / "tokenizer.json").write_text("{}")
    (directory / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG))
    (directory / "config.json").write_text("{}")
    return directory


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty data directory of its own."""
    monkeypatch.setenv("KDB_FAST_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def hub_has_bge(home: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A hub that hands over a small model; the list holds the name of each download."""
    downloads: list[str] = []

    def download(entry: CatalogueEntry, target: Path, staging: Path, report: Callable[[str], None]) -> None:
        downloads.append(entry.name)
        write_model(target, entry.model_file)

    monkeypatch.setattr(model_fetching, "download", download)
    return downloads


@pytest.fixture
def no_hub(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def probe(repository: str) -> None:
        raise hub.HubError("the hub cannot be reached")

    monkeypatch.setattr(hub, "probe", probe)


def example() -> Model:
    return Model(
        name="org/model",
        path=Path("/somewhere"),
        model_file="model.onnx",
        dimensions=384,
        max_tokens=512,
        pooling="mean",
        normalised=True,
        files=(("model.onnx", "aa"), ("tokenizer.json", "bb")),
    )


# --- fingerprint ---


@pytest.mark.parametrize(
    "change",
    [
        {"name": "org/other"},
        {"dimensions": 256},
        {"max_tokens": 128},
        {"pooling": "cls"},
        {"normalised": False},
        {"files": (("model.onnx", "ac"), ("tokenizer.json", "bb"))},
        {"files": (("model.onnx", "aa"), ("tokenizer.json", "bc"))},
        {"files": (("model.onnx", "aa"),)},
        {"source": (("weights", "cc"),)},
    ],
)
def test_fingerprint_differs_with_each_ingredient(change: dict[str, Any]) -> None:
    assert replace(example(), **change).fingerprint() != example().fingerprint()


def test_fingerprint_differs_with_precision() -> None:
    assert len({EncoderSpec(example(), 100).fingerprint(precision) for precision in ("fp32", "bf16", "int8")}) == 3


def test_fingerprint_is_16_hex_digits_and_the_same_on_every_machine() -> None:
    assert example().fingerprint() == replace(example(), path=Path("/elsewhere")).fingerprint()
    assert len(example().fingerprint()) == 16
    assert int(example().fingerprint(), 16)


def test_fingerprint_of_a_built_graph_rests_on_its_weights_and_not_on_the_onnx_package() -> None:
    built = replace(example(), source=(("weights", "cc"), ("graph", "1")))
    files = (("model.onnx", "zz"), ("model.onnx_data", "yy"), ("model.onnx_tables", "xx"), ("tokenizer.json", "bb"))
    serialised_otherwise = replace(built, files=files)
    assert serialised_otherwise.fingerprint() == built.fingerprint()
    assert replace(built, source=(("weights", "cc"), ("graph", "2"))).fingerprint() != built.fingerprint()
    assert replace(built, source=(("weights", "dd"), ("graph", "1"))).fingerprint() != built.fingerprint()


def test_plain_model_is_the_same_with_less_to_read() -> None:
    names = ("model.onnx", "model.onnx_plain", "model.onnx_data", "model.onnx_tables", "tokenizer.json")
    built = replace(example(), files=tuple((name, "aa") for name in names), source=(("weights", "cc"), ("graph", "1")))
    plain = built.plain()
    assert plain.model_file == "model.onnx_plain"
    assert [name for name, _ in plain.files] == ["model.onnx_plain", "model.onnx_data", "tokenizer.json"]
    assert plain.fingerprint() == built.fingerprint()
    assert plain.plain() == plain
    assert example().plain() == example(), "it has none"


def test_model_survives_the_way_to_another_process() -> None:
    assert pickle.loads(pickle.dumps(example())) == example()


# --- names and directories ---


def test_directory_is_named_after_the_model() -> None:
    assert model_cache.directory_name(BGE) == "BAAI--bge-small-en-v1.5"
    assert model_cache.directory_name("org/a/../b") == "org--a--..--b"


@pytest.mark.parametrize("name", ["", ".", "..", "../../etc", ".hidden/x", "a\x00b"])
def test_name_that_cannot_be_a_directory_is_refused(name: str, home: Path) -> None:
    with pytest.raises(ModelError, match="is not a model's name"):
        models.resolve(name)


def test_cache_is_in_the_data_directory(home: Path) -> None:
    assert model_cache.model_cache_dir() == home / "models"
    assert models.installed() == []


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("all-MiniLM-L6-v2", minilm.NAME), ("BAAI/bge-smal-en-v1.5", BGE), ("bge-small-en", "BAAI/bge-small-en")],
)
def test_unknown_name_suggests_close_ones(typed: str, meant: str, home: Path) -> None:
    with pytest.raises(ModelError, match="There is no model") as caught:
        models.resolve(typed)
    assert meant in caught.value.remedy


def test_name_of_a_servers_model_says_how_to_ask_the_server(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", "http://localhost:11434/v1")
    with pytest.raises(ModelError) as caught:
        models.resolve("nomic-embed-text")
    assert "add --provider openai" in caught.value.remedy


def test_name_like_no_other_suggests_the_list(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(ModelError) as caught:
        models.resolve("zzzzzzzz")
    assert caught.value.remedy == "All names: kdb-fast models list"


# --- pull, resolve, find ---


def test_pulled_model_is_complete_private_and_found_in_any_case(hub_has_bge: list[str], home: Path) -> None:
    model = models.pull(BGE.upper())
    assert model.path == home / "models" / "BAAI--bge-small-en-v1.5"
    assert (home / "models").stat().st_mode & 0o777 == 0o700
    assert (model.name, model.dimensions, model.pooling, model.normalised) == (BGE, 384, "cls", True)
    assert model.max_tokens == 128
    assert [name for name, _ in model.files] == [
        "model_optimized.onnx",
        "tokenizer.json",
        "tokenizer_config.json",
        "config.json",
    ]
    assert dict(model.files)["model_optimized.onnx"] == hashlib.sha256(ONNX_FILE).hexdigest()
    assert models.resolve(BGE.lower()) == models.resolve(BGE) == model
    assert models.installed() == [model]
    assert {row.name for row in models.supported() if row.installed} == {BGE}
    assert hub_has_bge == [BGE]


def test_pull_of_a_sound_model_fetches_nothing(hub_has_bge: list[str]) -> None:
    assert models.pull(BGE) == models.pull(BGE)
    assert hub_has_bge == [BGE]


def test_changed_byte_is_refused_and_pull_repairs_it(hub_has_bge: list[str]) -> None:
    model = models.pull(BGE)
    (model.path / "tokenizer.json").write_text("[]")
    with pytest.raises(ModelError) as caught:
        models.resolve(BGE)
    message = caught.value.message
    assert "tokenizer.json" in message
    assert hashlib.sha256(b"[]").hexdigest() in message
    assert hashlib.sha256(b"{}").hexdigest() in message
    assert caught.value.remedy == f"Run: kdb-fast models pull {BGE}"
    lines: list[str] = []
    assert models.pull(BGE, lines.append) == model
    assert "damaged" in lines[0]
    assert models.resolve(BGE) == model


def test_missing_file_is_refused(hub_has_bge: list[str]) -> None:
    model = models.pull(BGE)
    (model.path / "config.json").unlink()
    with pytest.raises(ModelError, match=r"config\.json .* no readable file"):
        models.resolve(BGE)


def test_what_a_killed_pull_left_is_removed(hub_has_bge: list[str], home: Path) -> None:
    leftover = home / "models" / ".new-BAAI--bge-small-en-v1.5-abc"
    leftover.mkdir(parents=True)
    (home / "models").chmod(0o700)
    assert models.installed() == []
    models.pull(BGE)
    assert not leftover.exists()


def test_failed_pull_leaves_nothing_installed(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(entry: CatalogueEntry, target: Path, staging: Path, report: Callable[[str], None]) -> None:
        (target / entry.model_file).write_bytes(ONNX_FILE)

    monkeypatch.setattr(model_fetching, "download", download)
    with pytest.raises(ModelError, match=r"missing tokenizer\.json, tokenizer_config\.json"):
        models.pull(BGE)
    assert [path.name for path in (home / "models").iterdir()] == [".lock-BAAI--bge-small-en-v1.5"]


def test_full_disk_is_a_model_error(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model_fetching, "download", download)
    with pytest.raises(ModelError, match="No space left on device"):
        models.pull(BGE)


def test_other_version_of_fastembed_decides_pooling_anew(hub_has_bge: list[str]) -> None:
    model = models.pull(BGE)
    stale = replace(model, pooling="mean", normalised=False)
    model_manifest.write_manifest(stale, "0.0.1")
    assert models.resolve(BGE) == model
    assert model_manifest.read_manifest(model.path)[0] == model
    assert stale.fingerprint() != model.fingerprint()


def test_cache_that_others_can_write_is_refused(hub_has_bge: list[str], home: Path) -> None:
    models.pull(BGE)
    (home / "models").chmod(0o770)
    with pytest.raises(ModelError, match="has mode 770") as caught:
        models.resolve(BGE)
    assert caught.value.remedy == f"Run: chmod go-w {home / 'models'}"


def test_directory_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.chmod(tmp_path, 0o700)
    status = tmp_path.stat()
    monkeypatch.setattr(Path, "stat", lambda self: os.stat_result([*status[:4], 4321, *status[5:]]))
    with pytest.raises(ModelError, match="belongs to user 4321"):
        model_files.check_private(tmp_path)


# --- without the hub ---


def test_unreachable_hub_names_the_ways_out(no_hub: None) -> None:
    with pytest.raises(ModelError, match="the hub cannot be reached") as caught:
        models.resolve(BGE)
    assert "HF_ENDPOINT" in caught.value.remedy
    assert "--model-path" in caught.value.remedy
    assert caught.value.exit_code == 4


def test_minilm_comes_from_the_package_index_without_the_hub(no_hub: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(directory: Path, report: Callable[[str], None]) -> tuple[tuple[str, str], ...]:
        write_model(directory, "model.onnx")
        return (("weights", "cc"), ("graph", "1"))

    monkeypatch.setattr(minilm, "build", prepare)
    lines: list[str] = []
    model = models.resolve("sentence-transformers/all-minilm-l6-v2", report=lines.append)
    assert model.source == (("weights", "cc"), ("graph", "1"))
    assert (model.name, model.pooling, model.normalised) == (minilm.NAME, "mean", True)
    assert lines[0] == "The model hub is out of reach: the hub cannot be reached."
    assert models.resolve(minilm.NAME) == model


def test_hub_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    import requests
    from huggingface_hub import constants

    released = threading.Event()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "HUB_TIMEOUT", 0.05)
    monkeypatch.setattr(requests, "get", lambda *_, **__: released.wait(60))
    try:
        with pytest.raises(hub.HubError, match=r"does not answer within 0\.05 s"):
            hub.probe("org/model")
    finally:
        released.set()


def test_offline_switch_of_the_hub_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(hub.HubError, match="HF_HUB_OFFLINE is set"):
        hub.probe("org/model")


# --- a directory that the user gives ---


def test_directory_of_a_model_is_taken_as_it_is(tmp_path: Path, home: Path) -> None:
    model = models.resolve(BGE.lower(), write_model(tmp_path / "given"))
    assert (model.name, model.path, model.pooling) == (BGE, tmp_path / "given", "cls")
    assert not home.exists()
    before = model.fingerprint()
    (tmp_path / "given" / "model_optimized.onnx").write_bytes(b"\x08\x09")
    assert models.resolve(BGE, tmp_path / "given").fingerprint() != before


def test_incomplete_directory_lists_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"missing model_optimized\.onnx, tokenizer_config\.json\.") as caught:
        models.resolve(BGE, tmp_path)
    assert "model_optimized.onnx, tokenizer.json, tokenizer_config.json" in caught.value.remedy


def test_path_that_is_no_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is not a directory"):
        models.resolve(BGE, tmp_path / "nowhere")


def test_directory_of_another_model_is_refused(hub_has_bge: list[str]) -> None:
    path = models.pull(BGE).path
    with pytest.raises(ModelError, match=f"holds the model {BGE}, not {minilm.NAME}") as caught:
        models.resolve(minilm.NAME, path)
    assert caught.value.remedy == f"Add: --model {BGE}"


# --- manifest and tokenizer settings ---


@pytest.mark.parametrize(
    "change",
    [{"format": 2}, {"files": {"../x": "aa"}}, {"files": {}}, {"dimensions": "many"}, {"source": None}, {"name": ...}],
)
def test_damaged_manifest_is_refused(change: dict[str, Any], hub_has_bge: list[str]) -> None:
    path = models.pull(BGE).path / model_manifest.MANIFEST
    content = json.loads(path.read_text()) | change
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))
    with pytest.raises(ModelError, match=r"kdb_fast\.json"):
        models.resolve(BGE)
    assert models.installed() == []


@pytest.mark.parametrize(
    ("settings", "limit"),
    [
        ({"model_max_length": 512, "max_length": 128}, 128),
        ({"model_max_length": 512}, 512),
        ({"model_max_length": int(1e30), "max_length": 256}, 256),
        ({"model_max_length": 0, "max_length": 64}, 64),
    ],
)
def test_limit_is_the_smaller_usable_setting(settings: dict[str, Any], limit: int, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert model_files.max_tokens(tmp_path, "model.onnx") == limit


@pytest.mark.parametrize("settings", [{}, {"model_max_length": 1e30}, {"max_length": True}, {"max_length": -1}])
def test_model_without_a_usable_limit_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="model_max_length"):
        model_files.max_tokens(tmp_path, "model.onnx")


# --- external data ---


def onnx_with_data(location: str, *, in_subgraph: bool = False) -> bytes:
    from onnx import TensorProto, helper

    tensor = TensorProto(name="w", dims=[1], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="offset", value="0")
    tensor.external_data.add(key="location", value=location)
    nodes, tensors = [], [tensor]
    if in_subgraph:
        branch = helper.make_graph([helper.make_node("Constant", [], ["y"], value=tensor)], "branch", [], [])
        nodes, tensors = [helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)], []
    graph = helper.make_graph(nodes, "graph", [], [], tensors)
    return bytes(helper.make_model(graph).SerializeToString())


@pytest.mark.parametrize("in_subgraph", [False, True])
def test_external_data_is_part_of_the_model(in_subgraph: bool, tmp_path: Path) -> None:
    write_model(tmp_path, content=onnx_with_data("weights/a.bin", in_subgraph=in_subgraph))
    with pytest.raises(ModelError, match=r"'weights/a\.bin', which is missing"):
        models.resolve(BGE, tmp_path)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "a.bin").write_bytes(b"1234")
    model = models.resolve(BGE, tmp_path)
    assert dict(model.files)["weights/a.bin"] == hashlib.sha256(b"1234").hexdigest()


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "a/../../secret", "", "link", "a\x00b"])
def test_external_data_outside_of_the_directory_is_refused(location: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    path = write_model(tmp_path / "model", content=onnx_with_data(location))
    (path / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(ModelError, match="outside of its directory"):
        models.resolve(BGE, path)


def test_links_into_one_directory_of_blobs_are_accepted(tmp_path: Path) -> None:
    snapshot = write_model(tmp_path / "snapshot", content=onnx_with_data("data"))
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "1").write_bytes((snapshot / "model_optimized.onnx").read_bytes())
    (tmp_path / "blobs" / "2").write_bytes(b"1234")
    (snapshot / "model_optimized.onnx").unlink()
    (snapshot / "model_optimized.onnx").symlink_to(tmp_path / "blobs" / "1")
    (snapshot / "data").symlink_to(tmp_path / "blobs" / "2")
    assert "data" in dict(models.resolve(BGE, snapshot).files)


@pytest.mark.parametrize("content", [b"", b"\x3a\x7f", b"\x3a", b"<html>", b"\x09\x00", b"\xff" * 20])
def test_file_that_is_cut_short_or_no_onnx_file_is_refused(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is not a complete ONNX file"):
        models.resolve(BGE, write_model(tmp_path, content=content))


def test_field_numbers_are_those_of_the_onnx_format() -> None:
    import onnx

    messages: dict[str, Any] = {
        "model": onnx.ModelProto,
        "graph": onnx.GraphProto,
        "function": onnx.FunctionProto,
        "node": onnx.NodeProto,
        "attribute": onnx.AttributeProto,
        "sparse tensor": onnx.SparseTensorProto,
        "tensor": onnx.TensorProto,
        "external data": onnx.StringStringEntryProto,
    }
    for name, fields in onnx_files._TENSOR_PATHS.items():
        by_number = messages[name].DESCRIPTOR.fields_by_number
        for number, inner in fields.items():
            assert by_number[number].message_type is messages[inner].DESCRIPTOR


# --- all-MiniLM-L6-v2 from the package index ---


@pytest.mark.parametrize("missing", ["onnx", "pip"])
def test_missing_package_names_the_extra(missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == missing else object())
    with pytest.raises(ModelError, match=f"The Python package {missing} is missing") as caught:
        minilm.build(tmp_path, print)
    assert caught.value.remedy == "Run: pip install 'kdb-fast[models]'"


def test_failure_of_pip_is_told_in_its_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = "WARNING: x\nERROR: No matching distribution found\nERROR: second\n"
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 1, "", stderr)

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(ModelError, match=r"could not fetch \S+ 0\.1\.0: No matching distribution found\. "):
        minilm.download_wheel(tmp_path)
    assert "--no-deps" in commands[0]
    assert "--only-binary=:all:" in commands[0]


def test_pip_that_takes_too_long_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **options: Any) -> None:
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(ModelError, match="within 600 s"):
        minilm.download_wheel(tmp_path)


def make_wheel(path: Path, contents: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in contents.items():
            archive.writestr(minilm.MEMBERS + name, content)
    return path


def test_only_published_files_are_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minilm, "PUBLISHED", {"config.json": hashlib.sha256(b"{}").hexdigest()})
    wheel = make_wheel(tmp_path / "a.whl", {"config.json": b"{}", "../../evil": b"x", "setup.py": b"x"})
    target = tmp_path / "target"
    target.mkdir()
    minilm.extract(wheel, target)
    assert {path.name for path in tmp_path.rglob("*")} == {"a.whl", "target", "config.json"}


def test_altered_package_is_refused(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path / "a.whl", dict.fromkeys(minilm.PUBLISHED, b"altered"))
    with pytest.raises(ModelError) as caught:
        minilm.extract(wheel, tmp_path)
    assert hashlib.sha256(b"altered").hexdigest() in caught.value.message
    assert minilm.PUBLISHED["model.safetensors"] in caught.value.message
    assert [path.name for path in tmp_path.iterdir()] == ["a.whl"]


@pytest.mark.parametrize("content", [b"", b"PK no zip"])
def test_damaged_wheel_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.whl").write_bytes(content)
    with pytest.raises(ModelError, match="is damaged"):
        minilm.extract(tmp_path / "a.whl", tmp_path)


def test_wheel_without_a_file_is_refused(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path / "a.whl", {})
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        minilm.extract(wheel, tmp_path)


def safetensors(path: Path, header: object, data: bytes) -> Path:
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def test_safetensors_gives_float32_tensors_by_name(tmp_path: Path) -> None:
    matrix = np.arange(6, dtype="<f4").reshape(2, 3)
    header = {
        "__metadata__": {"format": "pt"},
        "ids": {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]},
        "matrix": {"dtype": "F32", "shape": [2, 3], "data_offsets": [8, 32]},
        "scalar": {"dtype": "F32", "shape": [], "data_offsets": [32, 36]},
    }
    data = np.int64(7).tobytes() + matrix.tobytes() + np.float32(0.5).tobytes()
    tensors = minilm.read_safetensors(safetensors(tmp_path / "w", header, data))
    assert tensors.keys() == {"matrix", "scalar"}
    assert np.array_equal(tensors["matrix"], matrix)
    assert tensors["matrix"].dtype == np.float32
    assert tensors["scalar"] == 0.5


@pytest.mark.parametrize(
    ("header", "data"),
    [
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"1234"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"12345678"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}, b"1234"),
        ({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, b"1234"),
        ([1], b""),
    ],
)
def test_safetensors_that_contradicts_itself_is_refused(header: object, data: bytes, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is not a safetensors file"):
        minilm.read_safetensors(safetensors(tmp_path / "w", header, data))


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, b"\x02\x00\x00\x00\x00\x00\x00\x00{x"])
def test_safetensors_that_is_cut_short_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(content)
    with pytest.raises(ModelError, match="is not a safetensors file"):
        minilm.read_safetensors(tmp_path / "w")


class SmallWeights(dict[str, Any]):
    """Random weights with a vocabulary of ten words."""

    def __missing__(self, name: str) -> Any:
        if "LayerNorm" in name or name.endswith(".bias"):
            shape: tuple[int, ...] = (1536,) if "intermediate" in name else (384,)
        elif "embeddings" in name:
            shape = (10, 384)
        elif "intermediate" in name:
            shape = (1536, 384)
        else:
            shape = (384, 1536) if name.endswith(".output.dense.weight") and "attention" not in name else (384, 384)
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
        return np.random.default_rng(seed).normal(size=shape, scale=0.05).astype(np.float32)


def test_graph_is_valid_and_has_the_same_bytes_each_time(tmp_path: Path) -> None:
    import onnx

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        minilm_graph.write_graphs(SmallWeights(), tmp_path / name / "model.onnx")
    for graph, beside in (
        ("model.onnx", ["model.onnx_data", "model.onnx_tables"]),
        ("model.onnx_plain", ["model.onnx_data"]),
    ):
        onnx.checker.check_model(tmp_path / "a" / graph, full_check=True)
        for name in (graph, *beside):
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        assert onnx_files.external_files(tmp_path / "a", graph) == beside


def test_data_can_be_mapped_and_does_not_overlap(tmp_path: Path) -> None:
    import onnx

    minilm_graph.write_graphs(SmallWeights(), tmp_path / "model.onnx")
    for file, name, count in (
        ("model.onnx", "model.onnx_data", 41),
        ("model.onnx", "model.onnx_tables", 6),
        ("model.onnx_plain", "model.onnx_data", 44),
    ):
        graph = onnx.load(tmp_path / file, load_external_data=False).graph
        places = [{e.key: e.value for e in t.external_data} for t in graph.initializer if t.external_data]
        spans = sorted((int(p["offset"]), int(p["length"])) for p in places if p["location"] == name)
        assert len(spans) == count
        assert all(offset % 65_536 == 0 for offset, _ in spans)
        assert all(a + length <= b for (a, length), (b, _) in itertools.pairwise(spans))
        assert sum(spans[-1]) == (tmp_path / name).stat().st_size


@pytest.mark.parametrize("part", ["query", "key", "value"])
def test_what_the_first_layer_looks_up_is_the_product_of_the_norm(tmp_path: Path, part: str) -> None:
    import onnx
    from onnx import numpy_helper

    weights = SmallWeights()
    minilm_graph.write_graphs(weights, tmp_path / "model.onnx")
    graph = onnx.load(tmp_path / "model.onnx").graph
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    name = f"encoder.layer.0.attention.self.{part}"
    word, position = 7, 3
    embedding = (
        weights["embeddings.word_embeddings.weight"][word]
        + weights["embeddings.position_embeddings.weight"][position]
        + weights["embeddings.token_type_embeddings.weight"][0]
    ).astype(np.float64)
    deviation = np.sqrt(embedding.var() + 1e-12)
    norm = "embeddings.LayerNorm"
    state = (embedding - embedding.mean()) / deviation * weights[f"{norm}.weight"] + weights[f"{norm}.bias"]
    expected = weights[f"{name}.weight"] @ state + weights[f"{name}.bias"]
    looked_up = tensors[f"{name}.words"][word] + tensors[f"{name}.positions"][position]
    assert np.allclose(looked_up / deviation + tensors[f"{name}.bias"], expected, atol=1e-6)
    assert np.abs(expected).max() > 0.01


def test_weights_without_a_tensor_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no tensor 'embeddings\.word_embeddings\.weight'"):
        minilm_graph.write_graphs({}, tmp_path / "model.onnx")


@pytest.mark.usefixtures("home")
def test_graph_of_another_version_is_used_but_pull_replaces_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def older(entry: Any, work: Path, report: Any) -> tuple[tuple[str, str], ...]:
        write_model(work)
        (work / "model_optimized.onnx_plain").write_bytes(ONNX_FILE)
        return (("weights", "aa"), ("graph", version))

    version = "0"
    monkeypatch.setattr(model_fetching, "_obtain", older)
    first = models.pull(BGE)
    assert models.resolve(BGE) == first
    version = minilm_graph.GRAPH_VERSION
    lines: list[str] = []
    second = models.pull(BGE, lines.append)
    assert "built by another version of kdb-fast. Fetching it again." in lines[0]
    assert second.fingerprint() != first.fingerprint()
    assert models.resolve(BGE) == models.pull(BGE) == second


@pytest.mark.usefixtures("home")
def test_a_built_model_without_its_plain_graph_is_used_but_pull_replaces_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(entry: Any, work: Path, report: Any) -> tuple[tuple[str, str], ...]:
        write_model(work)
        if whole:
            (work / "model_optimized.onnx_plain").write_bytes(ONNX_FILE)
        return (("weights", "aa"), ("graph", minilm_graph.GRAPH_VERSION))

    whole = False
    monkeypatch.setattr(model_fetching, "_obtain", build)
    first = models.pull(BGE)
    assert models.resolve(BGE, once=True) == models.resolve(BGE) == first
    whole = True
    second = models.pull(BGE)
    assert models.resolve(BGE) == second
    assert models.resolve(BGE, once=True) == second.plain() != second
    assert second.fingerprint() == first.fingerprint()
