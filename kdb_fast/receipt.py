"""What a run says of itself at its end. Its counts while it goes on: :mod:`.accounting`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from .accounting import Fate
from .records import number_of

NEIGHBOURS = 10
"""Nearest records of a record that a comparison of two precisions looks at."""

FATES = tuple(fate.value for fate in Fate)
"""What becomes of a record that is read: one of these."""


@dataclass(frozen=True)
class Fidelity:
    """How close a lower precision came to fp32.

    Attributes:
        records: Size of the sample.
        cosine_mean: Mean cosine of a record's two vectors.
        cosine_min: The lowest of them.
        overlap: Mean share of the 10 nearest records in fp32 that are among the 10 nearest here too.
        speed: CPU time of fp32 ÷ CPU time of this precision, on this machine.
    """

    records: int
    cosine_mean: float
    cosine_min: float
    overlap: float
    speed: float

    def describe(self) -> str:
        """One line for people."""
        return (
            f"cosine with fp32 {self.cosine_mean:.5f} on average, {self.cosine_min:.5f} at worst, "
            f"{self.overlap:.1%} of the {NEIGHBOURS} nearest the same, {self.speed:.1f} times as fast "
            f"({number_of(self.records, 'record')})"
        )


@dataclass(frozen=True)
class Phases:
    """Seconds of each part of a run; ``embed`` and ``write`` are those of all processes together."""

    prepare: float = 0.0
    start: float = 0.0
    embed: float = 0.0
    write: float = 0.0
    index: float = 0.0


@dataclass(frozen=True)
class HostShare:
    """What a host of a cluster has done in a run.

    Attributes:
        name: Its host name and address.
        cpus: Of it that embed; 0 once it takes no part any more.
        records: Texts that were embedded there, and their tokens.
        deaths: Of embedding processes there, those that had to go with their host left out.
        left_out: Why it takes no part; '' while it does.
    """

    name: str
    cpus: int = 0
    records: int = 0
    tokens: int = 0
    deaths: int = 0
    left_out: str = ""

    def after(self, before: HostShare | None) -> HostShare:
        """This with what the host had done before."""
        if before is None:
            return self
        return replace(
            self,
            records=self.records + before.records,
            tokens=self.tokens + before.tokens,
            deaths=self.deaths + before.deaths,
        )


@dataclass(frozen=True)
class TargetNames:
    """Where the vectors of a table are, as messages name it.

    Attributes:
        name: Under which the target is kept.
        table: That which has the vectors.
        column: That of the vectors.
        key: The columns by which its rows are told apart.
    """

    name: str
    table: str
    column: str
    key: tuple[str, ...]

    def describe(self) -> str:
        """One line for people."""
        return f"{self.name}: column {self.column} of {self.table}, rows by {', '.join(self.key)}"


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """What a run has done, under the names that ``kdb-fast reindex --json`` prints and ``kdb_fast_runs`` keeps.

    Attributes:
        run: Number of the run.
        schema: That of the index's tables, or of kdb-fast's own ones.
        target: What was brought up to date; None for KameleonDB's index.
        state: ``done``, ``stopped`` or ``failed``.
        input: Name of what was read, '' for an input that cannot be read again.
        read: Records read; the sum of the next five once the run is done.
        stored: Records that were embedded and written.
        unchanged: Records whose text and model are stored already.
        reused: Records that were written with the vector of an equal text.
        superseded: Records of which a newer one was read, or whose row another program has written meanwhile.
        rejected: Records that could not be stored; ``kdb-fast rejects list`` says why.
        foreign: Of the unchanged those whose rows hold a vector of another program, which was left alone.
        empty: Records without text.
        deleted: What the index had of records that are gone; of a text in pieces one.
        truncated: Records that are longer than the model reads.
        lost_chars: Characters of these that it has not read, about; 0 for a provider's API, which does not tell.
        chunks: Pieces of the records that were written, where texts are cut into pieces.
        tokens: Tokens embedded; ``padded_tokens`` with the padding that was computed.
        seconds: Of the whole run.
        records_per_second: Records written, of the whole run; ``tokens_per_second`` likewise.
        model: Its name.
        dimensions: Length of the vectors.
        precision: That of the model; None for a provider's API.
        fidelity: How close a lower precision came to fp32; None for fp32.
        fingerprint: Differs as soon as anything differs that has a part in the vectors.
        document_prefix: What the model has read before each text.
        workers: Embedding processes, or requests in flight; 0 where this process embedded.
        hosts: Those of the cluster; empty for a run on one machine.
        plan: Processes and memory, in words; ``flush_size`` those of a flush.
        flushes: Transactions that have written.
        bytes_written: Of texts and vectors.
        index: What was done with the vector index, and why.
        phases: Seconds of each part.
        peak_rss_bytes: Memory of all processes at most; ``peak_rss_by_process`` of each.
        warnings: What a person should know.
        input_changed: The input was changed while it was read, so that records may have been missed.
        version: Of kdb-fast.
    """

    run: int = 0
    schema: str | None = None
    target: TargetNames | None = None
    state: str = ""
    input: str = ""
    read: int = 0
    stored: int = 0
    unchanged: int = 0
    reused: int = 0
    superseded: int = 0
    rejected: int = 0
    foreign: int = 0
    empty: int = 0
    deleted: int = 0
    truncated: int = 0
    lost_chars: int = 0
    chunks: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    seconds: float = 0.0
    records_per_second: float = 0.0
    tokens_per_second: float = 0.0
    model: str = ""
    dimensions: int = 0
    precision: str | None = None
    document_prefix: str = ""
    fidelity: Fidelity | None = None
    fingerprint: str = ""
    workers: int = 0
    hosts: tuple[HostShare, ...] = ()
    plan: str = ""
    flushes: int = 0
    flush_size: str = ""
    bytes_written: int = 0
    index: str = ""
    phases: Phases = Phases()
    peak_rss_bytes: int = 0
    peak_rss_by_process: dict[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    input_changed: bool = False
    version: str = ""

    @property
    def written(self) -> int:
        """Records whose vector is in the index since this run."""
        return self.stored + self.reused

    @property
    def fates(self) -> dict[str, int]:
        """How many of the records read came to each end, by its name."""
        return {fate: getattr(self, fate) for fate in FATES}

    def as_json(self) -> dict[str, Any]:
        """The values to be printed or stored, in the order of the fields."""
        return asdict(self, dict_factory=_with_lists)

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Receipt:
        """The receipt that was stored with these values; what the version that stored it did not know is left empty."""
        known = _known(Receipt, values)
        for name, kind in (("phases", Phases), ("fidelity", Fidelity), ("target", TargetNames)):
            if known.get(name) is not None:
                known[name] = kind(**_with_tuples(_known(kind, known[name])))
        known["warnings"] = tuple(known.get("warnings", ()))
        known["hosts"] = tuple(HostShare(**_known(HostShare, host)) for host in known.get("hosts", ()))
        return Receipt(**known)


def _with_lists(items: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in items}


def _with_tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _known(kind: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    return {f.name: values[f.name] for f in fields(kind) if f.name in values}


@dataclass(frozen=True)
class RejectedLine:
    """A rejected record of an input: its line (0 where that is not known), and the id it was inserted under, or ''."""

    line: int
    record_id: str
    reason: str
    detail: str


@dataclass(frozen=True, kw_only=True)
class InsertReceipt(Receipt):
    """The receipt of an insert, as ``kdb-fast insert --json`` prints it.

    Attributes:
        inserted: Records that were inserted.
        ids: Ids of the first few of these.
        pending: Records inserted and not indexed, although they have text.
        rejects: The first rejected records.
    """

    inserted: int = 0
    ids: tuple[str, ...] = ()
    pending: int = 0
    rejects: tuple[RejectedLine, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Retried:
    """What became of rejected records that were tried again, as ``kdb-fast rejects retry --json`` prints it.

    Attributes:
        rejects_before: Rejects before the run.
        remaining: Rejects of records, after it.
        lines_of_inserts: By entity, rejected lines of inserts: these are not in the database.
        lines_of_files: The same of files, for entities that KameleonDB does not define.
        receipt: Of the run; None if there was nothing to try.
    """

    rejects_before: int
    remaining: int
    lines_of_inserts: dict[str, int]
    lines_of_files: dict[str, int]
    receipt: Receipt | None

    def as_json(self) -> dict[str, Any]:
        """The values to be printed, in the order of the fields."""
        return {**vars(self), "receipt": self.receipt.as_json() if self.receipt else None}
