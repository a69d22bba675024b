"""What a run on a Ray cluster is made of, but for the model: ready in a moment, and ill-behaved as told by a text.

Its process imports this module, and so do the actors, whose hosts must find it and what it imports: ``HOSTS``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import poison_worker
from oracle import MARK

from kdb_fast.embedding.encoder import EncoderSpec
from kdb_fast.engine.cluster import actor, driver, model_files, ray_cluster
from kdb_fast.engine.cluster.messages import ClusterSpec

FOLDER = "LC_STUB_FOLDER"
"""Environment variable of hosts: what MARK is elsewhere. A process of a host is none of the run's."""


def hosts(mark: Path) -> Mapping[str, str]:
    """Environment of hosts on which runs with this mark may embed."""
    here = Path(__file__).parent
    return {FOLDER: str(mark), "PYTHONPATH": os.pathsep.join((str(here), str(here.parent)))}


class StubActor(actor.EmbeddingActor):
    """An actor with ``poison_worker.StubEncoder``."""

    def __init__(self, spec: EncoderSpec) -> None:
        os.environ[MARK] = os.environ[FOLDER]
        actor.Encoder = poison_worker.StubEncoder  # type: ignore[attr-defined, assignment]
        actor.import_for = lambda model: None  # type: ignore[attr-defined]
        super().__init__(spec)


def run(connection: Connection, spec: ClusterSpec, encoder: EncoderSpec, stderr: Any) -> None:
    """Entry point of the process that talks to the cluster."""
    ray_cluster.EmbeddingActor = StubActor  # type: ignore[attr-defined]
    model_files.files_of = lambda spec: ()
    model_files.placed = lambda spec, directories: spec
    driver.run(connection, spec, encoder, stderr)
