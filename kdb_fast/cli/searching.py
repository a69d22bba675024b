"""``search`` and ``status``."""

from __future__ import annotations

import gc
import shlex
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import SchemaError, UsageError
from .console import complain, print_json
from .options import (
    BASE_URL_HELP,
    database_option,
    in_schema,
    json_option,
    opened_database,
    state_schema_option,
)

if TYPE_CHECKING:
    from ..db.address import DatabaseAddress
    from ..search.ahead import QueryAhead
    from ..search.tables.search import Mode, Question


@click.command("search")
@click.argument("query", nargs=-1, required=True, metavar="[NAME] QUERY")
@database_option
@click.option("--entity", "entities", multiple=True, help="Only this entity; repeat it for several.")
@click.option(
    "--mode",
    type=click.Choice(["hybrid", "vector", "keyword"]),
    help="Default: hybrid; vector for a table without keyword search.",
)
@click.option("--limit", default=10, show_default=True)
@click.option(
    "--where",
    metavar="JSON|SQL",
    help='Exact values of fields, such as {"city": "Oslo"}; for a table an SQL condition over the columns of its '
    "source, such as \"published AND lang = 'en'\".",
)
@click.option("--columns", metavar="A,B", help="For a table: columns to show with each result, with commas between.")
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
@state_schema_option
@json_option
def search_command(
    query: tuple[str, ...],
    db: str | None,
    entities: tuple[str, ...],
    mode: Mode | None,
    limit: int,
    where: str | None,
    columns: str | None,
    min_score: float,
    state_schema: str | None,
    as_json: bool,
    **of_model: Any,
) -> None:
    """Search the index by meaning, by keyword, or both (reciprocal rank fusion). With NAME, that of a target (see
    kdb-fast targets list): the table that was embedded under this name.

    In QUERY, "two words" in quotes stay together, -word excludes (after --: kdb-fast search -- "-word …"), and or
    means either. A record that holds an identifier of the query (ERR_CONN_1111, nginx.conf, "a phrase") comes first.
    """
    from ..search.query import check_query

    *names, text = query
    if len(names) > 1:
        raise UsageError(
            f"{len(query)} arguments; expected a query, or the name of a target and a query.",
            remedy=f"Put the query in quotes: kdb-fast search {shlex.quote(' '.join(query))}",
        )
    check_query(text, mode or "hybrid", min_score)
    if names and entities:
        raise UsageError("--entity is for KameleonDB's index.", remedy="Give a condition: --where SQL.")
    if not names and (columns is not None or state_schema is not None):
        raise UsageError(
            f"--{'state-schema' if columns is None else 'columns'} is for a table.",
            remedy='Name the target before the query: kdb-fast search NAME "QUERY"',
        )
    ahead = _ahead(mode, **of_model)
    with opened_database(db, reads=True) as address:
        if names:
            from ..search.tables.search import Question

            question = Question(
                query=text,
                mode=mode,
                where=where or "",
                columns=tuple(name.strip() for name in columns.split(",")) if columns else (),
                limit=limit,
                min_score=min_score,
                **of_model,
            )
            _search_table(in_schema(address, state_schema), names[0], question, as_json, ahead)
        else:
            _search_index(address, text, mode or "hybrid", entities, limit, where, min_score, as_json, of_model, ahead)


def _ahead(
    mode: str | None, provider: str | None, model: str | None, model_path: Path | None, base_url: str | None
) -> QueryAhead | None:
    """What embeds the query ahead, in a process that ends after it."""
    if not click.get_current_context().obj or mode == "keyword" or provider == "openai" or base_url:
        return None
    from ..search.ahead import QueryAhead

    # What is imported stays, and each collection would look at all of it, the one at the end too: a tenth of the time.
    gc.disable()
    click.get_current_context().call_on_close(gc.freeze)
    return QueryAhead(provider, model, model_path)


def _search_table(
    address: DatabaseAddress, name: str, question: Question, as_json: bool, ahead: QueryAhead | None
) -> None:
    from ..search.tables.search import search_kept
    from ..tables.describe import NO_TARGET
    from .report import print_table_results, printable

    try:
        found = search_kept(address, name, question, ahead)
    except SchemaError as error:
        if error.message.startswith(NO_TARGET):
            both = shlex.quote(f"{name} {question.query}")
            error.remedy += f" If both words are the query, put them in quotes: kdb-fast search {both}"
        raise
    for part in found.left_out:
        complain(f"warning: {printable(str(part), 1000)}")
    if as_json:
        results = [asdict(result) for result in found.results]
        answer = {"query": question.query, "target": name, "mode": found.mode, "results": results}
        print_json({**answer, "left_out": found.left_out, "notes": found.notes})
        return
    for note in found.notes:
        complain(f"note: {printable(note, 1000)}")
    print_table_results(found.results)


def _search_index(
    address: DatabaseAddress,
    query: str,
    mode: str,
    entities: tuple[str, ...],
    limit: int,
    where: str | None,
    min_score: float,
    as_json: bool,
    of_model: Mapping[str, Any],
    ahead: QueryAhead | None,
) -> None:
    """Search KameleonDB's index."""
    from ..search.commands import run_search, unknown_entities
    from ..search.scope import parse_where
    from .report import print_results, printable

    results, missed = run_search(
        address,
        query,
        mode=mode,
        entities=entities,
        limit=limit,
        where=parse_where(where),
        min_score=min_score,
        model_name=of_model["model"],
        model_path=of_model["model_path"],
        provider=of_model["provider"],
        base_url=of_model["base_url"],
        alone=bool(click.get_current_context().obj),
        ahead=ahead,
    )
    for part in missed:
        complain(f"warning: {printable(str(part), 1000)}")
    for said in () if results or not entities else unknown_entities(address, entities):
        complain(f"note: {printable(said, 1000)}")
    if as_json:
        print_json({"query": query, "mode": mode, "results": results, "left_out": missed})
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
        from .targets import show_target

        show_target(target, db, state_schema, as_json)
        return
    from ..search.commands import run_status
    from .report import print_status

    with opened_database(db, reads=True) as address:
        result = run_status(in_schema(address, state_schema))
        name = address.display
    for note in result.hidden_targets:
        complain(f"note: {note}")
    if as_json:
        print_json(result.as_json())
    else:
        print_status(result, name)
