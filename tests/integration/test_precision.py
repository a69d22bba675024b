"""Lower precisions with the real model: prepared once, compared with fp32, the same in every batch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from servers import ListSource, index_rows, records_of

from kdb_fast import precision as precision_module
from kdb_fast.database import DatabaseAddress
from kdb_fast.demo_docs import records as library_records
from kdb_fast.encoder import Encoder, EncoderSpec
from kdb_fast.errors import ModelError, StoppedError
from kdb_fast.models import Model
from kdb_fast.precision import Choice, Chooser
from kdb_fast.reindex import reindex
from kdb_fast.settings import ReindexOptions

pytest.importorskip("openvino")

pytestmark = pytest.mark.timeout(400)  # the first test waits for the calibration: half a minute of two idle cores

VNNI = frozenset({"avx512_vnni"})


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [f"{record['name']}: {record['summary']}" for record in library_records()][:400]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def prepared_here(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenVINO computes int8 without VNNI too, only not faster: the vectors can be tested anywhere."""
    monkeypatch.setenv("KDB_FAST_HOME", str(home))
    monkeypatch.setattr(precision_module, "cpu_flags", lambda: VNNI)


def chooser(model: Model, texts: list[str], *, history: tuple[str, ...] = (), **options: object) -> Chooser:
    given = {"index": "sqlite:///an index", "report": str, "sample": lambda rows: texts[:rows], **options}
    return Chooser(EncoderSpec(model, 100), history=history, **given)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def int8(minilm: Model, texts: list[str], home: Path) -> Iterator[Choice]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDB_FAST_HOME", str(home))
        patch.setattr(precision_module, "cpu_flags", lambda: VNNI)
        yield chooser(minilm, texts).choose("int8")


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


def test_int8_computes_the_rest_in_bf16_where_the_cpu_can(
    int8: Choice, minilm: Model, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    monkeypatch.setattr(precision_module, "cpu_flags", lambda: VNNI | {"avx512_bf16"})
    choice = chooser(minilm, texts, report=notes.append).choose("int8")
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
    monkeypatch.setattr(precision_module, "cpu_flags", lambda: VNNI)
    assert chooser(minilm, texts, history=(choice.fingerprint,)).choose("int8") == int8


def test_prepared_once_for_an_index(int8: Choice, minilm: Model, texts: list[str]) -> None:
    def never(rows: int) -> list[str]:
        raise AssertionError("records were read again")

    again = chooser(minilm, texts, sample=never).choose("int8")
    assert again == int8
    # Another index starts with the model of its earlier runs, but compares it on records of its own.
    other = chooser(minilm, texts[200:], index="another", history=(int8.fingerprint,)).choose("int8")
    assert other.fingerprint == int8.fingerprint
    assert other.fidelity != int8.fidelity


def test_a_changed_file_is_not_used(int8: Choice, minilm: Model, home: Path, monkeypatch: pytest.MonkeyPatch,
                                    tmp_path: Path) -> None:  # fmt: skip
    shutil.copytree(home / "prepared", tmp_path / "prepared")
    monkeypatch.setenv("KDB_FAST_HOME", str(tmp_path))
    weights = tmp_path / "prepared" / int8.fingerprint / "model.bin"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    notes: list[str] = []
    with pytest.raises(ModelError, match="too few"):
        chooser(minilm, ["a"], history=(int8.fingerprint,), report=notes.append).choose("int8")
    assert "model.bin has changed" in notes[0]


def test_refused_below_the_floor_and_auto_falls_back(int8: Choice, minilm: Model, texts: list[str]) -> None:
    with pytest.raises(ModelError, match="not close enough") as refused:
        chooser(minilm, texts).choose("int8", 0.99999)
    assert "expected a mean cosine of at least 0.99999" in refused.value.message
    notes: list[str] = []
    auto = chooser(minilm, texts, report=notes.append).choose("auto", 0.99999)
    assert auto.spec.precision == "fp32"
    assert auto.fingerprint == minilm.fingerprint()
    assert any("not close enough" in note for note in notes)
    assert any("no BF16 instructions" in note for note in notes)


def test_what_the_machine_lacks_is_refused(minilm: Model, texts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="no BF16 instructions"):
        chooser(minilm, texts).choose("bf16")
    monkeypatch.setattr(precision_module, "cpu_flags", lambda: frozenset({"avx2"}))
    with pytest.raises(ModelError, match="no VNNI instructions"):
        chooser(minilm, texts).choose("int8")
    monkeypatch.setattr(precision_module.openvino_backend, "installed", lambda: False)
    with pytest.raises(ModelError, match=r"pip install 'kdb-fast\[openvino\]'"):
        chooser(minilm, texts).choose("int8")


def test_too_few_records(minilm: Model) -> None:
    with pytest.raises(ModelError, match="3 records are too few"):
        chooser(minilm, ["a", "b", "c"], index="new").choose("int8")


def test_a_stop_ends_the_preparation(minilm: Model, texts: list[str], tmp_path: Path,
                                     monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setenv("KDB_FAST_HOME", str(tmp_path))
    with pytest.raises(StoppedError):
        chooser(minilm, texts, index="new", should_stop=lambda: True).choose("int8")
    assert not list(tmp_path.glob("prepared/*/model.xml"))


def test_reindex_in_int8(int8: Choice, minilm: Model, texts: list[str], tmp_path: Path) -> None:
    path = tmp_path / "index.db"
    path.touch()
    address = DatabaseAddress("sqlite", str(path), "sqlite:///an index")
    source = ListSource(records_of(texts[:250]))
    options = ReindexOptions(precision="int8", workers=2, model_path=minilm.path)
    receipt = reindex(address, lambda: source, options)
    assert (receipt["stored"], receipt["precision"]) == (250, "int8")
    assert receipt["fidelity"]["cosine_mean"] >= 0.997
    assert "int8: cosine with fp32" in receipt["plan"]
    assert receipt["fingerprint"] == int8.fingerprint
    json.dumps(receipt)
    rows = index_rows(address)
    exact = Encoder(EncoderSpec(minilm, 100)).embed(texts[:250])
    stored = np.stack([rows["Note", record.record_id].vector for record in records_of(texts[:250])])
    cosines = np.einsum("ij,ij->i", stored, exact)
    assert cosines.min() >= 0.98
    assert cosines.mean() < 0.99999  # so it was not fp32
    again = reindex(address, lambda: ListSource(records_of(texts[:250])), options)
    assert (again["stored"], again["unchanged"]) == (0, 250)
