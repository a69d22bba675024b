"""Runs on a Ray cluster: a head with two CPUs on this machine, which has to be sent the model."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from servers import ListSource, Oracle, engine_processes, eventually, index_rows, mixed_texts, records_of

from kdb_fast.db.address import DatabaseAddress
from kdb_fast.embedding.models.files import sha256_of
from kdb_fast.embedding.models.lookup import Model
from kdb_fast.errors import ClusterError, MissingPackageError
from kdb_fast.indexing.progress import Progress
from kdb_fast.indexing.reindex import reindex
from kdb_fast.receipt import HostShare, Receipt
from kdb_fast.settings import ReindexOptions

pytest.importorskip("ray")

pytestmark = pytest.mark.timeout(110)

ACCESS = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
"""Who does not know this token is refused."""


class Head:
    """A Ray head with two CPUs.

    Attributes:
        address: For ``--cluster``; ``client`` that of Ray's client.
        home: ``KDB_FAST_HOME`` of its actors.
    """

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="kf-ray-", dir="/tmp"))  # the paths of its sockets are long
        self.home = self._folder / "home"
        self.home.mkdir(mode=0o700)
        ports = free_ports(2)
        self.address, self.client = (f"127.0.0.1:{port}" for port in ports)
        command = [
            str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=2",
            "--node-ip-address=127.0.0.1", f"--port={ports[0]}", f"--ray-client-server-port={ports[1]}",
            "--include-dashboard=false", "--disable-usage-stats", "--object-store-memory=80000000",
            f"--temp-dir={self._folder / 'r'}",
        ]  # fmt: skip
        self.process = subprocess.Popen(
            command,
            env={**os.environ, **ACCESS, "KDB_FAST_HOME": str(self.home), "RAY_num_prestart_python_workers": "0"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def answers(self) -> bool:
        """Whether both ports take connections."""
        with contextlib.suppress(OSError):
            for address in (self.address, self.client):
                host, port = address.split(":")
                socket.create_connection((host, int(port)), 1).close()
            return True
        return False

    def stop(self) -> None:
        processes = [self.process.pid, *(child.pid for child in psutil.Process(self.process.pid).children(True))]
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(20)
        finally:
            for pid in processes:
                if psutil.pid_exists(pid):
                    os.kill(pid, signal.SIGKILL)
            shutil.rmtree(self._folder, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [int(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ACCESS.items():
            patch.setenv(name, value)
        found = Head()
        try:
            eventually(found.answers, 60)
            yield found
        finally:
            found.stop()


@pytest.fixture
def sqlite_database(tmp_path: Path) -> DatabaseAddress:
    path = tmp_path / "index.db"
    path.touch()
    return DatabaseAddress("sqlite", str(path), f"sqlite:///{path}")


def run(database: DatabaseAddress, texts: list[str], progress: Progress | None = None, **options: Any) -> Receipt:
    return reindex(database, ListSource(records_of(texts)), ReindexOptions(**options), progress)


def test_a_cluster_embeds_as_this_machine_does(
    head: Head, index: DatabaseAddress, minilm: Model, oracle: Oracle
) -> None:
    """The first run has the model sent, the second finds it there."""
    texts = mixed_texts(300)
    receipt = run(index, texts, cluster=head.address)
    assert (receipt.state, receipt.stored, receipt.workers) == ("done", 300, 2)
    oracle.check(index_rows(index), records_of(texts))
    (host,) = receipt.hosts
    assert host == HostShare(host.name, 2, 300, receipt.tokens)
    assert f"1 host of the cluster: {host.name} with 2 CPUs" in receipt.plan
    (sent,) = [path for path in (head.home / "cluster").iterdir() if not path.name.startswith(".")]
    assert all(sha256_of(sent / name) == expected for name, expected in minilm.files)
    assert engine_processes() == []


def test_rays_client_carries_a_run_too(head: Head, sqlite_database: DatabaseAddress, oracle: Oracle) -> None:
    texts = mixed_texts(40)
    receipt = run(sqlite_database, texts, cluster=f"ray://{head.client}", workers=1)
    assert (receipt.stored, receipt.workers, receipt.hosts[0].cpus) == (40, 1, 1)
    oracle.check(index_rows(sqlite_database), records_of(texts))


def test_a_cluster_that_is_not_there_is_said_in_a_line(sqlite_database: DatabaseAddress) -> None:
    (port,) = free_ports(1)
    with pytest.raises(ClusterError, match=f"^No Ray cluster answers at 127.0.0.1:{port}: .*refused") as caught:
        run(sqlite_database, ["a text"], cluster=f"127.0.0.1:{port}")
    assert caught.value.exit_code == 5
    assert engine_processes() == []


def test_without_ray_the_message_says_how_to_install_it(
    sqlite_database: DatabaseAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"pip install 'kdb-fast\[ray\]'"):
        run(sqlite_database, ["a text"], cluster="auto")
