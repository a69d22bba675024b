"""Who may import whom: the table of rooms in ARCHITECTURE.md. It keeps processes apart (worker and writer know nothing
of each other), start-up quick, and the way of a record downwards."""

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
PIPELINE_PARTS = [
    f"indexing.{name}" for name in ("flushing", "intake", "key_ledger", "leases", "screening", "text_reuse")
]


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
    assert {"errors", "ipc.messages", "engine.worker", "faults", "ipc.slab"} <= own_imports("engine.process_pool")
    assert {"stores.postgresql.index", "stores.postgresql.runs", "stores.base"} <= own_imports(
        "stores.postgresql.store"
    )
    assert "engine.api_pool" in own_imports("engine.start")
    assert "engine.api_pool" not in own_imports("engine.start", lazy=False)
    assert "receipt" not in own_imports("errors"), "for type checkers only"
    assert "receipt" in own_imports("errors", types=True)
    assert Import("psycopg", False, True) in imports_of("db.address")


# -- the rooms ---------------------------------------------------------------------------------------------

TOP = "top level"
ROW = re.compile(r"^\| ([^|]+) \|[^|]*\| ([^|]+) \|$", re.MULTILINE)


def table() -> dict[str, set[str]]:
    """What each room, and each module that has a row of its own, may import, as ARCHITECTURE.md says."""
    _, _, section = (PACKAGE.parent / "ARCHITECTURE.md").read_text().partition("\n## Rooms")
    found: list[tuple[str, str]] = ROW.findall(section.partition("\n## ")[0])
    return {
        name.strip().strip("`/"): {part.strip().strip("`/") for part in allowed.split(",")} - {"nothing"}
        for name, allowed in found
        if name != "room" and not name.startswith("---")
    }


ROOMS = table()


def room(name: str) -> str:
    """The row that a module belongs to: its own one, or that of its room."""
    parts = name.split(".")
    own = "/".join(parts) + ".py"
    return own if own in ROOMS else parts[0] if (PACKAGE / parts[0]).is_dir() else TOP


def test_the_table_names_every_room_and_nothing_else() -> None:
    there = {TOP} | {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert {name for name in ROOMS if "/" not in name} == there
    assert all((PACKAGE / name).exists() for name in ROOMS if name != TOP)
    assert set().union(*ROOMS.values()) <= there


def test_the_top_level_is_small() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 12


@pytest.mark.parametrize("name", sorted(set(MODULES) - {"", "__main__"}))
def test_a_module_imports_what_the_table_allows(name: str) -> None:
    own = room(name)
    reached = {room(target).partition("/")[0] for target in own_imports(name, types=True)}
    assert reached <= ROOMS[own] | ({own} if "/" not in own else set())


@pytest.mark.parametrize("name", sorted(name for name in MODULES if name and room(name) == TOP and name != "__main__"))
def test_the_top_level_needs_the_standard_library_only(name: str) -> None:
    outside = {i.target.split(".")[0] for i in imports_of(name) if not i.own and not i.lazy}
    assert outside <= set(sys.stdlib_module_names)


@pytest.mark.parametrize("name", sorted(set(MODULES) - set(below("catalog"))))
def test_only_the_catalogue_spells_what_kameleondbs_tables_are_like(name: str) -> None:
    """Docstrings may name them; ``kdb_records`` is also where :mod:`kdb_fast.tables.target` finds the schema."""
    constants = {n.value for n in ast.walk(ast.parse(MODULES[name].read_text())) if isinstance(n, ast.Constant)}
    statements = [text for text in constants if isinstance(text, str) and "``" not in text]
    words = "kdb_entity_definitions|kdb_field_definitions|is_deleted|storage_mode|dedicated_table_name"
    words = words if name == "tables.target" else f"{words}|kdb_records"
    assert not [text for text in statements if re.search(words, text)]


def test_the_worker_has_no_way_to_a_database() -> None:
    reached, new = {"engine.worker"}, {"engine.worker"}
    while new:
        new = {name for module in new if module in MODULES for name in own_imports(module)} - reached
        reached |= new
    assert not [name for name in reached if room(name) in {"db", "catalog", "sources", "stores"}]


@pytest.mark.parametrize(
    "name",
    sorted(set(MODULES) - {"engine.process_pool", "engine.writer_process", "engine.inline", "engine.cluster.actor"}),
)
def test_only_the_engine_imports_worker_and_writer(name: str) -> None:
    assert not own_imports(name) & {"engine.worker", "engine.writer"}


def test_pools_and_writers_are_imported_only_when_an_engine_is_started() -> None:
    kinds = {
        "engine.start",
        "engine.process_pool",
        "engine.writer_process",
        "engine.inline",
        "engine.api_pool",
        "engine.ray_pool",
    }
    users = {name for name in MODULES if own_imports(name, lazy=False) & kinds}
    assert users == {"engine.start"}


@pytest.mark.parametrize("name", ["indexing.pipeline", *PIPELINE_PARTS])
def test_the_pipeline_knows_no_process(name: str) -> None:
    assert not own_imports(name) & {"engine.start", "engine.child_processes", "indexing.reindex"}


@pytest.mark.parametrize("name", PIPELINE_PARTS)
def test_the_parts_of_the_pipeline_need_no_engine(name: str) -> None:
    assert not own_imports(name) & {"indexing.pipeline", "engine.base"}


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


@pytest.mark.parametrize("name", sorted(set(MODULES) - {"embedding.providers.custom"}))
def test_nobody_asks_what_a_provider_is(name: str) -> None:
    """It answers for itself; only where an object of the caller's own comes in, it is looked at."""
    calls = [n for n in ast.walk(ast.parse(MODULES[name].read_text())) if isinstance(n, ast.Call)]
    asked = [ast.unparse(c) for c in calls if ast.unparse(c.func) in {"isinstance", "issubclass"}]
    assert not [text for text in asked if "Provider)" in text or "Provider," in text]


def test_calls_within_the_model_area_go_down() -> None:
    order = ["lookup", "fetching", "minilm", "minilm_graph", "hub", "cache", "manifest", "files", "onnx_files",
             "catalogue"]  # fmt: skip
    modules = [f"embedding.models.{name}" for name in order]
    assert set(modules) == {name for name in below("embedding.models") if name != "embedding.models"}
    for place, name in enumerate(modules):
        assert not own_imports(name) & set(modules[:place]), f"{name} climbs back up"


def test_only_encoder_and_catalogue_import_the_model_libraries() -> None:
    users = {
        name
        for name in MODULES
        for i in imports_of(name)
        if not i.own and i.target.split(".")[0] in {"fastembed", "onnxruntime"}
    }
    assert users <= {
        "embedding.encoder",
        "embedding.loading",
        "embedding.offline",
        "embedding.precision.onnx_session",
        "embedding.models.hub",
        "embedding.models.catalogue",
    }


def test_nobody_imports_openvino_past_the_place_that_silences_it() -> None:
    assert [n for n in MODULES for i in imports_of(n) if not i.own and i.target.split(".")[0] == "openvino"] == []


@pytest.mark.parametrize(
    ("module", "unloaded"),
    [
        ("kdb_fast.cli", {"numpy", "psycopg", "onnxruntime", "fastembed", "rich", "sqlalchemy", "kameleondb", "typer"}),
        (
            "kdb_fast.kameleondb.installation",
            {"numpy", "psycopg", "onnxruntime", "fastembed", "rich", "sqlalchemy", "kameleondb"},
        ),
        ("kdb_fast.engine.start", {"psycopg", "onnxruntime", "fastembed", "rich", "sqlalchemy"}),
        (
            "kdb_fast.engine.worker",
            {"psycopg", "rich", "sqlalchemy", "kdb_fast.engine.writer", "kdb_fast.stores.postgresql.store"},
        ),
        ("kdb_fast.engine.writer", {"onnxruntime", "fastembed", "rich", "sqlalchemy", "kdb_fast.engine.worker"}),
        ("kdb_fast.indexing.reindex", {"psycopg", "onnxruntime", "fastembed", "rich", "sqlalchemy"}),
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
