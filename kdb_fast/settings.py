"""Option objects: frozen, checked when built, no defaults hidden elsewhere."""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from .errors import RejectLimitError, UsageError
from .records import number_of

DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
DEFAULT_BATCH_SIZE = 100
"""Default of ``--batch-size``: the specification's."""
MAX_BATCH_SIZES = {"fastembed": 1000, "openai": 2048}
"""Upper limit of ``--batch-size`` by provider: the specification's table."""
MAX_WORKERS = 256
MAX_CLUSTER_WORKERS = 16_384
"""Of a cluster: one CPU each."""
PRECISIONS = ("fp32", "bf16", "int8", "auto")
LEAST_CHUNK = 32
"""Least ``--chunk``: tokens of a piece, of which some are the model's special ones."""
INDEX_POLICIES = ("keep", "defer", "concurrently", "none")
"""What may be done with the indexes of the vectors: :class:`kdb_fast.tables.index_policy.IndexPolicy`."""

PATIENCE_SECONDS = 60.0
"""How long a database that went away is waited for: longer than a restart, shorter than a person's patience.
Environment: ``KDB_FAST_PATIENCE``."""

_CLUSTER = re.compile(r"(ray://)?[^/\s@]+:\d+")

SILENCE_SECONDS = 20.0
"""Silence after which a server is asked whether it still works. Environment: ``KDB_FAST_SILENCE``."""


def patience_seconds() -> float:
    """``KDB_FAST_PATIENCE``, or the default. Raises UsageError for what is no number of seconds."""
    return _seconds("KDB_FAST_PATIENCE", PATIENCE_SECONDS)


def silence_seconds() -> float:
    """``KDB_FAST_SILENCE``, or the default. Raises UsageError for what is no number of seconds."""
    return _seconds("KDB_FAST_SILENCE", SILENCE_SECONDS)


def _seconds(name: str, default: float) -> float:
    text = os.environ.get(name)
    if not text:
        return default
    with contextlib.suppress(ValueError):
        if 0 < float(text) < 1e6:
            return float(text)
    raise UsageError(f"{name} is {text!r}; expected seconds, more than 0.")


@dataclass(frozen=True, kw_only=True)
class RejectLimit:
    """How many records may be rejected before a run stops: a count or a share of the records read."""

    count: int | None = None
    share: float | None = 0.01

    GRACE = 100
    """A share is judged once this many records were read: 1 bad record in the first 10 is no trend."""

    @classmethod
    def parse(cls, text: str) -> RejectLimit:
        """``"25"`` is a count, ``"1%"`` a share of the records read. Raises UsageError for anything else."""
        try:
            if text.endswith("%"):
                share = float(text[:-1]) / 100
                if not 0 <= share <= 1:
                    raise ValueError
                return cls(share=share)
            count = int(text)
            if count < 0:
                raise ValueError
            return cls(count=count, share=None)
        except ValueError:
            raise UsageError(
                f"--max-rejects is {text!r}; expected a number such as 25 or a share such as 1%."
            ) from None

    def exceeded(self, *, rejected: int, read: int, finished: bool = False) -> bool:
        """Whether the run must stop now. A share is judged after ``GRACE`` records, or when all were read."""
        if self.count is not None:
            return rejected > self.count
        assert self.share is not None
        if read < self.GRACE and not finished:
            return False
        # At least one record may always be bad: 1 % of a small table would allow none.
        return rejected > max(1.0, self.share * read)

    def check(self, *, rejected: int, read: int, finished: bool = False) -> None:
        """Go on only within the limit.

        Raises:
            RejectLimitError: It is :meth:`exceeded`.
        """
        if self.exceeded(rejected=rejected, read=read, finished=finished):
            raise RejectLimitError(
                f"{rejected} of {number_of(read, 'record was', 'records were')} rejected; --max-rejects allows {self}.",
                remedy="See why with `kdb-fast rejects list`; raise the limit with --max-rejects.",
            )

    def __str__(self) -> str:
        return str(self.count) if self.count is not None else f"{100 * (self.share or 0):g}%"


@dataclass(frozen=True)
class ExpectedCount:
    """How many records an input must have. A pipe whose other end failed looks like one that has ended."""

    count: int
    or_more: bool = False

    @classmethod
    def parse(cls, text: str) -> ExpectedCount:
        """``"500"`` is exactly so many, ``"1+"`` at least. Raises UsageError for anything else."""
        digits = text.removesuffix("+")
        if not (digits.isascii() and digits.isdigit()):
            raise UsageError(f"--expect-count is {text!r}; expected a number such as 500, or 1+ for at least one.")
        return cls(int(digits), text.endswith("+"))

    def missed(self, read: int) -> str:
        """What to say where ``read`` records are not what was expected; '' where they are."""
        if read == self.count or (self.or_more and read > self.count):
            return ""
        expected = f"{'at least ' if self.or_more else ''}{self.count:,}"
        return f"{number_of(read, 'record was', 'records were')} read, expected {expected}."


def check_prefix(of: str, prefix: str) -> None:
    """Refuse a prefix that no model can read.

    Args:
        of: ``document`` or ``query``: which option it is.

    Raises:
        UsageError: It holds a NUL or a lone surrogate.
    """
    fault = "a NUL character" if "\x00" in prefix else ""
    try:
        prefix.encode()
    except UnicodeEncodeError:
        fault = "a lone surrogate, which is not valid Unicode"
    if fault:
        raise UsageError(f"--{of}-prefix holds {fault}; expected text.")


@dataclass(frozen=True, kw_only=True)
class ReindexOptions:
    """What ``kdb-fast reindex`` was asked to do.

    Attributes:
        entities: Names of the entities to index; empty means all.
        model: Name of the model.
        model_path: Directory of a model to use instead of looking ``model`` up.
        batch_size: Most rows in one model run (1 to 1,000) or request (openai: to 2,048). A cap: batches also obey
            a token budget.
        workers: Number of embedding processes; None means one for each CPU this process may use, or the cluster has.
        cluster: Ray cluster whose CPUs embed: ``auto``, ``ray://HOST:PORT`` or HOST:PORT; None for this machine.
        force: Embed every record, also those whose text and model are unchanged.
        limit: Read at most this many records.
        wait: Seconds to wait for another run to end; 0 refuses at once.
        max_rejects: When to give up on bad input.
        precision: ``fp32``, ``bf16``, ``int8`` or ``auto``.
        min_fidelity: Least mean cosine with fp32 that a lower precision must reach on the user's records.
        provider: ``fastembed`` or ``openai``.
        base_url: Address of the openai provider's API; None is that of the environment, else OpenAI's.
        dimensions: Length of a vector of the openai provider; None is that of the index, for a new one the model's.
        chunk: Tokens of a piece that texts are cut into, in a table target; 0 for whole texts.
        overlap: Tokens that two neighbouring pieces share.
        document_prefix: What the model reads before each text; it is no part of the text that is stored.
        index: What is done with the indexes of the vectors: ``keep``, ``defer`` (dropped and built again where that
            pays), ``concurrently`` or ``none``; None is ``defer`` for tables of ours and ``keep`` for a column of the
            user's.
    """

    entities: tuple[str, ...] = ()
    model: str = DEFAULT_MODEL
    model_path: Path | None = None
    batch_size: int = DEFAULT_BATCH_SIZE
    workers: int | None = None
    force: bool = False
    limit: int | None = None
    wait: float = 0.0
    max_rejects: RejectLimit = RejectLimit()
    precision: str = "fp32"
    min_fidelity: float | None = None
    provider: str = "fastembed"
    base_url: str | None = None
    dimensions: int | None = None
    chunk: int = 0
    overlap: int = 0
    document_prefix: str = ""
    index: str | None = None
    cluster: str | None = None

    def __post_init__(self) -> None:
        if self.index is not None and self.index not in INDEX_POLICIES:
            raise UsageError(f"--index is {self.index!r}; expected one of {', '.join(INDEX_POLICIES)}.")
        if self.provider not in MAX_BATCH_SIZES:
            raise UsageError(f"The provider is {self.provider!r}; expected {' or '.join(MAX_BATCH_SIZES)}.")
        if self.precision not in PRECISIONS:
            raise UsageError(f"--precision is {self.precision!r}; expected one of {', '.join(PRECISIONS)}.")
        if self.provider != "fastembed" and self.precision != "fp32":
            raise UsageError(f"--precision {self.precision} belongs to models on this machine, not to {self.provider}.")
        for option, given in (("base-url", self.base_url), ("dimensions", self.dimensions)):
            if given is not None and self.provider != "openai":
                raise UsageError(f"--{option} belongs to --provider openai, not to {self.provider}.")
        if self.dimensions is not None and self.dimensions < 1:
            raise UsageError(f"--dimensions is {self.dimensions}; expected 1 or more.")
        if self.chunk and self.chunk < LEAST_CHUNK:
            raise UsageError(f"--chunk is {self.chunk}; expected {LEAST_CHUNK} tokens or more, or 0 for whole texts.")
        if not 0 <= self.overlap <= self.chunk // 2:
            raise UsageError(
                f"--overlap is {self.overlap}; expected 0 to {self.chunk // 2}, half of --chunk {self.chunk}."
                if self.chunk
                else f"--overlap is {self.overlap}; it belongs to --chunk."
            )
        if self.chunk and self.provider != "fastembed":
            raise UsageError(
                f"--chunk needs a model on this machine, whose tokenizer counts; not {self.provider}.",
                remedy="Use a model on this machine, or leave --chunk out.",
            )
        if self.min_fidelity is not None and not 0 < self.min_fidelity <= 1:
            raise UsageError(f"--min-fidelity is {self.min_fidelity}; expected a cosine above 0, at most 1.")
        most = MAX_BATCH_SIZES[self.provider]
        if not 1 <= self.batch_size <= most:
            raise UsageError(f"--batch-size is {self.batch_size}; expected 1 to {most:,} with {self.provider}.")
        most_workers = MAX_CLUSTER_WORKERS if self.cluster else MAX_WORKERS
        if self.workers is not None and not 1 <= self.workers <= most_workers:
            raise UsageError(f"--workers is {self.workers}; expected 1 to {most_workers:,}.")
        if self.cluster is not None and self.provider != "fastembed":
            raise UsageError(f"--cluster is for models on its hosts, not for {self.provider}.")
        if self.cluster is not None and self.cluster != "auto" and not _CLUSTER.fullmatch(self.cluster):
            raise UsageError(f"--cluster is {self.cluster!r}; expected auto, ray://HOST:10001 or HOST:6379.")
        if self.limit is not None and self.limit < 1:
            raise UsageError(f"--limit is {self.limit}; expected 1 or more.")
        check_prefix("document", self.document_prefix)
        if self.wait < 0:
            raise UsageError(f"--wait is {self.wait}; expected seconds, 0 or more.")
