"""Lower precisions with the real model: prepared once, compared with fp32, the same in every batch.

What they compute is tried only where the CPU has the instructions. What is chosen on lesser CPUs is tried by taking
instructions away, on recorded flags, and what a CPU with AVX2 computes by taking them from the libraries: see
``cpus.py``.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from cpus import RECORDED, TAKEN_AWAY, avx2_environment, embed_with_avx2, needs_avx2_only, pretend, take_away
from servers import ListSource, index_rows, records_of

from kdb_fast.cli.demo_docs import records as library_records
from kdb_fast.db.address import DatabaseAddress
from kdb_fast.embedding.encoder import Encoder, EncoderSpec
from kdb_fast.embedding.models.lookup import Model
from kdb_fast.embedding.precision import openvino_backend
from kdb_fast.embedding.precision.choice import Choice, PrecisionSelector
from kdb_fast.embedding.precision.support import (
    CPU_FLAGS,
    int8_on_openvino,
    missing_for,
    missing_instructions,
    unsupported,
)
from kdb_fast.errors import ModelError, StoppedError
from kdb_fast.indexing.reindex import reindex
from kdb_fast.ipc.spawning import WORKER_ENVIRONMENT
from kdb_fast.resources import WITHOUT_CPU_FLAGS, cpu_flags
from kdb_fast.settings import ReindexOptions
from kdb_fast.tables.kdb_search import entity_and_id

pytestmark = pytest.mark.timeout(400)  # the first test waits for the calibration: half a minute of two idle cores

NO_BF16 = TAKEN_AWAY["VNNI without BF16"]


def needs(precision: str) -> None:
    """Skip the test where this CPU lacks the instructions, or openvino is not installed."""
    if reason := unsupported(precision):
        pytest.skip(f"what {precision} computes was not tried: {reason}")


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [f"{record['name']}: {record['summary']}" for record in library_records()][:400]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def prepared_here(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One place for what is prepared; int8 computes the rest in fp32, unless a test says otherwise."""
    monkeypatch.setenv("KDB_FAST_HOME", str(home))
    take_away(NO_BF16, monkeypatch)


def selector(model: Model, texts: list[str], *, history: tuple[str, ...] = (), **options: object) -> PrecisionSelector:
    given = {"index": "sqlite:///an index", "report": str, "sample": lambda rows: texts[:rows], **options}
    return PrecisionSelector(EncoderSpec(model, 100), history=history, **given)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def int8(minilm: Model, texts: list[str], home: Path) -> Iterator[Choice]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDB_FAST_HOME", str(home))
        take_away(NO_BF16, patch)
        needs("int8")
        yield selector(minilm, texts).choose("int8")


def test_int8_is_close_to_fp32_on_records_it_was_not_calibrated_on(int8: Choice, minilm: Model) -> None:
    assert int8.fidelity is not None
    assert int8.fidelity.cosine_mean >= 0.997
    assert int8.fidelity.overlap >= 0.94
    others = [f"{record['name']}: {record['text']}" for record in library_records()][1000:1040]
    exact = Encoder(EncoderSpec(minilm, 100)).embed(others)
    cosines = np.einsum("ij,ij->i", Encoder(int8.spec).embed(others), exact)
    assert cosines.mean() >= 0.997
    assert cosines.min() >= 0.98


def test_int8_is_the_same_in_every_batch_and_order(int8: Choice, texts: list[str]) -> None:
    encoder = Encoder(int8.spec)
    encoder.self_test()
    together = encoder.embed(texts[:80])
    alone = np.concatenate([encoder.embed([text]) for text in texts[:40]])
    backwards = encoder.embed(texts[:80][::-1])[::-1]
    assert np.abs(together[:40] - alone).max() < 1e-6
    assert np.abs(together - backwards).max() < 1e-6


def test_bf16_is_close_to_fp32_and_the_same_in_every_batch(
    minilm: Model, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    take_away("", monkeypatch)
    needs("bf16")
    choice = selector(minilm, texts).choose("bf16")
    assert choice.fidelity is not None
    assert choice.fidelity.cosine_mean >= 0.9999
    encoder = Encoder(choice.spec)
    encoder.self_test()
    together = encoder.embed(texts[:80])
    assert np.abs(together - encoder.embed(texts[:80][::-1])[::-1]).max() < 1e-6
    assert np.abs(together - Encoder(EncoderSpec(minilm, 100)).embed(texts[:80])).max() > 1e-5, "this is fp32"


def test_int8_computes_the_rest_in_bf16_where_the_cpu_can(
    int8: Choice, minilm: Model, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    take_away("", monkeypatch)
    needs("bf16")
    if not int8.spec.on_openvino:
        pytest.skip("int8 with attention in bf16 was not tried: ONNX Runtime runs int8 here")
    choice = selector(minilm, texts, report=notes.append).choose("int8")
    # The same quantised model, compared anew: its vectors are others, and an index is not filled with both.
    assert choice.spec.prepared == int8.spec.prepared
    assert choice.fingerprint == f"{int8.fingerprint}-bf16"
    assert not any("Calibrating" in note for note in notes)
    assert choice.fidelity is not None
    assert choice.fidelity.cosine_mean >= 0.997
    encoder = Encoder(choice.spec)
    encoder.self_test()
    together = encoder.embed(texts[:80])
    alone = np.concatenate([encoder.embed([text]) for text in texts[:40]])
    assert np.abs(together[:40] - alone).max() < 1e-6
    # Back on a machine without BF16 the first comparison still holds.
    take_away(NO_BF16, monkeypatch)
    assert selector(minilm, texts, history=(choice.fingerprint,)).choose("int8") == int8


def test_prepared_once_for_an_index(int8: Choice, minilm: Model, texts: list[str]) -> None:
    def never(rows: int) -> list[str]:
        raise AssertionError("records were read again")

    again = selector(minilm, texts, sample=never).choose("int8")
    assert again == int8
    # Another index starts with the model of its earlier runs, but compares it on records of its own.
    other = selector(minilm, texts[200:], index="another", history=(int8.fingerprint,)).choose("int8")
    assert other.fingerprint == int8.fingerprint
    assert other.fidelity != int8.fidelity


def test_a_changed_file_is_not_used(int8: Choice, minilm: Model, home: Path, monkeypatch: pytest.MonkeyPatch,
                                    tmp_path: Path) -> None:  # fmt: skip
    shutil.copytree(home / "prepared", tmp_path / "prepared")
    monkeypatch.setenv("KDB_FAST_HOME", str(tmp_path))
    weights = max((tmp_path / "prepared" / int8.fingerprint).iterdir(), key=lambda file: file.stat().st_size)
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    notes: list[str] = []
    with pytest.raises(ModelError, match="too few"):
        selector(minilm, ["a"], history=(int8.fingerprint,), report=notes.append).choose("int8")
    assert f"{weights.name} has changed" in notes[0]


def test_refused_below_the_floor_and_auto_falls_back(int8: Choice, minilm: Model, texts: list[str]) -> None:
    with pytest.raises(ModelError, match="not close enough to fp32 on the records of an earlier run") as refused:
        selector(minilm, texts).choose("int8", 0.99999)
    kept = refused.value.remedy.rpartition("compare again: rm ")[2]
    assert Path(kept).parent.name == int8.fingerprint
    assert Path(kept).is_file()
    assert "expected a mean cosine of at least 0.99999" in refused.value.message
    notes: list[str] = []
    auto = selector(minilm, texts, report=notes.append).choose("auto", 0.99999)
    assert auto.spec.precision == "fp32"
    assert auto.fingerprint == minilm.fingerprint()
    assert any("not close enough" in note for note in notes)
    assert any("no BF16 instructions" in note for note in notes)


@pytest.mark.parametrize("cpu", RECORDED)
def test_what_is_offered_on_a_real_cpu(cpu: str) -> None:
    flags, offered = RECORDED[cpu]
    assert {p for p in CPU_FLAGS if not missing_instructions(p, frozenset(flags.split()))} == offered


def test_instructions_are_only_taken_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cpuinfo"
    monkeypatch.setattr("kdb_fast.resources.PROC_CPUINFO", file)
    file.write_text("processor\t: 0\nflags\t\t: fma avx2 avx512f avx512_vnni\n\nprocessor\t: 1\nflags\t\t: fma\n")
    for without, left in (("", "fma avx2 avx512f avx512_vnni"), ("avx512_* amx_int8", "fma avx2 avx512f"), ("*", "")):
        monkeypatch.setenv(WITHOUT_CPU_FLAGS, without)
        assert cpu_flags() == frozenset(left.split())
    monkeypatch.delenv(WITHOUT_CPU_FLAGS)
    file.write_text("processor\t: 0\nBogoMIPS\t: 2100.00\nFeatures\t: fp asimd i8mm bf16\n")  # aarch64
    assert cpu_flags() == {"fp", "asimd", "i8mm", "bf16"}
    file.unlink()
    assert cpu_flags() == frozenset()


@pytest.mark.parametrize("cpu", TAKEN_AWAY)
def test_what_the_cpu_lacks_is_refused_and_auto_takes_fp32(
    cpu: str, minilm: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(rows: int) -> list[str]:
        raise AssertionError("records were read")

    pretend(cpu, monkeypatch)
    refused = [p for p in CPU_FLAGS if missing_instructions(p, cpu_flags())]
    if cpu == "not even AVX2":
        assert refused == ["int8", "bf16"]
    elif cpu != "all that this CPU has":
        assert refused == ["bf16"]
    for precision in refused:
        kind = {"int8": "AVX2", "bf16": "BF16"}[precision]
        with pytest.raises(ModelError, match=rf"--precision {precision}: this CPU has no {kind} instructions") as error:
            selector(minilm, [], sample=never).choose(precision)
        assert error.value.remedy == "Use --precision fp32 or auto."
    if refused == ["int8", "bf16"]:
        notes: list[str] = []
        choice = selector(minilm, [], sample=never, report=notes.append).choose("auto")
        assert choice.spec.precision == "fp32"
        assert [note.partition(" instructions")[0] for note in notes] == [
            "Not int8: this CPU has no AVX2",
            "Not bf16: this CPU has no BF16",
        ]


def test_the_command_says_why_a_precision_is_refused(minilm: Model, tmp_path: Path) -> None:
    file = tmp_path / "one.jsonl"
    file.write_text('{"id": 1, "text": "one"}\n')
    command = [sys.executable, "-m", "kdb_fast", "reindex", "--db", f"sqlite:///{tmp_path}/n.db", "--from", str(file),
               "--entity", "Note", "--model-path", str(minilm.path), "--precision", "int8"]  # fmt: skip
    environment = {**os.environ, WITHOUT_CPU_FLAGS: TAKEN_AWAY["not even AVX2"]}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 4, done.stderr
    assert "--precision int8: this CPU has no AVX2 instructions" in done.stderr
    assert "Use --precision fp32 or auto." in done.stderr


def test_what_is_not_installed_is_refused(minilm: Model, texts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    take_away("", monkeypatch)
    if reason := missing_instructions("bf16", cpu_flags()):
        pytest.skip(f"refused for another reason: {reason}")
    monkeypatch.setattr(openvino_backend, "installed", lambda: False)
    assert not int8_on_openvino()
    with pytest.raises(ModelError, match=r"pip install 'kdb-fast\[openvino\]'"):
        selector(minilm, texts).choose("bf16")


@pytest.fixture(scope="module")
def int8_without_vnni(minilm: Model, texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Choice:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDB_FAST_HOME", str(tmp_path_factory.mktemp("home")))
        take_away(TAKEN_AWAY["AVX2 only"], patch)
        needs("int8")
        return selector(minilm, texts).choose("int8")


def test_int8_without_vnni_is_close_to_fp32_and_the_same_in_every_batch(
    int8_without_vnni: Choice, minilm: Model, texts: list[str]
) -> None:
    assert not int8_without_vnni.spec.on_openvino
    assert int8_without_vnni.fidelity is not None
    assert int8_without_vnni.fidelity.cosine_mean >= 0.997
    assert int8_without_vnni.fidelity.overlap >= 0.94
    encoder = Encoder(int8_without_vnni.spec)
    encoder.self_test()
    together = encoder.embed(texts[:80])
    alone = np.concatenate([encoder.embed([text]) for text in texts[:40]])
    assert np.abs(together[:40] - alone).max() < 1e-6
    assert np.abs(together - encoder.embed(texts[:80][::-1])[::-1]).max() < 1e-6
    # Its dense layers are single products of integers, of which no CPU saturates: see quantised_weights.PAIR.
    onnx = pytest.importorskip("onnx")
    prepared = int8_without_vnni.spec.prepared
    assert prepared is not None
    graph = onnx.load(str(prepared)).graph
    products = [node for node in graph.node if node.op_type == "MatMulIntegerToFloat"]
    assert len(products) == 33
    weights = {tensor.name: tensor for tensor in graph.initializer}
    for node in products:
        weight = onnx.numpy_helper.to_array(weights[node.input[1]]).astype(int)
        for part in (np.maximum(weight, 0), np.maximum(-weight, 0)):
            assert (part[::2] + part[1::2]).max() <= 128


def test_int8_on_avx2_gives_nearly_the_vectors_of_this_cpu(
    int8_without_vnni: Choice, minilm: Model, texts: list[str], tmp_path: Path
) -> None:
    needs_avx2_only("int8 of a CPU with AVX2 only")
    here = Encoder(int8_without_vnni.spec).embed(texts[:60])
    there = embed_with_avx2(texts[:60], tmp_path / "v.npy", minilm.name, minilm.path, int8_without_vnni.spec.prepared)
    cosines = np.einsum("ij,ij->i", there, here)
    assert cosines.mean() > 0.9999, "saturated products would be far off"
    assert cosines.min() > 0.999


def test_what_was_prepared_for_vnni_is_not_used_without_it(
    int8: Choice, minilm: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not int8.spec.on_openvino:
        pytest.skip("no model was prepared for VNNI: this CPU has none, or openvino is not installed")
    assert missing_for(int8.spec, frozenset({"avx2", "avx512_vnni"})) == ""
    assert "VNNI" in missing_for(int8.spec, frozenset({"avx2"}))
    take_away(TAKEN_AWAY["AVX2 only"], monkeypatch)
    with pytest.raises(ModelError, match="too few"):  # so it would be prepared anew
        selector(minilm, ["a"], history=(int8.fingerprint,)).choose("int8")


def test_what_a_worker_sees_of_the_environment_is_enough_for_avx2_alone() -> None:
    needs_avx2_only("a worker on a CPU with AVX2 only")
    seen = {name: value for name, value in {**os.environ, **avx2_environment()}.items() if name in WORKER_ENVIRONMENT}
    program = "from numpy._core._multiarray_umath import __cpu_features__ as has; print(has['AVX2'], has['AVX512F'])"
    done = subprocess.run(
        [sys.executable, "-c", program], env=seen, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "True False\n"), done.stderr


def test_fp32_on_avx2_gives_the_same_vectors(minilm: Model, texts: list[str], tmp_path: Path) -> None:
    needs_avx2_only("fp32 of a CPU with AVX2 only")
    some = [text[:60] for text in texts[:4]]
    there = embed_with_avx2(some, tmp_path / "v.npy", minilm.name, minilm.path)
    assert np.abs(there - Encoder(EncoderSpec(minilm, 100)).embed(some)).max() < 1e-5


def test_too_few_records(minilm: Model) -> None:
    needs("int8")
    with pytest.raises(ModelError, match="No record with a text") as error:
        selector(minilm, [], index="new").choose("int8")
    assert "says what is wrong" in error.value.remedy
    with pytest.raises(ModelError, match="3 records are too few"):
        selector(minilm, ["a", "b", "c"], index="new").choose("int8")


def test_a_stop_ends_the_preparation(minilm: Model, texts: list[str], tmp_path: Path,
                                     monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    needs("int8")
    monkeypatch.setenv("KDB_FAST_HOME", str(tmp_path))
    with pytest.raises(StoppedError):
        selector(minilm, texts, index="new", should_stop=lambda: True).choose("int8")
    assert not list(tmp_path.glob("prepared/*/model.xml"))


def test_reindex_in_int8(int8: Choice, minilm: Model, texts: list[str], tmp_path: Path) -> None:
    path = tmp_path / "index.db"
    path.touch()
    address = DatabaseAddress("sqlite", str(path), "sqlite:///an index")
    source = ListSource(records_of(texts[:250]))
    options = ReindexOptions(precision="int8", workers=2, model_path=minilm.path)
    receipt = reindex(address, source, options)
    assert (receipt.stored, receipt.precision) == (250, "int8")
    assert receipt.fidelity is not None
    assert receipt.fidelity.cosine_mean >= 0.997
    assert "int8: cosine with fp32" in receipt.plan
    assert receipt.fingerprint == int8.fingerprint
    json.dumps(receipt.as_json())
    rows = index_rows(address)
    exact = Encoder(EncoderSpec(minilm, 100)).embed(texts[:250])
    vectors = [rows[entity_and_id(record.key)].vector for record in records_of(texts[:250])]
    stored = np.stack([vector for vector in vectors if vector is not None])
    cosines = np.einsum("ij,ij->i", stored, exact)
    assert cosines.min() >= 0.98
    assert cosines.mean() < 0.99999  # so it was not fp32
    again = reindex(address, ListSource(records_of(texts[:250])), options)
    assert (again.stored, again.unchanged) == (0, 250)
