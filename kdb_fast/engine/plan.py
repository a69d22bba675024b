"""How a run is carried out on this machine: workers, slots, token budget — each with its reason."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..embedding.batching import TOKEN_BUDGET
from ..ipc.slab import SlabShape
from ..records import number_of
from ..resources import available_memory, cpu_list, cpu_quota, usable_cpus
from .sharding import SHARD_ROWS

WORKER_BYTES = 350_000_000
"""Memory to allow for one worker besides its model's files: interpreter, libraries, activations of 512 tokens, kernels
that OpenVINO compiles. MiniLM takes 270 (fp32) to 350 MB in all where two share its files."""

INLINE_ROWS = 200
"""Up to so many rows this process embeds them itself: 200 take about 1.3 s, as long as starting workers does."""

FLUSH_SLOTS = 64
"""Slots beside those that the workers have: half of them are filled while the other half is written, about 4,000 rows.
The fixed cost of a transaction (20 ms) is a seventh of the time with 2,000 rows, and half of that with 4,000."""

MEMORY_FOR_SLAB = 16
"""The slab takes at most available memory ÷ 16."""


@dataclass(frozen=True)
class Plan:
    """What was chosen, and why."""

    workers: int
    cpus: list[int]
    shape: SlabShape
    token_budget: int
    reasons: tuple[str, ...]

    def because(self, reason: str) -> Plan:
        """The same with one more reason."""
        return replace(self, reasons=(*self.reasons, reason))

    def describe(self) -> str:
        """One line for people."""
        return "; ".join(self.reasons)


def make_plan(
    *,
    workers: int | None,
    dimensions: int,
    model_bytes: int,
    shard_rows: int | None = None,
    token_budget: int = TOKEN_BUDGET,
    why: str = "--workers",
    growth: int = 1,
    elsewhere: bool = False,
) -> Plan:
    """Choose workers and slots for this machine.

    Args:
        workers: What the user asked for, or None.
        dimensions: Length of a vector.
        model_bytes: Memory that the model's files take in every worker.
        token_budget: Of the encoder's batches.
        why: Where ``workers`` comes from.
        growth: So many times as many workers may join during the run.
        shard_rows: Rows of a slot; None for SHARD_ROWS. Of larger ones there are fewer.
        elsewhere: The workers are on other machines, by the hundred: the slots' text areas grow.
    """
    reasons: list[str] = []
    cpus, memory = cpu_list(), available_memory()
    if workers is None:
        by_cpu = usable_cpus()
        need = WORKER_BYTES + model_bytes
        by_memory = max(1, int(memory * 0.7) // need)
        workers = min(by_cpu, by_memory)
        quota = cpu_quota()
        if by_memory < by_cpu:
            why = f"memory: {memory / 1e9:.1f} GB available, {need / 1e9:.2f} GB each"
        elif quota is not None and quota < (len(cpus) or by_cpu):
            why = f"CPU quota {quota:g}"
        else:
            why = f"{number_of(by_cpu, 'CPU')} usable"
        reasons.append(f"{number_of(workers, 'worker')} × 1 thread ({why})")
    else:
        reasons.append(f"{number_of(workers, 'worker')} × 1 thread ({why})")
    rows = shard_rows or SHARD_ROWS
    wanted = max(2 * workers + 2, (3 * growth * workers + FLUSH_SLOTS) * SHARD_ROWS // max(rows, SHARD_ROWS))
    one = SlabShape(1, rows, dimensions, grows=elsewhere).first_bytes
    slots = max(2 * workers + 2, min(wanted, memory // MEMORY_FOR_SLAB // one))
    limited = "" if slots == wanted else ", limited by memory"
    reasons.append(f"{slots} slots of {rows} rows ({slots * one / 1e6:.0f} MB shared{limited})")
    reasons.append(f"batches of up to {token_budget:,} tokens (the cache)")
    return Plan(workers, cpus, SlabShape(slots, rows, dimensions, grows=elsewhere), token_budget, tuple(reasons))


def inline_shape(dimensions: int) -> SlabShape:
    """Slots for a run in this process."""
    return SlabShape(4, SHARD_ROWS, dimensions)
