"""What share of the machine's arithmetic does the encoder use?"""

from __future__ import annotations

import numpy as np

from kdb_fast.embedding.precision.support import int8_on_openvino

from . import data, machine, tokens
from .chart import Bar
from .kinds import ALONE, FIRST, Figures, figures
from .measure import Spread, pairwise, spread
from .options import Options, say
from .results import Requirement, Result, Table, measured
from .runner import Contender, Outcome, alternate, earlier, raw
from .session import DataSet, Session, session

RECORDS = {"tickets": 3000, "contacts": 10_000}
"""Some 20 s of two cores in fp32: what an encoder does once, such as compiling kernels, must not count much."""

CEILING_SECONDS = 0.05
"""Of matrix products, by each library, after every shard."""

LAYERS, HIDDEN, INNER = 6, 384, 1536
FLOP_PER_TOKEN = 2 * (4 * HIDDEN**2 + 2 * HIDDEN * INNER) * LAYERS
"""Products with weights of all-MiniLM-L6-v2: query, key, value, output, and the two of the feed-forward part."""

FASTER = {"bf16": 1.75, "int8": 2.6 if int8_on_openvino() else 1.45}
"""The lower precisions, and how many times as fast as fp32 each must be here."""

BUDGETS = (256, 512, 1024, 2048, 4096)


def attention_flop(counts: list[int]) -> float:
    """Products of attention itself: each token with each of its text, twice (scores, and their mean of the values)."""
    squares = np.square(np.array(counts, dtype=np.float64)).sum()
    return float(2 * 2 * HIDDEN * LAYERS * squares)


def run(options: Options) -> Result:
    """Measure the part."""
    result = Result(
        "embed",
        "What share of the measured ceiling of this machine does the encoder reach, and how much faster are the lower "
        "precisions?",
        caveats=[
            "The ceiling is the fp32 product 512×384 @ 384×1536 in the encoder's own processes, one on each core, the "
            f"mean rate of the faster of NumPy and ONNX Runtime; {CEILING_SECONDS:g} s of each after every shard.",
            f"Share = real tokens × {FLOP_PER_TOKEN / 1e6:.1f} MFLOP ÷ (ceiling × seconds). Only products with weights "
            "count: attention, softmax, GELU, normalisation, tokenizer and padding are loss. The second figure counts "
            "the products of attention as work too.",
            f"The first {FIRST:,} records: what is prepared on records of the set and compared with fp32, once for an "
            "index, and the encoder's time at its rate; database and search index apart.",
        ],
    )
    with session(options) as s:
        bars: list[Bar] = []
        rows: list[list[str]] = []
        speeds: list[list[str]] = []
        for name in ("tickets", "contacts"):
            dataset = s.dataset(name, options.size(RECORDS[name], 300))
            outcomes = alternate(_contenders(s, dataset), s.runs)
            if options.add:
                earlier(outcomes, measured("embed", machine.describe(), options.out).get(name, {}))
            result.raw[name] = raw(outcomes.values())
            encode, *lower = outcomes.values()
            plain, with_attention = _shares(encode, _attention(dataset))
            result.requirements.append(Requirement(f"{name}: share of the fp32 ceiling", plain, 86, unit=" %"))
            rows.append(
                [
                    name,
                    spread(run["possible_gflop"] / run["seconds"] for run in encode.runs).text(0),
                    spread(encode.rates).text(0),
                    pairwise(encode.values("tokens"), encode.values("seconds")).text(0),
                    plain.text(1, " %"),
                    with_attention.text(1, " %"),
                    spread(100 * _padding(run) for run in encode.runs).text(2, " %"),
                ]
            )
            speeds.append(_speed(name, encode, figures(encode.runs, encode.runs)))
            for o in lower:
                if o.skipped:
                    result.caveats.append(f"Not run: {name}: {o.skipped}.")
                    continue
                found = figures(encode.runs, o.runs)
                result.requirements.append(
                    Requirement(f"{name}: {o.contender.label} ÷ fp32", found.times, FASTER[o.contender.label], unit="×")
                )
                memory = spread(b / 1e6 for b in o.values("worker_pss_bytes"))
                result.requirements.append(
                    Requirement(f"{name}: worker in {o.contender.label}", memory, 350, at_most=True, unit=" MB")
                )
                speeds.append(_speed(name, o, found))
            bars.append(Bar(f"{name}: products with weights", plain, True))
            bars.append(Bar(f"{name}: with attention", with_attention))
        columns = (
            "records", "ceiling GFLOP/s", "records/s", "tokens/s", "share of ceiling", "with attention", "padding"
        )  # fmt: skip
        result.tables.append(Table("One pinned process a core", columns, rows))
        heads = ("records", "precision", "records/s", "against fp32", "mean cosine", "10 nearest", "preparation, s",
                 f"first {FIRST:,}", "padding", "PSS of a worker, MB")  # fmt: skip
        result.tables.append(Table("Precisions, encoder alone", heads, speeds))
        if options.sweep:
            result.tables.append(_sweep(s, result))
    result.data = s.lines
    result.chart = ("Share of the measured fp32 ceiling", "%", bars)
    return result


def _contenders(s: Session, dataset: DataSet) -> list[Contender]:
    seconds = CEILING_SECONDS if not s.options.quick else 0.01
    return [
        Contender(ALONE, "encode", {**dataset.params(), "ceiling": seconds}, ours=True),
        *(Contender(p, "encode", {**dataset.params(), "precision": p}, ours=True) for p in FASTER),
    ]


def _speed(name: str, o: Outcome, found: Figures) -> list[str]:
    exact = o.contender.label == ALONE
    near = ["", "", "", ""] if exact else [
        found.times.text(2, "×"), f"{found.cosine:.5f}", f"{found.overlap:.1%}", f"{found.preparation:.1f}"
    ]  # fmt: skip
    return [
        name,
        "fp32" if exact else o.contender.label,
        found.rate.text(0),
        *near,
        found.first(),
        spread(100 * _padding(run) for run in o.runs).text(2, " %"),
        spread(b / 1e6 for b in o.values("worker_pss_bytes")).text(0),
    ]


def _attention(dataset: DataSet) -> float:
    counts, window = tokens.lengths(list(data.read(dataset.path)))
    return attention_flop(np.minimum(counts, window).tolist())


def _shares(encode: Outcome, attention: float) -> tuple[Spread, Spread]:
    """Per cent of what was possible meanwhile, without and with the products of attention."""
    flop = [run["tokens"] * FLOP_PER_TOKEN for run in encode.runs]
    possible = [1e9 * run["possible_gflop"] for run in encode.runs]
    return (
        spread(100 * done / most for done, most in zip(flop, possible, strict=True)),
        spread(100 * (done + attention) / most for done, most in zip(flop, possible, strict=True)),
    )


def _padding(run: dict[str, float]) -> float:
    return 1 - run["tokens"] / max(1, run["padded_tokens"])


def _sweep(s: Session, result: Result) -> Table:
    """Records a second by the token budget of a batch."""
    say("  token budgets")
    dataset = s.dataset("tickets", s.options.size(RECORDS["tickets"], 60))
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
