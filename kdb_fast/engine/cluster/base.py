"""A cluster as the fleet sees it: hosts that come and go, actors that are started on them and embed.

Nothing here waits: what was asked for is told later, by an event. So one thread can look after all hosts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from ...embedding.encoder import EncoderSpec
from ...ipc.messages import Embed, Embedded, Failed


class Node(NamedTuple):
    """A host of the cluster: its id there, its name for people, and its CPUs."""

    id: str
    name: str
    cpus: int


@dataclass(eq=False)
class Actor:
    """One embedding process on a host.

    Attributes:
        number: Differs for all actors of a run.
        since: Since when it owes an answer (monotonic seconds).
        ready: It has said so.
    """

    node: Node
    number: int
    since: float
    ready: bool = False


class NodesSeen(NamedTuple):
    """The hosts that the cluster has now."""

    nodes: tuple[Node, ...]


class HostFit(NamedTuple):
    """A host can take part, with so many bytes of memory."""

    node: Node
    memory: int


class HostUnfit(NamedTuple):
    """A host cannot take part; ``again``: it may be able to later."""

    node: Node
    reason: str
    again: bool = False


class HostPrepared(NamedTuple):
    """A host has the files of the model: this is the encoder there."""

    node: Node
    spec: EncoderSpec


class ActorReady(NamedTuple):
    """An actor can embed."""

    actor: Actor


class ActorLost(NamedTuple):
    """An actor is gone. ``blameless``: because of its host or the network, so not of a text."""

    actor: Actor
    how: str
    blameless: bool


class ActorFailed(NamedTuple):
    """An actor says that it cannot go on."""

    actor: Actor
    failed: Failed


class Answered(NamedTuple):
    """An actor has embedded what it was given. Codes are uint8, one a row; vectors float32, row by row, in parts."""

    actor: Actor
    embedded: Embedded
    codes: bytes
    vectors: tuple[bytes, ...]


ClusterEvent = NodesSeen | HostFit | HostUnfit | HostPrepared | ActorReady | ActorLost | ActorFailed | Answered


class Cluster(Protocol):
    """What the fleet asks for."""

    def examine(self, node: Node) -> None:
        """Whether the host can take part: HostFit or HostUnfit follows."""

    def prepare(self, node: Node) -> None:
        """Have the model's files on the host: HostPrepared or HostUnfit follows."""

    def start(self, actor: Actor, spec: EncoderSpec) -> None:
        """Start an actor: ActorReady, ActorFailed or ActorLost follows."""

    def embed(self, actor: Actor, order: Embed, texts: list[str]) -> None:
        """Have texts embedded: Answered, ActorFailed or ActorLost follows."""

    def kill(self, actor: Actor) -> None:
        """End an actor, without waiting for it; no event of it need follow."""
