"""A host of the cluster, as the fleet keeps it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from ...embedding.encoder import EncoderSpec
from ...receipt import HostShare
from .base import Actor, Node


class State(Enum):
    """Of a host."""

    EXAMINED = "is being examined"
    FIT = "gets the model"
    READY = "embeds"
    LEFT_OUT = "is left out"
    GONE = "is gone"


@dataclass(eq=False)
class Host:
    """A host of the cluster, and what it has done."""

    node: Node
    state: State = State.EXAMINED
    reason: str = ""
    again_at: float = float("inf")
    most: int = 0
    """Actors that its CPUs and its memory allow."""
    busy_until: list[float] = field(default_factory=list)
    """Of CPUs on which no actor came up: until when none is tried."""
    joined_at: float | None = None
    """When it was seen, of one that has joined during the run and does not embed yet."""
    spec: EncoderSpec | None = None
    actors: list[Actor] = field(default_factory=list)
    records: int = 0
    tokens: int = 0
    deaths: int = 0

    def share(self) -> HostShare:
        """For the parent and the receipt."""
        why = self.reason if self.state in (State.LEFT_OUT, State.GONE) else ""
        embedding = sum(actor.ready for actor in self.actors)
        return HostShare(self.node.name, embedding, self.records, self.tokens, self.deaths, why)
