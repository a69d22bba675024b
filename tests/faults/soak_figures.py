"""What a soak found, for programs and for people."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Figures:
    """What a soak found."""

    seconds: float
    seed: int
    targets: list[str]
    records: int = 0
    faults: dict[str, int] = field(default_factory=dict)
    runs: int = 0
    exit_codes: dict[str, int] = field(default_factory=dict)
    rows_committed: int = 0
    complete_checks: int = 0
    longest_stall_seconds: float = 0.0
    longest_orphan_seconds: float = 0.0
    stopped_while_starting: int = 0
    rows_lost: int = 0
    rows_doubled: int = 0
    rows_without_record: int = 0
    vectors_wrong: int = 0
    counts_wrong: int = 0
    hangs: int = 0
    children_left: int = 0
    shared_memory_left: int = 0
    secrets_shown: int = 0
    unexpected: list[str] = field(default_factory=list)
    oracle: str = "not reached"

    @property
    def good(self) -> bool:
        return self.oracle == "agrees" and not any(getattr(self, name) for name in MUST_BE_NOTHING)


MUST_BE_NOTHING = (
    "rows_lost",
    "rows_doubled",
    "rows_without_record",
    "vectors_wrong",
    "counts_wrong",
    "hangs",
    "children_left",
    "shared_memory_left",
    "secrets_shown",
    "unexpected",
)


def by_count(counts: dict[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: -item[1])


def report(figures: Figures) -> str:
    """The figures for people."""
    lines = [f"{sum(figures.faults.values())} faults in {figures.seconds:.0f} s (seed {figures.seed}):"]
    lines += [f"  {count:>5}  {name}" for name, count in by_count(figures.faults)]
    codes = ", ".join(f"{code} × {count}" for code, count in by_count(figures.exit_codes))
    targets = ", ".join(figures.targets)
    lines.append(f"{figures.runs} runs over {figures.records} records ({targets}); exit codes: {codes}")
    shown = (
        "rows_committed",
        "complete_checks",
        "longest_stall_seconds",
        "longest_orphan_seconds",
        "stopped_while_starting",
        *MUST_BE_NOTHING[:-1],
    )
    lines += [f"  {name.replace('_', ' '):<24} {getattr(figures, name)}" for name in shown]
    lines += [f"unexpected: {text}" for text in figures.unexpected]
    lines.append(f"oracle: {figures.oracle}")
    return "\n".join(lines)
