"""Files that are read into a table of vectors: every kind of bad row becomes one reject, and nothing else is lost."""

from __future__ import annotations

import bz2
import csv
import gzip
import hashlib
import io
import json
import sys
import tracemalloc
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from kdb_fast.db.address import parse_address
from kdb_fast.errors import MissingPackageError, ResourceError, UsageError
from kdb_fast.records import Record, Reject
from kdb_fast.sources import json_records
from kdb_fast.sources.files import delimited, parquet, unpacking
from kdb_fast.sources.files.columns import key_columns
from kdb_fast.sources.files.delimited import DelimitedRows
from kdb_fast.sources.files.input import FileInput
from kdb_fast.sources.files.source import FileSource
from kdb_fast.tables.template import split_template

POSTGRESQL, SQLITE = parse_address("postgresql:///x"), parse_address("sqlite:///x.db")

CSV = b"id,title,body\n1,One,first\n2,Two,second\n"


def opened(path: Path | str, key: Sequence[str] = (), sqlite: bool = False, **options: Any) -> FileSource:
    columns = key_columns(key, "sqlite" if sqlite else "postgresql")
    return FileInput(str(path), columns, **options).open(SQLITE if sqlite else POSTGRESQL)


def source(tmp_path: Path, raw: bytes, name: str = "rows.csv", **options: Any) -> FileSource:
    path = tmp_path / name
    path.write_bytes(raw)
    return opened(path, **options)


def read(made: FileSource) -> list[Record | Reject]:
    try:
        return [item for page in made.pages() for item in page]
    finally:
        made.close()


def texts(found: list[Record | Reject]) -> dict[str, str]:
    """Text by key of the records, reason by ``line N`` of the rejects."""
    return {
        "/".join(map(str, item.key)) if isinstance(item, Record) else f"line {item.position}": item[1] for item in found
    }


def rows_of(raw: bytes, **options: Any) -> list[tuple[int, Any]]:
    """Number of the line and fields, or reason, of each row; the header is a, b."""
    rows = DelimitedRows(io.BytesIO(b"a,b\n" + raw), **options).rows(())
    return [(n, d.reason if isinstance(d, Reject) else list(d.values())) for n, d, _ in rows]


class TestDelimited:
    @pytest.mark.parametrize(
        ("raw", "expected"),
        [
            (b"1,2\n3,4\n", [(2, ["1", "2"]), (3, ["3", "4"])]),
            (b"1,2\r\n3,4", [(2, ["1", "2"]), (3, ["3", "4"])]),
            (b"\n1,2\n\r\n\n3,4\n\n", [(3, ["1", "2"]), (6, ["3", "4"])]),
            (b",\n", [(2, ["", ""])]),
            (b'"1","2"\n', [(2, ["1", "2"])]),
            (b'"a,b","c""d"\r\n', [(2, ["a,b", 'c"d'])]),
            (b'"",""""\n', [(2, ["", '"'])]),
            (b'1,"two\nlines"\n3,4\n', [(2, ["1", "two\nlines"]), (4, ["3", "4"])]),
            (b'"a\r\n\r\nb",2\r\n3,4', [(2, ["a\r\n\r\nb", "2"]), (5, ["3", "4"])]),
            (b'"a\n"",\n"",b","c\n"\n3,4\n', [(2, ['a\n",\n",b', "c\n"]), (6, ["3", "4"])]),
            (b'5" pipe,say "hi"\n', [(2, ['5" pipe', 'say "hi"'])]),
            (b'5" pipe,"a ""b"""\n', [(2, ['5" pipe', 'a "b"'])]),
            (b' "1",2\n', [(2, [' "1"', "2"])]),
            ("ä,日本\n".encode(), [(2, ["ä", "日本"])]),
            (b"1,a\0b\n", [(2, ["1", "a\0b"])]),
            (b"1,a\rb\n", [(2, ["1", "a\rb"])]),
        ],
    )
    def test_rows_are_read_with_the_line_where_they_begin(self, raw: bytes, expected: list[Any]) -> None:
        assert rows_of(raw) == expected

    @pytest.mark.parametrize(
        ("line", "reason"),
        [
            (b"1", "too_few_fields"),
            (b"  ", "too_few_fields"),
            (b"1,2,3", "too_many_fields"),
            (b"1,2,", "too_many_fields"),
            (b"1,caf\xe9", "not_utf8"),
            (b'1,"caf\xe9"', "not_utf8"),
            (b"1,\xed\xa0\x80", "not_utf8"),
            (b'1,"a"b', "bad_quotes"),
            (b'"a" ,2', "bad_quotes"),
            (b'1,"never closed', "bad_quotes"),
            (b'"never closed,2', "bad_quotes"),
        ],
    )
    def test_a_faulty_row_is_one_reject_and_those_around_it_are_read(self, line: bytes, reason: str) -> None:
        good = (b"1,2\n", b'3,"4"\n')
        for before, after in [good, good[::-1]]:
            found = list(DelimitedRows(io.BytesIO(b"a,b\n" + before + line + b"\n" + after)).rows(()))
            assert [number for number, _, _ in found] == [2, 3, 4]
            reject = found[1][1]
            assert isinstance(reject, Reject)
            assert reject.reason == reason
            assert reject.content_hash == hashlib.sha256(line).digest()
            assert [isinstance(data, dict) for _, data, _ in found] == [True, False, True]

    def test_a_quote_that_is_not_closed_takes_no_other_row_along(self) -> None:
        raw = b'1,"open\n' + b'2,"good\nrow"\n3,x\n' * 3 + b'4,"open at the end'
        found = rows_of(raw)
        assert found[0] == (2, "bad_quotes")
        assert found[-1] == (12, "bad_quotes")
        assert found[1:-1] == [
            (number, fields)
            for line in (3, 6, 9)
            for number, fields in ((line, ["2", "good\nrow"]), (line + 2, ["3", "x"]))
        ]

    def test_a_long_field_and_a_long_line_end_at_the_cap(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(delimited, "MAX_LINE_BYTES", 100)
        found = rows_of(b'1,"' + b"long\n" * 50 + b"2,3\n" + b"x" * 500 + b"\n4,5\n")
        assert found[0] == (2, "bad_quotes")
        assert found[1:51] == [(number, "too_few_fields") for number in range(3, 52)] + [(52, ["2", "3"])]
        assert found[51:] == [(53, "line_too_long"), (54, ["4", "5"])]

    def test_a_long_line_within_quotes_ends_at_the_cap(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(delimited, "MAX_LINE_BYTES", 100)
        assert rows_of(b'1,"a\n' + b"x" * 500 + b'\nb"\n4,5\n') == [
            (2, "bad_quotes"),
            (3, "line_too_long"),
            (4, "too_few_fields"),
            (5, ["4", "5"]),
        ]

    @given(
        st.lists(st.tuples(*[st.text(st.sampled_from(list('ab",;\t\r\n ä\0')), max_size=8)] * 2), max_size=8),
        st.sampled_from([",", ";", "\t", "|"]),
        st.sampled_from(["\n", "\r\n"]),
    )
    def test_what_python_writes_is_read_back(self, rows: list[tuple[str, str]], delimiter: str, end: str) -> None:
        file = io.StringIO()
        writer = csv.writer(file, delimiter=delimiter, lineterminator=end, quoting=csv.QUOTE_ALL)
        writer.writerows([("a", "b"), *rows])
        found = DelimitedRows(io.BytesIO(file.getvalue().encode()), delimiter).rows(())
        assert [data for _, data, _ in found] == [{"a": a, "b": b} for a, b in rows]

    @given(st.text(st.sampled_from(list('ab",\n\r')), max_size=40))
    def test_no_text_is_read_twice_and_none_fails(self, text: str) -> None:
        raw = text.encode()
        found = rows_of(raw)
        assert [number for number, _ in found] == sorted({number for number, _ in found})
        assert len(found) <= raw.count(b"\n") + 1

    @pytest.mark.parametrize(
        ("header", "columns"),
        [
            (b"id;a,b;c", ("id", "a,b", "c")),
            (b"id\ttitle", ("id", "title")),
            (b"id|title", ("id", "title")),
            (b'"a;b;c",d', ("a;b;c", "d")),
            (b'id,"two\nlines",', ("id", "two\nlines", "")),
            (b"\xef\xbb\xbfid,b", ("id", "b")),
            (b'\xef\xbb\xbf"id",b', ("id", "b")),
            (b"\n\r\nid,b", ("id", "b")),
            (b"only", ("only",)),
        ],
    )
    def test_the_delimiter_is_found_out_by_the_first_line(self, header: bytes, columns: tuple[str, ...]) -> None:
        assert DelimitedRows(io.BytesIO(header + b"\n")).columns == columns

    @pytest.mark.parametrize(
        ("raw", "fault"),
        [(b"", "it is empty"), (b"\n\n", "it is empty"), (b"i\xe9,b\n", "UTF-8"), (b'"id,b\n1,2\n', "quote")],
    )
    def test_without_names_of_columns_it_is_refused(self, raw: bytes, fault: str) -> None:
        with pytest.raises(UsageError, match=fault):
            DelimitedRows(io.BytesIO(raw))

    def test_lines_of_old_macs_are_named(self) -> None:
        with pytest.raises(UsageError, match="carriage return"):
            DelimitedRows(io.BytesIO(b"id\r1\r2\r"))


class TestRecords:
    def test_the_text_is_all_columns_but_the_key_with_a_blank_line_between(self, tmp_path: Path) -> None:
        assert read(source(tmp_path, CSV)) == [
            Record(("1",), "One\n\nfirst", None, 2),
            Record(("2",), "Two\n\nsecond", None, 3),
        ]

    def test_empty_parts_are_left_out(self, tmp_path: Path) -> None:
        raw = b"id,a,b,c\n1,,x,\n2,x,,y\n3, ,x,\n"
        assert texts(read(source(tmp_path, raw))) == {"1": "x", "2": "x\n\ny", "3": " \n\nx"}

    def test_named_columns_are_taken_in_their_order(self, tmp_path: Path) -> None:
        found = read(source(tmp_path, CSV, text=("body", "id"), key=("title",)))
        assert texts(found) == {"One": "first\n\n1", "Two": "second\n\n2"}

    def test_a_column_without_name_is_no_text(self, tmp_path: Path) -> None:
        assert texts(read(source(tmp_path, b",id,a\n0,1,x\n"))) == {"1": "x"}

    def test_a_template_is_filled_where_any_column_holds_text(self, tmp_path: Path) -> None:
        raw = b"id,title,body\n1,One,first\n2,,second\n3,, \n"
        made = source(tmp_path, raw, template=r"{{{title}}}: {body}\n{title}!")
        assert texts(read(made)) == {"1": "{One}: first\nOne!", "2": "{}: second\n!"}
        assert made.take_empty() == [("3",)]

    def test_several_columns_are_the_key(self, tmp_path: Path) -> None:
        raw = b"lang,id,body\nen,1,x\nde,1,y\n"
        assert [item.key for item in read(source(tmp_path, raw, key=("id", "lang")))] == [("1", "en"), ("1", "de")]

    def test_a_row_without_text_leaves_the_table(self, tmp_path: Path) -> None:
        made = source(tmp_path, b"id,a,b\n1,x,\n2,,\n3, ,\xe2\x80\x8b\n")
        assert texts(read(made)) == {"1": "x"}
        assert (made.take_empty(), made.empty) == ([("2",), ("3",)], 2)

    @pytest.mark.parametrize("value", ["", "x", "1.0", "0x1", "9223372036854775808", "1" * 30, "١"])
    def test_a_number_as_key_is_one(self, tmp_path: Path, value: str) -> None:
        made = source(tmp_path, f"id,a\n{value},x\n7,y\n".encode(), key=("id:bigint",))
        (bad, good) = read(made)
        assert isinstance(bad, Reject)
        assert (bad.key, bad.reason, bad.position) == (("",), "bad_key" if value else "missing_key", 2)
        assert bad.content_hash == hashlib.sha256(f"{value},x".encode()).digest()
        assert good.key == ("7",)

    def test_a_number_as_key_has_one_form(self, tmp_path: Path) -> None:
        raw = b"id,a\n007,x\n+8,x\n-9223372036854775808,x\n"
        assert [r.key for r in read(source(tmp_path, raw, key=("id:bigint",)))] == [
            ("7",),
            ("8",),
            ("-9223372036854775808",),
        ]
        assert [r.key for r in read(source(tmp_path, raw, key=("id:bigint",), sqlite=True))][:2] == [(7,), (8,)]
        assert [r.key for r in read(source(tmp_path, raw, sqlite=True))][:2] == [("007",), ("+8",)]

    @pytest.mark.parametrize(
        ("kind", "raw", "key"),
        [
            ("float", "1.50", "1.5"),
            ("float", "-0", "0.0"),
            ("float", "1_000", None),
            ("float", "inf", None),
            ("uuid", "A0EEBC999C0B4EF8BB6D6BB9BD380A11", "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"),
            ("uuid", "7", None),
            ("date", "20240229", "2024-02-29"),
            ("date", "29.2.2024", None),
        ],
    )
    def test_a_key_of_each_type_has_one_form(self, tmp_path: Path, kind: str, raw: str, key: str | None) -> None:
        (item,) = read(source(tmp_path, f"id,a\n{raw},x\n".encode(), key=(f"id:{kind}",)))
        assert item.key == (key or "",)
        assert isinstance(item, Reject) == (key is None)

    def test_a_type_that_is_none_is_told(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=r"no column 'id:flaot'.* types are text, bigint, float, uuid, date"):
            source(tmp_path, CSV, key=("id:flaot",))
        (bad,) = read(source(tmp_path, b'{"id": 1.5, "a": "x"}\n', "rows.jsonl", key=("id:flaot",)))
        assert isinstance(bad, Reject)
        assert "the types are" in bad.detail

    def test_the_key_is_text_unless_its_type_is_named(self) -> None:
        assert [(c.name, c.type) for c in key_columns(("id:bigint", "a:b", ":text"), "postgresql")] == [
            ("id", "bigint"),
            ("a:b", "text"),
            (":text", "text"),
        ]
        assert [(c.name, c.type, c.typed) for c in key_columns((), "sqlite")] == [("id", "TEXT", True)]
        with pytest.raises(UsageError, match="twice"):
            key_columns(("id", "id:bigint"), "sqlite")

    def test_a_key_may_be_in_the_file_twice_and_the_file_is_no_complete_list(self, tmp_path: Path) -> None:
        made = source(tmp_path, CSV)
        made.close()
        assert (made.complete, made.unique_keys, made.entities) == (False, False, ())

    def test_pages_sample_and_limit(self, tmp_path: Path) -> None:
        raw = b"id,a\n" + b"".join(b"%d,text %d\n" % (i, i) for i in range(2500))
        made = source(tmp_path, raw)
        assert made.sample(1500)[1499] == "text 1499"
        assert [len(page) for page in made.pages()] == [1000, 1000, 500]
        made.close()
        made = source(tmp_path, raw, limit=1001)
        assert made.estimate() == 1001
        assert len(read(made)) == 1001

    def test_memory_does_not_grow_with_the_file(self, tmp_path: Path) -> None:
        path = tmp_path / "rows.csv"
        with path.open("wb") as file:
            file.write(b"id,a\n")
            for start in range(0, 40_000, 1000):
                file.writelines(b'%d,"text of a row ""%d"", quoted"\n' % (i, i) for i in range(start, start + 1000))
        made = opened(path)
        tracemalloc.start()
        try:
            assert sum(len(page) for page in made.pages()) == 40_000
            assert tracemalloc.get_traced_memory()[1] < 4e6
        finally:
            tracemalloc.stop()
            made.close()


class TestColumns:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"key": ("ID",)}, r"no column 'ID' \(--key\); nearest: 'id'"),
            ({"text": ("titel",)}, r"no column 'titel' \(--text\); nearest: 'title'"),
            ({"text": ("zzz",)}, r"no column 'zzz' \(--text\); it has: 'id', 'title', 'body'"),
            ({"template": "{titel}"}, "nearest: 'title'"),
            ({"template": "{title"}, "single {"),
            ({"template": "title"}, "no column"),
            ({"template": "{title}", "text": ("body",)}, "both"),
            ({"format": "xml"}, "csv, tsv, json, parquet"),
            ({"delimiter": "||"}, "one character"),
            ({"encoding": "klingon"}, "latin-1"),
            ({"encoding": "rot13"}, "latin-1"),
        ],
    )
    def test_what_makes_no_sense_is_refused_before_anything_is_read(
        self, tmp_path: Path, options: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(UsageError, match=message):
            source(tmp_path, CSV, **options)

    def test_a_name_that_two_columns_have_cannot_be_used(self, tmp_path: Path) -> None:
        raw = b"id,a,a,b\n1,x,y,z\n"
        with pytest.raises(UsageError, match="several columns 'a'"):
            source(tmp_path, raw)
        assert texts(read(source(tmp_path, raw, text=("b",)))) == {"1": "z"}

    @pytest.mark.parametrize(
        ("template", "pieces"),
        [
            ("{a}", ["", "a", ""]),
            (r"{a}\n\n{b c}.", ["", "a", "\n\n", "b c", "."]),
            (r"{{x}} {a}\t\\n\q", ["{x} ", "a", "\t\\n\\q"]),
        ],
    )
    def test_templates(self, template: str, pieces: list[str]) -> None:
        assert split_template(template) == pieces


ROWS = [{"id": 1, "title": "One", "body": "first"}, {"id": "two", "title": None, "body": "second"}]


class TestJson:
    @pytest.mark.parametrize("name", ["rows.jsonl", "rows.ndjson", "rows", "rows.txt"])
    def test_lines_and_arrays_are_told_by_their_beginning(self, tmp_path: Path, name: str) -> None:
        for raw in (b"\n".join(json.dumps(row).encode() for row in ROWS), b"\n " + json.dumps(ROWS, indent=1).encode()):
            assert texts(read(source(tmp_path, raw, name))) == {"1": "One\n\nfirst", "two": "second"}

    def test_bad_values_are_rejected_with_their_line(self, tmp_path: Path) -> None:
        lines = [
            b'{"id": "good", "a": "x", "n": 1, "l": ["y", null, "z"]}',
            b'{"a": "x"}',
            b'{"id": null, "a": "x"}',
            b'{"id": true, "a": "x"}',
            b'{"id": 1.5, "a": "x"}',
            b'{"id": "t", "a": 5}',
            b'{"id": "l", "a": ["x", 1]}',
            b"null",
            b'{"id": "u", "a": "\xe9"}',
            b'{"id": "e", "a": null}',
            b'{"id": "missing"}',
        ]
        made = source(tmp_path, b"\n".join(lines), "rows.jsonl", text=("a", "l"))
        found = read(made)
        assert texts(found) == {
            "good": "x\n\ny\nz",
            "line 2": "missing_key",
            "line 3": "missing_key",
            "line 4": "bad_key",
            "line 5": "bad_key",
            "line 6": "wrong_type",
            "line 7": "wrong_type",
            "line 8": "not_an_object",
            "line 9": "not_utf8",
            "missing": "",
        }
        assert [item.content_hash for item in found if isinstance(item, Reject)] == [
            hashlib.sha256(line).digest() for line in lines[1:9]
        ]
        assert made.take_empty() == [("e",)]

    def test_fields_without_text_are_named_at_the_end(self, tmp_path: Path) -> None:
        made = source(tmp_path, b'{"id": 1, "a": "x", "n": 1}\n', "r.jsonl")
        assert texts(read(made)) == {"1": "x"}
        assert "'n' (1 record)" in made.warnings()[0]
        made = source(tmp_path, b'{"id": 1, "a": "x"}\n', "r.jsonl", text=("a", "typo"))
        read(made)
        assert made.warnings() == ["No record has the field 'typo'."]


class TestParquet:
    def written(self, path: Path, table: dict[str, Any], **options: Any) -> Path:
        pyarrow.parquet.write_table(pyarrow.table(table), path, **options)
        return path

    def test_columns_of_text_are_read_and_others_refused(self, tmp_path: Path) -> None:
        table = {
            "id": pyarrow.array([1, 2, 3]),
            "n": pyarrow.array([1.5, 2.5, None]),
            "title": pyarrow.array(["One", None, ""]).dictionary_encode(),
            "body": pyarrow.array(["first", "second", None], pyarrow.large_string()),
            "tags": pyarrow.array([["a", None, "b"], [], None]),
        }
        path = self.written(tmp_path / "rows.parquet", table)
        made = opened(path)
        assert made.estimate() == 3
        assert texts(read(made)) == {"1": "One\n\nfirst\n\na\nb", "2": "second"}
        assert made.take_empty() == [("3",)]
        assert [r.key for r in read(opened(path, ("id:bigint",), sqlite=True, text=("title",)))] == [(1,)]
        with pytest.raises(UsageError, match=r"'n' \(--text\) is of type double"):
            opened(path, text=("n",))
        with pytest.raises(UsageError, match=r"'n' \(--key\) is of type double"):
            opened(path, ("n",))
        with pytest.raises(UsageError, match=r"'id' \(--text\) is of type integer"):
            opened(path, text=("id",))

    def test_it_is_told_by_its_first_bytes_and_may_be_packed_or_piped(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        raw = self.written(tmp_path / "rows", {"id": ["a"], "x": ["text"]}).read_bytes()
        for name, data in (("rows", raw), ("r.gz", gzip.compress(raw)), ("r", zstandard.compress(raw))):
            assert texts(read(source(tmp_path, data, name))) == {"a": "text"}
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))
        assert texts(read(opened("-"))) == {"a": "text"}

    def test_a_text_that_is_not_utf8_is_rejected_with_its_row(self, tmp_path: Path) -> None:
        bad = pyarrow.array([b"x", b"caf\xe9", None, b"y"]).view(pyarrow.string())
        path = self.written(tmp_path / "r.parquet", {"id": ["a", "b", "c", "d"], "x": bad, "z": ["1"] * 4})
        assert texts(read(opened(path))) == {"a": "x\n\n1", "line 2": "not_utf8", "c": "1", "d": "y\n\n1"}

    def test_keys_of_uuid(self, tmp_path: Path) -> None:
        number = uuid.UUID(int=5)
        column = pyarrow.ExtensionArray.from_storage(pyarrow.uuid(), pyarrow.array([number.bytes], pyarrow.binary(16)))
        path = self.written(tmp_path / "r.parquet", {"id": column, "x": ["text"]})
        assert texts(read(opened(path))) == {str(number): "text"}

    def test_damaged_files_are_named(self, tmp_path: Path) -> None:
        path = self.written(tmp_path / "r.parquet", {"id": [str(i) for i in range(5000)], "x": ["text"] * 5000})
        raw = path.read_bytes()
        with pytest.raises(UsageError, match="cannot be read as Parquet"):
            source(tmp_path, raw[:-20], "cut.parquet")
        with pytest.raises(UsageError, match="cannot be read as Parquet"):
            source(tmp_path, b"id,x\n1,2\n", "other.parquet")
        broken = raw[:100] + bytes(400) + raw[500:]
        with pytest.raises(ResourceError, match=r"damaged|failed"):
            read(source(tmp_path, broken, "broken.parquet"))

    def test_memory_does_not_grow_with_a_row_group(self, tmp_path: Path) -> None:
        rows = 30_000
        table = {"id": [str(i) for i in range(rows)], "x": [f"{i} " + "text " * 200 for i in range(rows)]}
        path = self.written(tmp_path / "r.parquet", table, row_group_size=rows, use_dictionary=False)
        before, made = pyarrow.total_allocated_bytes(), opened(path)
        most, count = 0, 0
        for page in made.pages():
            count += len(page)
            most = max(most, pyarrow.total_allocated_bytes() - before)
        made.close()
        assert count == rows
        assert most < 12e6  # 30 MB of text

    def test_without_its_package_it_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = self.written(tmp_path / "r.parquet", {"id": ["a"], "x": ["text"]})
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(MissingPackageError, match="kdb-fast\\[parquet\\]"):
            opened(path)
        assert parquet.BATCH_ROWS


class TestPacked:
    @pytest.mark.parametrize("name", ["rows.csv.gz", "rows.csv.zst", "rows.gz", "rows", "rows.csv"])
    def test_gzip_and_zstandard_are_unpacked_whatever_the_name(self, tmp_path: Path, name: str) -> None:
        two = b"3,Three,third\n"
        for raw in (
            gzip.compress(CSV),
            zstandard.compress(CSV),
            gzip.compress(CSV) + gzip.compress(two),
            zstandard.compress(CSV) + zstandard.compress(two),
        ):
            found = texts(read(source(tmp_path, raw, name)))
            assert found["2"] == "Two\n\nsecond"
            assert len(found) in (2, 3)

    @pytest.mark.parametrize("name", ["r.jsonl.gz", "r.gz"])
    def test_json_and_tsv_too(self, tmp_path: Path, name: str) -> None:
        raw = gzip.compress(b"\n".join(json.dumps(row).encode() for row in ROWS))
        assert texts(read(source(tmp_path, raw, name))) == {"1": "One\n\nfirst", "two": "second"}
        raw = gzip.compress(b"id\ta,b\n1\tx,y\n")
        assert texts(read(source(tmp_path, raw, "r.tsv.gz"))) == {"1": "x,y"}

    @pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress])
    def test_a_cut_or_damaged_end_is_an_error_and_what_was_before_is_read(self, tmp_path: Path, pack: Any) -> None:
        rows = b"".join(b"%d,%s\n" % (i, hashlib.sha256(b"%d" % i).hexdigest().encode()) for i in range(20_000))
        raw = pack(b"id,a\n" + rows)
        for broken in (raw[: len(raw) * 3 // 4], raw[:-600] + bytes(500) + raw[-100:]):
            made = source(tmp_path, broken, "r")
            seen: list[Record | Reject] = []
            with pytest.raises(ResourceError, match=r"end early|damaged"):
                seen.extend(item for page in made.pages() for item in page)
            made.close()
            assert len(seen) > 10_000

    def test_a_bomb_does_not_fill_the_memory(self) -> None:
        raw = zstandard.compress(bytes(200_000_000))
        tracemalloc.start()
        try:
            stream = unpacking.unpacked(io.BytesIO(raw), raw[:4])
            assert sum(map(len, unpacking.chunks_of(stream))) == 200_000_000
            assert tracemalloc.get_traced_memory()[1] < 100e6
        finally:
            tracemalloc.stop()

    def test_without_a_package_for_zstandard_it_is_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("zstandard", "compression"):
            monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(MissingPackageError, match="kdb-fast\\[zstd\\]"):
            source(tmp_path, zstandard.ZstdCompressor().compress(CSV), "r.csv.zst")

    @pytest.mark.parametrize(
        ("raw", "what"),
        [(bz2.compress(CSV), "bzip2"), (gzip.compress(bz2.compress(CSV)), "bzip2"), (b"%PDF-1.4", "a PDF")],
    )
    def test_what_is_not_read_is_named(self, tmp_path: Path, raw: bytes, what: str) -> None:
        with pytest.raises(UsageError, match=f"{what}.*expected CSV, TSV, Parquet"):
            source(tmp_path, raw)


class TestEncoding:
    @pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-16-le", "utf-32", "cp1252", "UTF-8"])
    def test_a_named_encoding_is_read(self, tmp_path: Path, encoding: str) -> None:
        raw = 'id,a\n1,naïve café\n2,"x\ny"\n'.encode(encoding)
        expected = {"1": "naïve café", "2": "x\ny"}
        assert texts(read(source(tmp_path, raw, encoding=encoding))) == expected
        assert texts(read(source(tmp_path, gzip.compress(raw), encoding=encoding))) == expected
        lines = '{"id": 1, "a": "naïve café"}\n{"id": 2, "a": "x\\ny"}\n'.encode(encoding)
        assert texts(read(source(tmp_path, lines, "r.jsonl", encoding=encoding))) == expected

    @pytest.mark.parametrize(("encoding", "bad"), [("utf-16-le", b"\x00\xd8"), ("cp1252", b"\x81"), ("ascii", b"\xe9")])
    def test_what_is_none_is_rejected_with_its_line(self, tmp_path: Path, encoding: str, bad: bytes) -> None:
        raw = "id,a\n1,x\n2,".encode(encoding) + bad + "\n3,y\n".encode(encoding)
        assert texts(read(source(tmp_path, raw, encoding=encoding))) == {"1": "x", "line 3": "not_utf8", "3": "y"}

    def test_utf16_that_is_not_named_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=r"UTF-16.*--encoding utf-16"):
            source(tmp_path, CSV.decode().encode("utf-16"))


class TestStandardInput:
    def piped(self, monkeypatch: pytest.MonkeyPatch, raw: bytes, **options: Any) -> FileSource:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))
        return opened("-", **options)

    @pytest.mark.parametrize("pack", [bytes, gzip.compress, zstandard.compress])
    def test_it_is_told_by_its_first_bytes(self, monkeypatch: pytest.MonkeyPatch, pack: Any) -> None:
        made = self.piped(monkeypatch, pack(CSV))
        assert made.estimate() is None
        assert texts(read(made))["1"] == "One\n\nfirst"
        assert (made.input, made.warnings(), made.changed()) == ("standard input", [], False)
        raw = b"\n".join(json.dumps(row).encode() for row in ROWS)
        assert texts(read(self.piped(monkeypatch, pack(raw))))["two"] == "second"
        assert not sys.stdin.closed

    def test_a_file_that_changes_meanwhile_is_reported(self, tmp_path: Path) -> None:
        made = source(tmp_path, CSV)
        assert made.input == str(tmp_path / "rows.csv")
        with (tmp_path / "rows.csv").open("ab") as file:
            file.write(b"3,x,y\n")
        assert len(read(made)) == 3
        assert made.changed()
        assert "size" in made.warnings()[0]

    @pytest.mark.parametrize("name", ["missing.csv", "."])
    def test_a_file_that_cannot_be_read_is_a_usage_error(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(UsageError, match="Cannot read"):
            opened(tmp_path / name)

    def test_a_large_file_is_estimated_by_its_size(self, tmp_path: Path) -> None:
        made = source(tmp_path, b"id,a\n" + b"".join(b"%d,some text\n" % i for i in range(100_000, 120_000)))
        assert made.estimate() == pytest.approx(20_000, rel=0.01)
        made.close()
        assert json_records.MAX_LINE_BYTES
