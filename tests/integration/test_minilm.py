"""all-MiniLM-L6-v2 gives the vectors of the published model: ``tests/data/minilm.json`` holds PyTorch's."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdb_fast.embedding.encoder import Encoder, EncoderSpec
from kdb_fast.embedding.models.lookup import Model, installed, resolve, verify
from kdb_fast.errors import ModelError

REFERENCE = json.loads((Path(__file__).parents[1] / "data" / "minilm.json").read_text(encoding="utf-8"))
TEXTS: list[str] = REFERENCE["texts"]
REFERENCE_TOKENS = 256
"""sentence-transformers cuts there, FastEmbed at 512."""


@pytest.fixture(scope="module")
def embedding(minilm: Model) -> Any:
    from fastembed import TextEmbedding

    return TextEmbedding(
        minilm.name,
        specific_model_path=str(minilm.path),
        cache_dir=str(minilm.path),
        threads=1,
        local_files_only=True,
        providers=["CPUExecutionProvider"],
    )


def cut_at_reference(embedding: Any, text: str) -> str:
    """``text`` up to the last token that the reference saw, its two special tokens included."""
    offsets = embedding.model.tokenizer.encode(text).offsets
    return text if len(offsets) <= REFERENCE_TOKENS else text[: offsets[REFERENCE_TOKENS - 2][1]]


@pytest.mark.parametrize("number", range(len(TEXTS)))
def test_vector_equals_the_published_models(number: int, embedding: Any) -> None:
    text = cut_at_reference(embedding, TEXTS[number])
    vector = next(iter(embedding.embed([text])))
    expected = np.array(REFERENCE["vectors"][number])
    assert vector.shape == (384,)
    assert vector.dtype == np.float32
    cosine = vector.astype(np.float64) @ expected / np.linalg.norm(vector) / np.linalg.norm(expected)
    assert cosine >= 0.99999


def test_reference_holds_a_text_that_has_to_be_cut(embedding: Any) -> None:
    cut = [text for text in TEXTS if cut_at_reference(embedding, text) != text]
    assert cut
    for text in cut:
        tokens = embedding.model.tokenizer.encode(cut_at_reference(embedding, text)).ids
        assert len(tokens) == REFERENCE_TOKENS


def test_vector_does_not_depend_on_its_batch(embedding: Any) -> None:
    texts = TEXTS[:5]
    together = np.array(list(embedding.embed(texts)))
    alone = np.array([next(iter(embedding.embed([text]))) for text in texts])
    assert np.abs(together - alone).max() < 1e-6


def test_model_says_what_fastembed_does(minilm: Model, embedding: Any) -> None:
    assert embedding.model.tokenizer.truncation["max_length"] == minilm.max_tokens == 512
    assert (minilm.dimensions, minilm.pooling, minilm.normalised) == (384, "mean", True)
    assert np.linalg.norm(next(iter(embedding.embed(["a"])))) == pytest.approx(1, abs=1e-6)


def test_installed_model_is_found_complete_and_verified(minilm: Model) -> None:
    verify(minilm)
    assert resolve(minilm.name) == minilm
    assert minilm in installed()
    assert resolve(minilm.name.upper()) == minilm
    assert resolve(minilm.name, minilm.path).fingerprint() == minilm.fingerprint()


def test_one_text_needs_neither_the_tables_nor_their_sum(minilm: Model, tmp_path: Path) -> None:
    copied = tmp_path / "model"
    shutil.copytree(minilm.path, copied, ignore=shutil.ignore_patterns("*_tables"))
    (copied / "model.onnx_tables").write_bytes(b"damaged")
    plain = resolve(minilm.name, copied, once=True)
    assert plain.fingerprint() == minilm.fingerprint()
    tables, without = (Encoder(EncoderSpec(model, 1, once=True)) for model in (minilm, plain))
    assert np.abs(tables.embed(TEXTS) - without.embed(TEXTS)).max() < 1e-6
    with pytest.raises(ModelError, match=r"model\.onnx_tables .* is damaged"):
        resolve(minilm.name, copied)
    with (copied / "model.onnx_data").open("r+b") as file:
        file.write(b"damaged")
    with pytest.raises(ModelError, match=r"model\.onnx_data .* is damaged"):
        resolve(minilm.name, copied, once=True)


def test_a_built_model_is_loaded_as_fastembed_does(minilm: Model, encoder: Encoder, embedding: Any) -> None:
    texts = [*TEXTS, "", "\x00 \u200b [MASK] [PAD]", "word " * 600]
    theirs = embedding.model.tokenizer
    assert encoder.token_ids(texts) == [theirs.encode(text).ids for text in texts]
    assert np.abs(encoder.embed(texts) - np.array(list(embedding.embed(texts)))).max() < 1e-6


def test_a_built_model_needs_no_fastembed(minilm: Model) -> None:
    code = """
import sys
from kdb_fast.search.query_model import embedded
from kdb_fast.embedding.models.lookup import resolve

vector, maker = embedded("The quick brown fox", resolve(sys.argv[1], once=True))
print("fastembed" in sys.modules, len(vector))
"""
    command = [sys.executable, "-c", code, minilm.name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["False", "384"]


def test_worker_needs_nothing_of_what_fastembed_imports_for_downloads(minilm: Model) -> None:
    code = """
import sys
from kdb_fast.embedding.encoder import Encoder, EncoderSpec
from kdb_fast.embedding.models.lookup import resolve
from kdb_fast.embedding.offline import import_fastembed

import_fastembed()
encoder = Encoder(EncoderSpec(resolve(sys.argv[1]), 100))
encoder.self_test()
left_out = {"huggingface_hub", "requests", "httpx"}
print(sorted(left_out & sys.modules.keys()), encoder.embed(["The quick brown fox"]).tobytes().hex())
"""
    command = [sys.executable, "-c", code, minilm.name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    vector = Encoder(EncoderSpec(minilm, 100)).embed(["The quick brown fox"])
    assert done.stdout.split(maxsplit=1) == ["[]", f"{vector.tobytes().hex()}\n"]


def test_for_one_text_no_weights_are_packed_and_its_vector_is_the_same(minilm: Model) -> None:
    import onnxruntime

    usual = onnxruntime.SessionOptions
    once, packed = (Encoder(EncoderSpec(minilm, 1, once=once)) for once in (True, False))
    options = once._inner.model.get_session_options()
    assert options.get_session_config_entry("session.disable_prepacking") == "1"
    assert onnxruntime.SessionOptions is usual
    text = ["The quick brown fox"]
    assert np.abs(once.embed(text) - packed.embed(text)).max() < 1e-6


@pytest.mark.parametrize(("machine", "setting"), [("aarch64", "1"), ("x86_64", None)])
def test_arms_kernels_that_keep_memory_are_left_out(
    machine: str, setting: str | None, minilm: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    usual = onnxruntime.SessionOptions
    monkeypatch.setattr("platform.machine", lambda: machine)
    encoder = Encoder(EncoderSpec(minilm, 100))
    options = encoder._inner.model.get_session_options()
    if setting is not None:
        assert options.get_session_config_entry("mlas.disable_kleidiai") == setting
    else:
        with pytest.raises(RuntimeError):
            options.get_session_config_entry("mlas.disable_kleidiai")
    assert onnxruntime.SessionOptions is usual
