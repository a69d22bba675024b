"""What share of the machine's arithmetic does the encoder use?"""

from __future__ import annotations

import numpy as np

from . import data, tokens
from .chart import Bar
from .measure import Spread, pairwise, spread
from .options import Options, say
from .results import Result, Table
from .runner import Contender, Outcome, alternate, raw
from .session import DataSet, Session, session

RECORDS = 3000
LAYERS, HIDDEN, INNER = 6, 384, 1536
FLOP_PER_TOKEN = 2 * (4 * HIDDEN**2 + 2 * HIDDEN * INNER) * LAYERS
"""Products with weights of all-MiniLM-L6-v2: query, key, value, output, and the two of the feed-forward part."""

BUDGETS = (256, 512, 1024, 2048, 4096)


def attention_flop(counts: list[int]) -> float:
    """Products of attention itself: each token with each of its text, twice (scores, and their mean of the values)."""
    squares = np.square(np.array(counts, dtype=np.float64)).sum()
    return float(2 * 2 * HIDDEN * LAYERS * squares)


def run(options: Options) -> Result:
    """Measure the part."""
    result = Result(
        "embed",
        "What share of the measured ceiling of this machine does the encoder reach, and what does the rest of the job "
        "cost on top?",
        caveats=[
            "The ceiling is the fp32 product 512×384 @ 384×1536, one thread on each core, all cores at once, the "
            "faster of NumPy and ONNX Runtime, measured before each run of the encoder.",
            f"Share = real tokens × {FLOP_PER_TOKEN / 1e6:.1f} MFLOP ÷ (ceiling × seconds). Only products with weights "
            "count: attention, softmax, GELU, normalisation, tokenizer and padding are loss. The second figure counts "
            "the products of attention as work too.",
        ],
    )
    with session(options) as s:
        bars: list[Bar] = []
        rows: list[list[str]] = []
        faster: list[list[str]] = []
        for name in ("tickets", "contacts"):
            dataset = s.dataset(name, options.size(RECORDS, 300))
            outcomes = alternate(_contenders(s, dataset), s.runs, s.reset)
            result.raw[name] = raw(outcomes.values())
            ceiling, encode, whole, *lower = outcomes.values()
            share, with_attention = _shares(ceiling, encode, _attention(dataset))
            rows.append(
                [
                    name,
                    ceiling.spread("gflops").text(0),
                    spread(encode.rates).text(0),
                    pairwise(encode.values("tokens"), encode.values("seconds")).text(0),
                    share.text(1, " %"),
                    with_attention.text(1, " %"),
                    spread(100 * _padding(run) for run in encode.runs).text(2, " %"),
                    spread(b / 1e6 for b in encode.values("worker_pss_bytes")).text(0),
                    pairwise(encode.values("seconds"), whole.values("seconds")).text(3),
                ]
            )
            for o in lower:
                if o.skipped:
                    result.caveats.append(f"Not run: {name}: {o.skipped}.")
                    continue
                faster.append([name, o.contender.label, spread(o.rates).text(0),
                               pairwise(encode.values("seconds"), o.values("seconds")).text(2, "×"),
                               spread(100 * _padding(run) for run in o.runs).text(2, " %"),
                               spread(b / 1e6 for b in o.values("worker_pss_bytes")).text(0)])  # fmt: skip
            bars.append(Bar(f"{name}: products with weights", share, True))
            bars.append(Bar(f"{name}: with attention", with_attention))
        columns = ("records", "ceiling GFLOP/s", "records/s", "tokens/s", "share of ceiling", "with attention",
                   "padding", "PSS of a worker, MB", "encoder alone ÷ whole job (time)")  # fmt: skip
        result.tables.append(Table("One pinned process a core", columns, rows))
        heads = ("records", "precision", "records/s", "against fp32", "padding", "PSS of a worker, MB")
        result.tables.append(Table("Lower precisions, encoder alone", heads, faster))
        if options.sweep:
            result.tables.append(_sweep(s, result))
    result.data = s.lines
    result.chart = ("Share of the measured fp32 ceiling", "%", bars)
    return result


def _contenders(s: Session, dataset: DataSet) -> list[Contender]:
    return [
        Contender("ceiling", "ceiling", {"seconds_each": 2.0 if not s.options.quick else 0.2}),
        Contender("encoder alone", "encode", dataset.params(), ours=True),
        Contender("whole job", "reindex", {**dataset.params(), "conninfo": s.conninfo}, ours=True),
        *(Contender(p, "encode", {**dataset.params(), "precision": p}, ours=True) for p in ("bf16", "int8")),
    ]


def _attention(dataset: DataSet) -> float:
    counts, window = tokens.lengths(list(data.read(dataset.path)))
    return attention_flop(np.minimum(counts, window).tolist())


def _shares(ceiling: Outcome, encode: Outcome, attention: float) -> tuple[Spread, Spread]:
    """Per cent of the ceiling that was measured just before, without and with the products of attention."""
    plain, with_attention = [], []
    for limit, run in zip(ceiling.runs, encode.runs, strict=True):
        possible = limit["gflops"] * 1e9 * run["seconds"]
        plain.append(100 * run["tokens"] * FLOP_PER_TOKEN / possible)
        with_attention.append(100 * (run["tokens"] * FLOP_PER_TOKEN + attention) / possible)
    return spread(plain), spread(with_attention)


def _padding(run: dict[str, float]) -> float:
    return 1 - run["tokens"] / max(1, run["padded_tokens"])


def _sweep(s: Session, result: Result) -> Table:
    """Records a second by the token budget of a batch."""
    say("  token budgets")
    dataset = s.dataset("tickets", s.options.size(RECORDS, 60))
    budgets = BUDGETS if not s.options.quick else BUDGETS[1:3]
    contenders = [Contender(str(b), "encode", {**dataset.params(), "token_budget": b}) for b in budgets]
    outcomes = alternate(contenders, s.runs)
    result.raw["sweep"] = raw(outcomes.values())
    rows = [
        [
            label,
            spread(o.rates).text(0),
            spread(100 * _padding(run) for run in o.runs).text(2, " %"),
            spread(b / 1e6 for b in o.values("worker_pss_bytes")).text(0),
        ]
        for label, o in outcomes.items()
    ]
    return Table("Token budget of a batch (tickets)", ("budget", "records/s", "padding", "PSS of a worker, MB"), rows)
