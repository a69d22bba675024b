"""Runs on a partitioned search table: rows of all partitions stay, and its tree of indexes outlives a killed run."""

from __future__ import annotations

import contextlib
from typing import Any

import poison_worker
import pytest
from commands import Commands, MakeJob
from kameleondb import KameleonDB
from search_engines import sqlalchemy_url
from servers import execute

from kdb_fast.db.address import DatabaseAddress

TABLES = """
CREATE EXTENSION vector;
CREATE TABLE kdb_search (
  id varchar(36), entity_name varchar(255) NOT NULL, record_id varchar(36) NOT NULL,
  content text NOT NULL, embedding vector(384), model varchar(100), dimensions integer,
  created_at timestamptz NOT NULL DEFAULT now(), updated_at timestamptz,
  tsv tsvector GENERATED ALWAYS AS (to_tsvector('english', content)) STORED,
  PRIMARY KEY (entity_name, id), UNIQUE (entity_name, record_id)
) PARTITION BY LIST (entity_name);
CREATE TABLE kdb_search_alpha PARTITION OF kdb_search FOR VALUES IN ('Alpha');
CREATE TABLE kdb_search_rest PARTITION OF kdb_search DEFAULT;
CREATE INDEX ix_kdb_search_fts ON kdb_search USING gin (tsv);
CREATE INDEX ix_kdb_search_vector ON kdb_search USING hnsw (embedding vector_cosine_ops) WITH (m = 8);
COMMENT ON INDEX ix_kdb_search_vector IS 'of all';
ALTER INDEX kdb_search_alpha_embedding_idx RENAME TO near;
"""

TREE = (
    "SELECT c.relname, pg_get_indexdef(c.oid), i.indisvalid, obj_description(c.oid, 'pg_class'), h.inhparent::regclass "
    "FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid LEFT JOIN pg_inherits h ON h.inhrelid = c.oid "
    "WHERE i.indrelid::regclass::text LIKE 'kdb_search%' ORDER BY 1"
)


@pytest.fixture
def tree(database: DatabaseAddress) -> list[tuple[Any, ...]]:
    """The indexes of a partitioned table, of which six are for searching."""
    execute(database, TABLES)
    found = execute(database, TREE)
    assert len([row for row in found if "USING hnsw" in row[1] or "USING gin" in row[1]]) == 6
    return found


def test_a_record_that_is_gone_takes_no_row_of_another_partition_along(
    database: DatabaseAddress, commands: Commands, tree: list[tuple[Any, ...]]
) -> None:
    url = sqlalchemy_url(database)

    def reindex() -> dict[str, Any]:
        command = commands.start("reindex", "--db", url, "--json")
        assert command.wait() == 0, command.err
        return command.receipt

    with contextlib.closing(KameleonDB(url)) as client:
        for name in ("Alpha", "Beta"):
            entity = client.create_entity(name, fields=[{"name": "title", "type": "string"}])
            entity.insert_many([{"title": f"{name} {i}"} for i in range(3)])
        assert reindex()["stored"] == 6
        ((gone,),) = execute(
            database, "SELECT record_id FROM kdb_search WHERE entity_name = 'Alpha' ORDER BY content LIMIT 1"
        )
        client.entity("Alpha").delete(gone)
    assert reindex()["deleted"] == 1
    found = execute(database, "SELECT content FROM kdb_search ORDER BY 1")
    assert [content for (content,) in found] == [
        "title: Alpha 1", "title: Alpha 2", "title: Beta 0", "title: Beta 1", "title: Beta 2"
    ]  # fmt: skip
    assert execute(database, TREE) == tree


@pytest.mark.parametrize(
    "fault", ["index_dropped:1", "index_build:1", "index_build:3", "index_build:4", "index_build:6"]
)
def test_run_killed_between_drop_and_rebuild_leaves_the_tree_to_the_next(
    database: DatabaseAddress, make_job: MakeJob, tree: list[tuple[Any, ...]], fault: str
) -> None:
    job = make_job(database, [f"note {i} about tea" for i in range(40)])
    command = job.start(KDB_FAST_FAULT=f"store.{fault}:kill")
    assert command.wait() == -9
    after = execute(database, TREE)
    assert (after == tree) == fault.startswith("index_dropped")  # a transaction that was not committed
    receipt = job.run()
    assert receipt["stored"] + receipt["unchanged"] == 40
    assert execute(database, TREE) == tree
    assert execute(database, "SELECT * FROM kdb_fast_state") == []
    stored = execute(database, "SELECT content, embedding::text FROM kdb_search")
    assert sorted(content for content, _ in stored) == sorted(record.content for record in job.records)


@pytest.mark.parametrize("fault", ["index_dropped", "index_build"])
def test_writer_killed_while_it_changes_a_partitioned_index(
    database: DatabaseAddress, make_job: MakeJob, tree: list[tuple[Any, ...]], fault: str
) -> None:
    job = make_job(database, [f"note {i} about tea" for i in range(40)])
    marks = str(job.commands.mark)
    command = job.start("--workers", "1", KDB_FAST_FAULT=f"store.{fault}:1:kill", KDB_FAST_FAULT_DIR=marks)
    assert command.wait() == 0, command.err
    assert job.commands.fired()
    assert command.receipt["stored"] == 40
    assert command.receipt["index"].startswith("deferred")
    assert execute(database, TREE) == tree
    query = str(poison_worker.vector_of(job.records[7].content).tolist())
    nearest = "SELECT content FROM kdb_search ORDER BY embedding <=> %s::vector LIMIT 1"
    assert execute(database, nearest, query) == [(job.records[7].content,)]
