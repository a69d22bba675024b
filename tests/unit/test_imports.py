"""Who may import whom. The rules keep processes apart (worker and writer know nothing of each other), start-up
quick and the pure modules pure."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import kdb_fast

PACKAGE = Path(kdb_fast.__file__).parent
HEAVY = {"psycopg", "psycopg_c", "psycopg_binary", "onnxruntime", "onnx", "openvino", "fastembed", "sqlalchemy",
         "rich", "kameleondb", "huggingface_hub", "tokenizers", "requests", "httpx"}  # fmt: skip
FOUNDATION = {"accounting", "errors", "settings", "receipt", "records", "messages"}
PIPELINE_PARTS = ["accounting", "flushing", "intake", "key_ledger", "leases", "screening", "text_reuse"]
ABOVE = {"worker", "writer", "supervisor", "pipeline", "engine_factory", "reindex", "bars", "cli"}


class Import(NamedTuple):
    """One import of a module: ``target`` is a dotted name, without ``kdb_fast.`` for our own."""

    target: str
    own: bool
    lazy: bool


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(name: str, *, types: bool = False) -> list[Import]:
    """All imports that a running program may make; with ``types`` also those for type checkers only."""
    path = MODULES[name]
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    package = [part for part in package if part]
    return list(_walk(ast.parse(path.read_text()), package, lazy=False, types=types))


def _walk(node: ast.AST, package: list[str], *, lazy: bool, types: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if not types and isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield from _walk(other, package, lazy=lazy, types=types)
        elif isinstance(child, ast.Import):
            for alias in child.names:
                own = alias.name.split(".")[0] == "kdb_fast"
                yield Import(alias.name.removeprefix("kdb_fast.") if own else alias.name, own, lazy)
        elif isinstance(child, ast.ImportFrom):
            yield from _from(child, package, lazy)
        else:
            inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from _walk(child, package, lazy=lazy or inside, types=types)


def _from(node: ast.ImportFrom, package: list[str], lazy: bool) -> Iterator[Import]:
    module = node.module or ""
    own = node.level > 0 or module.split(".")[0] == "kdb_fast"
    if not own:
        yield Import(module, False, lazy)
        return
    if node.level:
        base = [*package[: len(package) - node.level + 1], *([module] if module else [])]
    else:
        base = module.split(".")[1:]
    prefix = ".".join(base)
    for alias in node.names:
        name = f"{prefix}.{alias.name}" if prefix else alias.name
        # `from .errors import X` names a module; `from . import errors` names the module after it.
        yield Import(name if name in MODULES else prefix, True, lazy)


def own_imports(name: str, *, lazy: bool = True, types: bool = False) -> set[str]:
    """Modules of the package that a module imports, those within functions too unless ``lazy`` is false; with ``types``
    also those for type checkers only."""
    return {i.target for i in imports_of(name, types=types) if i.own and (lazy or not i.lazy)} - {""}


def below(*names: str) -> list[str]:
    """The modules and packages of these names with all they hold."""
    return [module for module in MODULES if any(module == n or module.startswith(f"{n}.") for n in names)]


# -- the reading of imports itself -------------------------------------------------------------------------


def test_imports_are_read_rightly() -> None:
    assert {"errors", "messages", "worker", "writer", "slab"} <= own_imports("supervisor")
    assert {"slab"} <= own_imports("stores.pgcopy")
    assert {"stores.pg_index", "stores.pg_runs", "stores.base"} <= own_imports("stores.postgresql")
    assert "writer" in own_imports("engine")
    assert "writer" not in own_imports("engine", lazy=False)
    assert "receipt" not in own_imports("errors"), "for type checkers only"
    assert "receipt" in own_imports("errors", types=True)
    assert Import("psycopg", False, True) in imports_of("database")


# -- which way imports point -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(FOUNDATION))
def test_foundation_imports_nothing_of_the_package_but_itself(name: str) -> None:
    assert own_imports(name) <= FOUNDATION


@pytest.mark.parametrize("name", sorted(FOUNDATION))
def test_foundation_needs_the_standard_library_only(name: str) -> None:
    outside = {i.target.split(".")[0] for i in imports_of(name) if not i.own}
    assert outside <= set(sys.stdlib_module_names)


@pytest.mark.parametrize("name", below("sources", "sharding", "slab", "stores", "encoder", "vectors", "resources"))
def test_parts_never_import_the_processes_that_use_them(name: str) -> None:
    assert not own_imports(name) & ABOVE


@pytest.mark.parametrize("name", below("sources"))
def test_sources_know_nothing_of_the_index(name: str) -> None:
    assert not [i for i in own_imports(name) if i.startswith("stores") or i in {"slab", "encoder", "models"}]


@pytest.mark.parametrize("name", below("stores"))
def test_stores_know_nothing_of_sources_and_models(name: str) -> None:
    assert not [i for i in own_imports(name) if i.startswith("sources") or i in {"encoder", "models"}]


@pytest.mark.parametrize("name", below("catalog"))
def test_the_catalogue_of_kameleondb_knows_nothing_of_those_who_ask_it(name: str) -> None:
    assert own_imports(name) <= {"errors", "hidden_rows", "records", "target", *below("catalog")}


@pytest.mark.parametrize("name", sorted(set(MODULES) - set(below("catalog"))))
def test_only_the_catalogue_spells_what_kameleondbs_tables_are_like(name: str) -> None:
    """Docstrings may name them; ``kdb_records`` is also where :mod:`kdb_fast.target` finds the schema."""
    constants = {n.value for n in ast.walk(ast.parse(MODULES[name].read_text())) if isinstance(n, ast.Constant)}
    statements = [text for text in constants if isinstance(text, str) and "``" not in text]
    words = "kdb_entity_definitions|kdb_field_definitions|is_deleted|storage_mode|dedicated_table_name"
    assert not [text for text in statements if re.search(words if name == "target" else f"{words}|kdb_records", text)]


def test_worker_and_writer_never_import_each_other_or_the_parent() -> None:
    assert not own_imports("worker") & {"writer", "supervisor", "pipeline", "engine", "reindex", "cli"}
    assert not own_imports("writer") & {"worker", "supervisor", "pipeline", "engine", "reindex", "cli"}


def test_the_worker_has_no_way_to_a_database() -> None:
    assert not {i for i in own_imports("worker") if i == "database" or i.startswith(("stores", "sources"))}


def test_the_writer_has_no_way_to_a_model() -> None:
    assert not own_imports("writer") & {"encoder", "models", "minilm", "hub"}


@pytest.mark.parametrize("name", sorted(set(MODULES) - {"supervisor", "engine"}))
def test_only_supervisor_and_engine_import_worker_and_writer(name: str) -> None:
    assert not own_imports(name) & {"worker", "writer"}


def test_the_engine_imports_worker_and_writer_only_when_it_runs() -> None:
    assert not own_imports("engine", lazy=False) & {"worker", "writer"}


@pytest.mark.parametrize("name", ["pipeline", *PIPELINE_PARTS])
def test_the_pipeline_knows_no_process(name: str) -> None:
    assert not own_imports(name) & {"worker", "writer", "supervisor", "reindex", "cli"}


@pytest.mark.parametrize("name", PIPELINE_PARTS)
def test_the_parts_of_the_pipeline_need_no_engine(name: str) -> None:
    assert not own_imports(name) & {"pipeline", "engine"}


@pytest.mark.parametrize("name", sorted(set(MODULES) - {"__main__", *below("cli")}))
def test_nothing_imports_the_command_line(name: str) -> None:
    assert not own_imports(name) & set(below("cli"))


@pytest.mark.parametrize("name", ["reindex", "insert", "rejects", "pipeline", "engine_factory", "run_embedding"])
def test_a_run_does_not_know_how_it_is_shown(name: str) -> None:
    assert not own_imports(name, types=True) & {"bars", "report", "console"}


def circles(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """The graph without the modules that import nothing of it or that nothing of it imports, again and again."""
    while ends := {name for name, needs in graph.items() if not needs} | graph.keys() - set().union(*graph.values()):
        graph = {name: needs - ends for name, needs in graph.items() if name not in ends}
    return graph


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": set()}) == {}
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}) == {"b": {"c"}, "c": {"b"}}


def test_nothing_is_imported_in_a_circle() -> None:
    """Neither at the top, nor within a function, nor for type checkers only.

    Left out is what is imported from the package itself, ``__version__``: its ``__init__`` runs before any of its
    modules, and names them for type checkers only.
    """
    assert circles({name: own_imports(name, types=True) & set(MODULES) - {name} for name in MODULES}) == {}


# -- heavy imports -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(MODULES))
def test_heavy_packages_are_imported_where_they_are_used(name: str) -> None:
    at_the_top = {i.target.split(".")[0] for i in imports_of(name) if not i.own and not i.lazy}
    assert not at_the_top & HEAVY


@pytest.mark.parametrize("name", sorted(set(MODULES) - {"own_provider"}))
def test_nobody_asks_what_a_provider_is(name: str) -> None:
    """It answers for itself; only where an object of the caller's own comes in, it is looked at."""
    calls = [n for n in ast.walk(ast.parse(MODULES[name].read_text())) if isinstance(n, ast.Call)]
    asked = [ast.unparse(c) for c in calls if ast.unparse(c.func) in {"isinstance", "issubclass"}]
    assert not [text for text in asked if "Provider)" in text or "Provider," in text]


def test_calls_within_the_model_area_go_down() -> None:
    order = ["models", "model_fetching", "minilm", "minilm_graph", "hub", "model_cache", "model_manifest",
             "model_files", "onnx_files", "model_catalogue"]  # fmt: skip
    for place, name in enumerate(order):
        assert not own_imports(name) & set(order[:place]), f"{name} climbs back up"


def test_only_encoder_and_catalogue_import_the_model_libraries() -> None:
    users = {
        name
        for name in MODULES
        for i in imports_of(name)
        if not i.own and i.target.split(".")[0] in {"fastembed", "onnxruntime"}
    }
    assert users <= {"encoder", "hub", "model_catalogue", "offline"}


def test_nobody_imports_openvino_past_the_place_that_silences_it() -> None:
    assert [n for n in MODULES for i in imports_of(n) if not i.own and i.target.split(".")[0] == "openvino"] == []


@pytest.mark.parametrize(
    ("module", "unloaded"),
    [
        ("kdb_fast.cli", {"numpy", "psycopg", "onnxruntime", "fastembed", "rich", "sqlalchemy", "kameleondb", "typer"}),
        ("kdb_fast.kameleondb", {"numpy", "psycopg", "onnxruntime", "fastembed", "rich", "sqlalchemy", "kameleondb"}),
        ("kdb_fast.supervisor", {"psycopg", "onnxruntime", "fastembed", "rich", "sqlalchemy"}),
        ("kdb_fast.worker", {"psycopg", "rich", "sqlalchemy", "kdb_fast.writer", "kdb_fast.stores.postgresql"}),
        ("kdb_fast.writer", {"onnxruntime", "fastembed", "rich", "sqlalchemy", "kdb_fast.worker"}),
        ("kdb_fast.reindex", {"psycopg", "onnxruntime", "fastembed", "rich", "sqlalchemy"}),
    ],
)
def test_a_fresh_interpreter_loads_no_more_than_it_needs(module: str, unloaded: set[str]) -> None:
    answer = subprocess.run(
        [sys.executable, "-c", f"import sys, {module}; print('\\n'.join(sys.modules))"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        cwd=PACKAGE.parent,
    )
    loaded = set(answer.stdout.split())
    assert module in loaded
    assert not loaded & unloaded
