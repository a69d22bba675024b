"""The documentation of the standard library of the interpreter at hand, as JSON Lines on standard output.

Run as ``python -m kdb_fast.cli.demo_docs`` in a process of its own: importing two hundred modules has side
effects that nobody wants in theirs. Fields: ``name``, ``kind``, ``module``, ``summary``, ``text``.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import json
import os
import pkgutil
import re
import sys
import types
import warnings
from collections.abc import Iterator

SKIPPED = {"antigravity", "this", "idlelib", "lib2to3", "test", "turtledemo", "tkinter", "turtle", "ensurepip", "pip"}
"""Modules that open a browser or a window, print when imported, or hold no documentation."""

TEXT_CHARS = 300
"""Characters of a text beside its summary. The vector of a long text is near to nothing in particular: that of the
module csv had a cosine of 0.36 with "read a comma separated file" with its whole text, and has 0.56 with 300."""


def module_names() -> Iterator[str]:
    """Public modules of the standard library with their public submodules."""
    for name in sorted(sys.stdlib_module_names):
        if name.startswith("_") or name in SKIPPED:
            continue
        yield name
        with contextlib.suppress(Exception):
            path = getattr(importlib.import_module(name), "__path__", None)
            for info in pkgutil.walk_packages(path, name + ".", onerror=lambda _: None) if path else ():
                parts = info.name.split(".")
                if not any(p.startswith("_") or p in ("tests", "test", "idle_test") for p in parts):
                    yield info.name


def records() -> Iterator[dict[str, str]]:
    """One record for each public module, class, function and method with a docstring of its own; no name twice."""
    seen: set[str] = set()
    for module_name in module_names():
        try:
            module = importlib.import_module(module_name)
        except BaseException:  # noqa: S112
            # Some modules belong to another system (winreg) or end the process on purpose.
            continue
        yield from _record(module_name, "module", module_name, module, seen)
        for name in sorted(getattr(module, "__all__", None) or vars(module)):
            item = vars(module).get(name)
            if name.startswith("_") or isinstance(item, types.ModuleType):
                continue
            if not (inspect.isclass(item) or inspect.isroutine(item)):
                continue
            home = getattr(item, "__module__", None) or module_name
            if home != module_name and not home.startswith("_") and home != "builtins":
                continue  # it is told where it lives
            kind = "class" if inspect.isclass(item) else "function"
            yield from _record(f"{module_name}.{name}", kind, module_name, item, seen)
            if inspect.isclass(item):
                for method, function in sorted(vars(item).items()):
                    plain = function.__func__ if isinstance(function, (classmethod, staticmethod)) else function
                    if not method.startswith("_") and inspect.isroutine(plain):
                        yield from _record(f"{module_name}.{name}.{method}", "method", module_name, plain, seen)


def _record(name: str, kind: str, module: str, item: object, seen: set[str]) -> Iterator[dict[str, str]]:
    text = None
    with contextlib.suppress(Exception):
        text = inspect.getdoc(item) if kind != "class" else inspect.cleandoc(getattr(item, "__doc__", None) or "")
    if text and text.strip() and name not in seen:
        seen.add(name)
        summary, rest = split_summary(text.strip())
        yield {"name": name, "kind": kind, "module": module, "summary": summary, "text": rest[:TEXT_CHARS]}


def split_summary(text: str, limit: int = 240) -> tuple[str, str]:
    """The first sentences, as far as ``limit`` characters allow (KameleonDB's string fields hold 255), and the rest.

    No word is in both: a text that repeats itself costs twice to embed and finds nothing more.
    """
    joined = " ".join(text.split())
    if len(joined) <= limit:
        return joined, ""
    end = max(joined.rfind(mark, 0, limit) for mark in (". ", "? ", "! ")) + 1
    if end <= 0:
        end = joined.rfind(" ", 0, limit)
    if end <= 0:
        return text[:limit], text[limit:]
    words = len(joined[:end].split())
    taken = re.match(rf"(?:\s*\S+){{{words}}}\s*", text)
    assert taken is not None
    return joined[:end], text[taken.end() :]


def main() -> None:
    """Write all records; whatever modules print on import is thrown away."""
    os.environ.setdefault("BROWSER", "true")
    out = sys.stdout
    warnings.simplefilter("ignore")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        for record in records():
            # Docstrings may hold what JSON and databases cannot.
            clean = {k: v.encode("utf-8", "replace").decode().replace("\x00", "") for k, v in record.items()}
            out.write(json.dumps(clean) + "\n")
    out.flush()
    # Modules imported here may have started threads that never end.
    os._exit(0)


if __name__ == "__main__":
    main()
