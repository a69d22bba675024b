"""What a target remembers of its options is kept until something else is given, and taken back by an empty value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from servers import execute
from table_commands import DESCRIBED, INTO, MODEL, Table, stub_model

import kdb_fast
from kdb_fast.cli.demo import sqlalchemy_url
from kdb_fast.db.address import parse_address


def _kept(table: Table, name: str = "articles") -> dict[str, Any]:
    return table.json("targets", "show", name)


def test_empty_values_take_back_what_was_given(table: Table) -> None:
    given = ("--filter", "id = 1", "--index", "keep", "--document-prefix", "d: ", "--query-prefix", "q: ", "--keyword")
    assert table.json("reindex", *DESCRIBED, *given)["stored"] == 1
    assert table.json("reindex", "articles")["unchanged"] == 1
    names = ("filter", "index", "document_prefix", "query_prefix", "keyword")
    assert all(_kept(table)[name] for name in names)
    unset = ("--filter", "", "--index", "", "--document-prefix", "", "--query-prefix", "", "--no-keyword")
    assert table.json("reindex", "articles", *unset)["stored"] == 2
    assert [_kept(table)[name] for name in names] == [""] * len(names)


def test_text_template_and_key(table: Table) -> None:
    table.run("reindex", *INTO, "--key", "id")
    assert table.json("reindex", "vectors", "--template", "{title}: {body}")["stored"] == 2
    assert (_kept(table, "vectors")["text"], _kept(table, "vectors")["template"]) == ([], "{title}: {body}")
    table.run("reindex", "vectors", "--template", "", "--text", "body")
    assert (_kept(table, "vectors")["text"], _kept(table, "vectors")["template"]) == (["body"], "")
    table.run("reindex", "vectors", "--text", "", "--key", "")
    kept = _kept(table, "vectors")
    assert (kept["text"], kept["key"]) == (["title", "body", "lang"], ["id"])


@pytest.mark.parametrize("index", ["sqlite"], indirect=True)
def test_a_model_of_a_server_gives_way_to_one_on_this_machine(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    stub_model(monkeypatch)
    kdb_fast.reindex_table(table.address, "articles", text="body", vector="embedding", model="other")
    change = "UPDATE kdb_fast_targets SET definition = replace(definition, %s, %s)"
    execute(table.address, change, '"provider":"fastembed","base_url":""', '"provider":"openai","base_url":"http://a"')
    kdb_fast.reindex_table(table.address, name="articles", provider="fastembed", model="")
    kept = _kept(table)
    assert (kept["provider"], kept["base_url"], kept["model"]) == ("fastembed", "", MODEL.name)
    line = table.run("reindex", "articles", "--base-url", "", "--dimensions", "0", "--expect-count", "2")
    assert "nothing changed" in line


def test_a_source_stays_until_it_is_taken_back(table: Table, tmp_path: Path) -> None:
    if table.is_postgresql:
        name = sqlalchemy_url(table.address)
    else:
        name = f"sqlite:///{tmp_path}/other.db"
        other = parse_address(name)
        execute(other, "CREATE TABLE articles (id INTEGER PRIMARY KEY, body TEXT)")
        execute(other, "INSERT INTO articles VALUES (1, 'there'), (2, 'there too'), (3, 'and this')")
    rows = 2 if table.is_postgresql else 3
    assert table.json("reindex", *INTO, "--source", name)["read"] == rows
    for again in (("vectors",), INTO):
        assert table.json("reindex", *again)["unchanged"] == rows
        assert _kept(table, "vectors")["source"]
    receipt = table.json("reindex", "vectors", "--source", "")
    assert receipt["read"] == 2
    assert _kept(table, "vectors")["source"] == ""
    assert table.json("reindex", "vectors")["unchanged"] == 2
