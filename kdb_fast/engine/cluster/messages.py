"""What passes between the parent and the cluster process, beside :class:`~kdb_fast.ipc.messages.Embed` and the slab."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ...receipt import HostShare
from ...records import number_of
from ..base import SlotFilled

SHOWN = 8
"""Hosts that a plan names."""


@dataclass(frozen=True)
class ClusterSpec:
    """Which cluster, and how much of it.

    Attributes:
        address: ``auto``, ``ray://HOST:PORT`` or HOST:PORT.
        name: Of the run, for the names of the actors.
        workers: At most so many CPUs; None for all.
        patience: Seconds that the run waits when no host is left.
    """

    address: str
    name: str
    workers: int | None
    patience: float


class Survey(NamedTuple):
    """Cluster process → parent, once: what the cluster has.

    Attributes:
        hosts: Names of the hosts that will take part, each with the CPUs that are used there.
        left_out: Names of the others, each with the reason.
    """

    hosts: tuple[tuple[str, int], ...]
    left_out: tuple[tuple[str, str], ...]

    def describe(self) -> str:
        """For the plan."""
        hosts = ", ".join(f"{name} with {number_of(cpus, 'CPU')}" for name, cpus in self.hosts[:SHOWN])
        more = f" and {len(self.hosts) - SHOWN} more" if len(self.hosts) > SHOWN else ""
        left = "".join(f"; left out: {name}: {reason}" for name, reason in self.left_out[:SHOWN])
        return f"{number_of(len(self.hosts), 'host')} of the cluster: {hosts}{more}{left}"

    @property
    def cpus(self) -> int:
        """CPUs in all."""
        return sum(cpus for _, cpus in self.hosts)


class News(NamedTuple):
    """Cluster process → parent: what has happened, every second at least.

    Attributes:
        taken: Orders that were read from the pipe so far.
        filled: Slots.
        notes: What a person should know.
        hosts: Those of which something has changed.
    """

    taken: int = 0
    filled: tuple[SlotFilled, ...] = ()
    notes: tuple[str, ...] = ()
    hosts: tuple[HostShare, ...] = ()
