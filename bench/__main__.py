"""``python -m bench [PART…] [--quick] [--runs N]``: measure, and write the results."""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from . import history, machine, results
from .options import DATABASES, RESULTS, STRESS_SETS, Options, say

PARTS = (
    "demo",
    "stress",
    "embed",
    "engine",
    "scale",
    "store",
    "tables",
    "bytes",
    "million",
    "search",
    "relevance",
    "cluster",
    "hosts",
)


def main(arguments: list[str] | None = None) -> int:
    """Run the parts; returns 1 if a requirement was not met (never with ``--quick``, which measures nothing)."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "parts", nargs="*", choices=[[], *PARTS], metavar="PART", help=f"{', '.join(PARTS)}; default all"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one run: a smoke test, not a measurement")
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="runs of each contender (default 3)")
    parser.add_argument("--sweep", action="store_true", help="part embed: also try token budgets")
    parser.add_argument("--sets", nargs="+", choices=STRESS_SETS, default=STRESS_SETS, help="part stress: only these")
    parser.add_argument(
        "--records", nargs="+", type=int, default=(), metavar="N", help="part million: only these sizes"
    )
    parser.add_argument("--databases", nargs="+", choices=DATABASES, default=DATABASES, help="part million: only these")
    parser.add_argument(
        "--against",
        type=Path,
        metavar="DIR",
        help="parts search, engine, scale, million: also a checkout of another version, run in turn",
    )
    parser.add_argument(
        "--cpus", nargs="+", type=int, default=(), metavar="N", help="part cluster: only simulated clusters of so many"
    )
    parser.add_argument("--add", action="store_true", help="parts embed, hosts: more runs, beside those of its results")
    parser.add_argument("--seed", type=int, default=1, help="seed of the data sets")
    parser.add_argument("--out", type=Path, help="directory of the results (default bench/results)")
    given = parser.parse_args(arguments)
    if given.runs < 1:
        parser.error("--runs must be 1 or more")
    out = given.out or (Path(tempfile.mkdtemp(prefix="kdb-fast-bench-quick-")) if given.quick else RESULTS)
    options = Options(
        runs=given.runs,
        quick=given.quick,
        sweep=given.sweep,
        sets=tuple(given.sets),
        cpus=tuple(given.cpus),
        add=given.add,
        seed=given.seed,
        out=out,
        against=given.against and given.against.resolve(),
        records=tuple(given.records),
        databases=tuple(given.databases),
    )
    met = True
    for part in given.parts or PARTS:
        say(f"== {part}")
        about = machine.describe()
        run: Callable[[Options], results.Result] = importlib.import_module(f"bench.part_{part}").run
        result = run(options)
        if options.quick:
            result.caveats.insert(0, "**A smoke test with tiny sizes: the numbers mean nothing.**")
        name = results.write(result, about, out)
        history.record(history.main_figures(result), about, out)
        print((out / f"{name}.md").read_text(), flush=True)
        met = met and all(requirement.met for requirement in result.requirements)
    results.gather(out, PARTS)
    say(f"results: {out}")
    return 0 if met or options.quick else 1


if __name__ == "__main__":
    sys.exit(main())
