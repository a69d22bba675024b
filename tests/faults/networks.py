"""A command that is watched for what it sends to other machines, whatever library or thread does it."""

from __future__ import annotations

import functools
import ipaddress
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

CALLS = "trace=connect,sendto,sendmsg,sendmmsg"
ADDRESS = re.compile(r'(?:inet_addr\(|inet_pton\(AF_INET6, )"([^"]+)"')

COUNTING = """
import subprocess, sys
code = subprocess.run(sys.argv[2:], check=False).returncode
names, values = [line.split() for line in open("/proc/net/snmp") if line.startswith("Ip:")]
found = dict(zip(names, values))
found |= dict(line.split() for line in open("/proc/net/snmp6"))
wanted = ("OutRequests", "OutNoRoutes", "Ip6OutRequests", "Ip6OutNoRoutes")
open(sys.argv[1], "w").write(" ".join(f"{name}={found[name]}" for name in wanted if found.get(name, "0") != "0"))
sys.exit(code)
"""
"""Runs a command in a network that leads nowhere, and writes down what the kernel counted of attempts to send."""


class Watched(NamedTuple):
    """What a command gave.

    Attributes:
        code: Its exit code.
        output: Standard output and error.
        sent: What it tried to send to other machines: their addresses, or counts; None if nobody could watch.
    """

    code: int
    output: str
    sent: list[str] | None


def run(command: Sequence[str], environment: Mapping[str, str], timeout: float = 300) -> Watched:
    """Run a command with this environment and no other; it is watched by strace, or else put into a network
    namespace. The former sees more: some libraries send nothing where there is no network."""
    with tempfile.TemporaryDirectory() as folder:
        notes = Path(folder) / "notes"
        if how := _strace():
            words = [*how, "-o", str(notes), *command]
        elif how := _namespace():
            words = [*how, sys.executable, "-c", COUNTING, str(notes), *command]
        else:
            words = list(command)
        done = subprocess.run(
            words, env=dict(environment), stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout, check=False
        )
        text = notes.read_text(errors="replace") if notes.exists() else ""
    output = (done.stdout + done.stderr).decode(errors="replace")
    if not how:
        return Watched(done.returncode, output, None)
    addresses = [found for found in ADDRESS.findall(text) if not _is_here(found)]
    return Watched(done.returncode, output, addresses if _strace() else text.split())


def _is_here(address: str) -> bool:
    found = ipaddress.ip_address(address)
    return found.is_loopback or found.is_unspecified


@functools.cache
def _strace() -> tuple[str, ...]:
    """The command that watches system calls; () where it is missing or forbidden."""
    strace = shutil.which("strace")
    if (
        strace is None
        or subprocess.run([strace, "-o", "/dev/null", "true"], capture_output=True, check=False).returncode
    ):
        return ()
    return (strace, "-f", "-qq", "-e", CALLS, "-e", "signal=none")


@functools.cache
def _namespace() -> tuple[str, ...]:
    """The command that gives a program a network of its own; () where that is forbidden."""
    unshare = shutil.which("unshare")
    if unshare is None:
        return ()
    for options in (("--net",), ("--map-root-user", "--net")):
        if subprocess.run([unshare, *options, "true"], capture_output=True, check=False).returncode == 0:
            return (unshare, *options)
    return ()
