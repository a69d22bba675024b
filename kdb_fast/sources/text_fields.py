"""Which values of a record of an input are its text, and what is said at the end of those that are not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ..records import number_of, storable_key
from .json_records import kind

NAMES_KEPT, NAMES_SHOWN = 1000, 10
"""Names of fields that were left out, kept and shown: an object may have its data as names."""


class TextFields:
    """Finds the texts of records.

    Args:
        names: Of the fields that are embedded, in this order; () for all that hold text but those of ``key``.
        key: Of the fields that tell records apart.
        lists: A list of texts is a text of a line for each.
    """

    def __init__(self, names: Sequence[str], key: Collection[str], *, lists: bool = False) -> None:
        self._names, self._key, self._lists = tuple(dict.fromkeys(names)), frozenset(key), lists
        self._left_out: Counter[str] = Counter()
        self._unseen = set(self._names)

    def of(self, data: Mapping[str, Any]) -> tuple[list[tuple[str, str | None]], str]:
        """The fields to embed that a record has, without those that hold no text; and why it has none that can be.

        That is '' where it can be embedded, or has no text at all.
        """
        given = self._given(data)
        if self._lists:
            given = [(name, _lines(value) if type(value) is list else value) for name, value in given]
        texts = [(name, value) for name, value in given if value is None or type(value) is str]
        if len(texts) < len(given):
            others = [name for name, value in given if value is not None and type(value) is not str]
            if self._names or len(others) == len(given):
                return [], f"the field {shown(others[0])} is {kind(data[others[0]])}, expected text"
            if len(self._left_out) < NAMES_KEPT:
                self._left_out.update(others)
        return texts, ""

    def _given(self, data: Mapping[str, Any]) -> list[tuple[str, Any]]:
        """The fields to embed that the record has, null and other types too."""
        if not self._names:
            return [(name, value) for name, value in data.items() if name not in self._key]
        found = [(name, data[name]) for name in self._names if name in data]
        if self._unseen:
            self._unseen.difference_update(data)
        return found

    def warnings(self) -> list[str]:
        """Which fields were left out, and which were in no record."""
        found = []
        if self._left_out:
            names = [
                f"{shown(n)} ({number_of(count, 'record')})" for n, count in self._left_out.most_common(NAMES_SHOWN)
            ]
            more = len(self._left_out) - len(names)
            found.append(
                f"Fields that do not hold text were left out: {', '.join(names)}{f' and {more} more' if more else ''}."
            )
        if unseen := [shown(name) for name in self._names if name in self._unseen]:
            found.append(f"No record has the field {' or '.join(unseen)}.")
        return found


def shown(name: str) -> str:
    """The name of a field, for a message."""
    return repr(storable_key(name, 60))


def _lines(values: list[Any]) -> Any:
    """A list of texts as one text; any other list as it is."""
    texts = [value for value in values if value is not None]
    return "\n".join(texts) if all(type(text) is str for text in texts) else values
