"""JSON Lines and JSON arrays: every kind of bad input becomes one reject, and nothing else is lost."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import sys
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdb_fast.errors import UsageError
from kdb_fast.records import Record, Reject, content_from_fields
from kdb_fast.sources import json_records
from kdb_fast.sources.json_records import iter_json_records
from kdb_fast.sources.jsonl import JsonlSource

GOOD = b'{"id": "good", "name": "x"}'


def parsed(raw: bytes) -> list[tuple[int, dict[str, Any] | Reject]]:
    return list(iter_json_records(io.BytesIO(raw)))


def reasons(raw: bytes) -> list[tuple[int, str]]:
    """(line, reason) of the rejects; the reason of an object is ''."""
    return [(line, item.reason if isinstance(item, Reject) else "") for line, item in parsed(raw)]


def source(tmp_path: Path, raw: bytes, **options: Any) -> JsonlSource:
    path = tmp_path / "records.jsonl"
    path.write_bytes(raw)
    return JsonlSource(path, "Item", **options)


def read(made: JsonlSource) -> list[Record | Reject]:
    try:
        return [item for page in made.pages() for item in page]
    finally:
        made.close()


FAULTS = [
    pytest.param(b'{"id": 1', "invalid_json", id="cut"),
    pytest.param(b'{"id": 1} {"id": 2}', "invalid_json", id="two objects"),
    pytest.param(b"{'id': 1}", "invalid_json", id="single quotes"),
    pytest.param(b'{"id": 1, "a": tru}', "invalid_json", id="half a word"),
    pytest.param(b'{"id": 1, "a": "\t"}', "invalid_json", id="control character"),
    pytest.param(b'{"id": 1, "id": 2}', "duplicate_key", id="duplicate key"),
    pytest.param(b'{"id": 1, "a": {"b": 1, "b": 1}}', "duplicate_key", id="duplicate key inside"),
    pytest.param(b'{"id": 1, "a": NaN}', "not_finite_number", id="NaN"),
    pytest.param(b'{"id": 1, "a": -Infinity}', "not_finite_number", id="-Infinity"),
    pytest.param(b'{"id": 1, "a": 1e999}', "not_finite_number", id="1e999"),
    pytest.param(b'{"id": 1, "a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "too_deep", id="too deep"),
    pytest.param(b'{"id": ' + b"7" * 5000 + b"}", "number_too_long", id="5000 digits"),
    pytest.param(b"[1, 2]", "not_an_object", id="an array"),
    pytest.param(b'"text"', "not_an_object", id="a string"),
    pytest.param(b"null", "not_an_object", id="null"),
    pytest.param(b'{"id": "caf\xe9"}', "not_utf8", id="latin-1"),
    pytest.param(b"\xef\xbb\xbf" + GOOD, "invalid_json", id="byte order mark in the middle"),
]


@pytest.mark.parametrize(("line", "reason"), FAULTS)
def test_a_faulty_line_is_one_reject_and_the_lines_around_it_are_read(line: bytes, reason: str) -> None:
    found = parsed(GOOD + b"\n" + line + b"\n" + GOOD + b"\n")

    assert [position for position, _ in found] == [1, 2, 3]
    reject = found[1][1]
    assert isinstance(reject, Reject)
    assert reject.reason == reason
    assert reject.content_hash == hashlib.sha256(line).digest()
    assert found[0][1] == found[2][1] == {"id": "good", "name": "x"}


@pytest.mark.parametrize(("element", "reason"), [fault for fault in FAULTS if fault.id not in ("cut", "two objects")])
def test_a_faulty_element_is_one_reject_and_the_elements_around_it_are_read(element: bytes, reason: str) -> None:
    found = parsed(b"[" + GOOD + b",\n" + element + b",\n\n" + GOOD + b"]\n")

    assert [position for position, _ in found] == [1, 2, 4]
    reject = found[1][1]
    assert isinstance(reject, Reject)
    assert reject.reason == reason
    assert reject.content_hash == hashlib.sha256(element).digest()
    assert found[0][1] == found[2][1] == {"id": "good", "name": "x"}


def test_blank_lines_carriage_returns_and_a_byte_order_mark_at_the_start_are_accepted() -> None:
    assert parsed(b'\xef\xbb\xbf{"id": 1}\r\n\r\n   \n{"id": 2}') == [(1, {"id": 1}), (4, {"id": 2})]


def test_an_empty_input_has_no_records() -> None:
    assert parsed(b"") == parsed(b"\n \n") == parsed(b"\xef\xbb\xbf") == parsed(b"[]") == parsed(b" [\n\n] \n") == []


@pytest.mark.parametrize(
    "tail", [b'{"id": 2, "na', b'{"id": "\xc3', b'{"id": 2, "name": "x"'], ids=["text", "character", "brace"]
)
def test_a_broken_last_line_without_newline_is_truncated_input(tail: bytes) -> None:
    assert reasons(GOOD + b"\n" + tail) == [(1, ""), (2, "truncated_input")]


def test_a_whole_last_line_without_newline_is_a_record() -> None:
    assert reasons(GOOD + b"\n" + GOOD) == [(1, ""), (2, "")]


def test_not_utf8_names_the_byte() -> None:
    (_, reject), _ = parsed(b'{"id": "\xff"}\n' + GOOD)
    assert isinstance(reject, Reject)
    assert "byte 9 " in reject.detail


@pytest.mark.parametrize(("line", "reason"), FAULTS)
def test_details_never_hold_the_text(line: bytes, reason: str) -> None:
    secret = line.rstrip(b"}") + b', "more": "hunter2-SENTINEL'
    rejects = [item for _, item in parsed(secret + b"\n" + line + b" hunter2-SENTINEL\n")]
    assert rejects
    for reject in rejects:
        assert isinstance(reject, Reject)
        assert "SENTINEL" not in reject.detail


class TestLongLines:
    @pytest.fixture(autouse=True)
    def small_cap(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(json_records, "MAX_LINE_BYTES", 1000)
        monkeypatch.setattr(json_records, "CHUNK_BYTES", 64)

    def test_a_line_over_the_cap_is_rejected_whole_and_the_next_is_read(self) -> None:
        line = b'{"id": "long", "name": "' + b"x" * 5000 + b'"}'
        found = parsed(GOOD + b"\n" + line + b"\n" + GOOD)

        assert [position for position, _ in found] == [1, 2, 3]
        reject = found[1][1]
        assert isinstance(reject, Reject)
        assert reject.reason == "line_too_long"
        assert f"{len(line):,} bytes" in reject.detail
        assert reject.content_hash == hashlib.sha256(line).digest()

    @pytest.mark.parametrize("size", [999, 1000])
    def test_a_line_up_to_the_cap_is_read(self, size: int) -> None:
        line = b'{"id": "' + b"x" * (size - 10) + b'"}'
        assert len(line) == size
        assert reasons(line + b"\n" + GOOD) == [(1, ""), (2, "")]

    def test_an_element_over_the_cap_is_rejected_and_the_next_is_read(self) -> None:
        element = b'{"id": "long",\n "name": "' + b"x\\\\" * 2000 + b'"}'
        found = parsed(b"[" + GOOD + b",\n" + element + b",\n" + GOOD + b"]")

        assert reasons(b"[" + GOOD + b",\n" + element + b",\n" + GOOD + b"]") == [
            (1, ""),
            (2, "line_too_long"),
            (4, ""),
        ]
        assert found[2][1] == {"id": "good", "name": "x"}

    def test_an_element_just_over_the_cap_is_rejected_too(self) -> None:
        element = b'{"id": "' + b"x" * 991 + b'"}'
        assert len(element) == 1001
        assert reasons(b"[" + element + b"," + element[1:-1] + b"," + GOOD + b"]")[0] == (1, "line_too_long")


class Endless(io.RawIOBase):
    """A stream of many equal bytes that needs no memory."""

    def __init__(self, head: bytes, fill: bytes, size: int) -> None:
        self._head, self._fill, self._left = head, fill, size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._head or self._fill * min(len(buffer) // len(self._fill), self._left // len(self._fill))
        self._head, self._left = b"", self._left - (0 if self._head else len(data))
        buffer[: len(data)] = data
        return len(data)


@pytest.mark.parametrize("head", [b'{"id": "', b'[{"id": "', b"[{"], ids=["line", "string in an array", "array"])
def test_memory_stays_flat_over_an_endless_line(head: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_records, "MAX_LINE_BYTES", 1 << 20)
    stream = io.BufferedReader(Endless(head, b"xxxxxxx ", 48 << 20), buffer_size=1 << 16)
    tracemalloc.start()
    try:
        found = list(iter_json_records(stream))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert isinstance(found[0][1], Reject)
    assert found[0][1].reason == "line_too_long"
    assert peak < 8 << 20


class TestArrays:
    def test_position_is_the_line_where_the_element_starts(self) -> None:
        raw = b'\n[\n  {"id": 1,\n   "x": "],{"},\n\n  {"id": 2}\n]\n'
        assert parsed(raw) == [(3, {"id": 1, "x": "],{"}), (6, {"id": 2})]

    def test_an_array_that_is_cut_keeps_its_whole_elements_and_says_so(self) -> None:
        assert reasons(b'[{"id": 1},\n{"id": 2}') == [(1, ""), (2, ""), (2, "truncated_input")]
        assert reasons(b'[{"id": 1},\n{"id":') == [(1, ""), (2, "truncated_input")]
        assert reasons(b'[{"id": 1},\n') == [(1, ""), (2, "truncated_input")]
        assert reasons(b'[{"id": "a') == [(1, "truncated_input")]

    def test_an_empty_element_and_a_trailing_comma_are_rejected(self) -> None:
        assert reasons(b'[\n{"id": 1},\n]') == [(2, ""), (3, "invalid_json")]
        assert reasons(b'[{"id": 1},,{"id": 2}]') == [(1, ""), (1, "invalid_json"), (1, "")]

    def test_text_after_the_end_is_rejected(self) -> None:
        assert reasons(b'[{"id": 1}]\n\n{"id": 2}\n') == [(1, ""), (3, "invalid_json")]

    def test_a_line_that_is_an_array_of_numbers_is_not_taken_for_the_array_form(self) -> None:
        assert reasons(b'[1]\n{"id": 2}\n') == [(1, "not_an_object"), (2, "")]


SCALARS = st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False, allow_infinity=False)
TEXTS = st.text(max_size=30)
OBJECTS = st.dictionaries(TEXTS, SCALARS | TEXTS | st.lists(TEXTS, max_size=3), max_size=4)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(OBJECTS, max_size=8),
    indent=st.sampled_from([None, 1]),
    ascii_only=st.booleans(),
    chunk=st.integers(1, 50),
)
def test_both_forms_give_back_what_was_written(
    rows: list[dict[str, Any]], indent: int | None, ascii_only: bool, chunk: int
) -> None:
    lines = "\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows).encode()
    array = json.dumps(rows, ensure_ascii=ascii_only, indent=indent).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_records, "CHUNK_BYTES", chunk)  # an array split at any byte
        # A first line that holds only "[" comes with no more than itself, so the rest is read in chunks.
        assert [item for _, item in parsed(array)] == rows
        assert [item for _, item in parsed(b"[\n" + array.strip()[1:])] == rows
    assert [item for _, item in parsed(lines)] == rows


@settings(max_examples=100, deadline=None)
@given(noise=st.binary(max_size=200))
def test_any_bytes_between_two_records_lose_neither(noise: bytes) -> None:
    line = noise.replace(b"\n", b"").replace(b"\r", b"")
    found = parsed(GOOD + b"\n" + line + b"\n" + GOOD)

    assert found[0][1] == found[-1][1] == {"id": "good", "name": "x"}
    assert len(found) == (2 if not line.strip() else 3)


@pytest.mark.parametrize(
    ("raw", "word"),
    [
        (gzip.compress(GOOD), "gzip"),
        (b"PK\x03\x04rest", "zip"),
        ("﻿{}".encode("utf-16"), "UTF-16"),
        ("{}".encode("utf-16-le"), "UTF-16"),
        ("{}".encode("utf-16-be"), "UTF-16"),
        ("{}".encode("utf-32"), "UTF-16 or UTF-32"),
    ],
    ids=["gzip", "zip", "utf-16", "utf-16-le", "utf-16-be", "utf-32"],
)
def test_compressed_or_wide_text_is_refused_at_once(tmp_path: Path, raw: bytes, word: str) -> None:
    with pytest.raises(UsageError, match=word) as refused:
        source(tmp_path, raw)
    assert refused.value.remedy
    with pytest.raises(UsageError, match=word):
        parsed(raw)


class TestSource:
    def test_content_is_every_text_but_the_id_in_the_order_of_the_line(self, tmp_path: Path) -> None:
        raw = b'{"title": "Box", "id": "a", "n": 3, "ok": true, "none": null, "empty": "", "body": "Made of wood"}\n'
        assert read(source(tmp_path, raw)) == [Record(("Item", "a"), "title: Box | body: Made of wood", None, 1)]

    def test_named_fields_are_taken_in_the_order_given_and_null_is_left_out(self, tmp_path: Path) -> None:
        raw = b'{"a": "1", "b": "2", "c": null, "key": "k"}\n{"key": "l"}\n'
        found = read(source(tmp_path, raw, id_field="key", fields=["c", "b", "a", "b"]))
        assert found == [Record(("Item", "k"), "b: 2 | a: 1", None, 1), Record(("Item", "l"), "", None, 2)]
        assert isinstance(found[0], Record)
        assert found[0].content == content_from_fields([("b", "2"), ("a", "1")])

    def test_a_whole_number_and_its_text_are_the_same_id(self, tmp_path: Path) -> None:
        raw = b'{"id": 1, "x": "a"}\n{"id": "1", "x": "b"}\n{"id": -7, "x": "c"}\n'
        assert [item.key[1] for item in read(source(tmp_path, raw))] == ["1", "1", "-7"]

    @pytest.mark.parametrize(
        ("line", "reason"),
        [
            (b'{"x": "a"}', "missing_id"),
            (b'{"id": null, "x": "a"}', "missing_id"),
            (b'{"id": true}', "bad_id"),
            (b'{"id": 1.0}', "bad_id"),
            (b'{"id": [1]}', "bad_id"),
            (b'{"id": {}}', "bad_id"),
            (b'{"id": 1, "name": 5}', "wrong_type"),
            (b'{"id": 1, "name": false}', "wrong_type"),
            (b'{"id": 1, "name": ["x"]}', "wrong_type"),
        ],
    )
    def test_unusable_ids_and_values_are_rejected_with_the_line(self, tmp_path: Path, line: bytes, reason: str) -> None:
        _, reject = read(source(tmp_path, GOOD + b"\n" + line + b"\n", fields=["name"]))
        assert isinstance(reject, Reject)
        assert (reject.key[0], reject.reason, reject.position) == ("Item", reason, 2)
        assert reject.content_hash == hashlib.sha256(line).digest()
        assert reject.key[1] == ("1" if reason == "wrong_type" else "")

    def test_rejects_of_the_reader_get_the_entity_and_the_line(self, tmp_path: Path) -> None:
        _, reject = read(source(tmp_path, GOOD + b"\nnull\n"))
        assert isinstance(reject, Reject)
        assert (reject.key[0], reject.reason, reject.position) == ("Item", "not_an_object", 2)

    def test_lone_surrogates_are_left_to_the_check_of_every_source(self, tmp_path: Path) -> None:
        found = read(source(tmp_path, b'{"id": "a", "x": "\\ud800"}\n'))
        assert found == [Record(("Item", "a"), "x: \ud800", None, 1)]

    def test_pages_hold_at_most_a_thousand_records_and_all_of_them(self, tmp_path: Path) -> None:
        made = source(tmp_path, b"".join(b'{"id": %d, "x": "t"}\n' % i for i in range(2500)))
        sizes = [len(page) for page in made.pages()]
        made.close()
        assert sizes == [1000, 1000, 500]

    def test_large_texts_make_smaller_pages(self, tmp_path: Path) -> None:
        made = source(tmp_path, (b'{"id": 1, "x": "' + b"t" * 3_000_000 + b'"}\n') * 4)
        assert [len(page) for page in made.pages()] == [3, 1]
        made.close()

    @pytest.mark.parametrize("limit", [1, 1000, 1001])
    def test_limit_stops_after_that_many(self, tmp_path: Path, limit: int) -> None:
        made = source(tmp_path, b'{"id": 1, "x": "t"}\nnull\n' * 1000, limit=limit)
        assert made.estimate() == min(limit, made.estimate() or 0)
        assert len(read(made)) == limit

    def test_estimate_is_exact_for_a_small_file_of_either_form(self, tmp_path: Path) -> None:
        rows = [{"id": i, "x": "t"} for i in range(20)]
        for raw in (b"\n".join(json.dumps(row).encode() for row in rows), json.dumps(rows, indent=1).encode()):
            made = source(tmp_path, raw)
            assert made.estimate() == 20
            assert len(read(made)) == 20

    def test_estimate_of_a_large_file_comes_from_its_size(self, tmp_path: Path) -> None:
        made = source(tmp_path, b"".join(b'{"id": %d, "x": "some text"}\n' % i for i in range(100_000, 120_000)))
        assert made.estimate() == pytest.approx(20_000, rel=0.01)
        made.close()

    def test_a_key_may_be_in_the_input_twice_and_the_input_is_not_a_complete_list(self, tmp_path: Path) -> None:
        made = source(tmp_path, GOOD)
        made.close()
        assert (made.complete, made.unique_keys, made.entities) == (False, False, ("Item",))

    def test_standard_input_is_read_where_the_path_is_a_dash(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(GOOD + b"\n")))
        made = JsonlSource("-", "Item")
        assert made.estimate() is None
        assert read(made) == [Record(("Item", "good"), "name: x", None, 1)]
        assert made.warnings() == []
        assert not sys.stdin.closed

    def test_compressed_standard_input_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(gzip.compress(GOOD))))
        with pytest.raises(UsageError, match="gzip"):
            read(JsonlSource("-", "Item"))

    @pytest.mark.parametrize("name", ["missing.jsonl", ".", "nul\x00"])
    def test_a_file_that_cannot_be_read_is_a_usage_error(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(UsageError, match="Cannot read"):
            JsonlSource(tmp_path / name, "Item")

    @pytest.mark.parametrize("entity", ["", "x" * 256])
    def test_an_entity_name_that_the_index_cannot_hold_is_a_usage_error(self, tmp_path: Path, entity: str) -> None:
        (tmp_path / "f").write_bytes(GOOD)
        with pytest.raises(UsageError, match="1 to 255"):
            JsonlSource(tmp_path / "f", entity)


class TestChangedFile:
    def made(self, tmp_path: Path) -> JsonlSource:
        made = source(tmp_path, GOOD + b"\n")
        assert made.warnings() == []
        return made

    def warned(self, made: JsonlSource) -> Sequence[str]:
        read(made)
        return made.warnings()

    def test_growth_is_reported(self, tmp_path: Path) -> None:
        made = self.made(tmp_path)
        with (tmp_path / "records.jsonl").open("ab") as file:
            file.write(GOOD)
        assert "size" in self.warned(made)[0]

    def test_a_rewrite_of_the_same_size_is_reported(self, tmp_path: Path) -> None:
        made = self.made(tmp_path)
        os.utime(tmp_path / "records.jsonl", ns=(1, 1))
        assert "written" in self.warned(made)[0]

    def test_replacement_and_removal_are_reported(self, tmp_path: Path) -> None:
        made = self.made(tmp_path)
        other = tmp_path / "other"
        other.write_bytes(GOOD + b"\n")
        other.replace(tmp_path / "records.jsonl")
        assert "replaced" in self.warned(made)[0]
        (tmp_path / "records.jsonl").unlink()
        assert "removed" in made.warnings()[0]


# -- one object over several lines ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            '{\n  "id": "a",\n  "list": [\n    {"x": "}{"},\n    {}\n  ]\n}\n',
            [(1, {"id": "a", "list": [{"x": "}{"}, {}]})],
        ),
        ('{"id": "a",\n"b": 2}\n{"id": "c"}\n', [(1, {"id": "a", "b": 2}), (3, {"id": "c"})]),
        ('{"id": "a", "b": {\n "c": 1\n}}', [(1, {"id": "a", "b": {"c": 1}})]),
        ('{"id": "a",\n{"id": "b"}\n', [(1, "invalid_json"), (2, {"id": "b"})]),
        ('{"id": "a"},\n{"id": "b"}\n', [(1, "invalid_json"), (2, {"id": "b"})]),
        ('{"id": "a"}\n{\n', [(1, {"id": "a"}), (2, "invalid_json")]),
        ('{\n  "id": "a"\n', [(1, "truncated_input")]),
    ],
)
def test_an_object_may_go_on_over_several_lines(text: str, expected: list[Any]) -> None:
    found = list(iter_json_records(io.BytesIO(text.encode())))
    assert [(n, data if isinstance(data, dict) else data.reason) for n, data in found] == expected
