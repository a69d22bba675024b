"""WORKER: FastEmbed without what it imports for downloads, for other models than those of text, and for its log.

A worker gets a model that lies on disk, but FastEmbed imports huggingface_hub, its HTTP clients and requests all the
same: 370 of a worker's 860 modules, 0.2 of the 0.7 s of a core until it is ready, and 18 MB. The rest that is left out
takes 60 of the 75 ms that FastEmbed then needs; what it logs goes to Python's own logging.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import logging
import sys
import types
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from .models.files import Model

DOWNLOADS = ("huggingface_hub", "requests")
OTHER_KINDS = tuple(
    f"fastembed.{kind}" for kind in ("image", "late_interaction", "late_interaction_multimodal", "sparse")
)
LEFT_OUT = (*DOWNLOADS, "tqdm", "PIL", *OTHER_KINDS, "loguru")


class _LeftOutType(type):
    """So that a name can be looked up, stand in an ``except`` clause or an annotation, but not be called."""

    def __getattr__(cls, name: str) -> type[_LeftOut]:
        if name.startswith("__"):
            raise AttributeError(name)
        return _LeftOut

    def __call__(cls, *arguments: Any, **options: Any) -> NoReturn:
        raise RuntimeError(f"{' and '.join(DOWNLOADS)} are left out in a worker: it downloads nothing")


class _LeftOut(Exception, metaclass=_LeftOutType):
    """Whatever is imported from one of the packages."""


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not _belongs(name, LEFT_OUT):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def exec_module(self, module: types.ModuleType) -> None:
        def attribute(name: str) -> type[_LeftOut]:
            if name.startswith("__"):
                raise AttributeError(name)
            return _LeftOut

        module.__getattr__ = attribute  # type: ignore[method-assign]
        if module.__name__ == "loguru":
            module.logger = logging.getLogger("fastembed")  # type: ignore[attr-defined]


def import_libraries() -> None:
    """Import what FastEmbed runs any model with, before it is known whether that one is still to be fetched."""
    with contextlib.suppress(ImportError):  # FastEmbed's own import says what is wrong
        import onnxruntime  # noqa: F401
        import tokenizers  # noqa: F401


_partial = False
"""Whether FastEmbed was imported without LEFT_OUT."""


def import_whole_fastembed() -> None:
    """Import FastEmbed as ever, also where it was imported without LEFT_OUT before."""
    global _partial
    if _partial:
        for name in [name for name in sys.modules if _belongs(name, ("fastembed",))]:
            del sys.modules[name]
        _partial = False
    import fastembed  # noqa: F401


def import_for(model: Model) -> None:
    """Import FastEmbed as :func:`import_fastembed`, unless this model is loaded without it."""
    if not model.source:
        import_fastembed()


def import_fastembed() -> None:
    """Import FastEmbed without LEFT_OUT; a version of it that cannot do without imports them as ever.

    For processes of our own only: FastEmbed can download only after :func:`import_whole_fastembed`.
    """
    global _partial
    if "fastembed" in sys.modules:
        return
    before = set(sys.modules)
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        import fastembed  # noqa: F401

        forget: tuple[str, ...] = LEFT_OUT
        _partial = True
    except Exception:
        forget = (*LEFT_OUT, "fastembed")
    finally:
        sys.meta_path.remove(finder)
    # Whoever else needs the packages gets the real ones.
    for name in set(sys.modules) - before:
        if _belongs(name, forget):
            del sys.modules[name]


def _belongs(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)
