"""A model on disk → FastEmbed's object for it: tokenizer, ONNX Runtime's session and pooling."""

from __future__ import annotations

import contextlib
import io
import os
import platform
from collections.abc import Iterator
from typing import Any

from .models.files import Model


def load_fastembed(model: Model, threads: int, *, lazy: bool, once: bool = False) -> Any:
    """FastEmbed's own object for a model on disk, without a word on standard error and without a network.

    Args:
        threads: Of one run of the model.
        lazy: Do not load the model's graph into ONNX Runtime.
        once: For one text. The weights are used as they lie in the file. To pack them as their products want them takes
            50 ms, after which a text takes 5 ms instead of 8 to 12; vectors differ by less than 1e-6.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
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
    return embedding.model


def is_plain(inner: Any) -> bool:
    """Whether a FastEmbed model is tokenizer → session → pooling, without steps of its own in between."""
    from fastembed.text.onnx_text_model import OnnxTextModel

    return (
        isinstance(inner, OnnxTextModel)
        and type(inner).onnx_embed is OnnxTextModel.onnx_embed
        and type(inner).__name__ != "JinaEmbeddingV3"
    )


@contextlib.contextmanager
def _session_settings(once: bool) -> Iterator[None]:
    """Settings that FastEmbed does not hand on, for sessions made meanwhile.

    On aarch64 they do without Arm's KleidiAI, whose kernels keep memory for every new shape of a batch, gigabytes in
    the end (onnxruntime issue 29538).
    """
    settings = ["mlas.disable_kleidiai"] if platform.machine() in ("aarch64", "arm64") else []
    if once:
        settings.append("session.disable_prepacking")
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
