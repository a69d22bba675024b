"""The search indexes of a table and of its partitions are, after a load, what they were before it."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from servers import Server, connect_as, database_name, execute

from kdb_fast.catalog.records import live_rows
from kdb_fast.db.address import DatabaseAddress
from kdb_fast.errors import SchemaError
from kdb_fast.stores.postgresql import index as pg_index
from kdb_fast.stores.postgresql import index_build as pg_index_build
from kdb_fast.stores.postgresql.index_build import IndexBuilder
from kdb_fast.stores.postgresql.index_store import PostgreSQLIndexStore

COLUMNS = """
  id varchar(36), entity_name varchar(255) NOT NULL, record_id varchar(36) NOT NULL,
  content text NOT NULL, embedding vector(8), model varchar(100), dimensions integer,
  created_at timestamptz NOT NULL DEFAULT now(), updated_at timestamptz,
  tsv tsvector GENERATED ALWAYS AS (to_tsvector('english', content)) STORED
"""
KEYS = ", PRIMARY KEY (entity_name, id), UNIQUE (entity_name, record_id)"
INDEXES = """
CREATE INDEX ix_kdb_search_fts ON kdb_search USING gin (tsv);
CREATE INDEX ix_kdb_search_vector ON kdb_search USING hnsw (embedding vector_cosine_ops);
"""
BY_ENTITY = f"""
CREATE TABLE kdb_search ({COLUMNS}{KEYS}) PARTITION BY LIST (entity_name);
CREATE TABLE kdb_search_alpha PARTITION OF kdb_search FOR VALUES IN ('Alpha');
CREATE TABLE kdb_search_rest PARTITION OF kdb_search DEFAULT;
{INDEXES}
"""
PLAIN = f"CREATE TABLE kdb_search ({COLUMNS}{KEYS}); {INDEXES}"

SNAPSHOT = """
SELECT i.indrelid::regclass::text AS place, c.relname, pg_get_indexdef(c.oid), i.indisvalid,
  (SELECT spcname FROM pg_tablespace WHERE oid = c.reltablespace), obj_description(c.oid, 'pg_class'),
  (SELECT array_agg((attnum, attstattarget) ORDER BY attnum) FROM pg_attribute WHERE attrelid = c.oid
   AND attstattarget > -1)::text,
  (SELECT inhparent::regclass::text FROM pg_inherits WHERE inhrelid = c.oid), i.indisclustered, i.indisreplident
FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_class t ON t.oid = i.indrelid
WHERE t.relname LIKE 'kdb\\_search%' ORDER BY 1, 2
"""

Make = Callable[[str], PostgreSQLIndexStore]


@pytest.fixture
def make(database: DatabaseAddress) -> Iterator[Make]:
    """A prepared store on tables made by a script."""
    with contextlib.ExitStack() as stack:

        def make_one(script: str) -> PostgreSQLIndexStore:
            execute(database, f"CREATE EXTENSION IF NOT EXISTS vector; {script}")
            store = PostgreSQLIndexStore(database, "test")
            stack.callback(store.close)
            store.prepare(8)
            return store

        yield make_one


def snapshot(address: DatabaseAddress) -> list[tuple[Any, ...]]:
    """All that is known of each index: table, name, definition, validity, tablespace, comment, statistics, parent."""
    return execute(address, SNAPSHOT)


def search_indexes(address: DatabaseAddress) -> list[str]:
    """Names of the vector and full-text indexes that are there and valid, but for those of a table moved away."""
    found = [row for row in snapshot(address) if row[3] and row[0] != "kdb_search_old"]
    return [row[1] for row in found if "USING hnsw" in row[2] or "USING gin" in row[2]]


def fill(address: DatabaseAddress, rows: int = 60) -> None:
    execute(
        address,
        "INSERT INTO kdb_search (id, entity_name, record_id, content, embedding) "
        "SELECT 'i' || n, (ARRAY['Alpha', 'Beta', 'Gamma'])[n % 3 + 1], 'r' || n, 'text ' || n, "
        "(SELECT array_agg(random()) FROM generate_series(1, 8) WHERE n > 0)::real[]::vector "
        f"FROM generate_series(1, {rows}) n",
    )


def no_beat(what: str) -> None:
    pass


def load(store: PostgreSQLIndexStore) -> tuple[str, tuple[str, ...]]:
    """Drop, write, build; what was said about it."""
    assert store.drop_index().text == "dropped for the load"
    assert search_indexes(store.address) == []
    fill(store.address)
    outcome = store.finish_index(no_beat)
    assert store.finish_index(no_beat).text == "kept"
    assert execute(store.address, "SELECT * FROM kdb_fast_state") == []
    return outcome.text, outcome.warnings


TREES = {
    "by entity": BY_ENTITY,
    "by hash": f"""
        CREATE TABLE kdb_search ({COLUMNS}, PRIMARY KEY (record_id, id), UNIQUE (entity_name, record_id))
        PARTITION BY HASH (record_id);
        CREATE TABLE kdb_search_0 PARTITION OF kdb_search FOR VALUES WITH (MODULUS 3, REMAINDER 0);
        CREATE TABLE kdb_search_1 PARTITION OF kdb_search FOR VALUES WITH (MODULUS 3, REMAINDER 1);
        CREATE TABLE kdb_search_2 PARTITION OF kdb_search FOR VALUES WITH (MODULUS 3, REMAINDER 2);
        {INDEXES}""",
    "two levels, one in another schema": f"""
        CREATE SCHEMA "cold %s";
        CREATE TABLE kdb_search ({COLUMNS}{KEYS}) PARTITION BY LIST (entity_name);
        CREATE TABLE kdb_search_alpha PARTITION OF kdb_search FOR VALUES IN ('Alpha') PARTITION BY HASH (entity_name);
        CREATE TABLE "cold %s"."kdb_search a" PARTITION OF kdb_search_alpha
          FOR VALUES WITH (MODULUS 2, REMAINDER 0);
        CREATE TABLE "cold %s"."kdb_search b" PARTITION OF kdb_search_alpha
          FOR VALUES WITH (MODULUS 2, REMAINDER 1);
        CREATE TABLE kdb_search_rest PARTITION OF kdb_search DEFAULT;
        {INDEXES}""",
    "names, parameters and comments of a user's own": f"""
        CREATE TABLE kdb_search ({COLUMNS}{KEYS}) PARTITION BY LIST (entity_name);
        CREATE TABLE kdb_search_alpha PARTITION OF kdb_search FOR VALUES IN ('Alpha');
        CREATE TABLE kdb_search_rest PARTITION OF kdb_search DEFAULT;
        CREATE INDEX "Near ON ONLY me" ON ONLY kdb_search USING hnsw (embedding vector_l2_ops) WITH (m = 8);
        CREATE INDEX near_alpha ON kdb_search_alpha USING hnsw (embedding vector_l2_ops) WITH (m = 8);
        CREATE INDEX "near % rest" ON kdb_search_rest USING hnsw (embedding vector_l2_ops) WITH (m = 8);
        ALTER INDEX "Near ON ONLY me" ATTACH PARTITION near_alpha;
        ALTER INDEX "Near ON ONLY me" ATTACH PARTITION "near % rest";
        CREATE INDEX words ON kdb_search USING gin (tsv) WITH (fastupdate = off);
        COMMENT ON INDEX "Near ON ONLY me" IS 'of all: 100 % of it''s rows';
        COMMENT ON INDEX near_alpha IS 'of Alpha';""",
    "indexes that are attached to nothing": f"""
        CREATE TABLE kdb_search ({COLUMNS}{KEYS}) PARTITION BY LIST (entity_name);
        CREATE TABLE kdb_search_alpha PARTITION OF kdb_search FOR VALUES IN ('Alpha');
        CREATE TABLE kdb_search_rest PARTITION OF kdb_search DEFAULT;
        CREATE INDEX own_alpha ON kdb_search_alpha USING hnsw (embedding vector_cosine_ops) WITH (ef_construction = 32);
        CREATE INDEX own_rest ON kdb_search_rest USING ivfflat (embedding vector_cosine_ops) WITH (lists = 2);
        CREATE INDEX ix_kdb_search_fts ON kdb_search USING gin (tsv);""",
    "a whole of which one part is attached, and one that has other indexes": f"""
        CREATE TABLE kdb_search ({COLUMNS}{KEYS}) PARTITION BY LIST (entity_name);
        CREATE TABLE kdb_search_alpha PARTITION OF kdb_search FOR VALUES IN ('Alpha');
        CREATE TABLE kdb_search_rest PARTITION OF kdb_search DEFAULT;
        CREATE INDEX whole ON ONLY kdb_search USING hnsw (embedding vector_cosine_ops);
        CREATE INDEX part ON kdb_search_alpha USING hnsw (embedding vector_cosine_ops);
        ALTER INDEX whole ATTACH PARTITION part;
        CREATE INDEX other ON kdb_search_rest USING hnsw (embedding vector_ip_ops);
        CREATE INDEX ix_kdb_search_fts ON kdb_search USING gin (tsv);""",
    "expressions, predicates and statistics": f"""
        {BY_ENTITY}
        CREATE INDEX halves ON kdb_search USING hnsw ((embedding::halfvec(8)) halfvec_l2_ops);
        CREATE INDEX a_few ON kdb_search_rest USING hnsw (embedding vector_cosine_ops)
          WHERE content LIKE '%s 100 %' AND created_at > '2020-02-03 04:05:06.789+02';
        CREATE INDEX simple ON kdb_search USING gin (to_tsvector('simple', content), entity_name_array(entity_name));
        ALTER INDEX halves ALTER COLUMN 1 SET STATISTICS 321;
        ALTER INDEX simple ALTER COLUMN 2 SET STATISTICS 7;""",
    "no partitions": f"""
        {PLAIN}
        COMMENT ON INDEX ix_kdb_search_vector IS 'tuned';
        CREATE INDEX halves ON kdb_search USING hnsw ((embedding::halfvec(8)) halfvec_cosine_ops) WHERE model IS NULL;
        ALTER INDEX halves ALTER COLUMN 1 SET STATISTICS 0;""",
}
FUNCTION = (
    "CREATE FUNCTION entity_name_array(t text) RETURNS text[] IMMUTABLE LANGUAGE sql RETURN ARRAY[t || ''::text]; "
)


@pytest.mark.parametrize("tree", TREES)
def test_a_tree_of_indexes_is_after_a_load_what_it_was(database: DatabaseAddress, make: Make, tree: str) -> None:
    store = make(FUNCTION + TREES[tree])
    before = snapshot(database)
    text, warnings = load(store)
    assert text.startswith("built ")
    assert [w for w in warnings if "lists" not in w] == []
    assert snapshot(database) == before
    assert store.finish_index(no_beat).text == "kept"
    assert load_again(store) == before


def load_again(store: PostgreSQLIndexStore) -> list[tuple[Any, ...]]:
    """What is there after another one, which changes nothing."""
    store.drop_index()
    store.finish_index(no_beat)
    return snapshot(store.address)


def test_what_was_built_on_partitions_is_counted(make: Make) -> None:
    assert load(make(BY_ENTITY))[0] == "built ix_kdb_search_fts, ix_kdb_search_vector (4 on partitions)"


@pytest.mark.parametrize("after", range(1, 8))
def test_a_tree_that_was_left_half_built_is_completed_by_whoever_comes_next(
    database: DatabaseAddress, make: Make, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    store = make(
        BY_ENTITY
        + "ALTER INDEX kdb_search_alpha_embedding_idx RENAME TO mine; COMMENT ON INDEX mine IS 'of mine'; "
        + "COMMENT ON INDEX ix_kdb_search_vector IS 'of all'"
    )
    before = snapshot(database)
    assert len(search_indexes(database)) == 6
    store.drop_index()
    left = iter(range(1, after))

    def fail(point: str) -> None:
        if point == "store.index_build" and next(left, None) is None:
            raise RuntimeError(point)

    with monkeypatch.context() as patch, contextlib.suppress(RuntimeError):
        patch.setattr(pg_index_build, "fault", fail)
        store.finish_index(no_beat)
    store.close()
    other = PostgreSQLIndexStore(connect_as(database, options="-c search_path=pg_catalog,public"), "test")
    with contextlib.closing(other):
        if after % 2:
            # A run that loads again remembers what is there now and what was there before.
            assert other.drop_index().text == "dropped for the load"
        other.finish_index(no_beat)
        assert execute(database, "SELECT * FROM kdb_fast_state") == []
    assert snapshot(database) == before


def test_definitions_that_an_earlier_version_remembered_are_built(database: DatabaseAddress, make: Make) -> None:
    store = make(PLAIN)
    fill(database)
    execute(database, "DROP INDEX ix_kdb_search_vector, ix_kdb_search_fts")
    execute(database, "CREATE INDEX mine ON kdb_search USING hnsw (embedding vector_ip_ops) WITH (m='8')")
    (definition,) = [row[2] for row in snapshot(database) if row[1] == "mine"]
    execute(database, "DROP INDEX mine")
    remembered = json.dumps({"mine": definition})
    execute(database, "INSERT INTO kdb_fast_state VALUES ('dropped_indexes/kdb_search', %s)", remembered)
    assert pg_index.finish(store.session, store.indexed, no_beat).text == "built ix_kdb_search_fts, mine"
    assert definition in [row[2] for row in snapshot(database)]
    assert execute(database, "SELECT count(*) FROM kdb_fast_state WHERE key LIKE 'dropped_indexes%%'") == [(0,)]


def test_a_partition_that_comes_during_the_load_gets_its_index(database: DatabaseAddress, make: Make) -> None:
    store = make(BY_ENTITY)
    store.drop_index()
    execute(
        database,
        "CREATE TABLE kdb_search_beta PARTITION OF kdb_search FOR VALUES IN ('Beta'); "
        "CREATE TABLE kdb_search_gamma PARTITION OF kdb_search FOR VALUES IN ('Gamma') "
        "PARTITION BY LIST (entity_name); "
        "CREATE TABLE kdb_search_gammas PARTITION OF kdb_search_gamma DEFAULT; "
        "CREATE INDEX theirs ON kdb_search_beta USING gin (tsv)",
    )
    outcome = store.finish_index(no_beat)
    assert outcome.warnings == ()
    found = snapshot(database)
    assert all(row[3] for row in found)
    assert {row[0] for row in found if row[7] == "ix_kdb_search_vector"} == {
        "kdb_search_alpha", "kdb_search_beta", "kdb_search_gamma", "kdb_search_rest"
    }  # fmt: skip
    assert [row[7] for row in found if row[1] == "theirs"] == ["ix_kdb_search_fts"]
    assert len(search_indexes(database)) == 12
    assert store.finish_index(no_beat).text == "kept"


def test_a_partition_that_leaves_during_the_load_gets_its_index_back(database: DatabaseAddress, make: Make) -> None:
    store = make(BY_ENTITY)
    store.drop_index()
    execute(
        database,
        "ALTER TABLE kdb_search DETACH PARTITION kdb_search_alpha; "
        "CREATE TABLE kdb_search_new PARTITION OF kdb_search FOR VALUES IN ('Alpha')",
    )
    fill(database)
    store.finish_index(no_beat)
    assert len(search_indexes(database)) == 8
    execute(database, "DROP TABLE kdb_search_alpha")
    store.drop_index()
    execute(database, "DROP TABLE kdb_search_new")
    outcome = store.finish_index(no_beat)
    assert len([w for w in outcome.warnings if "kdb_search_new" in w and "is gone" in w]) == 2
    assert len(search_indexes(database)) == 4
    assert execute(database, "SELECT bool_and(indisvalid) FROM pg_index") == [(True,)]


def test_a_partition_without_an_index_gets_one_and_the_others_are_left_alone(
    database: DatabaseAddress, make: Make
) -> None:
    store = make(BY_ENTITY)
    # What a version that did not know partitions left behind: parents alone.
    execute(
        database,
        "DROP INDEX ix_kdb_search_fts, ix_kdb_search_vector; "
        "CREATE INDEX ix_kdb_search_vector ON ONLY kdb_search USING hnsw (embedding vector_cosine_ops); "
        "CREATE INDEX own ON kdb_search_alpha USING gin (tsv) WITH (fastupdate = off); "
        "CREATE INDEX beside ON kdb_search_alpha USING hnsw (embedding vector_cosine_ops)",
    )
    outcome = store.finish_index(no_beat)
    assert outcome.text == "built kdb_search_rest_tsv_idx, kdb_search_rest_embedding_idx"
    assert sorted(search_indexes(database)) == [
        "beside", "ix_kdb_search_vector", "kdb_search_rest_embedding_idx", "kdb_search_rest_tsv_idx", "own"
    ]  # fmt: skip
    assert {row[1] for row in snapshot(database) if row[7] == "ix_kdb_search_vector"} == {
        "beside", "kdb_search_rest_embedding_idx"
    }  # fmt: skip
    assert store.finish_index(no_beat).text == "kept"


def test_an_index_made_by_another_program_meanwhile_is_not_made_twice(database: DatabaseAddress, make: Make) -> None:
    store = make(BY_ENTITY + "ALTER INDEX kdb_search_alpha_embedding_idx RENAME TO mine")
    store.drop_index()
    execute(database, INDEXES)  # as KameleonDB does when it starts
    made = snapshot(database)
    assert store.finish_index(no_beat).text == "kept"
    assert snapshot(database) == made


def test_pruning_a_partition_leaves_the_rows_of_the_others(database: DatabaseAddress, make: Make) -> None:
    store = make(
        BY_ENTITY + "CREATE TABLE kdb_entity_definitions (id text, name text, storage_mode text, "
        "dedicated_table_name text, is_active bool); "
        "CREATE TABLE kdb_records (id text, entity_id text, is_deleted bool); "
        "INSERT INTO kdb_entity_definitions VALUES ('1', 'Alpha', 'shared', NULL, true)"
    )
    execute(
        database,
        "INSERT INTO kdb_search (id, entity_name, record_id, content) SELECT e || n, e, 'r' || n, 'text' "
        "FROM generate_series(1, 3) n, unnest(ARRAY['Alpha', 'Beta']) e; "
        "INSERT INTO kdb_records SELECT 'r' || n, '1', n = 2 FROM generate_series(1, 3) n",
    )
    # The same physical places in both partitions, and the same keys.
    assert execute(database, "SELECT count(*), count(DISTINCT ctid) FROM kdb_search") == [(6, 3)]
    assert store.prune("Alpha", live_rows) == 1
    assert execute(database, "SELECT entity_name, record_id FROM kdb_search ORDER BY 1, 2") == [
        ("Alpha", "r1"), ("Alpha", "r3"), ("Beta", "r1"), ("Beta", "r2"), ("Beta", "r3")
    ]  # fmt: skip


# -- what an index has beside its definition -----------------------------------------------------------------


@pytest.fixture
def tablespaces(postgres: Server) -> Iterator[tuple[str, str]]:
    """Two tablespaces."""
    folder = Path(tempfile.mkdtemp(prefix="kdb-fast-tests-"))
    folder.chmod(0o755)
    data = execute(postgres.address, "SHOW data_directory")[0][0]
    names = []
    try:
        for number in (1, 2):
            names.append(f"space {number}")
            place = folder / str(number)
            place.mkdir()
            owner = Path(data).stat()
            with contextlib.suppress(PermissionError):
                shutil.chown(place, owner.st_uid, owner.st_gid)
            execute(postgres.address, f"CREATE TABLESPACE \"{names[-1]}\" LOCATION '{place}'")
        yield names[0], names[1]
    finally:
        for name in names:
            execute(postgres.address, f'DROP TABLESPACE IF EXISTS "{name}"')
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("script", [PLAIN, BY_ENTITY], ids=["plain", "partitioned"])
def test_an_index_stays_in_its_tablespace_whatever_the_roles_default_is(
    postgres: Server, tablespaces: tuple[str, str], script: str
) -> None:
    database = postgres.create_database()
    try:
        execute(database, "CREATE EXTENSION vector")
        execute(database, script)
        execute(
            database,
            f'ALTER INDEX ix_kdb_search_vector SET TABLESPACE "{tablespaces[0]}"; '
            + f'ALTER DATABASE {database_name(database)} SET default_tablespace TO "{tablespaces[1]}"',
        )
        if script == BY_ENTITY:
            execute(database, f'ALTER INDEX kdb_search_rest_embedding_idx SET TABLESPACE "{tablespaces[0]}"')
        before = snapshot(database)
        assert {row[4] for row in before} == {None, tablespaces[0]}
        with contextlib.closing(PostgreSQLIndexStore(database, "test")) as store:
            store.prepare(8)
            assert load(store)[1] == ()
            assert snapshot(database) == before
            # A tablespace that is gone meanwhile is told, and costs no index.
            store.drop_index()
            execute(postgres.address, f'DROP TABLESPACE "{tablespaces[0]}"')
            outcome = store.finish_index(no_beat)
        assert f"tablespace {tablespaces[0]}" in outcome.warnings[0]
        assert search_indexes(database) == [row[1] for row in before if "gin" in row[2] or "hnsw" in row[2]]
        assert {row[4] for row in snapshot(database)} == {None}
    finally:
        postgres.drop_database(database)


def test_what_cannot_be_made_again_is_not_dropped(database: DatabaseAddress, make: Make) -> None:
    store = make(
        PLAIN
        + "CREATE INDEX by_time ON kdb_search (created_at); CLUSTER kdb_search USING by_time; "
        + "ALTER TABLE kdb_search REPLICA IDENTITY USING INDEX kdb_search_entity_name_record_id_key"
    )
    before = snapshot(database)
    assert [row[1] for row in before if row[8]] == ["by_time"]
    assert [row[1] for row in before if row[9]] == ["kdb_search_entity_name_record_id_key"]
    load(store)
    assert snapshot(database) == before
    execute(database, "ALTER INDEX ix_kdb_search_vector DEPENDS ON EXTENSION vector")
    assert store.drop_index().text.startswith("kept: ix_kdb_search_vector cannot be dropped")
    assert snapshot(database) == before


@pytest.mark.parametrize("lacking", ["the schema public", "the tablespace", "kdb_search_rest"])
def test_what_the_role_could_not_make_again_is_not_dropped(
    postgres: Server, database: DatabaseAddress, make: Make, tablespaces: tuple[str, str], lacking: str
) -> None:
    make(BY_ENTITY)
    role = postgres.create_role(database, "ALL ON SCHEMA public", "ALL ON ALL TABLES IN SCHEMA public")
    user = execute(role, "SELECT current_user")[0][0]
    for table in ("kdb_search", "kdb_search_alpha", "kdb_search_rest"):
        execute(database, f"ALTER TABLE {table} OWNER TO {user}")
    with contextlib.closing(PostgreSQLIndexStore(role, "test")) as store:
        if lacking == "the schema public":
            execute(database, f"REVOKE CREATE ON SCHEMA public FROM {user}")
        elif lacking == "the tablespace":
            execute(database, f'ALTER INDEX kdb_search_alpha_embedding_idx SET TABLESPACE "{tablespaces[0]}"')
        else:
            execute(database, "ALTER TABLE kdb_search_rest OWNER TO postgres")
        before = snapshot(database)
        text = store.drop_index().text
        assert text.startswith("kept: this role ")
        assert lacking in text
        assert snapshot(database) == before
        if lacking != "the tablespace":
            execute(database, "DROP INDEX ix_kdb_search_vector")
            outcome = store.finish_index(no_beat)
            assert outcome.text.startswith("not built: this role ")
            statement = outcome.warnings[0].removeprefix("Let the owner run: ")
            execute(database, statement)
            assert snapshot(database) == before
    execute(database, "DROP TABLE kdb_search")


# -- names that are taken ------------------------------------------------------------------------------------


def test_an_index_whose_name_is_taken_is_built_under_another_and_told(database: DatabaseAddress, make: Make) -> None:
    store = make(PLAIN)
    execute(
        database,
        "ALTER TABLE kdb_search RENAME TO kdb_search_old; "
        "CREATE TABLE kdb_search (LIKE kdb_search_old INCLUDING GENERATED INCLUDING DEFAULTS, "
        "PRIMARY KEY (id), UNIQUE (entity_name, record_id))",
    )
    outcome = store.finish_index(no_beat)
    assert outcome.text == "built ix_kdb_search_fts1, ix_kdb_search_vector1"
    assert "ix_kdb_search_vector is taken by an index of kdb_search_old" in outcome.warnings[1]
    valid = {row[1] for row in snapshot(database) if row[0] == "kdb_search" and row[3]}
    assert {"ix_kdb_search_fts1", "ix_kdb_search_vector1"} <= valid
    before = snapshot(database)
    load(store)
    assert snapshot(database) == before
    # The remedy that is printed.
    execute(database, "DROP TABLE kdb_search_old")
    execute(database, outcome.warnings[1].partition("run: ")[2])
    assert "ix_kdb_search_vector" in search_indexes(database)


def test_what_is_not_there_after_building_is_not_reported_as_built(
    database: DatabaseAddress, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make(PLAIN)
    store.drop_index()
    look = IndexBuilder.outcome

    def after_another_session(self: Any, homeless: Any) -> Any:
        execute(database, "DROP INDEX ix_kdb_search_fts")
        execute(database, "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'ix_kdb_search_vector'::regclass")
        return look(self, homeless)

    monkeypatch.setattr(IndexBuilder, "outcome", after_another_session)
    outcome = store.finish_index(no_beat)
    assert outcome.text == "not valid: ix_kdb_search_fts, ix_kdb_search_vector"
    assert "run the same command again" in outcome.warnings[0]
    monkeypatch.undo()
    assert store.finish_index(no_beat).text == "built ix_kdb_search_fts, ix_kdb_search_vector"


def test_a_name_that_is_taken_during_the_load_costs_no_index(database: DatabaseAddress, make: Make) -> None:
    store = make(BY_ENTITY)
    store.drop_index()
    execute(
        database,
        "CREATE TABLE ix_kdb_search_vector (); CREATE SEQUENCE kdb_search_alpha_embedding_idx; "
        "CREATE TABLE ix_kdb_search_fts1 ()",
    )
    outcome = store.finish_index(no_beat)
    assert outcome.text == "built ix_kdb_search_fts, ix_kdb_search_vector1 (4 on partitions)"
    assert len(outcome.warnings) == 2
    assert len(search_indexes(database)) == 6
    assert {row[7] for row in snapshot(database) if "hnsw" in row[2]} == {None, "ix_kdb_search_vector1"}
    assert store.finish_index(no_beat).text == "kept"


def test_remedy_for_a_column_of_another_type_works_as_it_is_printed(database: DatabaseAddress, make: Make) -> None:
    with pytest.raises(SchemaError, match="is of type halfvec") as caught:
        make(PLAIN.replace("vector(8)", "halfvec(8)").replace("vector_cosine_ops", "halfvec_cosine_ops"))
    (statement,) = [part for part in caught.value.remedy.replace("(", ")").split(")") if "ALTER TABLE" in part]
    execute(database, statement)
    store = make("")
    names = {row[1] for row in snapshot(database) if row[0] == "kdb_search"}
    assert names == {
        "ix_kdb_search_entity", "ix_kdb_search_record", "ix_kdb_search_fts1", "ix_kdb_search_vector1",
        "kdb_search_pkey1", "kdb_search_entity_name_record_id_key1",
    }  # fmt: skip
    assert load(store) == ("built ix_kdb_search_fts1, ix_kdb_search_vector1", ())


def test_a_partition_in_which_no_key_can_be_unique_is_named(database: DatabaseAddress, make: Make) -> None:
    script = f"""
      CREATE FOREIGN DATA WRAPPER elsewhere; CREATE SERVER other FOREIGN DATA WRAPPER elsewhere;
      CREATE TABLE kdb_search ({COLUMNS}) PARTITION BY LIST (entity_name);
      CREATE FOREIGN TABLE kdb_search_alpha PARTITION OF kdb_search FOR VALUES IN ('Alpha') SERVER other;
    """
    with pytest.raises(SchemaError, match="no unique constraint on") as caught:
        make(script)
    assert "kdb_search_alpha" in caught.value.remedy
    assert "foreign table" in caught.value.remedy
