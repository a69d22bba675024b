"""What gives the vectors of a run: the model or the provider that the options name, in the precision chosen for it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from ..db.address import DatabaseAddress
from ..embedding.chunking import Splitter, check_size, chunked_fingerprint
from ..embedding.encoder import EncoderSpec
from ..embedding.models.lookup import resolve
from ..embedding.providers.base import EmbeddingProvider
from ..embedding.providers.prefixed import PrefixedProvider
from ..errors import ModelError, UsageError
from ..origins import same_name
from ..receipt import Fidelity
from ..settings import DEFAULT_MODEL, ReindexOptions
from ..sources.base import Source
from ..stores.past_runs import index_model_of, recent_fingerprints
from ..tables.kdb_search import KDB_SEARCH
from .intake import Split
from .progress import Progress

if TYPE_CHECKING:
    from ..embedding.precision.choice import Choice


@dataclass(frozen=True)
class Embedding:
    """What gives the vectors of a run: a model on this machine (``spec``) or a provider's API (``provider``).

    ``read_chars`` are the characters of a text that count for the size of its shard.
    """

    name: str
    dimensions: int
    fingerprint: str
    read_chars: int
    spec: EncoderSpec | None = None
    provider: EmbeddingProvider | None = None
    fidelity: Fidelity | None = None
    why: str = ""
    """Why this precision, for the plan; '' for what was asked for without a comparison."""
    seconds: float = 0.0
    """What it took to find it: a download, or the preparation of a precision."""
    split: Split | None = None
    """Cuts a text into the pieces that are embedded in its place."""

    def in_pieces(self, size: int, overlap: int) -> Embedding:
        """The same for pieces of texts, of at most ``size`` tokens.

        Raises:
            UsageError: The model reads fewer, or is no model on this machine.
        """
        spec = self.spec
        if spec is None:
            raise UsageError("Texts are cut into pieces only for a model on this machine, whose tokenizer counts.")
        check_size(spec.model, size)
        # Loaded with the first text: many runs have none that has changed.
        splitter = functools.cache(functools.partial(Splitter.of_model, spec.model, size, overlap, spec.prefix))
        fingerprint = chunked_fingerprint(self.fingerprint, size, overlap)
        return replace(self, fingerprint=fingerprint, split=lambda text: splitter().split(text))

    @classmethod
    def of_model(cls, spec: EncoderSpec) -> Embedding:
        """A model on this machine, in fp32."""
        return cls(spec.model.name, spec.model.dimensions, spec.fingerprint(), spec.read_chars, spec)

    @classmethod
    def of_provider(cls, provider: EmbeddingProvider) -> Embedding:
        """A provider that is called from this process."""
        fingerprint, name, dimensions = provider.maker()
        return cls(name, dimensions, fingerprint, provider.read_chars, provider=provider)

    def with_prefix(self, prefix: str) -> Embedding:
        """The same, reading ``prefix`` before each text."""
        if not prefix:
            return self
        if self.provider is not None:
            return Embedding.of_provider(PrefixedProvider(self.provider, prefix))
        assert self.spec is not None
        return Embedding.of_model(replace(self.spec, prefix=prefix))

    def close(self) -> None:
        """Close the provider's connections."""
        if self.provider is not None:
            self.provider.close()


class Records(NamedTuple):
    """What a precision is chosen for."""

    address: DatabaseAddress
    source: Source
    should_stop: Callable[[], bool]
    target: str = KDB_SEARCH.name
    """Name of the target that they go to."""


def find_embedding(options: ReindexOptions, progress: Progress, records: Records | None = None) -> Embedding:
    """The model or provider that the options name.

    Args:
        options: What was asked for.
        progress: Told of steps that take time.
        records: What a lower precision is calibrated on and compared with fp32 on; needed for one.

    Raises:
        ModelError: The model is not to be had, or unfit.
        UsageError: The provider lacks a key or a package.
    """
    if options.provider == "fastembed":
        model = resolve(options.model, options.model_path, report=progress.note)
        spec = EncoderSpec(model, options.batch_size, prefix=options.document_prefix)
        exact = Embedding.of_model(spec)
        if options.precision == "fp32":
            return exact
        assert records is not None
        choice = _choose_precision(options, spec, progress, records)
        return replace(
            exact, fingerprint=choice.fingerprint, spec=choice.spec, fidelity=choice.fidelity, why=choice.why
        )
    provider = _open_provider(options, records)
    try:
        return Embedding.of_provider(provider).with_prefix(options.document_prefix)
    except BaseException:
        provider.close()
        raise


def _open_provider(options: ReindexOptions, records: Records | None) -> EmbeddingProvider:
    """The API's provider, for vectors of the length that was asked for, that the index has or that the model gives."""
    from ..embedding.providers.openai.provider import OPENAI_MODEL, OpenAIProvider
    from ..errors import ProviderKeyError

    name = options.model if options.model != DEFAULT_MODEL else OPENAI_MODEL
    is_new, made = False, None
    if records is not None:
        # What is known of another target's vectors is in the options.
        is_new, made = index_model_of(records.address) if records.target == KDB_SEARCH.name else (True, None)
    length: dict[str, Any] = {}
    if options.dimensions is not None:
        length = {"dimensions": options.dimensions}
    elif made and made.dimensions and made.name and same_name(made.name, name):
        length = {"dimensions": made.dimensions}
    threads = options.workers or OpenAIProvider.concurrent_calls
    provider = OpenAIProvider(
        model=name, base_url=options.base_url, max_inputs=options.batch_size, concurrency=threads, **length
    )
    if is_new and not length and provider.is_elsewhere:
        try:
            provider.settle()
        except (ProviderKeyError, ModelError):
            pass  # the run says so, and keeps it
        except BaseException:
            provider.close()
            raise
    return provider


def _choose_precision(options: ReindexOptions, spec: EncoderSpec, progress: Progress, records: Records) -> Choice:
    from ..embedding.precision.choice import PrecisionSelector

    progress.step("choosing the precision")
    target = "" if records.target == KDB_SEARCH.name else records.target
    selector = PrecisionSelector(
        spec,
        index=" ".join(filter(None, (records.address.display, records.address.schema, target))),
        history=recent_fingerprints(records.address, records.target),
        sample=records.source.sample,
        report=progress.note,
        should_stop=records.should_stop,
    )
    return selector.choose(options.precision, options.min_fidelity)
