"""``models list``, ``models pull`` and ``models path``."""

from __future__ import annotations

import sys

import click

from ..settings import DEFAULT_MODEL
from .console import print_json
from .groups import ListedCommands
from .options import json_option


@click.group("models", cls=ListedCommands)
def models_group() -> None:
    """List, fetch and find embedding models."""


@models_group.command("list")
@json_option
def models_list(as_json: bool) -> None:
    """List all models that can be named, and which are on this machine."""
    from ..embedding.models.lookup import supported
    from .report import print_models

    entries = supported()
    if as_json:
        print_json({"models": [entry._asdict() for entry in entries]})
    else:
        print_models(entries)


@models_group.command("pull")
@click.argument("name", default=DEFAULT_MODEL)
@json_option
def models_pull(name: str, as_json: bool) -> None:
    """Fetch a model, check it and make it ready."""
    from ..embedding.models.lookup import pull

    model = pull(name, report=lambda text: print(text, file=sys.stderr))
    if as_json:
        print_json({"name": model.name, "path": str(model.path), "fingerprint": model.fingerprint()})
    else:
        print(f"{model.name}: {model.path}")


@models_group.command("path")
@click.argument("name", default=DEFAULT_MODEL)
def models_path(name: str) -> None:
    """Print the directory of a model that is on this machine."""
    from ..embedding.models.lookup import installed
    from ..errors import ModelError

    for model in installed():
        if model.name.lower() == name.lower():
            print(model.path)
            return
    raise ModelError(f"The model {name} is not on this machine.", remedy=f"Fetch it: kdb-fast models pull {name}")
