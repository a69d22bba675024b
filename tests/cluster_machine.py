"""What this machine allows to a cluster of tests (:mod:`clusters`), and what clusters have left on it."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
from servers import eventually

NAME = re.compile(r"kf(\d+)c\d+")
"""Of a cluster, from the number of its process. With a host's number behind it, it is a name of a network device still,
which has at most 15 characters."""

FOLDER = Path("/tmp")
"""Where Ray's files go: the paths of its sockets may have 107 characters."""

NETWORK = "198.18.{}.{}"
"""Addresses that are set aside for tests of networks (RFC 2544), so nobody's own network is hidden."""


# -- what is left ------------------------------------------------------------------------------------------


def processes_of(name: str) -> list[psutil.Process]:
    """Living processes of the cluster of this name."""
    return [process for process, owner in all_processes() if owner == name]


def all_processes() -> Iterator[tuple[psutil.Process, str]]:
    """Every living process of a cluster, with the cluster's name. They are known by their directory: Ray gives workers
    titles that cover their environment, and some outlive their parent."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            directory = Path(process.cwd())
            if directory.is_relative_to(FOLDER) and process.status() != psutil.STATUS_ZOMBIE:
                name = directory.relative_to(FOLDER).parts[:1]
                if name and NAME.fullmatch(name[0]):
                    yield process, name[0]


def devices() -> Iterator[tuple[str, str]]:
    """Every network device of a cluster, with the cluster's name."""
    with contextlib.suppress(FileNotFoundError):
        for device in os.listdir("/sys/class/net"):
            if found := NAME.match(device):
                yield device, found[0]


def clear(name: str) -> None:
    """Remove whatever there is of a cluster."""

    def none_is_left() -> bool:
        left = processes_of(name)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        return not left

    eventually(none_is_left)
    for device, owner in devices():
        if owner == name:
            run("ip", "link", "delete", device, check=False)
    shutil.rmtree(FOLDER / name, ignore_errors=True)


def sweep() -> None:
    """Remove what clusters have left whose process was killed."""
    names = {name for _, name in all_processes()} | {name for _, name in devices()} | set(os.listdir(FOLDER))
    for name in names:
        if (found := NAME.fullmatch(name)) and not psutil.pid_exists(int(found[1])):
            clear(name)


# -- the machine -------------------------------------------------------------------------------------------


@functools.cache
def no_networks() -> str:
    """Why hosts cannot have networks of their own here; empty where they can."""
    if missing := [word for word in ("ip", "bridge", "unshare", "nsenter") if shutil.which(word) is None]:
        return f"no program {missing[0]}"
    if run("unshare", "--net", "true", check=False):
        return "no network namespaces for this user"
    device = f"kf{os.getpid()}c0"
    if run("ip", "link", "add", device, "type", "bridge", check=False):
        return "no bridges for this user"
    run("ip", "link", "delete", device)
    return ""


def run(*command: str, check: bool = True) -> int:
    """Its exit code; with ``check`` it must be 0."""
    done = subprocess.run(command, capture_output=True, check=False)
    assert not check or done.returncode == 0, (command, done.stderr)
    return done.returncode


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def free_subnet() -> int:
    """The last number but one of addresses that no device of this machine has."""
    taken = {address.address for group in psutil.net_if_addrs().values() for address in group}
    for number in range(256):
        subnet = (os.getpid() + number) % 256
        if NETWORK.format(subnet, 1) not in taken:
            return subnet
    raise AssertionError("256 clusters")


def network_of(pid: int) -> str:
    return os.readlink(f"/proc/{pid}/ns/net")
