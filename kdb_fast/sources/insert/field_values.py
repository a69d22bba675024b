"""What a new record must be: its fields against KameleonDB's definitions. Pure: no connection, no database.

KameleonDB 0.2 itself checks only that every field is defined. Types, required fields and characters that no
database can store are checked here, before the database sees them: there one bad value fails its whole page.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from ...records import storable_key
from ..json_records import kind

SYSTEM_FIELDS = frozenset({"id", "created_at", "updated_at", "created_by"})
"""Keys that KameleonDB accepts in a new record and does not use: it gives these values itself."""

MAX_NAMES_SHOWN = 10
"""Field names in a message; more would hide the message."""


class UnfitError(Exception):
    """A record that cannot be inserted.

    Attributes:
        reason: A short machine-readable word.
        detail: One sentence for a person, without the record's text.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class FieldRule:
    """What a value of one field must be.

    Attributes:
        name: As users write it.
        column: Where it is stored: the key in a shared record, or the column of a dedicated table.
        type: KameleonDB's name of the type; one that it does not know takes any value.
        required: Null and a missing value are refused. KameleonDB's ``default_value`` is a note that it never
            applies, so a default does not stand in.
        max_chars: Longest text that the column holds; None for any.
        bounds: Least and greatest whole number that the column holds; None for any.
        stored: False where the dedicated table has no column for it.
    """

    name: str
    column: str
    type: str
    required: bool = False
    max_chars: int | None = None
    bounds: tuple[int, int] | None = None
    stored: bool = True


def check_record(rules: Mapping[str, FieldRule], data: Mapping[str, Any], *, escapes: bool = True) -> dict[str, Any]:
    """The values to store, by column, in the order of ``data``; a field that is not given is left out.

    Args:
        rules: The rules of all active fields by name.
        data: The record as it was read from JSON. Keys of :data:`SYSTEM_FIELDS` are ignored, as KameleonDB does.
        escapes: Whether the JSON text had an escape like ``\\u0000``: only then can it hold a NUL or half a
            surrogate pair.

    Raises:
        UnfitError: The first fault, with reason ``nul_byte``, ``lone_surrogate``, ``unknown_field``,
            ``wrong_type``, ``out_of_range``, ``too_long``, ``no_column`` or ``required_field``.
    """
    if escapes:
        for name, value in data.items():
            _check_text(name, value)
    values: dict[str, Any] = {}
    for name, value in data.items():
        if name in SYSTEM_FIELDS:
            continue
        rule = rules.get(name)
        if rule is None:
            raise _unknown(name, rules)
        if value is not None:
            value = _checked(rule, value)
        if rule.stored:
            values[rule.column] = value
    for rule in rules.values():
        if rule.required and data.get(rule.name) is None:
            found = "is null" if rule.name in data else "is missing"
            raise UnfitError("required_field", f"the required field {shown(rule.name)} {found}")
    return values


def shown(name: str) -> str:
    """A name from a record, quoted and safe for messages."""
    return repr(storable_key(name, 60))


def _checked(rule: FieldRule, value: Any) -> Any:
    check, expected = _CHECKS.get(rule.type, _ANYTHING)
    try:
        value = check(value)
    except TypeError:
        raise UnfitError("wrong_type", f"the field {shown(rule.name)} is {kind(value)}, expected {expected}") from None
    except OverflowError:
        raise UnfitError("out_of_range", f"the field {shown(rule.name)} is too large for a 64-bit float") from None
    except ValueError:
        what = "a number with a fraction" if isinstance(value, float) else "a string of another form"
        raise UnfitError("wrong_type", f"the field {shown(rule.name)} is {what}, expected {expected}") from None
    if not rule.stored:
        raise UnfitError(
            "no_column",
            f"the field {shown(rule.name)} was added after the entity got its own table, which has no column "
            f"{shown(rule.column)}",
        )
    if rule.max_chars is not None and isinstance(value, str) and len(value) > rule.max_chars:
        raise UnfitError(
            "too_long", f"the field {shown(rule.name)} has {len(value):,} characters, the column holds {rule.max_chars}"
        )
    if rule.bounds is not None and isinstance(value, int) and not rule.bounds[0] <= value <= rule.bounds[1]:
        least, greatest = rule.bounds
        raise UnfitError(
            "out_of_range", f"the field {shown(rule.name)} is outside {least:,} to {greatest:,}, which the column holds"
        )
    return value


def _text(value: Any) -> str:
    if type(value) is not str:
        raise TypeError
    return value


def _whole(value: Any) -> int:
    if type(value) is float:
        if not value.is_integer():
            raise ValueError
        return int(value)
    if type(value) is not int:
        raise TypeError
    return value


def _number(value: Any) -> float:
    if type(value) is not int and type(value) is not float:
        raise TypeError
    return float(value)


def _flag(value: Any) -> bool:
    if type(value) is not bool:
        raise TypeError
    return value


def _moment(value: Any) -> str:
    datetime.fromisoformat(_text(value))
    return str(value)


def _uuid(value: Any) -> str:
    UUID(_text(value))
    return str(value)


def _anything(value: Any) -> Any:
    return value


_ANYTHING: tuple[Callable[[Any], Any], str] = (_anything, "anything")
_CHECKS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "string": (_text, "text"),
    "text": (_text, "text"),
    "int": (_whole, "a whole number"),
    "float": (_number, "a number"),
    "bool": (_flag, "true or false"),
    "datetime": (_moment, "a date and time in ISO 8601 form"),
    "uuid": (_uuid, "a UUID as text"),
    "json": _ANYTHING,
}


def _unknown(name: str, rules: Mapping[str, FieldRule]) -> UnfitError:
    close = difflib.get_close_matches(name, rules, n=3)
    # Same letters in another case are the likeliest slip; difflib compares case.
    near = list(dict.fromkeys([other for other in rules if other.casefold() == name.casefold()] + close))
    if near:
        hint = f"did you mean {' or '.join(shown(other) for other in near)}?"
    else:
        first = [shown(other) for other in list(rules)[:MAX_NAMES_SHOWN]]
        more = len(rules) - len(first)
        hint = f"expected {', '.join(first) or 'no field at all'}{f' and {more} more' if more else ''}"
    return UnfitError("unknown_field", f"{shown(name)} is no field of the entity; {hint}")


def _check_text(name: str, value: Any) -> None:
    """Refuse what no database stores as text, wherever in the value it is."""
    found = [name, value]
    while found:
        item = found.pop()
        if isinstance(item, str):
            if "\x00" in item:
                raise UnfitError("nul_byte", f"the field {shown(name)} has a NUL character (U+0000)")
            if not item.isascii():
                try:
                    item.encode()
                except UnicodeEncodeError as error:
                    code = f"U+{ord(item[error.start]):04X}"
                    raise UnfitError(
                        "lone_surrogate", f"the field {shown(name)} has a lone surrogate ({code})"
                    ) from None
        elif isinstance(item, dict):
            found += item
            found += item.values()
        elif isinstance(item, list):
            found += item
