"""Every public name says what it does, with its arguments, units and errors."""

from __future__ import annotations

import ast
import contextlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from importlib import import_module
from importlib.util import resolve_name
from pathlib import Path
from typing import Any

import pytest

import kdb_fast
from kdb_fast.search.engine import SessionBatch


def public() -> Iterator[tuple[str, Any]]:
    """Public names with their methods and properties, and those of what they give."""
    owners = {name: getattr(kdb_fast, name) for name in kdb_fast.__all__} | {"SessionBatch": SessionBatch}
    for name, thing in owners.items():
        yield name, thing
        if not inspect.isclass(thing) or issubclass(thing, Exception):
            continue
        for attribute in dir(thing):
            member = inspect.getattr_static(thing, attribute)
            if isinstance(member, property):
                member = member.fget
            if not attribute.startswith("_") and inspect.isfunction(member):
                yield f"{name}.{attribute}", member


PUBLIC = dict(public())


def documentation(name: str) -> str:
    """Its own docstring, or that of what it overrides; a class's stands for its constructor as well."""
    owner, _, member = name.partition(".")
    thing = PUBLIC[owner]
    if member:
        thing = inspect.getattr_static(thing, member)
    return inspect.getdoc(thing) or ""


def own_raises(function: Any) -> bool:
    """Whether the body of a function has a ``raise`` of an exception of its own, not of one that it has caught."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    return any(isinstance(node, ast.Raise) and node.exc is not None for node in ast.walk(tree))


def test_the_list_is_complete() -> None:
    assert {"SearchEngine.index_records_batch", "SessionBatch.delete_record", "OpenAIProvider.close",
            "FastEmbedProvider.embed_matrix", "EmbeddingProvider.embed_with_metadata"} <= PUBLIC.keys()  # fmt: skip
    assert own_raises(SessionBatch._queue)
    assert not own_raises(kdb_fast.SearchEngine.__enter__)


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_it_is_described(name: str) -> None:
    text = documentation(name)
    assert len(text.split()) >= 4, "a sentence at least"
    assert text.splitlines()[0].endswith((".", ":", ",")) or "." in text.split("\n\n")[0]


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_it_names_what_it_raises(name: str) -> None:
    thing = PUBLIC[name]
    function = inspect.getattr_static(thing, "__init__", None) if inspect.isclass(thing) else thing
    if inspect.isfunction(function) and not is_dataclass(thing) and own_raises(function):
        assert "raises" in documentation(name).lower()


RAISING = (
    "SearchEngine", "SearchEngine.index_record", "SearchEngine.index_records_batch", "SearchEngine.delete_record",
    "SearchEngine.transaction", "SearchEngine.for_session", "SearchEngine.search", "SearchEngine.get_status",
    "SessionBatch.index_record", "SessionBatch.index_records_batch", "SessionBatch.delete_record",
    "EmbeddingProvider.embed", "EmbeddingProvider.embed_batch", "EmbeddingProvider.embed_with_metadata",
    "EmbeddingProvider.embed_into", "FastEmbedProvider", "OpenAIProvider", "get_provider",
)  # fmt: skip


@pytest.mark.parametrize("name", RAISING)
def test_what_reaches_a_database_or_a_model_names_its_errors(name: str) -> None:
    assert "raises" in documentation(name).lower()


@pytest.mark.parametrize("name", sorted(n for n, thing in PUBLIC.items() if is_dataclass(thing)))
def test_results_describe_their_fields(name: str) -> None:
    text = documentation(name)
    for field in fields(PUBLIC[name]):
        assert f"{field.name}:" in text or f"``{field.name}``" in text


@pytest.mark.parametrize("name", ["SearchEngine", "FastEmbedProvider", "OpenAIProvider"])
def test_constructors_describe_their_arguments(name: str) -> None:
    arguments = text_between(documentation(name), "Args:", "Raises:")
    for parameter in list(inspect.signature(PUBLIC[name].__init__).parameters.values())[1:]:
        if parameter.kind is not parameter.VAR_KEYWORD:
            assert parameter.name in arguments


def text_between(text: str, start: str, stop: str) -> str:
    return text[text.index(start) : text.index(stop)]


REFERENCE = re.compile(r":(?:mod|func|class|data|meth|attr|exc):`~?((?:kdb_fast)?\.[\w.]+)`")
"""One that names its module, from the package on or relative to the module that it is in."""


def references() -> Iterator[tuple[str, str]]:
    """(module, reference) of each reference, with the dots of a relative one."""
    package = Path(kdb_fast.__file__).parent
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        within = ".".join(parts[:-1])
        for target in REFERENCE.findall(path.read_text(encoding="utf-8")):
            yield within, target


@pytest.mark.parametrize(("within", "target"), sorted(set(references())))
def test_what_is_referred_to_is_there(within: str, target: str) -> None:
    path = resolve_name(target, within) if target.startswith(".") else target
    parts = path.split(".")
    found: Any = None
    for end in range(len(parts), 0, -1):
        with contextlib.suppress(ModuleNotFoundError):
            found, parts = import_module(".".join(parts[:end])), parts[end:]
            break
    for part in parts:
        found = getattr(found, part)
