"""The smallest stand-in for what KameleonDB's development branch has and its release 0.2.0 lacks."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

import pytest


class TheirEngine:
    """Its search engine, which must not be asked for anything once ours is in its place."""

    def __init__(self, engine: Any, embedding_provider: Any = None) -> None:
        self._engine, self._provider = engine, embedding_provider

    def index_record(self, entity_name: str, record_id: str, content: str) -> None:
        raise AssertionError("not by its own engine")


def develop(patch: pytest.MonkeyPatch) -> None:
    """Give the installed KameleonDB the search layer of the development branch, until ``patch`` is undone."""
    import kameleondb
    import typer
    from kameleondb.core.engine import Entity, KameleonDB

    search = ModuleType("kameleondb.search")
    search.SearchEngine = TheirEngine  # type: ignore[attr-defined]
    patch.setitem(sys.modules, "kameleondb.search", search)
    patch.setattr(kameleondb, "search", search, raising=False)

    init, insert, update = KameleonDB.__init__, Entity.insert, Entity.update

    def new_init(
        self: Any, url: str, echo: bool = False, embeddings: bool = False, embedding_provider: Any = "fastembed",
        embedding_model: str | None = None,
    ) -> None:  # fmt: skip
        init(self, url, echo=echo)
        self._embeddings_enabled, self._search_engine = embeddings, None
        if embeddings:
            self._init_search_engine(embedding_provider, embedding_model, None)

    def init_search_engine(self: Any, provider: Any, model: str | None, dimensions: int | None) -> None:
        self._search_engine = search.SearchEngine(self._connection.engine, provider)

    def index_record_for_search(self: Any, entity_name: str, record_id: str, data: Any) -> None:
        if self._search_engine:
            self._search_engine.index_record(entity_name, record_id, str(data))

    def new_insert(self: Any, data: Any, created_by: str | None = None) -> str:
        record_id: str = insert(self, data, created_by=created_by)
        self._db._index_record_for_search(self._name, record_id, data)
        return record_id

    def new_update(self: Any, record_id: str, data: Any) -> Any:
        result = update(self, record_id, data)
        self._db._index_record_for_search(self._name, record_id, result)
        return result

    def unused(self: Any, *arguments: Any, **named: Any) -> Any:
        raise AssertionError("replaced by install()")

    patch.setattr(KameleonDB, "__init__", new_init)
    patch.setattr(KameleonDB, "_init_search_engine", init_search_engine, raising=False)
    patch.setattr(KameleonDB, "_index_record_for_search", index_record_for_search, raising=False)
    for name in ("reindex_embeddings", "search", "embedding_status"):
        patch.setattr(KameleonDB, name, unused, raising=False)
    patch.setattr(Entity, "insert", new_insert)
    patch.setattr(Entity, "update", new_update)

    def command() -> None:
        raise AssertionError("replaced by kdb-fast kameleondb")

    main = importlib.import_module("kameleondb.cli.main")  # its package has a function of this name
    embeddings_app = typer.Typer(help="Embeddings management")
    embeddings_app.command("reindex")(command)
    embeddings_app.command("status")(command)
    patch.setattr(main.app, "registered_groups", list(main.app.registered_groups))
    patch.setattr(main.app, "registered_commands", list(main.app.registered_commands))
    main.app.add_typer(embeddings_app, name="embeddings")
    main.app.command(name="search")(command)
