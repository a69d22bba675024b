"""Hosts of a Ray cluster join, leave, die and are cut off during a run; every record must end up stored once."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import signal
import socket
import sqlite3
import time
from collections.abc import Callable, Iterator

import cluster_stub
import psutil
import psycopg
import pytest
from cluster_machine import no_networks
from clusters import ACCESS, Cluster
from commands import Command, Commands, FileJob, MakeJob
from oracle import Receipt
from poison_worker import DEADLY, EACH_SECONDS, GATED
from servers import eventually, execute, kept_rejects

from kdb_fast.db.address import DatabaseAddress
from kdb_fast.engine.cluster.ray_cluster import POLL_SECONDS

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="nothing was run on a cluster: ray is missing"),
    pytest.mark.timeout(240),
]

HOSTS = 2

FULL = os.environ.get("KDB_FAST_CLUSTER_FAULTS") == "full"
"""The long form: both databases, both ways to reach a cluster, and cuts of several lengths."""

CUTS = [1.0, 4.0, 6.0, 8.0, 20.0, 45.0] if FULL else [20.0]
"""Seconds. The cluster gives a host up that does not answer for six."""


RAYS_PATIENCE = {"RAY_CLIENT_RECONNECT_GRACE_PERIOD": "4", "RAY_gcs_rpc_server_reconnect_timeout_s": "6"}
"""Of the commands here, in seconds instead of 30 and 60: how long the head keeps what a client had that has gone, and
how long Ray's driver lives without a head."""


@pytest.fixture(scope="module")
def started(commands: Commands) -> Iterator[Cluster]:
    """The cluster of all tests here."""
    found = Cluster((1,) * HOSTS, environment=cluster_stub.hosts(commands.mark))
    yield found
    found.close()
    assert found.left() == []


@pytest.fixture
def cluster(started: Cluster) -> Cluster:
    """A cluster with HOSTS hosts of one CPU."""
    started.make_whole(HOSTS)
    return started


@pytest.fixture(params=["address", "client"] if FULL else ["address"])
def through(request: pytest.FixtureRequest) -> str:
    """How the command reaches the cluster: by a raylet of its own machine, or by the head's server of Ray's client."""
    return str(request.param)


class Run:
    """A job on the cluster, whose texts wait for :meth:`go` unless it says otherwise.

    Attributes:
        through: ``address`` or ``client``, of the cluster.
    """

    through = "address"

    def __init__(self, job: FileJob, cluster: Cluster) -> None:
        self.job, self.cluster = job, cluster
        self._folder = job.commands.mark
        (self._folder / "embedded").touch()

    def start(self, *, seconds: dict[str, float] | None = None, **environment: str) -> Command:
        address = getattr(self.cluster, self.through)
        return self.job.start("--cluster", address, seconds=seconds, **{**ACCESS, **RAYS_PATIENCE, **environment})

    def go(self) -> None:
        """Texts with GATED are embedded from now on."""
        (self._folder / "go").touch()

    def embedders(self) -> set[int]:
        """Processes that have begun with a text."""
        return {int(line.split()[0]) for line in (self._folder / "embedded").read_text().splitlines()}

    def wait_for_embedders(self, count: int, command: Command) -> None:
        def there() -> bool:
            assert command.poll() is None, (command.err, command.out)
            return len(self.embedders()) >= count

        eventually(there, 60)

    def finish(self, command: Command, *, actors_end_within: float = 20) -> Receipt:
        """It must end well; its receipt, after the oracle."""
        assert command.wait(90) == 0, (command.err, command.out)
        receipt = command.receipt
        self.job.check(receipt)
        eventually(lambda: not self.cluster.actors(), actors_end_within)
        return receipt


MakeRun = Callable[[list[str]], Run]


@pytest.fixture(params=["database", "sqlite_database"] if FULL else ["database"])
def make_run(request: pytest.FixtureRequest, make_job: MakeJob, cluster: Cluster) -> MakeRun:
    database: DatabaseAddress = request.getfixturevalue(request.param)
    return lambda texts: Run(make_job(database, texts), cluster)


def gated(count: int) -> list[str]:
    return [f"{GATED} {number}" for number in range(count)]


def records_by_host(receipt: Receipt) -> dict[str, int]:
    return {host["name"]: host["records"] for host in receipt["hosts"]}


def test_a_host_that_joins_is_used(make_run: MakeRun, cluster: Cluster) -> None:
    run = make_run(gated(200))
    command = run.start()
    run.wait_for_embedders(HOSTS, command)
    cluster.add_host()
    run.wait_for_embedders(HOSTS + 1, command)
    run.go()
    receipt = run.finish(command)
    assert receipt["workers"] == HOSTS + 1
    assert sum(host["records"] for host in receipt["hosts"]) == receipt["stored"] == 200
    (seconds,) = re.findall(r"takes part from now on, with 1 CPU, (\d+) s after it was seen", command.err)
    assert int(seconds) + POLL_SECONDS <= 10


@pytest.mark.parametrize("how", ["leaves", "is killed"])
def test_what_a_lost_host_had_is_given_out_again(make_run: MakeRun, cluster: Cluster, how: str) -> None:
    run = make_run(gated(100))
    command = run.start()
    run.wait_for_embedders(HOSTS, command)
    lost = cluster.hosts[0]
    (cluster.remove_host if how == "leaves" else cluster.kill_raylet)(lost)
    eventually(lambda: "given out again" in command.err, 60)
    run.go()
    receipt = run.finish(command)
    assert (receipt["stored"], receipt["workers"]) == (100, 1)
    assert all(host["deaths"] == 0 for host in receipt["hosts"])


def test_actors_that_are_killed_are_replaced(make_run: MakeRun, cluster: Cluster) -> None:
    run = make_run(gated(100))
    command = run.start()
    for round in range(1, 3):
        run.wait_for_embedders(HOSTS * round, command)
        for host in cluster.hosts:
            assert cluster.kill_actor(host)
    run.wait_for_embedders(HOSTS * 3, command)
    run.go()
    receipt = run.finish(command)
    assert (receipt["stored"], receipt["rejected"]) == (100, 0)
    assert sum(host["deaths"] for host in receipt["hosts"]) == HOSTS * 2


def test_a_deadly_text_is_found_and_all_others_are_stored(make_run: MakeRun) -> None:
    texts = [f"text {number}" for number in range(100)]
    run = make_run(texts)
    run.job.write([*texts, f"{DEADLY} one"])
    command = run.start()
    assert command.wait() == 3, command.err
    receipt = command.receipt
    assert (receipt["stored"], receipt["rejected"]) == (100, 1)
    assert kept_rejects(run.job.database) == [("Note", "100", "worker_died", 101)]
    run.job.write(texts)
    run.job.check(run.job.run())


@pytest.mark.skipif(bool(no_networks()), reason=f"a host is not cut off, since it has no network: {no_networks()}")
@pytest.mark.parametrize("seconds", CUTS)
def test_a_host_is_cut_off_for_a_while(make_run: MakeRun, cluster: Cluster, seconds: float) -> None:
    run = make_run(gated(200))
    command = run.start()
    run.wait_for_embedders(HOSTS, command)
    with cluster.cut_off(cluster.hosts[0]):
        run.go()
        time.sleep(seconds)
    # The host hears that it was given up, and ends its actors, when its connection is tried again: after 20 s at most.
    receipt = run.finish(command, actors_end_within=60)
    assert receipt["stored"] == 200


def test_a_slow_host_does_not_hold_up_the_end(make_run: MakeRun, cluster: Cluster) -> None:
    """Its first text would take longer than the test may."""
    cluster.kill_raylet(cluster.hosts[0])
    cluster.add_host(environment={EACH_SECONDS: "1000"})
    run = make_run([f"text {number}" for number in range(60)])
    command = run.start()
    receipt = run.finish(command)
    assert receipt["stored"] == 60
    # With no records the host that died may be there, too.
    assert [n for n in records_by_host(receipt).values() if n] == [60]


def test_the_command_is_killed_and_run_again(make_run: MakeRun, cluster: Cluster, through: str) -> None:
    run = make_run([*(f"text {number}" for number in range(100)), *gated(20)])
    run.through = through
    command = run.start()
    run.wait_for_embedders(HOSTS, command)
    eventually(lambda: stored(run.job.database), 60)
    command.kill()
    eventually(lambda: not cluster.actors(), 10 if through == "address" else 20)
    run.go()
    receipt = run.finish(run.start())
    assert receipt["stored"] < 120
    assert receipt["unchanged"] > 0


def test_ctrl_c_ends_the_actors_too(make_run: MakeRun, cluster: Cluster, through: str) -> None:
    run = make_run([*(f"text {number}" for number in range(100)), *gated(20)])
    run.through = through
    command = run.start(seconds={"drain": 0.5})
    run.wait_for_embedders(HOSTS, command)
    eventually(lambda: stored(run.job.database), 60)
    command.send(signal.SIGINT)
    assert command.wait() == 130, command.err
    eventually(lambda: not cluster.actors(), 10)
    run.go()
    receipt = run.finish(run.start())
    assert receipt["unchanged"] > 0


def test_ctrl_c_while_the_cluster_does_not_answer(make_job: MakeJob, sqlite_database: DatabaseAddress) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        command = make_job(sqlite_database, ["a text"]).start("--cluster", address)
        eventually(lambda: "asking the cluster" in command.err)
        command.send(signal.SIGINT)
        assert command.wait() == 130, command.err
    assert "Stopped on request." in command.err


def test_through_rays_client_a_run_is_interrupted_and_killed_and_run_to_the_end(
    make_run: MakeRun, cluster: Cluster
) -> None:
    run = make_run([*(f"text {number}" for number in range(100)), *gated(20)])
    run.through = "client"
    command = run.start(seconds={"drain": 0.5}, RAY_CLIENT_RECONNECT_GRACE_PERIOD="100")
    run.wait_for_embedders(HOSTS, command)
    eventually(lambda: stored(run.job.database), 60)
    command.send(signal.SIGINT)
    assert command.wait() == 130, command.err
    eventually(lambda: not cluster.actors(), 20)
    command = run.start()
    run.wait_for_embedders(HOSTS * 2, command)
    command.kill()
    eventually(lambda: not cluster.actors(), 20)
    run.go()
    receipt = run.finish(run.start())
    assert receipt["unchanged"] > 0
    assert receipt["unchanged"] + receipt["stored"] == 120


def test_the_process_that_talks_to_the_cluster_is_killed(make_run: MakeRun, cluster: Cluster) -> None:
    run = make_run(gated(100))
    command = run.start()
    run.wait_for_embedders(HOSTS, command)
    (driver,) = [child for child in psutil.Process(command.pid).children() if is_driver(child)]
    driver.kill()
    run.wait_for_embedders(HOSTS * 2, command)
    run.go()
    receipt = run.finish(command)
    assert receipt["stored"] == 100
    assert sum(host["records"] for host in receipt["hosts"]) == 100


def test_no_host_is_left(make_run: MakeRun, cluster: Cluster) -> None:
    run = make_run([*(f"text {number}" for number in range(100)), *gated(20)])
    command = run.start(KDB_FAST_PATIENCE="3")
    run.wait_for_embedders(HOSTS, command)
    eventually(lambda: stored(run.job.database), 60)
    for host in list(cluster.hosts):
        cluster.kill_raylet(host)
    assert command.wait() == 5, command.err
    assert "What was committed is safe" in command.err
    run.go()
    cluster.add_host()
    receipt = run.finish(run.start())
    assert receipt["unchanged"] > 0
    assert receipt["unchanged"] + receipt["stored"] == 120


def test_the_head_dies(make_run: MakeRun, cluster: Cluster, through: str) -> None:
    run = make_run([*(f"text {number}" for number in range(100)), *gated(20)])
    run.through = through
    command = run.start(KDB_FAST_PATIENCE="3")
    run.wait_for_embedders(HOSTS, command)
    eventually(lambda: stored(run.job.database), 60)
    cluster.kill_head()
    assert command.wait() == 5, command.err
    assert "What was committed is safe" in command.err
    cluster.start_anew(HOSTS)
    run.go()
    receipt = run.finish(run.start())
    assert receipt["unchanged"] > 0
    assert receipt["unchanged"] + receipt["stored"] == 120


def stored(database: DatabaseAddress) -> int:
    """Rows of the index so far."""
    with contextlib.suppress(psycopg.errors.UndefinedTable, sqlite3.OperationalError):
        ((count,),) = execute(database, "SELECT count(*) FROM kdb_search")
        return int(count)
    return 0


def is_driver(process: psutil.Process) -> bool:
    """Whether a child of a command has loaded Ray."""
    return any("_raylet" in mapping.path for mapping in process.memory_maps())
