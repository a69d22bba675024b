"""A model on disk → FastEmbed's object for it: tokenizer, ONNX Runtime's session and pooling."""

from __future__ import annotations

import contextlib
import io
import os
import platform
from collections.abc import Iterator
from typing import Any

from .models.files import Model


def load_fastembed(model: Model, threads: int, *, lazy: bool) -> Any:
    """FastEmbed's own object for a model on disk, without a word on standard error and without a network.

    Args:
        threads: Of one run of the model.
        lazy: Do not load the model's graph into ONNX Runtime.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # FastEmbed's imports may write to stderr; a person running `reindex` has no use for it.
    with contextlib.redirect_stderr(io.StringIO()):
        from fastembed import TextEmbedding

        with _without_kleidiai():
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
def _without_kleidiai() -> Iterator[None]:
    """On aarch64: let sessions made meanwhile do without Arm's KleidiAI, whose kernels keep memory for every new shape
    of a batch, gigabytes in the end (onnxruntime issue 29538). FastEmbed hands no such setting on."""
    if platform.machine() not in ("aarch64", "arm64"):
        yield
        return
    import onnxruntime

    usual = onnxruntime.SessionOptions

    def options() -> Any:
        made = usual()
        made.add_session_config_entry("mlas.disable_kleidiai", "1")
        return made

    onnxruntime.SessionOptions = options
    try:
        yield
    finally:
        onnxruntime.SessionOptions = usual
