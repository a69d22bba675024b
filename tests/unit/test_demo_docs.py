"""The demo's records: no word of a docstring is lost, none is there twice."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kdb_fast.cli.demo_docs import split_summary


@given(st.text(alphabet="ab.?\n ", max_size=400).map(str.strip).filter(bool), st.integers(1, 60))
def test_a_summary_and_the_rest_make_the_text(text: str, limit: int) -> None:
    summary, rest = split_summary(text, limit)
    assert len(summary) <= limit
    assert "".join((summary + rest).split()) == "".join(text.split())


def test_a_short_text_is_all_summary() -> None:
    assert split_summary("Read a file.\n\nReturns its lines.") == ("Read a file. Returns its lines.", "")


def test_the_summary_ends_with_a_sentence_and_the_rest_keeps_its_lines() -> None:
    text = "Read a file. It may be\nlong.\n\nRaises an OSError\nif it is not there."
    assert split_summary(text, 40) == ("Read a file. It may be long.", "Raises an OSError\nif it is not there.")


def test_without_a_sentence_it_ends_with_a_word() -> None:
    assert split_summary("one two three four", 10) == ("one two", "three four")
