"""A Ray cluster on this machine, made for tests: a head, and hosts that come, go, die and are cut off.

Where that is allowed (root, with ``ip``), each host has a network namespace and an address of its own, and a bridge
joins them: then a cable can be pulled. Elsewhere all share the machine's address; see :func:`no_networks`.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil
from cluster_machine import (
    FOLDER,
    NETWORK,
    clear,
    devices,
    free_port,
    free_subnet,
    network_of,
    no_networks,
    processes_of,
    run,
    sweep,
)
from servers import eventually

ACCESS = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
"""Environment of whoever uses the cluster. Who does not know this token is refused: where hosts have no networks of
their own they listen on the machine's address."""

START_SECONDS = 60.0

STORE_BYTES = 80_000_000
"""Of each host's object store; Ray takes no less than 75 MB."""

SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "4",
    "RAY_num_prestart_python_workers": "0",
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "3",
    # With it the head's process for a client is forked in the middle of gRPC's calls, and now and then hangs.
    "GRPC_ENABLE_FORK_SUPPORT": "0",
}
"""A host that does not answer is given up after some 6 s, not 30; one that leaves waits 3 s for its actors."""

RAYS_OWN = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""Titles of processes that Ray has whether anybody uses it or not."""


class Host:
    """A raylet with its workers, and whatever else Ray starts beside it.

    Attributes:
        number: 0 for the head.
        address: Its IP address.
        pid: Of the process that ends all others of the host when it ends.
        odd: It differs from those that the cluster began with, or does not work any more.
    """

    def __init__(self, number: int, address: str, process: subprocess.Popen[bytes], folder: Path) -> None:
        self.number, self.address, self.process, self.folder = number, address, process, folder
        self.odd = False

    @property
    def pid(self) -> int:
        return self.process.pid

    def processes(self) -> list[psutil.Process]:
        """All of it that live."""
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(self.pid)
            return [root, *root.children(recursive=True)]
        return []

    def raylet(self) -> psutil.Process:
        (found,) = [process for process in self.processes() if process.name() == "raylet"]
        return found

    def actors(self) -> list[psutil.Process]:
        """Processes in which an actor of somebody's lives."""
        return [process for process in self.processes() if is_actor(process)]


def is_actor(process: psutil.Process) -> bool:
    """Whether an actor of ours lives in the process, which Ray then names after its class."""
    with contextlib.suppress(psutil.Error):
        title = " ".join(process.cmdline()).strip()
        return title.startswith("ray::") and not title.startswith(RAYS_OWN)
    return False


class Cluster:
    """A head on an address of the bridge, with no CPU of its own, in the namespaces of the tests.

    Args:
        cpus: One host for each, with so many CPUs.
        environment: Of all hosts, beside this process's own.
        lost_after: Seconds after which a host that does not answer is given up.

    Attributes:
        address: Of the head, as ``RAY_ADDRESS`` has it.
        client: The same for Ray's client: ``ray://HOST:PORT``.
        hosts: Those that were added and not removed, without the head.
    """

    _numbers = itertools.count(1)

    def __init__(
        self,
        cpus: Sequence[int] = (1, 1),
        *,
        environment: Mapping[str, str] | None = None,
        lost_after: float = 6.0,
    ) -> None:
        sweep()
        self.name = f"kf{os.getpid()}c{next(self._numbers)}"
        self.folder = FOLDER / self.name
        self.folder.mkdir(mode=0o755)
        self.networks = not no_networks()
        os.environ.update(ACCESS)  # of runs within this process
        self._environment = {**os.environ, **SETTINGS, **ACCESS, **(environment or {})}
        self._environment["RAY_health_check_failure_threshold"] = str(round(lost_after / 1.5))
        self._host_numbers = itertools.count(1)
        self._started: list[subprocess.Popen[bytes]] = []
        self.hosts: list[Host] = []
        try:
            self._lay_network()
            self._begin(cpus)
        except BaseException:
            self.close()
            raise

    def _begin(self, cpus: Sequence[int]) -> None:
        self.head = self._start_head()
        for count in cpus:  # they ask until the head answers
            self._launch(count, {})
        for host in (self.head, *self.hosts):
            self._await(host)

    # -- hosts -----------------------------------------------------------------------------------------

    def add_host(self, cpus: int = 1, environment: Mapping[str, str] | None = None) -> Host:
        """A host joins; returns once the head knows it."""
        host = self._launch(cpus, environment or {})
        host.odd = cpus != 1 or bool(environment)
        self._await(host)
        return host

    def remove_host(self, host: Host) -> None:
        """A host leaves in order: it tells the head."""
        host.process.send_signal(signal.SIGTERM)
        self._gone(host)

    def kill_raylet(self, host: Host) -> None:
        """SIGKILL: its workers notice and end, and so does the rest of the host."""
        with contextlib.suppress(ValueError, psutil.NoSuchProcess):  # it may be ending by itself
            host.raylet().kill()
        self._gone(host)

    def kill_actor(self, host: Host) -> bool:
        """SIGKILL one actor of the host; False if there is none."""
        for process in host.actors():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
                return True
        return False

    def kill_head(self) -> None:
        """SIGKILL to all of the head; its hosts live on, for as long as Ray has them wait for it."""
        for process in self.head.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.head.process.wait(30)

    def start_anew(self, count: int) -> None:
        """A new head with the address of the old one, and so many new hosts of one CPU."""
        for host in list(self.hosts):
            self.kill_raylet(host)
        self._begin((1,) * count)

    def make_whole(self, count: int) -> None:
        """So many hosts of one CPU with nothing odd about them, whatever there was."""
        if self.head.process.poll() is not None:
            self.start_anew(count)
        for host in list(self.hosts):
            if host.process.poll() is not None:
                self.hosts.remove(host)
            elif host.odd:
                self.kill_raylet(host)
        for host in self.hosts[count:]:
            self.kill_raylet(host)
        while len(self.hosts) < count:
            self.add_host()

    def cut(self, host: Host) -> None:
        """Nothing passes to or from the host until :meth:`heal`, and nobody is told."""
        assert self.networks, "cannot cut off what has no network of its own"
        host.odd = True  # it may have been given up
        run("bridge", "link", "set", "dev", self._cable(host.number), "state", "0")

    def heal(self, host: Host) -> None:
        run("bridge", "link", "set", "dev", self._cable(host.number), "state", "3")

    @contextlib.contextmanager
    def cut_off(self, host: Host) -> Iterator[None]:
        """Cut until the block ends."""
        self.cut(host)
        try:
            yield
        finally:
            self.heal(host)

    def actors(self) -> list[psutil.Process]:
        """Processes of actors on all hosts."""
        return [process for process in processes_of(self.name) if is_actor(process)]

    def processes(self) -> list[psutil.Process]:
        """All processes of the cluster."""
        return processes_of(self.name)

    def logs(self) -> Iterator[Path]:
        """Every file that Ray has written."""
        for file in self.folder.rglob("*"):
            if file.is_file() and not file.is_symlink():
                yield file

    def close(self) -> None:
        """End all processes and remove the network and the files."""
        clear(self.name)
        for process in self._started:
            process.wait(10)
            if process.stdin is not None:
                process.stdin.close()

    def left(self) -> list[object]:
        """What is still there of it: processes, network devices, files."""
        found = [*self.processes(), *(device for device, owner in devices() if owner == self.name)]
        return [*found, *([self.folder] if self.folder.exists() else [])]

    # -- how -------------------------------------------------------------------------------------------

    def _lay_network(self) -> None:
        """Choose the head's address, which is that of the bridge, and its ports."""
        if not self.networks:
            from ray.util import get_node_ip_address

            self._shared = self._head_address = get_node_ip_address()  # what Ray makes of 127.0.0.1
        else:
            self._subnet = free_subnet()
            self._head_address = NETWORK.format(self._subnet, 1)
            # Else a bridge takes the lowest address of its cables: with each that comes or goes it may be another, and
            # hosts that knew the old one reach nobody for up to a minute.
            run("ip", "link", "add", self.name, "address", f"02:00:00:00:{self._subnet:02x}:01", "type", "bridge")
            run("ip", "addr", "add", f"{self._head_address}/24", "dev", self.name)
            run("ip", "link", "set", self.name, "up")
        self._ports = free_port(), free_port()
        self.address, self.client = (
            f"{scheme}{self._head_address}:{port}" for scheme, port in zip(("", "ray://"), self._ports, strict=True)
        )

    def _start_head(self) -> Host:
        address, (port, client) = self._head_address, self._ports
        ports = (f"--port={port}", f"--ray-client-server-port={client}")
        options = ("--head", *ports, "--include-dashboard=false", "--num-cpus=0", f"--node-ip-address={address}")
        return self._ray(0, address, options, self._environment, ())

    def _launch(self, cpus: int, environment: Mapping[str, str]) -> Host:
        number = next(self._host_numbers)
        address = NETWORK.format(self._subnet, number + 1) if self.networks else self._shared
        options = (f"--address={self.address}", f"--num-cpus={cpus}", f"--node-ip-address={address}")
        # In its own network a host waits until it has a cable.
        words = ("unshare", "--net", "sh", "-c", 'read -r go; exec "$@"', "sh") if self.networks else ()
        host = self._ray(number, address, options, {**self._environment, **environment}, words)
        self.hosts.append(host)
        if self.networks:
            self._plug_in(host)
        return host

    def _ray(
        self, number: int, address: str, options: Sequence[str], environment: Mapping[str, str], words: Sequence[str]
    ) -> Host:
        folder = self.folder / str(number)
        folder.mkdir(exist_ok=True)  # of a head that has died
        common = ("--block", f"--temp-dir={folder}", f"--object-store-memory={STORE_BYTES}")
        fewer = ("--include-log-monitor=false", "--dashboard-agent-listen-port=0")
        ports = ("--min-worker-port=0", "--max-worker-port=0")
        die = ("setpriv", "--pdeathsig", "KILL") if shutil.which("setpriv") else ()
        with open(folder / "start.log", "wb") as log:
            process = subprocess.Popen(
                [*words, *die, sys.executable, "-m", "ray.scripts.scripts", "start", *options, *common, *fewer, *ports],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=dict(environment),
                start_new_session=True,
                cwd=folder,
            )
        self._started.append(process)
        return Host(number, address, process, folder)

    def _plug_in(self, host: Host) -> None:
        cable = self._cable(host.number)
        eventually(lambda: network_of(host.pid) != network_of(os.getpid()))
        run("ip", "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", str(host.pid))
        run("ip", "link", "set", cable, "master", self.name, "up")
        inside = ("nsenter", f"--net=/proc/{host.pid}/ns/net", "ip")
        run(*inside, "link", "set", "lo", "up")
        run(*inside, "addr", "add", f"{host.address}/24", "dev", "eth0")
        run(*inside, "link", "set", "eth0", "up")
        assert host.process.stdin is not None
        host.process.stdin.write(b"go\n")
        host.process.stdin.flush()

    def _cable(self, number: int) -> str:
        return f"{self.name}h{number}"

    def _await(self, host: Host) -> None:
        """Until the head knows the host, and Ray's own start has said so."""
        started = host.folder / "start.log"

        def ready() -> bool:
            text = started.read_text(errors="replace")
            assert host.process.poll() is None, text
            return "Ray runtime started" in text

        eventually(ready, START_SECONDS)

    def _gone(self, host: Host) -> None:
        host.process.wait(30)
        self.hosts.remove(host)
