"""A model on disk → tokenizer, ONNX Runtime's session and pooling: FastEmbed's object, or our own for a built model."""

from __future__ import annotations

import contextlib
import io
import os
import platform
from collections.abc import Iterator, Mapping
from typing import Any

from .models.files import Model


class BuiltModel:
    """A model of :mod:`.models.minilm_graph`, with the names of FastEmbed's object for it.

    FastEmbed, which takes 40 ms and 5 MB to import, has no part in it.
    """

    def __init__(self, model: Model, threads: int, *, lazy: bool, once: bool) -> None:
        from tokenizers import Tokenizer

        self.tokenizer = Tokenizer.from_file(str(model.path / "tokenizer.json"))
        self.tokenizer.enable_truncation(model.max_tokens)
        self.model = None if lazy else _session(model, threads, once)

    def _preprocess_onnx_input(self, feed: Mapping[str, Any]) -> Mapping[str, Any]:
        return feed


def load_model(model: Model, threads: int, *, lazy: bool, once: bool = False) -> Any:
    """Our own object for a model that was built here; for all others FastEmbed's, without a word on standard error and
    without a network.

    Args:
        threads: Of one run of the model.
        lazy: Do not load the model's graph into ONNX Runtime.
        once: For one text. The weights are used as they lie in the file. To pack them as their products want them takes
            50 ms, after which a text takes 5 ms instead of 8 to 12; vectors differ by less than 1e-6.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if model.source:
        return BuiltModel(model, threads, lazy=lazy, once=once)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # FastEmbed's imports may write to stderr; a person running `reindex` has no use for it.
    with contextlib.redirect_stderr(io.StringIO()):
        from fastembed import TextEmbedding

        with _session_settings(once):
            embedding = TextEmbedding(
                model_name=model.name,
                specific_model_path=str(model.path),
                # It makes this directory: by default one for all users, in the system's temporary directory.
                cache_dir=str(model.path),
                local_files_only=True,
                threads=threads,
                providers=["CPUExecutionProvider"],
                lazy_load=lazy,
            )
    inner: Any = embedding.model
    if lazy and is_plain(inner):
        from fastembed.common.preprocessor_utils import load_tokenizer

        inner.tokenizer, inner.special_token_to_id = load_tokenizer(model_dir=model.path)
    return inner


def is_plain(inner: Any) -> bool:
    """Whether a model is tokenizer → session → pooling, without steps of its own in between."""
    if isinstance(inner, BuiltModel):
        return True
    from fastembed.text.onnx_text_model import OnnxTextModel

    return (
        isinstance(inner, OnnxTextModel)
        and type(inner).onnx_embed is OnnxTextModel.onnx_embed
        and type(inner).__name__ != "JinaEmbeddingV3"
    )


def _session(model: Model, threads: int, once: bool) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = threads
    for setting in _settings(once):
        options.add_session_config_entry(setting, "1")
    return onnxruntime.InferenceSession(str(model.path / model.model_file), options, providers=["CPUExecutionProvider"])


def _settings(once: bool) -> list[str]:
    """What a session is to do without.

    On aarch64 Arm's KleidiAI, whose kernels keep memory for every new shape of a batch, gigabytes in the end
    (onnxruntime issue 29538).
    """
    settings = ["mlas.disable_kleidiai"] if platform.machine() in ("aarch64", "arm64") else []
    return [*settings, "session.disable_prepacking"] if once else settings


@contextlib.contextmanager
def _session_settings(once: bool) -> Iterator[None]:
    """:func:`_settings`, which FastEmbed does not hand on, for sessions made meanwhile."""
    settings = _settings(once)
    if not settings:
        yield
        return
    import onnxruntime

    usual = onnxruntime.SessionOptions

    def options() -> Any:
        made = usual()
        for setting in settings:
            made.add_session_config_entry(setting, "1")
        return made

    onnxruntime.SessionOptions = options
    try:
        yield
    finally:
        onnxruntime.SessionOptions = usual
