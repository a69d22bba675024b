"""New records against KameleonDB's definitions."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kdb_fast.sources.insert.field_values import FieldRule, UnfitError, check_record

RULES = {
    rule.name: rule
    for rule in (
        FieldRule("title", "name", "string"),
        FieldRule("body", "body", "text"),
        FieldRule("stock", "stock", "int"),
        FieldRule("price", "price", "float"),
        FieldRule("active", "active", "bool"),
        FieldRule("since", "since", "datetime"),
        FieldRule("owner", "owner", "uuid"),
        FieldRule("extra", "extra", "json"),
        FieldRule("odd", "odd", "a type of the future"),
        FieldRule("short", "short", "string", max_chars=5),
        FieldRule("small", "small", "int", bounds=(-(1 << 31), (1 << 31) - 1)),
        FieldRule("late", "late", "text", stored=False),
    )
}
UUID = "6f1c2f0e-3b1a-4c65-9d57-0d7f0a6d0f11"


def fault(data: dict[str, Any], rules: dict[str, FieldRule] = RULES) -> tuple[str, str]:
    with pytest.raises(UnfitError) as unfit:
        check_record(rules, data)
    return unfit.value.reason, unfit.value.detail


def test_values_are_stored_by_column_in_the_order_given() -> None:
    values = check_record(RULES, {"stock": 1, "title": "a", "extra": None})
    assert list(values.items()) == [("stock", 1), ("name", "a"), ("extra", None)]


@pytest.mark.parametrize(
    ("field", "given", "stored"),
    [
        ("title", "", ""),
        ("stock", 3.0, 3),
        ("stock", -(10**30), -(10**30)),
        ("price", 3, 3.0),
        ("price", 1.5, 1.5),
        ("active", False, False),
        ("since", "2026-01-02T03:04:05Z", "2026-01-02T03:04:05Z"),
        ("since", "2026-01-02", "2026-01-02"),
        ("owner", UUID, UUID),
        ("owner", UUID.upper().replace("-", ""), UUID.upper().replace("-", "")),
        ("extra", {"a": [1, None, "x"]}, {"a": [1, None, "x"]}),
        ("extra", "text", "text"),
        ("odd", [1], [1]),
        ("short", "12345", "12345"),
        ("small", 2**31 - 1, 2**31 - 1),
        ("title", None, None),
        ("stock", None, None),
    ],
)
def test_a_value_of_the_right_type_is_stored_as_kameleondb_stores_it(field: str, given: Any, stored: Any) -> None:
    (value,) = check_record(RULES, {field: given}).values()
    assert (value, type(value)) == (stored, type(stored))


@pytest.mark.parametrize(
    ("field", "given", "message"),
    [
        ("title", 7, "'title' is a number, expected text"),
        ("body", ["x"], "'body' is an array, expected text"),
        ("stock", "7", "'stock' is a string, expected a whole number"),
        ("stock", True, "'stock' is a boolean, expected a whole number"),
        ("stock", 1.5, "'stock' is a number with a fraction, expected a whole number"),
        ("price", "1.5", "'price' is a string, expected a number"),
        ("price", False, "'price' is a boolean, expected a number"),
        ("active", 1, "'active' is a number, expected true or false"),
        ("active", "yes", "'active' is a string, expected true or false"),
        ("since", 1767225600, "'since' is a number, expected a date and time in ISO 8601 form"),
        ("since", "yesterday", "'since' is a string of another form, expected a date and time in ISO 8601 form"),
        ("since", "2026-02-30", "'since' is a string of another form, expected a date and time in ISO 8601 form"),
        ("owner", 7, "'owner' is a number, expected a UUID as text"),
        ("owner", "me", "'owner' is a string of another form, expected a UUID as text"),
    ],
)
def test_a_value_of_another_type_is_refused_without_showing_it(field: str, given: Any, message: str) -> None:
    assert fault({field: given}) == ("wrong_type", f"the field {message}")


def test_what_the_column_cannot_hold_is_refused() -> None:
    assert fault({"short": "123456"}) == ("too_long", "the field 'short' has 6 characters, the column holds 5")
    reason, detail = fault({"small": 2**31})
    assert reason == "out_of_range"
    assert "-2,147,483,648 to 2,147,483,647" in detail
    assert fault({"price": 10**400})[0] == "out_of_range"


def test_an_unknown_field_is_refused_with_near_names() -> None:
    assert fault({"titel": 1}) == ("unknown_field", "'titel' is no field of the entity; did you mean 'title'?")
    assert fault({"STOCK": 1})[1].endswith("did you mean 'stock'?")
    assert fault({"is_deleted": True})[0] == "unknown_field"
    assert "expected 'title', 'body', 'stock'" in fault({"zzz": 1})[1]
    assert fault({"zzz": 1})[1].endswith("and 2 more")
    assert fault({"zzz": 1}, {}) == ("unknown_field", "'zzz' is no field of the entity; expected no field at all")
    assert "\x1b" not in fault({"\x1b[31m" + "x" * 1000: 1})[1]


def test_a_required_field_must_be_there_and_not_null() -> None:
    rules = {"a": FieldRule("a", "a", "text", required=True), "b": FieldRule("b", "b", "int")}
    assert fault({"b": 1}, rules) == ("required_field", "the required field 'a' is missing")
    assert fault({"a": None}, rules) == ("required_field", "the required field 'a' is null")
    assert check_record(rules, {"a": ""}) == {"a": ""}


def test_a_field_without_a_column_may_be_null_only() -> None:
    reason, detail = fault({"late": "x"})
    assert reason == "no_column"
    assert "added after the entity got its own table" in detail
    assert check_record(RULES, {"late": None, "title": "a"}) == {"name": "a"}


def test_what_kameleondb_gives_itself_is_ignored() -> None:
    given = {"id": "x", "created_at": 1, "updated_at": None, "created_by": "me", "title": "a"}
    assert check_record(RULES, given) == {"name": "a"}


@pytest.mark.parametrize("bad", ["\x00", "a\ud800", "\udc00b"])
@pytest.mark.parametrize("where", ["value", "key", "deep", "deep key", "ignored"])
def test_text_that_no_database_stores_is_refused_wherever_it_is(bad: str, where: str) -> None:
    places: dict[str, dict[str, Any]] = {
        "value": {"title": bad},
        "key": {bad: 1},
        "deep": {"extra": [1, {"a": [bad]}]},
        "deep key": {"extra": {"a": {bad: 1}}},
        "ignored": {"id": bad},
    }
    data = places[where]
    assert json.loads(json.dumps(data)) == data
    reason, detail = fault(data)
    assert reason == ("nul_byte" if bad == "\x00" else "lone_surrogate")
    assert detail.isprintable()


def test_a_whole_surrogate_pair_is_text() -> None:
    assert check_record(RULES, json.loads('{"title": "\\ud83d\\ude00"}')) == {"name": "😀"}
