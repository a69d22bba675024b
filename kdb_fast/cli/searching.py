"""``search`` and ``status``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from .console import complain
from .options import BASE_URL_HELP, database_option, json_option, opened_database
from .tables import in_schema, state_schema_option
from .targets import show_target


@click.command("search")
@click.argument("query")
@database_option
@click.option("--entity", "entities", multiple=True, help="Only this entity; repeat it for several.")
@click.option("--mode", type=click.Choice(["hybrid", "vector", "keyword"]), default="hybrid", show_default=True)
@click.option("--limit", default=10, show_default=True)
@click.option("--where", metavar="JSON", help='Exact values of fields, such as {"city": "Oslo"}.')
@click.option(
    "--min-score",
    default=0.0,
    show_default=True,
    help="Leave out results below this score. A record at place n of a ranking gets 1/(60+n) from it: the highest is "
    "2/61 = 0.03278 (first by meaning and by keyword), in the modes vector and keyword 1/61 = 0.01639.",
)
@click.option("--model", metavar="NAME", help="Model that embeds the query. Default: that of the index.")
@click.option("--model-path", type=click.Path(path_type=Path, file_okay=False), help="Directory of a model.")
@click.option("--provider", type=click.Choice(["fastembed", "openai"]), help="Default: the one of the index's model.")
@click.option("--base-url", metavar="URL", help=BASE_URL_HELP)
@json_option
def search_command(
    query: str,
    db: str | None,
    entities: tuple[str, ...],
    mode: str,
    limit: int,
    where: str | None,
    min_score: float,
    model: str | None,
    model_path: Path | None,
    provider: str | None,
    base_url: str | None,
    as_json: bool,
) -> None:
    """Search the index by meaning, by keyword, or both (reciprocal rank fusion).

    In QUERY, "two words" in quotes stay together, -word excludes (after --: kdb-fast search -- "-word …"), and or
    means either. A record that holds an identifier of the query (ERR_CONN_1111, nginx.conf, "a phrase") comes first.
    """
    from ..search.commands import run_search
    from ..search.retrieval import check_query
    from ..search.scope import parse_where
    from .report import print_results, printable

    check_query(query, mode, min_score)
    with opened_database(db, reads=True) as address:
        results, missed = run_search(
            address,
            query,
            mode=mode,
            entities=entities,
            limit=limit,
            where=parse_where(where),
            min_score=min_score,
            model_name=model,
            model_path=model_path,
            provider=provider,
            base_url=base_url,
            alone=bool(click.get_current_context().obj),
        )
    for part in missed:
        complain(f"warning: {printable(str(part), 1000)}")
    if as_json:
        left_out = [part._asdict() for part in missed]
        print(json.dumps({"query": query, "mode": mode, "results": results, "left_out": left_out}, default=str))
    else:
        print_results(query, results)


@click.command("status")
@click.argument("target", required=False, metavar="[TARGET]")
@database_option
@state_schema_option
@json_option
def status_command(target: str | None, db: str | None, state_schema: str | None, as_json: bool) -> None:
    """Show for each entity what is indexed, pending, stale and rejected, and for each target its rows with a vector.

    With the name of a TARGET, that one only.
    """
    if target is not None:
        show_target(target, db, state_schema, as_json)
        return
    from ..search.commands import run_status
    from .report import print_status

    with opened_database(db, reads=True) as address:
        result = run_status(in_schema(address, state_schema))
        name = address.display
    if as_json:
        print(json.dumps(result, default=str))
    else:
        print_status(result, name)
