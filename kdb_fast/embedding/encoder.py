"""Texts → float32 matrix. The only module that runs a model of fastembed's (loading.py; OpenVINO: openvino_backend.py).

What makes it fast on a CPU (all measured, see docs/performance.md): one thread a process; every text tokenised
once; rows of near-equal token counts in small batches (batching.py), so that next to nothing is padding and the
activations stay in the core's cache; pooling here, so that only rows × dimensions leave the process.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import KdbFastError, ModelError, ResourceError
from ..origins import prefixed
from ..records import was_cut
from .batching import TOKEN_BUDGET, pack_batches, plan_batches
from .loading import BuiltModel, is_plain, load_model
from .models.files import Model
from .precision.openvino_rows import WIDTH_CLASS, filled_rows

CHARS_PER_TOKEN = 24
"""Texts are cut at this many characters a token of the model's window before they are tokenised; a cut that
left the window unfilled is repeated longer, so the result never depends on it. English has 4 to 5."""


PROBE = "The quick brown fox jumps over the lazy dog."
"""Embedded to see that a model or an API works: a text of our own, so what is said of it may be shown."""


class Tally(NamedTuple):
    """What an encode call computed, in tokens with the special ones.

    ``padded_tokens`` are the tokens that were really computed, padding and filler rows among them. ``lost_chars`` are
    the characters behind what the model reads, about: by the share of the tokens.
    """

    tokens: int
    padded_tokens: int
    truncated: int
    lost_chars: int = 0


@dataclass(frozen=True)
class EncoderSpec:
    """All a process needs to build an encoder. Small and picklable.

    ``precision`` int8 runs the quantised ``prepared`` in place of the model's own file.
    ``on_openvino``: by OpenVINO, not by ONNX Runtime.
    ``unquantised_precision`` is what int8 leaves unquantised, attention above all, is computed in: fp32 or bf16.
    ``prefix`` is put in front of each text: it is read with it, and counted in its tokens.
    ``once``: for one text, see :func:`.loading.load_model`.
    """

    model: Model
    batch_size: int
    token_budget: int = TOKEN_BUDGET
    threads: int = 1
    precision: str = "fp32"
    prepared: Path | None = None
    unquantised_precision: str = "fp32"
    on_openvino: bool = False
    prefix: str = ""
    once: bool = False

    @property
    def read_chars(self) -> int:
        """Characters of a text that count for the size of its shard: what is behind them is not tokenised."""
        return self.model.max_tokens * CHARS_PER_TOKEN

    def fingerprint(self, precision: str = "fp32") -> str:
        """Of the vectors: the model's, with a mark for the prefix and one such as ``-bf16`` for a lower precision (see
        :func:`~kdb_fast.origins.same_model`)."""
        base = prefixed(self.model.fingerprint(), self.prefix)
        return base if precision == "fp32" else f"{base}-{precision}"


Matrix = npt.NDArray[np.float32]
Tokens = npt.NDArray[np.int64]


class Batch(NamedTuple):
    """Texts as a graph takes them: its inputs by name, and a mask that is 1 where a token is and 0 where padding is.
    int64 [texts, tokens] each."""

    feed: dict[str, Tokens]
    mask: Tokens


class Encoder:
    """One model in this process.

    Raises:
        ModelError: The model cannot be loaded, or does not give the vectors it promises.
        ResourceError: There is not enough memory for it.
    """

    def __init__(self, spec: EncoderSpec) -> None:
        self.spec = spec
        self.dimensions = spec.model.dimensions
        self.max_tokens = spec.model.max_tokens
        with _explained(spec.model, "cannot be loaded"):
            # Where another file is run, ONNX Runtime need not load the model's own: 100 MB and 0.3 s.
            self._inner = load_model(spec.model, spec.threads, lazy=spec.precision != "fp32", once=spec.once)
        self._backend: _Backend
        if spec.precision != "fp32":
            self._backend = _lower(self._inner, spec)
        elif is_plain(self._inner):
            self._backend = _OnnxBackend(self._inner, self._inner.model, prefix=spec.prefix)
        else:
            self._backend = _WholeModel(self._inner, spec.prefix)
        if spec.prefix and isinstance(self._backend, _OnnxBackend) and len(self.token_ids([""])[0]) >= self.max_tokens:
            raise ModelError(
                f"The prefix fills the {self.max_tokens} tokens of {spec.model.name}: nothing is left of a text.",
                remedy="Give a shorter --document-prefix.",
            )

    def encode(self, texts: Sequence[str], out: Matrix) -> Tally:
        """Embed ``texts`` into ``out`` (float32, len(texts) × dimensions), row for row.

        Order and batching do not change a row by more than 1e-6; in a lower precision not at all.
        """
        return self._backend.encode(texts, out, self.spec)

    def embed(self, texts: Sequence[str]) -> Matrix:
        """:meth:`encode` into a new matrix."""
        out = np.empty((len(texts), self.dimensions), dtype=np.float32)
        if texts:
            self.encode(texts, out)
        return out

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of each text, cut at the model's window, special ones included.

        Raises:
            ModelError: The model is no plain transformer.
        """
        return self._plain()._tokenise(texts, self.max_tokens)[0]

    def batches(self, ids: Sequence[Sequence[int]]) -> list[Batch]:
        """Texts of these token ids as the graph takes them, longest first."""
        lengths = np.array([len(row) for row in ids], dtype=np.int64)
        plan = plan_batches(lengths, self.spec.token_budget, self.spec.batch_size)
        return [self._plain().batch([ids[i] for i in rows], int(lengths[rows].max())) for rows in plan]

    def _plain(self) -> _OnnxBackend:
        if not isinstance(self._backend, _OnnxBackend):
            raise ModelError(
                f"{self.spec.model.name} is no plain transformer, so it has no lower precision.",
                remedy="Use --precision fp32.",
            )
        return self._backend

    def self_test(self) -> None:
        """Embed a probe alone and within a ragged batch; refuse a model for which that makes a difference.

        Dynamic int8 models fail here: their vectors depend on the batch, so that a repeated, resumed or
        deduplicated run would store different ones (onnxruntime issue 10111).
        """
        with _explained(self.spec.model, "fails on a probe"):
            self._probe()

    def _probe(self) -> None:
        others = ["short", PROBE * 6, "Überraschung: naïve café", "1 2 3 4 5 6 7 8 9", PROBE + " Again."]
        alone = self.embed([PROBE])[0]
        out = np.empty((6, self.dimensions), dtype=np.float32)
        self._backend.encode([*others[:2], PROBE, *others[2:]], out, self.spec, ragged=True)
        if not np.isfinite(out).all() or not out.any(axis=1).all():
            fault = "zeros" if np.isfinite(out).all() else "NaN or infinity"
            raise ModelError(f"{self.spec.model.name} gives a vector of {fault} for a plain sentence.")
        norm = float(np.linalg.norm(alone) * np.linalg.norm(out[2])) or 1.0
        cosine = float(alone @ out[2]) / norm
        if cosine < BATCH_INVARIANCE:
            raise ModelError(
                f"{self.spec.model.name} gives another vector for the same text in another batch "
                f"(cosine {cosine:.5f}, expected at least {BATCH_INVARIANCE}).",
                remedy="It is quantised dynamically; choose a model in fp32 or one with static quantisation.",
            )


BATCH_INVARIANCE = 0.9998
"""Least cosine between any two batchings of a text: the worst that static int8 gave was 0.99989."""


class _Backend:
    def encode(self, texts: Sequence[str], out: Matrix, spec: EncoderSpec, *, ragged: bool = False) -> Tally:
        raise NotImplementedError


class _OnnxBackend(_Backend):
    """The usual case: tokenizer → ONNX session → FastEmbed's own pooling for this model."""

    def __init__(self, inner: Any, session: Any, width_class: int = 0, prefix: str = "") -> None:
        self._prefix = prefix
        self._tokenizer = inner.tokenizer
        padding = self._tokenizer.padding or {}
        self._pad_id = int(padding.get("pad_id", 0))
        self._pad_left = padding.get("direction") == "left"
        self._tokenizer.no_padding()
        self._session = session
        self._width_class = width_class
        self._inputs = {node.name for node in self._session.get_inputs()}
        self._inner = inner
        self._mean = isinstance(inner, BuiltModel) or type(inner).__name__ == "PooledNormalizedEmbedding"

    def encode(self, texts: Sequence[str], out: Matrix, spec: EncoderSpec, *, ragged: bool = False) -> Tally:
        ids, truncated, lost_chars = self._tokenise(texts, spec.model.max_tokens)
        lengths = np.fromiter((len(row) for row in ids), dtype=np.int64, count=len(ids))
        if ragged:
            batches = [np.arange(len(ids))]
        elif self._width_class:
            batches = list(pack_batches(lengths, spec.token_budget, spec.batch_size, self._width_class))
        else:
            batches = list(plan_batches(lengths, spec.token_budget, spec.batch_size))
        padded = 0
        for rows in batches:
            width = int(lengths[rows].max())
            if self._width_class:
                width = min(-(-width // self._width_class) * self._width_class, spec.model.max_tokens)
                padded += filled_rows(int(lengths[rows].sum()), spec.precision)
            else:
                padded += width * len(rows)
            _put(out, rows, self._run([ids[i] for i in rows], width), spec.model)
        return Tally(int(lengths.sum()), padded, truncated, lost_chars)

    def _tokenise(self, texts: Sequence[str], window: int) -> tuple[list[list[int]], int, int]:
        """Token ids, how many texts are longer than the model reads, and about how many characters it does not."""
        limit, prefix = window * CHARS_PER_TOKEN, self._prefix
        encodings = self._tokenizer.encode_batch_fast([prefix + text[:limit] for text in texts])
        ids = [e.ids for e in encodings]
        truncated = lost = 0
        special = self._tokenizer.num_special_tokens_to_add(False)
        for i, (text, encoding) in enumerate(zip(texts, encodings, strict=True)):
            cut = limit
            while len(text) > cut and len(ids[i]) < window:
                cut *= 8
                encoding = self._tokenizer.encode_batch_fast([prefix + text[:cut]])[0]
                ids[i] = encoding.ids
            more = encoding.overflowing
            if more or len(text) > cut:
                # What was cut before it came here was counted there.
                truncated += not was_cut(text)
                kept = len(ids[i]) - special
                share = kept / max(1, kept + sum(len(part.ids) - special for part in more))
                lost += len(text) - round(min(len(text), cut) * share)
        return ids, truncated, lost

    def batch(self, ids: Sequence[Sequence[int]], width: int) -> Batch:
        """Texts of these token ids as this graph takes them."""
        places = np.arange(width)[::-1] if self._pad_left else np.arange(width)
        real = places < np.array([[len(row)] for row in ids])
        input_ids = np.full(real.shape, self._pad_id, dtype=np.int64)
        input_ids[real] = [token for row in ids for token in row]
        mask = real.astype(np.int64)
        feed = {"input_ids": input_ids}
        if "attention_mask" in self._inputs:
            feed["attention_mask"] = mask
        if "token_type_ids" in self._inputs:
            feed["token_type_ids"] = np.zeros_like(input_ids)
        return Batch(self._inner._preprocess_onnx_input(feed), mask)

    def _run(self, ids: list[list[int]], width: int) -> Matrix:
        feed, mask = self.batch(ids, width)
        hidden = self._session.run(None, feed)[0]
        if self._mean:
            return mean_pool(hidden, mask)
        from fastembed.common.onnx_model import OnnxOutputContext

        context = OnnxOutputContext(model_output=hidden, attention_mask=mask, input_ids=feed["input_ids"])
        return np.asarray(list(self._inner._post_process_onnx_output(context)), dtype=np.float32)


class _WholeModel(_Backend):
    """Models that FastEmbed runs in a way of its own (static embeddings, task adapters): through its public API."""

    def __init__(self, inner: Any, prefix: str) -> None:
        self._inner, self._prefix = inner, prefix

    def encode(self, texts: Sequence[str], out: Matrix, spec: EncoderSpec, *, ragged: bool = False) -> Tally:
        texts = [self._prefix + text for text in texts]
        lengths = np.fromiter((min(len(t), 4 * spec.model.max_tokens) for t in texts), dtype=np.int64)
        chars = 4 * spec.token_budget
        batches = [np.arange(len(texts))] if ragged else list(plan_batches(lengths, chars, spec.batch_size))
        for rows in batches:
            vectors = list(self._inner.embed([texts[i] for i in rows], batch_size=len(rows)))
            _put(out, rows, np.asarray(vectors, dtype=np.float32), spec.model)
        counted = (
            int(self._inner.token_count(list(texts))) if hasattr(self._inner, "token_count") else int(lengths.sum())
        )
        return Tally(counted, counted, 0)


def _put(out: Matrix, rows: npt.NDArray[np.intp], vectors: Matrix, model: Model) -> None:
    """Write the vectors of ``rows``. NumPy alone would repeat a single vector for all rows.

    Raises:
        ModelError: There are more or fewer than rows, or they are not of the model's length.
    """
    if vectors.shape != (len(rows), model.dimensions):
        raise ModelError(
            f"{model.name} gives a matrix of {vectors.shape} for {len(rows)} texts; "
            f"expected {(len(rows), model.dimensions)}.",
            remedy="Is it the model of this name?",
        )
    out[rows] = vectors


def is_memory_error(error: Exception) -> bool:
    """Whether an exception of Python or of ONNX Runtime, which has no class for it, says that memory ran out."""
    said = ("bad_alloc", "Failed to allocate memory", "failed to map segment", "Cannot allocate memory")
    return isinstance(error, MemoryError) or any(text in str(error) for text in said)


@contextlib.contextmanager
def _explained(model: Model, fault: str) -> Iterator[None]:
    """Errors of the libraries become a ModelError, or a ResourceError where memory ran out."""
    try:
        yield
    except KdbFastError:
        raise
    except Exception as error:
        if is_memory_error(error):
            raise memory_ran_out() from error
        raise ModelError(
            f"The model {model.name} {fault}: {type(error).__name__}: {' '.join(str(error).split())}",
            remedy=f"Fetch it again: kdb-fast models pull {model.name}",
        ) from error


def memory_ran_out() -> ResourceError:
    """The error that says that this process may not use the memory that a model needs."""
    return ResourceError(
        "Memory ran out while texts were embedded.",
        remedy="Raise the limit (ulimit -v, or the container's), or use fewer --workers or a smaller model; then run "
        "the same command again: what was committed is safe.",
    )


def mean_pool(hidden: npt.NDArray[np.float32], mask: Tokens) -> Matrix:
    """Mean of the token vectors that the mask marks, then unit length. float32, rows × dimensions.

    Same as FastEmbed's pooling to 1e-7; one matrix product instead of a masked sum in float64.
    """
    weights = mask.astype(np.float32)
    with np.errstate(all="ignore"):  # NaN and infinity are found in the result, row by row
        pooled = np.matmul(weights[:, None, :], hidden)[:, 0, :]
        norms = np.linalg.norm(pooled, axis=1, keepdims=True)
        result: Matrix = pooled / np.maximum(norms, 1e-12)
    return result


def _lower(inner: Any, spec: EncoderSpec) -> _OnnxBackend:
    if not is_plain(inner):
        raise ModelError(
            f"{spec.model.name} is no plain transformer, so it has no lower precision.", remedy="Use --precision fp32."
        )
    path = spec.prepared or spec.model.path / spec.model.model_file
    if not spec.on_openvino:
        from .precision.onnx_session import open_session

        with _explained(spec.model, f"in {spec.precision} cannot be loaded"):
            return _OnnxBackend(inner, open_session(path, spec.threads), prefix=spec.prefix)
    from .precision.openvino_backend import OpenVinoSession

    hint = "bf16" if "bf16" in (spec.precision, spec.unquantised_precision) else "f32"
    session = OpenVinoSession(path, precision=spec.precision, hint=hint, threads=spec.threads)
    return _OnnxBackend(inner, session, WIDTH_CLASS, spec.prefix)
