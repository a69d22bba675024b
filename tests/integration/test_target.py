"""The target is a value: the whole main job on an index of another name, in PostgreSQL in another schema too."""

from __future__ import annotations

import re
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from servers import ListSource, Oracle, execute, mixed_texts, records_of

import kdb_fast
from kdb_fast.db.address import DatabaseAddress
from kdb_fast.db.pg_connection import connect_postgresql
from kdb_fast.db.sqlite_connection import connect_sqlite
from kdb_fast.indexing.reindex import reindex
from kdb_fast.indexing.rejects import list_rejects
from kdb_fast.receipt import Receipt
from kdb_fast.records import Record
from kdb_fast.search.readers import open_reader
from kdb_fast.search.retrieval import Mode, search
from kdb_fast.settings import ReindexOptions, RejectLimit
from kdb_fast.tables.kdb_search import KDB_SEARCH
from kdb_fast.tables.target import Params, Rows, Target

pytestmark = pytest.mark.usefixtures("loaded_once")

OTHER = replace(KDB_SEARCH, name='Not"es 100% {index}')


class WholeSource(ListSource):
    """All live records there are: any other row of the index has none."""

    def live_rows(self, rows: Rows, target: Target, entity: str, params: Params) -> str:
        assert entity == "Note"
        return f"s.record_id IN ({params.list(record.key[1] for record in self._records)})"


def test_the_main_job_on_an_index_of_another_name_and_schema(index: DatabaseAddress, oracle: Oracle) -> None:
    table = OTHER
    if index.dialect == "postgresql":
        execute(index, 'CREATE SCHEMA "an index"')
        table = replace(OTHER, schema="an index")
    else:
        Path(index.conninfo).touch()

    def run(source: ListSource, **options: Any) -> Receipt:
        return reindex(index, source, ReindexOptions(max_rejects=RejectLimit(share=1.0), **options), target=table)

    def found(query: str, mode: Mode) -> list[str]:
        connection: Any = connect_sqlite(index) if index.dialect == "sqlite" else connect_postgresql(index, role="test")
        with closing(connection):
            reader = open_reader(connection, index.dialect, table)
            results = search(reader, query, query_vector=oracle.vector(query), mode=mode, limit=3)
            return [result.id for result in results]

    records = records_of(mixed_texts(12))
    first = run(ListSource(records), workers=1)
    assert (first.stored, first.workers) == (12, 1)
    assert run(WholeSource(records)).unchanged == 12

    changed = [*records[:3], records[3]._replace(content="a lighthouse by the sea"), *records[5:]]
    changed.append(Record(("Note", "x" * 40), "a key too long"))
    third = run(WholeSource(changed))
    assert (third.unchanged, third.stored, third.rejected, third.deleted) == (10, 1, 1, 1)
    assert [(r.entity, r.record_id, r.reason) for r in list_rejects(index, index=table)] == [
        ("Note", "x" * 40, "id_too_long")
    ]
    assert found("lighthouse", "keyword") == ["r3"]
    assert found("a beacon on the coast", "vector")[0] == "r3"
    assert found("lighthouse", "hybrid")[0] == "r3"
    assert "r4" not in found(records[4].content, "vector")

    catalog = "sqlite_master" if index.dialect == "sqlite" else "(SELECT relname AS name FROM pg_class) c"
    assert execute(index, f"SELECT name FROM {catalog} WHERE name LIKE '%kdb\\_search%' ESCAPE '\\'") == []


def test_kameleondbs_table_is_named_in_one_file() -> None:
    """All else asks the target. Comments aside, and migrations: they say what tables were called before them."""
    package = Path(kdb_fast.__file__).parent
    name = re.compile(r"""kdb_search(?!\s+import\b|\.[a-zA-Z_]|\s*$|, seal$)""")
    naming = {
        str(path.relative_to(package)): lines
        for path in set(package.rglob("*.py")) - set((package / "tables" / "migrations").iterdir())
        if (lines := [line for line in path.read_text().splitlines() if name.search(line.partition("#")[0])])
    }
    assert naming.keys() == {"tables/kdb_search.py"}
