"""Files that are read into a table of vectors, on both databases: from the bytes to rows, vectors and rejects."""

from __future__ import annotations

import contextlib
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from articles import Articles
from servers import Vector, execute

from kdb_fast.db.address import DatabaseAddress
from kdb_fast.db.sqlite_connection import connect_sqlite
from kdb_fast.embedding.providers.base import EmbeddingProvider
from kdb_fast.indexing.reindex import reindex
from kdb_fast.indexing.run_embedding import Embedding
from kdb_fast.origins import prefixed
from kdb_fast.receipt import Receipt
from kdb_fast.settings import ReindexOptions, RejectLimit
from kdb_fast.sources.files.columns import key_columns
from kdb_fast.sources.files.input import FileInput
from kdb_fast.stores import open_store
from kdb_fast.stores.postgresql import table_find as pg_find
from kdb_fast.stores.postgresql.session import PgSession
from kdb_fast.stores.sqlite import table_find as sqlite_find
from kdb_fast.tables.table_target import TableTarget


class Letters(EmbeddingProvider):
    """A text's vector says how long it is and with which letter it begins."""

    def __init__(self) -> None:
        self.given: list[str] = []

    dimensions, model_name = 3, "letters"

    def embed(self, text: str) -> list[float]:
        return [float(len(text)), float(ord(text[0])), 1.0]

    def embed_batch(self, texts: list[str]) -> list[list[float]]:
        self.given += texts
        return [self.embed(text) for text in texts]


class Notes:
    """A table of vectors that files are read into."""

    def __init__(self, address: DatabaseAddress, path: Path) -> None:
        self.address, self.path = address, path
        self.provider = Letters()
        if address.dialect == "postgresql":
            execute(address, "CREATE EXTENSION vector")
        else:
            connect_sqlite(address, must_exist=False).close()

    def target(self, *key: str) -> TableTarget:
        """The table."""
        columns: dict[str, Any] = {"key": key_columns(key, self.address.dialect), "content": True}
        if self.address.dialect == "sqlite":
            with contextlib.closing(connect_sqlite(self.address)) as connection:
                return sqlite_find.find_table(connection, "note_vectors", "note_vectors", **columns)
        session = PgSession(self.address, "test")
        with contextlib.closing(session), session.transaction() as cursor:
            return pg_find.find_table(cursor, session.target, "note_vectors", "note_vectors", **columns)

    def read(self, raw: bytes, *key: str, name: str = "notes.csv", prefix: str = "", **options: Any) -> Receipt:
        """Read a file of this name."""
        path = self.path / name
        path.write_bytes(raw)
        target = self.target(*key)
        return reindex(
            self.address,
            FileInput(str(path), target.key, **options),
            ReindexOptions(provider="openai", max_rejects=RejectLimit(count=99), document_prefix=prefix),
            embedding=Embedding.of_provider(self.provider),
            target=target,
        )

    def rows(self) -> dict[Any, str]:
        """Texts by id."""
        return dict(execute(self.address, "SELECT id, content FROM note_vectors"))

    def vectors(self) -> dict[Any, Vector]:
        """Vectors by id."""
        return Articles(self.address, make=False).vectors_beside("note_vectors")

    def rejects(self) -> list[tuple[int, str]]:
        """(line, reason) of what is rejected now."""
        with contextlib.closing(open_store(self.address, "rejects", target=self.target())) as store:
            return sorted((row.position, row.reason) for row in store.rejects())


@pytest.fixture
def notes(index: DatabaseAddress, tmp_path: Path) -> Notes:
    return Notes(index, tmp_path)


CSV = b'id,title,body\n1,One,first\n2,,"second\n""quoted"" line"\n'


def test_rows_of_a_file_become_rows_of_the_table(notes: Notes) -> None:
    receipt = notes.read(CSV)
    assert (receipt.stored, receipt.rejected, receipt.input) == (2, 0, str(notes.path / "notes.csv"))
    assert notes.rows() == {"1": "One\n\nfirst", "2": 'second\n"quoted" line'}
    for key, text in notes.rows().items():
        np.testing.assert_allclose(notes.vectors()[key], notes.provider.embed(text))
    assert notes.read(CSV).unchanged == 2


def test_a_row_that_is_missing_stays_and_one_without_text_goes(notes: Notes) -> None:
    notes.read(CSV + b"3,Three,\n")
    receipt = notes.read(b"id,title,body\n2,,\n3,Three,more\n4,Four,\n")
    assert (receipt.stored, receipt.empty, receipt.deleted) == (2, 1, 1)
    assert notes.rows() == {"1": "One\n\nfirst", "3": "Three\n\nmore", "4": "Four"}


def test_the_last_of_several_rows_of_a_key_counts(notes: Notes) -> None:
    receipt = notes.read(b"id,a\n1,old\n2,x\n1,new\n")
    assert receipt.stored + receipt.superseded == 3
    assert notes.rows() == {"1": "new", "2": "x"}


def test_bad_rows_are_kept_with_their_line_until_the_file_is_whole(notes: Notes) -> None:
    bad = b'id,a,b\n1,x,y\n2,x\n3,x,y,z\n4,caf\xe9,x\n5,a\0b,x\n,x,y\n7,"open,x\n8,fine,x\n'
    receipt = notes.read(bad)
    lines = [
        (3, "too_few_fields"),
        (4, "too_many_fields"),
        (5, "not_utf8"),
        (6, "nul_byte"),
        (7, "missing_key"),
        (8, "bad_quotes"),
    ]
    assert (receipt.stored, receipt.rejected) == (2, 6)
    assert notes.rejects() == lines
    assert notes.read(bad).unchanged == 2
    assert notes.rejects() == lines
    assert notes.read(b"id,a,b\n9,x,y\n", name="other.csv").stored == 1
    assert notes.rejects() == lines
    notes.read(b"id,a,b\n2,x,y\n5,a,b\n")
    assert notes.rejects() == []


def test_a_key_of_numbers_is_kept_as_numbers(notes: Notes) -> None:
    receipt = notes.read(b"id,a\n007,x\n7.5,y\n-3,z\n", "id:bigint")
    assert (receipt.stored, receipt.rejected) == (2, 1)
    assert notes.rows() == {7: "x", -3: "z"}
    assert notes.read(b"id,a\n7,x\n", "id:bigint").unchanged == 1


@pytest.mark.parametrize(
    ("kind", "values", "kept", "wrong"),
    [
        ("float", [0.5, 1e300, 7], [0.5, 1e300, 7.0], "nan"),
        ("uuid", ["A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11"], ["a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"], "a0eebc99"),
        ("date", ["2024-02-29", "20240301"], ["2024-02-29", "2024-03-01"], "2023-02-29"),
    ],
)
def test_a_key_has_the_type_that_is_named(
    notes: Notes, kind: str, values: list[Any], kept: list[Any], wrong: str
) -> None:
    if notes.address.dialect == "sqlite" and kind != "float":  # it has no such types
        kept, wrong = values, ""
    raw = "".join(json.dumps({"id": value, "a": f"text of {value}"}) + "\n" for value in [*values, wrong]).encode()
    receipt = notes.read(raw, f"id:{kind}", name="notes.jsonl")
    assert (receipt.stored, receipt.rejected) == (len(values), 1)
    key = "id::text" if kind != "float" and notes.address.dialect == "postgresql" else "id"
    assert sorted(execute(notes.address, f"SELECT {key} FROM note_vectors")) == sorted((key,) for key in kept)
    table = "id,a\n" + "".join(f"{value},text of {value}\n" for value in kept)
    again = notes.read(table.encode(), f"id:{kind}")
    assert again.stored + again.reused + again.unchanged == len(values)
    assert len(notes.rows()) == len(values)


def test_all_formats_give_the_same_rows(notes: Notes) -> None:
    rows = [{"id": 1, "title": "One", "body": "first"}, {"id": 2, "title": None, "body": "second"}]
    notes.read(b"id,title,body\n1,One,first\n2,,second\n")
    lines = b"\n".join(json.dumps(row).encode() for row in rows)
    table = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    tsv = "id\ttitle\tbody\r\n1\tOne\tfirst\r\n2\t\tsecond\r\n"
    for name, raw in [
        ("r.jsonl", lines),
        ("r.json.gz", gzip.compress(json.dumps(rows).encode())),
        ("r.parquet", table.getvalue().to_pybytes()),
        ("r.tsv", tsv.encode()),
    ]:
        assert notes.read(raw, name=name).unchanged == 2, name
    assert notes.read(tsv.encode("utf-16"), name="wide.tsv", encoding="utf-16").unchanged == 2


def test_a_prefix_is_read_by_the_model_and_not_stored(notes: Notes) -> None:
    notes.read(CSV)
    receipt = notes.read(CSV, prefix="passage: ")
    assert (receipt.stored, receipt.document_prefix) == (2, "passage: ")
    assert receipt.fingerprint == prefixed(notes.provider.fingerprint(), "passage: ")
    assert "passage: One\n\nfirst" in notes.provider.given
    assert notes.rows() == {"1": "One\n\nfirst", "2": 'second\n"quoted" line'}
    assert notes.read(CSV, prefix="passage: ").unchanged == 2


def test_a_template_makes_the_text(notes: Notes) -> None:
    notes.read(CSV, template=r"{title}: {body}")
    assert notes.rows() == {"1": "One: first", "2": ': second\n"quoted" line'}


def test_many_rows_in_several_pages(notes: Notes) -> None:
    raw = b"id,a\n" + b"".join(b"%d,text %d\n" % (n, n % 700) for n in range(2500))
    receipt = notes.read(raw)
    assert (receipt.read, receipt.stored + receipt.reused) == (2500, 2500)
    assert notes.rows()["2499"] == "text 399"
    changed = raw.replace(b"\n77,text 77\n", b"\n77,another\n")
    assert (notes.read(changed).unchanged, notes.rows()["77"]) == (2499, "another")
