"""Fusion of rankings, reading of queries, scope of a search: all that needs no database."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdb_fast.catalog.definitions import Entity, Field, Place, Storage
from kdb_fast.errors import DatabaseError, ProviderError, UsageError
from kdb_fast.records import Key
from kdb_fast.search.query import Query, Term, parse_query
from kdb_fast.search.readers.base import DefinitionsChanged, SearchReader, Statement
from kdb_fast.search.readers.ranking import Hit, in_order
from kdb_fast.search.retrieval import MIN_DEPTH, checked_vector, fuse, search
from kdb_fast.search.scope import Scope, resolve_scope
from kdb_fast.tables.target import Params

VECTOR = np.array([1, 0], np.float32)


def ranking(*ids: str) -> list[Hit]:
    return [Hit(("E", record_id), 1 - place / 100) for place, record_id in enumerate(ids)]


def definition(entity: str, *fields: str, live: bool = True) -> Entity:
    return Entity(Storage(f"id of {entity}", entity, live), tuple(Field(f, f, "string") for f in fields))


class MemoryReader(SearchReader):
    """Rankings given beforehand; remembers how deep they were asked for."""

    dialect = "sqlite"

    def __init__(self, by_vector: list[Hit], by_keyword: list[Hit], gone: frozenset[str] = frozenset()) -> None:
        self.by_vector, self.by_keyword, self.gone = by_vector, by_keyword, gone
        self.depths: list[int] = []

    def definitions(self) -> list[Entity]:
        return [definition("E", "name")]

    def vector(self, vector: npt.NDArray[np.float32], scope: Scope, limit: int) -> list[Hit]:
        self.depths.append(limit)
        return self.by_vector[:limit]

    def keyword(self, query: Query, scope: Scope, limit: int) -> list[Hit]:
        self.depths.append(limit)
        return self.by_keyword[:limit]

    def _with_all(self, query: Query, scope: Scope, limit: int) -> list[Hit]:
        raise NotImplementedError

    def _with_required(self, required: Sequence[Term], query: Query, scope: Scope, limit: int) -> list[Hit]:
        raise NotImplementedError

    def _with_any(self, query: Query, scope: Scope, limit: int) -> list[Hit]:
        raise NotImplementedError

    def _without(self, excluded: Sequence[Term], params: Params) -> str:
        raise NotImplementedError

    def records(self, keys: Sequence[Key], scope: Scope) -> dict[Key, tuple[dict[str, Any], str]]:
        return {key: ({"name": key[1]}, f"text of {key[1]!s}") for key in keys if key[1] not in self.gone}

    def _contents(self, keys: Sequence[Key]) -> Statement:
        raise NotImplementedError

    def _stored(self, definition: Entity, place: Place, record_ids: list[str], scope: Scope) -> Statement:
        raise NotImplementedError

    def _by_column(self, definition: Entity, place: Place, values: Sequence[Any]) -> Mapping[str, Any]:
        raise NotImplementedError

    def _equals(self, place: Place, field: Field, value: Any, params: Params) -> str:
        raise NotImplementedError


class Assuming(MemoryReader):
    """Assumes definitions that hold no more."""

    def assumed_definitions(self) -> list[Entity]:
        return [definition("Old", "title")]


class TestFuse:
    def test_the_score_is_the_sum_of_the_reciprocal_ranks(self) -> None:
        scores = dict(fuse(ranking("a", "b"), ranking("b", "c")))
        assert scores == {
            ("E", "b"): pytest.approx(1 / 62 + 1 / 61),
            ("E", "a"): pytest.approx(1 / 61),
            ("E", "c"): pytest.approx(1 / 62),
        }

    def test_a_record_in_both_rankings_beats_the_first_of_one(self) -> None:
        assert fuse(ranking("a", "b"), ranking("c", "b"))[0][0] == ("E", "b")

    def test_a_tie_goes_to_the_one_with_a_similarity_then_to_the_smaller_key(self) -> None:
        assert [key[1] for key, _ in fuse(ranking("v"), ranking("k"))] == ["v", "k"]
        tied = fuse([Hit(("E", "x"), 0.5), Hit(("E", "y"), 0.5)], [Hit(("E", "y"), 2.0), Hit(("E", "x"), 1.0)])
        assert [key[1] for key, _ in tied] == ["x", "y"]

    def test_a_ranking_alone_keeps_its_order(self) -> None:
        ids = [f"{n:03}" for n in range(100)]
        assert [key[1] for key, _ in fuse(ranking(*ids), [])] == ids
        assert [key[1] for key, _ in fuse([], ranking(*ids))] == ids

    @given(st.permutations(range(12)), st.permutations(range(12)))
    def test_scores_fall_and_every_record_is_there_once(self, first: list[int], second: list[int]) -> None:
        fused = fuse(ranking(*map(str, first)), ranking(*map(str, second[:6])))
        scores = [score for _, score in fused]
        assert scores == sorted(scores, reverse=True)
        assert sorted(key[1] for key, _ in fused) == sorted(map(str, range(12)))

    def test_hits_are_ordered_by_similarity_then_key_and_without_direction_left_out(self) -> None:
        hits = [Hit(("E", "b"), 0.5), Hit(("E", "nan"), math.nan), Hit(("E", "a"), 0.5), Hit(("D", "z"), 0.9)]
        assert [hit.key[1] for hit in in_order(hits)] == ["z", "a", "b"]


class TestSearch:
    def test_results_have_score_data_and_text_and_are_cut_to_the_limit(self) -> None:
        reader = MemoryReader(ranking("a", "b", "c"), ranking("b"))
        found = search(reader, "q", query_vector=VECTOR, limit=2)
        assert [(r.id, r.data, r.matched_text) for r in found] == [
            ("b", {"name": "b"}, "text of b"),
            ("a", {"name": "a"}, "text of a"),
        ]
        assert found[0].score == pytest.approx(1 / 61 + 1 / 62)

    def test_each_mode_uses_its_rankings_and_the_same_scale(self) -> None:
        reader = MemoryReader(ranking("v", "both"), ranking("k", "both"))
        ids = {
            mode: [r.id for r in search(reader, "q", query_vector=VECTOR, mode=mode)]
            for mode in ("hybrid", "vector", "keyword")
        }
        assert ids == {"hybrid": ["both", "v", "k"], "vector": ["v", "both"], "keyword": ["k", "both"]}
        assert search(reader, "q", query_vector=VECTOR, mode="vector")[0].score == pytest.approx(1 / 61)

    def test_hybrid_without_a_vector_is_by_keyword(self) -> None:
        reader = MemoryReader(ranking("v"), ranking("k"))
        assert [r.id for r in search(reader, "q", query_vector=None)] == ["k"]

    def test_min_score_compares_with_the_fused_score(self) -> None:
        reader = MemoryReader(ranking("a", "b"), ranking("b"))
        assert [r.id for r in search(reader, "q", query_vector=VECTOR, min_score=0.02)] == ["b"]

    def test_rankings_are_deeper_than_the_limit(self) -> None:
        reader = MemoryReader([], [])
        search(reader, "q", query_vector=VECTOR, limit=1)
        search(reader, "q", query_vector=VECTOR, limit=100)
        assert reader.depths == [MIN_DEPTH, MIN_DEPTH, 400, 400]

    def test_a_record_that_vanished_meanwhile_gives_its_place_to_the_next(self) -> None:
        reader = MemoryReader(ranking("a", "b", "c", "d"), [], gone=frozenset({"a", "c"}))
        assert [r.id for r in search(reader, "q", query_vector=VECTOR, mode="vector", limit=2)] == ["b", "d"]

    @pytest.mark.parametrize("query", ["", "  \n", "\x00", "\ud800 \udfff"])
    def test_a_blank_query_finds_nothing(self, query: str) -> None:
        assert search(MemoryReader(ranking("a"), ranking("a")), query, query_vector=VECTOR) == []

    @pytest.mark.parametrize(
        "arguments",
        [
            {"limit": 0},
            {"mode": "fuzzy"},
            {"mode": "vector", "query_vector": None},
            {"query_vector": np.zeros(2, np.float32)},
            {"query_vector": np.array([np.nan, 1], np.float32)},
            {"query_vector": np.ones((2, 2), np.float32)},
            {"query_vector": np.empty(0, np.float32)},
        ],
    )
    def test_senseless_arguments_are_refused(self, arguments: dict[str, Any]) -> None:
        with pytest.raises(UsageError):
            search(MemoryReader([], []), "q", **{"query_vector": VECTOR, **arguments})

    @given(st.permutations(range(8)), st.permutations(range(8)), st.sets(st.integers(0, 7)), st.integers(1, 9))
    def test_rankings_side_by_side_give_what_they_give_in_turn(
        self, first: list[int], second: list[int], gone: set[int], limit: int
    ) -> None:
        def reader() -> MemoryReader:
            return MemoryReader(ranking(*map(str, first)), ranking(*map(str, second[:5])), frozenset(map(str, gone)))

        in_turn = search(reader(), "q", query_vector=VECTOR, limit=limit)
        assert search(reader(), "q", query_vector=lambda: VECTOR, limit=limit, beside=reader()) == in_turn

    def test_records_are_read_while_the_slower_ranking_goes_on(self) -> None:
        read = threading.Event()

        class Quick(MemoryReader):
            def records(self, keys: Sequence[Key], scope: Scope) -> dict[Key, tuple[dict[str, Any], str]]:
                read.set()
                return super().records(keys, scope)

        class Slow(MemoryReader):
            def vector(self, vector: npt.NDArray[np.float32], scope: Scope, limit: int) -> list[Hit]:
                assert read.wait(30)
                return super().vector(vector, scope, limit)

        slow, quick = Slow(ranking("v"), []), Quick([], ranking("k"))
        assert [r.id for r in search(slow, "q", query_vector=VECTOR, beside=quick)] == ["v", "k"]

    def test_a_query_is_embedded_while_it_is_ranked_by_keyword(self) -> None:
        ranked = threading.Event()

        class Quick(MemoryReader):
            def keyword(self, query: Query, scope: Scope, limit: int) -> list[Hit]:
                ranked.set()
                return super().keyword(query, scope, limit)

        def embed() -> npt.NDArray[np.float32]:
            assert ranked.wait(30)
            return VECTOR

        found = search(MemoryReader(ranking("v"), []), "q", query_vector=embed, beside=Quick([], ranking("k")))
        assert [r.id for r in found] == ["v", "k"]

    def test_the_second_reader_keeps_its_thread_but_not_in_a_fork(self, monkeypatch: pytest.MonkeyPatch) -> None:
        threads: list[threading.Thread] = []

        class Told(MemoryReader):
            def keyword(self, query: Query, scope: Scope, limit: int) -> list[Hit]:
                threads.append(threading.current_thread())
                return super().keyword(query, scope, limit)

        beside = Told([], ranking("k"))
        for pid in (1, 1, 2):
            monkeypatch.setattr("os.getpid", lambda pid=pid: pid)
            search(MemoryReader(ranking("v"), []), "q", query_vector=VECTOR, beside=beside)
        assert threads[0] == threads[1] != threads[2]
        assert threading.current_thread() not in threads

    @pytest.mark.parametrize("part", ["definitions", "keyword", "vector", "records", "embed"])
    def test_an_error_on_either_side_is_the_error_of_the_search(self, part: str) -> None:
        def fail(*arguments: object) -> Any:
            raise DatabaseError(f"{part} failed")

        readers = [MemoryReader(ranking("v"), []), MemoryReader([], ranking("k"))]
        for reader in readers:
            setattr(reader, part, fail)
        with pytest.raises(DatabaseError, match=f"{part} failed"):
            search(
                readers[0],
                "q",
                query_vector=fail if part == "embed" else lambda: VECTOR,
                beside=readers[1],
            )

    @pytest.mark.parametrize("raised", [DefinitionsChanged(), DatabaseError("no such table")])
    @pytest.mark.parametrize("part", ["vector", "keyword", "check_definitions"])
    def test_with_definitions_that_hold_no_more_both_rankings_are_made_again(
        self, part: str, raised: Exception
    ) -> None:
        embedded: list[str] = []

        def embed() -> npt.NDArray[np.float32]:
            embedded.append("q")
            return VECTOR

        def fail_once(*arguments: object) -> Any:
            delattr(failing, part)
            raise raised

        reader, beside = Assuming(ranking("v"), []), MemoryReader([], ranking("k"))
        failing = beside if part == "keyword" else reader
        setattr(failing, part, fail_once)
        assert [r.id for r in search(reader, "q", query_vector=embed, beside=beside)] == ["v", "k"]
        assert embedded == ["q"]

    def test_a_field_that_the_assumed_definitions_do_not_have_is_looked_for_again(self) -> None:
        reader, beside = Assuming(ranking("v"), []), MemoryReader([], ranking("k"))
        found = search(reader, "q", query_vector=VECTOR, where={"name": "x"}, beside=beside)
        assert [r.id for r in found] == ["v", "k"]

    def test_an_error_that_has_nothing_to_do_with_the_definitions_is_raised_at_once(self) -> None:
        asked: list[str] = []

        def fail() -> Any:
            asked.append("q")
            raise ProviderError("out of reach")

        with pytest.raises(ProviderError, match="out of reach"):
            search(MemoryReader([], []), "q", query_vector=fail, beside=MemoryReader([], []))
        assert asked == ["q"]

    def test_a_query_vector_may_be_a_list(self) -> None:
        assert checked_vector([1, 2]).dtype == np.float32


class TestParseQuery:
    def test_words_phrases_and_exclusions(self) -> None:
        query = parse_query('red "noise cancelling" -wired -"in ear"')
        assert query.terms == (Term("red", False), Term("noise cancelling", True))
        assert query.excluded == (Term("wired", False), Term("in ear", True))

    @pytest.mark.parametrize("text", ["comma-separated", "a -b"])
    def test_a_dash_inside_a_word_excludes_nothing(self, text: str) -> None:
        assert len(parse_query(text).excluded) == (1 if " -" in text else 0)

    @pytest.mark.parametrize("text", ["headphones - wireless", "headphones -- wireless", "headphones --wireless"])
    def test_a_dash_between_words_or_of_an_option_excludes_nothing(self, text: str) -> None:
        query = parse_query(text)
        assert [term.text for term in query.terms] == ["headphones", "wireless"]
        assert "-" not in query.text

    def test_nul_and_lone_surrogates_become_spaces(self) -> None:
        assert parse_query("a\x00b\ud800c").terms == (Term("a", False), Term("b", False), Term("c", False))

    def test_what_has_no_letter_or_digit_is_no_term(self) -> None:
        assert parse_query('??? * "" "-" () :').terms == ()

    def test_compounds_also_count_by_their_parts_and_or_does_not(self) -> None:
        terms = [term.text for term in parse_query('comma-separated or file "a-b" file').alternatives()]
        assert terms == ["comma-separated", "comma", "separated", "file", "a-b"]

    @given(st.text())
    def test_any_text_can_be_read(self, text: str) -> None:
        query = parse_query(text)
        assert query.text == query.text.strip()
        query.text.encode()
        assert all(any(c.isalnum() for c in term.text) for term in query.terms + query.excluded)

    def test_a_huge_query_is_cut(self) -> None:
        assert len(parse_query("word " * 100_000).terms) <= 64
        assert len(parse_query("x" * 100_000).text) == 2000


class TestScope:
    DEFINITIONS = (definition("A", "name", "color"), definition("B", "name"), definition("Old", "name", live=False))

    def test_without_entities_all_but_the_dropped_are_searched(self) -> None:
        scope = resolve_scope(self.DEFINITIONS, (), None)
        assert scope.names is None
        assert [d.name for d in scope.definitions] == ["A", "B"]
        assert scope.admits("from a file")
        assert not scope.admits("Old")

    def test_named_entities_are_searched_each_once_and_dropped_ones_not(self) -> None:
        scope = resolve_scope(self.DEFINITIONS, ("File", "A", "A", "Old"), None)
        assert scope.names == ("File", "A")
        assert [d.name for d in scope.definitions] == ["A"]

    def test_where_leaves_out_entities_without_the_field(self) -> None:
        scope = resolve_scope(self.DEFINITIONS, (), {"color": "red", "name": None})
        assert scope.names == ("A",)
        assert scope.where == (("color", "red"), ("name", None))
        assert resolve_scope(self.DEFINITIONS, ("B", "A"), {"color": "red"}).names == ("A",)

    @pytest.mark.parametrize("entities", [(), ("A",), ("File",)])
    def test_a_field_that_no_searched_entity_has_is_refused(self, entities: tuple[str, ...]) -> None:
        with pytest.raises(UsageError, match="'size'"):
            resolve_scope(self.DEFINITIONS, entities, {"size": 1})

    def test_a_field_of_an_entity_that_is_not_searched_is_refused(self) -> None:
        with pytest.raises(UsageError, match="'color'"):
            resolve_scope(self.DEFINITIONS, ("B",), {"color": "red"})

    @pytest.mark.parametrize("value", [[1], {"a": 1}, b"x", math.nan, math.inf, 2**63, "a\x00b", "\ud800"])
    def test_a_value_that_no_field_can_have_is_refused(self, value: Any) -> None:
        with pytest.raises(UsageError, match="'color'"):
            resolve_scope(self.DEFINITIONS, (), {"color": value})
