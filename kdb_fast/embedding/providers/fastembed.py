"""FastEmbed as a provider: the model runs in this process, and in worker processes where there is much to embed."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ...errors import MissingPackageError, OptionError
from ...settings import DEFAULT_BATCH_SIZE, MAX_BATCH_SIZES
from ..encoder import Encoder, EncoderSpec, Matrix, Tally
from ..models.cache import directory_name
from ..models.lookup import resolve
from .base import MatrixProvider, listed
from .texts import raise_unfit, unfit_rows, why_unfit

FASTEMBED_MODEL = "BAAI/bge-small-en-v1.5"
"""KameleonDB's default."""


class FastEmbedProvider(MatrixProvider):
    """A FastEmbed model in this process. The model is fetched and loaded on first use.

    Args:
        model_name: FastEmbed's name of the model.
        cache_dir: Directory that holds models as kdb-fast keeps them (``kdb-fast models path``), instead of its
            own. Nothing is fetched into it.
        model: Another name for ``model_name``, KameleonDB's.
        model_path: Directory of this one model.
        batch_size: Most texts of one run of the model, 1 to 1,000.
        threads: CPU threads; one is fastest where several processes embed.

    Raises:
        MissingPackageError: FastEmbed is not installed.
        OptionError: An option is not known or makes no sense.
    """

    limits_of = "fastembed"

    def __init__(
        self,
        model_name: str = FASTEMBED_MODEL,
        cache_dir: str | Path | None = None,
        *,
        model: str | None = None,
        model_path: str | Path | None = None,
        batch_size: int = DEFAULT_BATCH_SIZE,
        threads: int = 1,
        **options: object,
    ) -> None:
        if options:
            raise OptionError(
                f"The fastembed provider has no option {', '.join(sorted(options))}.",
                remedy="It takes model_name, cache_dir, model_path, batch_size and threads.",
            )
        if importlib.util.find_spec("fastembed") is None:
            raise MissingPackageError(
                "The fastembed provider needs the package fastembed.", remedy="Run: pip install kdb-fast"
            )
        most = MAX_BATCH_SIZES["fastembed"]
        if not 1 <= batch_size <= most:
            raise OptionError(f"batch_size is {batch_size}; expected 1 to {most:,}.")
        if threads < 1:
            raise OptionError(f"threads is {threads}; expected at least 1.")
        self._model_name = model or model_name
        self._path = Path(model_path) if model_path else None
        if self._path is None and cache_dir is not None:
            self._path = Path(cache_dir) / directory_name(self._model_name)
        self._batch_size, self._threads = batch_size, threads
        self._lock = threading.Lock()
        self._spec: EncoderSpec | None = None
        self._encoder: Encoder | None = None

    @property
    def spec(self) -> EncoderSpec:
        """What a worker process needs to build the same encoder. Resolves the model. Raises ModelError."""
        with self._lock:
            if self._spec is None:
                self._spec = EncoderSpec(resolve(self._model_name, self._path), self._batch_size, threads=self._threads)
            return self._spec

    @property
    def encoder(self) -> Encoder:
        """The encoder in this process. Loads the model. Raises ModelError."""
        spec = self.spec
        with self._lock:
            if self._encoder is None:
                self._encoder = Encoder(spec)
            return self._encoder

    def worker_spec(self) -> EncoderSpec:
        return self.spec

    def fingerprint(self) -> str:
        return self.spec.fingerprint()

    @property
    def max_tokens(self) -> int:  # type: ignore[override]  # the model's: it cannot be set
        """Window of the model in tokens. Resolves the model. Raises ModelError."""
        return self.spec.model.max_tokens

    @property
    def read_chars(self) -> int:
        return self.spec.read_chars

    @property
    def dimensions(self) -> int:
        return self.spec.model.dimensions

    @property
    def model_name(self) -> str:
        return self._model_name

    def embed_matrix(self, texts: Sequence[str]) -> Matrix:
        """The vectors as float32, len(texts) × dimensions. Raises ProviderInputError and ModelError."""
        raise_unfit(listed(texts), why_unfit)
        return self.encoder.embed(texts)

    def embed_into(self, texts: Sequence[str], out: Matrix) -> tuple[Tally, dict[int, str]]:
        refused = unfit_rows(texts, why_unfit)
        rows = [row for row in range(len(texts)) if row not in refused]
        out[list(refused)] = 0
        if not rows:
            return Tally(0, 0, 0), refused
        if not refused:
            return self.encoder.encode(texts, out), refused
        part = np.empty((len(rows), self.dimensions), np.float32)
        tally = self.encoder.encode([texts[row] for row in rows], part)
        out[rows] = part
        return tally, refused

    def self_test(self) -> None:
        self.encoder.self_test()

    def __repr__(self) -> str:
        return f"FastEmbedProvider({self._model_name!r})"
