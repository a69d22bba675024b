"""Is kdb-fast faster than what people use, on real records, from start to searchable?"""

from __future__ import annotations

from typing import Any

from kdb_fast.embedding.precision.support import unsupported

from .chart import Bar
from .measure import spread
from .options import Options
from .results import Requirement, Result, Table
from .runner import Contender, alternate, ran, raw, run_once
from .session import session

RECORDS, SAMPLE, LONG = 5000, 600, 1000
FASTEMBED_SAMPLE = 256
"""One of FastEmbed's batches. All 5,000 took more than ten minutes and 15 GB of memory, where kdb-fast took 78 s."""
WORKER_LIMIT_MB = 400.0
OVER_FASTEMBED, OVER_KAMELEONDB = 1.8, 2.0
"""Required ratios of records a second: kdb-fast's whole job to the embedding alone, and to one record at a time."""


def run(options: Options) -> Result:
    """Measure the part."""
    with session(options) as s:
        docs = s.dataset("docs", options.size(RECORDS, 220))
        long = s.dataset("long", options.size(LONG, 8))
        sample, sample_batches = options.size(SAMPLE, 20), options.size(FASTEMBED_SAMPLE, 24)
        database = {"conninfo": s.conninfo}
        # Prepares a lower precision: once for an index, so it is not in the times of the runs.
        prepared = run_once("precision", {**docs.params(options.size(1000, 220)), **database, "precision": "auto"})
        s.reset()
        outcomes = alternate(
            [
                Contender("kdb-fast, whole job", "reindex", {**docs.params(), **database}, ours=True),
                Contender("kdb-fast, --precision auto", "reindex",
                          {**docs.params(), **database, "precision": "auto"}, ours=True),
                Contender("FastEmbed default, embedding only", "fastembed",
                          docs.params(sample_batches), f"sample of {min(sample_batches, docs.records):,}"),
                Contender("KameleonDB's way, one at a time", "kameleondb_way", {**docs.params(sample), **database},
                          f"sample of {min(sample, docs.records):,}"),
            ],
            s.runs,
            s.reset,
        )  # fmt: skip
        s.reset()
        longest = run_once("reindex", {**long.params(), **database, "workers": 2})
        start = run_once("help", {"records": options.size(10, 3)})
    ours, auto, fastembed, kameleondb = outcomes.values()
    lower = any(run["precision"] != "fp32" for run in auto.runs)
    how = "; ".join(dict.fromkeys(f"{r['precision']} {_fidelity(r['fidelity'])}" for r in auto.runs))
    # Why not faster, where the machine is the reason.
    why = "" if lower else "".join(f"; {p}: {reason}" for p in ("int8", "bf16") if (reason := unsupported(p)))
    tokens = docs.stats.read / docs.records
    pss = [run["worker_pss_bytes"] / 1e6 for run in ours.runs]
    rows = [
        [
            o.contender.label + (f" ({o.contender.note})" if o.contender.note else ""),
            spread(o.rates).text(0),
            spread(r * tokens for r in o.rates).text(0),
            f"{docs.records / spread(o.rates).median:,.0f} s",
            spread(b / 1e6 for b in o.values("peak_pss_bytes")).text(0),
        ]
        for o in ran(outcomes)
    ]
    return Result(
        "demo",
        "How long does it take to make the demo's records searchable?",
        s.lines,
        [
            "kdb-fast: from the call of `reindex` to all indexes built, the start of its processes and the loading of "
            "the model included. The others have their model loaded and their table made beforehand; FastEmbed writes "
            "nothing.",
            f"auto chose {how}{why}. Its preparation took {_seconds(prepared)} once and is not in the times.",
            *([] if lower else [f"Not required of auto in fp32: {OVER_KAMELEONDB:g} × one record at a time."]),
            "Memory is the proportional set size of all processes of a contender at one moment, without the server.",
        ],
        [
            Table(
                "Records into PostgreSQL",
                ("contender", "records/s", "tokens/s", "all records", "memory MB"),
                rows,
            ),
            Table(
                "Time of kdb-fast by phase, s (worker time; phases overlap)",
                ("run", "whole", "start", "embed", "write", "index", "padding"),
                [
                    [str(i + 1), f"{r['seconds']:.1f}", *(f"{r['phases'][p]:.1f}" for p in
                     ("start", "embed", "write", "index")), f"{1 - r['tokens'] / max(1, r['padded_tokens']):.1%}"]
                    for i, r in enumerate(ours.runs)
                ],
            ),
        ],
        [
            Requirement("kdb-fast ÷ FastEmbed (embedding only)", ours.ratio(fastembed), OVER_FASTEMBED, unit="×"),
            Requirement("kdb-fast ÷ one record at a time", ours.ratio(kameleondb), OVER_KAMELEONDB, unit="×"),
            *([Requirement("the same with --precision auto", auto.ratio(kameleondb), OVER_KAMELEONDB, unit="×")]
              if lower else []),
            Requirement("largest worker, these records", spread(pss), WORKER_LIMIT_MB, True, " MB"),
            Requirement("largest worker, texts of 5,000 words", spread([longest["worker_pss_bytes"] / 1e6]),
                        WORKER_LIMIT_MB, True, " MB"),
            Requirement("`kdb-fast --help`", spread([start["median_seconds"]]), 0.2, True, " s"),
        ],
        ("Records a second, ready to search", "records/s",
         [Bar(o.contender.label, spread(o.rates), o.contender.ours) for o in ran(outcomes)]),
        {**raw(outcomes.values()), "long": longest, "help": start},
    )  # fmt: skip


def _fidelity(found: dict[str, float] | None) -> str:
    if found is None:
        return "(nothing lower)"
    return f"(cosine with fp32 {found['cosine_mean']:.5f}, least {found['cosine_min']:.5f})"


def _seconds(prepared: dict[str, Any]) -> str:
    return f"{prepared['phases']['prepare']:.0f} s" if "phases" in prepared else "no time"
