"""How long do 30,000 records take, with each system that people use and each precision of kdb-fast?"""

from __future__ import annotations

from typing import Any

from kdb_fast.embedding.precision.support import int8_on_openvino

from .chart import Bar
from .measure import spread
from .options import STRESS_SETS, Options, say
from .results import Requirement, Result, Table
from .runner import BenchError, Contender, Outcome, alternate, ran, raw, run_once
from .session import DataSet, Session, session

RECORDS = 30_000
ONE_BY_ONE, BATCHED = {"contacts": RECORDS, "tickets": 600, "mixed": 600}, 3000
"""Samples of the slow ones, in records: their rate does not rise with the number, and their index stays smaller."""

ALONE, ONE_CALL = "encoder alone, fp32", "one embed() and one upsert a record"
INT8 = "kdb-fast int8"
EXECUTEMANY, PARALLEL = "FastEmbed + executemany", "FastEmbed parallel + COPY"

PRECISIONS = ("fp32", "bf16", "int8")
PROBE = 1000
"""Records that are embedded in each precision to compare it with fp32."""


def run(options: Options) -> Result:
    """Measure the part."""
    result = Result(
        # Some of the sets only: beside the page of all, and not in its place.
        "stress" if options.sets == STRESS_SETS else "-".join(("stress", *options.sets)),
        "How many records a second end up in PostgreSQL, ready to search, for three kinds of record?",
        caveats=[
            "Every contender ends with the same table and all its indexes. Those marked as a sample embedded the first "
            "records of the set (which is in random order); their smaller index favours them.",
            "kdb-fast's time holds the start of its processes and the loading of the model; the others' does not.",
            "A lower precision gives other vectors: see the table of precisions for how far they are from fp32. Its "
            "preparation (seconds in that table) is done once for an index and is not in the times of the runs.",
            f"“{ALONE}” embeds the same records and writes nothing; it leaves no duplicate out.",
            "`mixed` holds 30 % exact duplicates, which kdb-fast embeds once; its tokens/s count them too.",
        ],
    )
    with session(options) as s:
        bars: list[Bar] = []
        fidelity: list[list[str]] = []
        for name in options.sets:
            data = s.dataset(name, options.size(RECORDS, 300))
            precisions = _precisions(s, data, result, fidelity)
            outcomes = alternate(_contenders(s, data, precisions), s.runs, s.reset)
            result.tables.append(_table(data, outcomes))
            result.requirements += _requirements(name, outcomes)
            if INT8 not in outcomes:
                also = " and 30 s for all of them" if name == "contacts" else ""
                result.caveats.append(f"Not required without int8: {name}: 5 × “{ONE_CALL}”{also}.")
            result.raw[name] = raw(outcomes.values())
            bars += [Bar(f"{name}: {o.contender.label}", spread(o.rates), o.contender.ours) for o in ran(outcomes)]
            result.caveats += [
                f"Not run: {o.contender.label}: {o.skipped}."
                for o in outcomes.values()
                if o.skipped and name == options.sets[0]
            ]
    columns = ("records", "precision", "cosine, mean", "cosine, least", "10 nearest", "preparation, s")
    result.tables.append(Table("How near each precision is to fp32", columns, fidelity))
    result.data = s.lines
    result.chart = ("Records a second, ready to search", "records/s", bars)
    return result


def _precisions(s: Session, data: DataSet, result: Result, rows: list[list[str]]) -> list[str]:
    """The precisions that this machine has; adds to ``rows`` how near each is to fp32. Leaves it prepared."""
    found: list[str] = []
    for precision in PRECISIONS:
        s.reset()
        params: dict[str, Any] = {**data.params(s.options.size(PROBE, 210)), "conninfo": s.conninfo,
                                  "precision": precision}  # fmt: skip
        try:
            report = run_once("precision", params)
        except BenchError as error:
            report = {"skipped": f"{precision}: {str(error).splitlines()[-1]}"}
        result.raw[f"precision {precision} {data.name}"] = report
        if "skipped" in report:
            say(f"  skipped: {report['skipped']}")
            if (line := f"Not run: {report['skipped']}.") not in result.caveats:
                result.caveats.append(line)
            continue
        found.append(precision)
        fidelity = report["fidelity"] or {"overlap": 1.0}
        rows.append([data.name, precision, f"{report['cosine_mean']:.6f}", f"{report['cosine_least']:.6f}",
                     f"{fidelity['overlap']:.1%}", f"{report['phases']['prepare']:.0f}"])  # fmt: skip
    return found


def _contenders(s: Session, data: DataSet, precisions: list[str]) -> list[Contender]:
    database = {"conninfo": s.conninfo}
    one, batch = s.options.size(ONE_BY_ONE[data.name], 30), s.options.size(BATCHED, 40)
    sample = f"sample of {min(batch, data.records):,}"
    return [
        *(
            Contender(f"kdb-fast {p}", "reindex", {**data.params(), **database, "precision": p}, ours=True)
            for p in precisions
        ),
        Contender(ALONE, "encode", data.params()),
        Contender(ONE_CALL, "kameleondb_way", {**data.params(one), **database},
                  f"sample of {one:,}" if one < data.records else ""),
        Contender(EXECUTEMANY, "fastembed_executemany", {**data.params(batch), **database}, sample,
                  optional=True),
        Contender(PARALLEL, "fastembed_parallel_copy", {**data.params(batch), **database}, sample,
                  optional=True),
        Contender("sentence-transformers + COPY", "sentence_transformers", {**data.params(batch), **database}, sample,
                  optional=True),
    ]  # fmt: skip


def _requirements(name: str, outcomes: dict[str, Outcome]) -> list[Requirement]:
    """What a whole job must reach against the others, and of the rate of the encoder alone. What only int8 with
    VNNI can reach is required only where it ran."""
    ours = outcomes["kdb-fast fp32"]
    best = max((o for o in ran(outcomes) if o.contender.ours), key=lambda o: spread(o.rates).median)
    bounds = [
        (ours, ALONE, 0.88),
        (ours, ONE_CALL, 2.4),
        (ours, EXECUTEMANY, 2.4),
        (ours, PARALLEL, 1.9),
    ]
    if INT8 in outcomes and int8_on_openvino():
        bounds.append((best, ONE_CALL, 5.0))
    if name == "mixed":
        del bounds[0]  # the encoder alone embeds the duplicates too
    result = [
        Requirement(f"{name}: {o.contender.label} ÷ {other}", o.ratio(outcomes[other]), bound, unit="×")
        for o, other, bound in bounds
        if outcomes[other].runs
    ]
    if name == "contacts" and INT8 in outcomes and int8_on_openvino():
        result.append(
            Requirement(f"{name}: {best.contender.label}", best.spread("seconds"), 30, at_most=True, unit=" s")
        )
    return result


def _table(data: DataSet, outcomes: dict[str, Outcome]) -> Table:
    done = ran(outcomes)
    base = next(o for o in done if o.contender.name == "kameleondb_way")
    tokens = data.stats.read / data.records
    rows = []
    for o in done:
        rate = spread(o.rates)
        rows.append(
            [
                o.contender.label + (f" ({o.contender.note})" if o.contender.note else ""),
                rate.text(0),
                f"{rate.median * tokens:,.0f}",
                f"{data.records / rate.median:,.0f} s",
                o.ratio(base).text(2, "×"),
                spread(b / 1e6 for b in o.values("peak_pss_bytes")).text(0),
            ]
        )
    columns = ("contender", "records/s", "tokens/s", f"time of {data.records:,}", "ratio", "memory MB")
    return Table(f"{data.name}: {tokens:.1f} tokens a record", columns, rows)
