from __future__ import annotations

import hashlib
import subprocess
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdb_fast import records
from kdb_fast.records import (
    MAX_CONTENT_BYTES,
    Record,
    content_from_fields,
    content_hash,
    content_of,
    cut_content,
    storable_key,
)
from kdb_fast.tables.kdb_search import MAX_ENTITY_CHARS, MAX_RECORD_ID_CHARS, unfit

ANY_TEXT = st.text(alphabet=st.characters(), max_size=40)
"""Any code points, lone surrogates and NUL among them."""


def reason(record: Record) -> str | None:
    problem = unfit(record)
    return problem[0] if problem else None


def test_content_joins_named_values_as_kameleondb_does() -> None:
    fields = [("name", "Wireless Headphones"), ("description", "Premium noise-cancelling")]
    assert content_from_fields(fields) == "name: Wireless Headphones | description: Premium noise-cancelling"


def test_null_and_empty_values_are_left_out_and_zero_and_false_stay() -> None:
    assert content_from_fields([("a", None), ("b", ""), ("c", 0), ("d", False), ("e", " ")]) == "c: 0 | d: False | e:  "
    assert content_from_fields([("a", None), ("b", "")]) == ""
    assert content_from_fields([("a", " \n"), ("b", "\u200b")]) == ""


def test_content_of_a_mapping_follows_the_given_names() -> None:
    assert content_of({"b": "2", "a": "1", "x": "9"}, ["a", "b", "missing"]) == "a: 1 | b: 2"


@settings(deadline=None)
@given(st.text())
def test_hash_is_sha256_of_the_utf8_form(content: str) -> None:
    assert content_hash(content) == hashlib.sha256(content.encode()).digest()


def test_hash_of_a_lone_surrogate_does_not_fail() -> None:
    assert len(content_hash("\ud800")) == 32
    assert content_hash("\ud800") != content_hash("\udfff")


@pytest.mark.parametrize(
    "content", ["x", "Überraschung", "日本語", "👩‍👩‍👧", "a\tb\nc", "\u202eabc", "\ufeffx", "\x7f\x01"]
)
def test_ordinary_text_in_any_script_is_fit(content: str) -> None:
    assert unfit(Record(("Product", "p-1"), content)) is None


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (Record(("E", "1"), None), "wrong_type"),  # type: ignore[arg-type]
        (Record(("E", 7), "text"), "wrong_type"),
        (Record((b"E", "1"), "text"), "wrong_type"),
        (Record(("E", ""), "text"), "missing_id"),
        (Record(("E", "x" * (MAX_RECORD_ID_CHARS + 1)), "text"), "id_too_long"),
        (Record(("", "1"), "text"), "bad_entity"),
        (Record(("E" * (MAX_ENTITY_CHARS + 1), "1"), "text"), "bad_entity"),
        (Record(("E", "1"), ""), "empty_text"),
        (Record(("E", "1"), " \t\n\u3000\u00a0"), "empty_text"),
        (Record(("E", "1"), "\u200b\ufeff \u00ad"), "empty_text"),
        (Record(("E", "1"), "a\x00b"), "nul_byte"),
        (Record(("E", "\x00"), "text"), "nul_byte"),
        (Record(("E\x00", "1"), "text"), "nul_byte"),
        (Record(("E", "1"), "a\ud800b"), "lone_surrogate"),
        (Record(("E", "\udfff"), "text"), "lone_surrogate"),
        (Record(("\udc80", "1"), "text"), "lone_surrogate"),
    ],
)
def test_each_kind_of_unfit_record_is_told_by_its_reason(record: Record, expected: str) -> None:
    problem = unfit(record)
    assert problem is not None
    assert problem[0] == expected
    assert problem[1]


def test_keys_at_the_width_of_the_columns_are_fit() -> None:
    assert unfit(Record(("E" * MAX_ENTITY_CHARS, "é" * MAX_RECORD_ID_CHARS), "text")) is None


def test_reasons_never_repeat_the_text() -> None:
    secret = "hunter2-SENTINEL"
    for content in (f"{secret}\x00", f"{secret}\ud800"):
        problem = unfit(Record(("E", "1"), content))
        assert problem is not None
        assert secret not in problem[1]


@settings(deadline=None)
@given(ANY_TEXT, ANY_TEXT, ANY_TEXT)
def test_a_fit_record_can_be_stored_and_an_unfit_one_has_a_reason(entity: str, record_id: str, content: str) -> None:
    problem = unfit(Record((entity, record_id), content))
    if problem is not None:
        assert all(problem)
        return
    for value in (entity, record_id, content):
        assert value
        assert "\x00" not in value
        assert value.encode().decode() == value
    assert content.strip()
    assert len(record_id) <= MAX_RECORD_ID_CHARS


@settings(deadline=None)
@given(st.text(max_size=60), st.integers(1, 100))
def test_a_cut_keeps_the_longest_beginning_of_whole_characters(content: str, limit: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "MAX_CONTENT_BYTES", limit)
        cut = cut_content(content)
    assert content.startswith(cut)
    assert len(cut.encode()) <= limit
    if cut != content:
        assert len(content[: len(cut) + 1].encode()) > limit


def test_a_text_that_fits_is_the_same_object() -> None:
    for content in ("a" * MAX_CONTENT_BYTES, "é" * (MAX_CONTENT_BYTES // 2), "short"):
        assert cut_content(content) is content


def test_a_text_one_byte_too_long_loses_one_character() -> None:
    assert cut_content("a" * (MAX_CONTENT_BYTES + 1)) == "a" * MAX_CONTENT_BYTES
    assert cut_content("a" + "é" * (MAX_CONTENT_BYTES // 2)) == "a" + "é" * (MAX_CONTENT_BYTES // 2 - 1)


@settings(deadline=None)
@given(st.one_of(ANY_TEXT, st.integers(), st.binary(max_size=20), st.none(), st.floats()), st.integers(1, 60))
def test_a_storable_key_is_printable_and_within_its_limit(value: Any, limit: int) -> None:
    key = storable_key(value, limit)
    assert len(key) <= limit
    assert key.isprintable()
    key.encode()


@settings(deadline=None)
@given(st.text(alphabet=st.characters(categories=["L", "N"]), max_size=30))
def test_a_key_that_can_be_stored_as_it_is_stays_as_it_is(value: str) -> None:
    if value.isprintable():
        assert storable_key(value) == value


def test_control_characters_in_a_key_are_written_out() -> None:
    assert storable_key("a\x00b\x1b[2J\ud800") == "a\\x00b\\x1b[2J\\ud800"
    assert storable_key("x" * 300) == "x" * 199 + "…"


def test_numbers_of_things_and_words_of_a_shell() -> None:
    assert records.number_of(0, "record") == "0 records"
    assert records.number_of(1, "record is", "records are") == "1 record is"
    assert records.number_of(1200, "record is", "records are") == "1,200 records are"
    assert records.shell_word("a b") == "'a b'"
    word = records.shell_word("odd\x07 name")
    printed = subprocess.run(["bash", "-c", f"printf %s {word}"], capture_output=True, check=True)
    assert printed.stdout == b"odd\x07 name"
