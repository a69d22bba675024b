"""Runs on a Ray cluster with the real model, which its host has to be sent. What goes wrong there: tests/faults."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from cluster_machine import free_port
from clusters import Cluster
from kameleon import close_kameleon, open_kameleon
from servers import ListSource, Oracle, engine_processes, index_rows, mixed_texts, records_of

from kdb_fast.accounting import Counts
from kdb_fast.cli.demo_docs import records as library_records
from kdb_fast.db.address import DatabaseAddress
from kdb_fast.embedding.models.files import sha256_of
from kdb_fast.embedding.models.lookup import Model
from kdb_fast.embedding.precision.support import int8_on_openvino, unsupported
from kdb_fast.engine.cluster import survey
from kdb_fast.engine.cluster.messages import ClusterSpec
from kdb_fast.errors import ClusterError, MissingPackageError
from kdb_fast.indexing.progress import Progress, Silent
from kdb_fast.indexing.reindex import reindex
from kdb_fast.receipt import HostShare, Receipt
from kdb_fast.resources import WITHOUT_CPU_FLAGS
from kdb_fast.settings import ReindexOptions
from kdb_fast.sources import SourceSpec

pytest.importorskip("ray")

pytestmark = pytest.mark.timeout(110)

FULL = os.environ.get("KDB_FAST_CLUSTER_FAULTS") == "full"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``KDB_FAST_HOME`` of the hosts: without a model."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def cluster(home: Path) -> Iterator[Cluster]:
    """One host with two CPUs."""
    home.chmod(0o700)
    found = Cluster([2], environment={"KDB_FAST_HOME": str(home), "RAY_worker_niceness": "0"})
    yield found
    found.close()


@pytest.fixture
def sqlite_database(tmp_path: Path) -> DatabaseAddress:
    path = tmp_path / "index.db"
    path.touch()
    return DatabaseAddress("sqlite", str(path), f"sqlite:///{path}")


def run(database: DatabaseAddress, texts: list[str], progress: Progress | None = None, **options: Any) -> Receipt:
    return reindex(database, ListSource(records_of(texts)), ReindexOptions(**options), progress)


def notes_of(folder: Path, texts: list[str]) -> SourceSpec:
    """A file of them: of a precision, a part is read before."""
    file = folder / "notes.jsonl"
    file.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)))
    return SourceSpec(from_file=str(file), entity="Note")


def test_a_cluster_embeds_as_this_machine_does(
    cluster: Cluster, home: Path, index: DatabaseAddress, minilm: Model, oracle: Oracle
) -> None:
    """The first run has the model sent, the second finds it there."""
    texts = mixed_texts(300)
    receipt = run(index, texts, cluster=cluster.address)
    assert (receipt.state, receipt.stored, receipt.workers) == ("done", 300, 2)
    oracle.check(index_rows(index), records_of(texts))
    (host,) = receipt.hosts
    assert host == HostShare(host.name, 2, 300, receipt.tokens)
    assert f"1 host of the cluster: {host.name} with 2 CPUs" in receipt.plan
    (sent,) = [path for path in (home / "cluster").iterdir() if not path.name.startswith(".")]
    assert all(sha256_of(sent / name) == expected for name, expected in minilm.files)
    assert engine_processes() == []


def test_rays_client_carries_a_run_too(cluster: Cluster, sqlite_database: DatabaseAddress, oracle: Oracle) -> None:
    texts = mixed_texts(40)
    receipt = run(sqlite_database, texts, cluster=cluster.client, workers=1)
    assert (receipt.stored, receipt.workers, receipt.hosts[0].cpus) == (40, 1, 1)
    oracle.check(index_rows(sqlite_database), records_of(texts))


@pytest.fixture
def odd_hosts(cluster: Cluster, tmp_path: Path) -> Iterator[None]:
    """One with another version of a package, as far as Python knows, and one with a lesser CPU."""
    package = tmp_path / "packages" / "tokenizers-0.0.1.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: tokenizers\nVersion: 0.0.1\n")
    hosts = [
        cluster.add_host(environment={"PYTHONPATH": str(package.parent)}),
        cluster.add_host(environment={WITHOUT_CPU_FLAGS: "avx512* avx_* amx_*"}),
    ]
    yield
    for host in hosts:
        cluster.kill_raylet(host)


@pytest.mark.usefixtures("odd_hosts")
def test_hosts_that_would_give_other_vectors_are_left_out(
    cluster: Cluster, sqlite_database: DatabaseAddress, tmp_path: Path, minilm: Model
) -> None:
    """What the lesser CPU gives in fp32 is as good."""
    notes = notes_of(tmp_path, [f"note {i}" for i in range(120)])
    exact = reindex(sqlite_database, notes, ReindexOptions(cluster=cluster.address))
    here = survey.versions(("tokenizers",))["tokenizers"]
    assert f"tokenizers 0.0.1, here {here} (install the same versions)" in exact.plan
    assert "2 hosts of the cluster" in exact.plan
    assert exact.plan.count("left out") == 1
    if reason := unsupported("bf16"):
        pytest.skip(f"whether a host without BF16 is left out was not tried: {reason}")
    receipt = reindex(sqlite_database, notes, ReindexOptions(cluster=cluster.address, precision="bf16"))
    assert "this CPU has no BF16 instructions" in receipt.plan
    assert "1 host of the cluster" in receipt.plan
    assert (exact.stored, receipt.stored) == (120, 120)


@pytest.mark.skipif(not FULL, reason="int8 is prepared in the long form only, KDB_FAST_CLUSTER_FAULTS=full")
@pytest.mark.usefixtures("odd_hosts")
def test_a_host_that_computes_another_int8_is_left_out(
    cluster: Cluster, sqlite_database: DatabaseAddress, tmp_path: Path, minilm: Model
) -> None:
    if not int8_on_openvino():
        pytest.skip("this CPU has no VNNI, so what it computes in int8 the lesser one computes too")
    texts = [f"{record['name']}: {record['summary']}" for record in library_records()][:400]
    receipt = reindex(
        sqlite_database, notes_of(tmp_path, texts), ReindexOptions(cluster=cluster.address, precision="int8")
    )
    assert "1 host of the cluster" in receipt.plan
    assert re.search(r"left out: .*this CPU has no (BF16|VNNI) instructions", receipt.plan)
    assert [host.records for host in receipt.hosts if host.records] == [400]


@pytest.mark.filterwarnings("ignore:The default datetime adapter is deprecated:DeprecationWarning")
def test_insert_and_a_retry_of_rejects_may_use_a_cluster_too(
    cluster: Cluster, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str], tmp_path: Path, minilm: Model
) -> None:
    pytest.importorskip("kameleondb")
    database = open_kameleon("sqlite", request, capsys, tmp_path)
    database.client.create_entity("Note", fields=[{"name": "text", "type": "text"}]).insert({"text": "fine"})
    database.reindex()
    database.execute(
        "CREATE TRIGGER no_word BEFORE INSERT ON kdb_search WHEN NEW.content LIKE '%forbidden%' "
        "BEGIN SELECT RAISE(ABORT, 'no such word'); END"
    )
    there = ("--cluster", cluster.address)
    inserted = database.insert("Note", [{"text": "forbidden"}, {"text": "good"}], "--max-rejects", "1", *there)
    assert (inserted.code, inserted.json["stored"], inserted.json["rejected"]) == (3, 1, 1), inserted
    assert sum(host["records"] for host in inserted.json["hosts"]) == 2
    database.execute("DROP TRIGGER no_word")
    retried = database.kdb_fast("rejects", "retry", "--json", "--no-progress", *there)
    assert (retried.code, retried.json["remaining"]) == (0, 0), retried
    assert sum(host["records"] for host in retried.json["receipt"]["hosts"]) == 1
    assert sorted(database.index().values()) == ["text: fine", "text: forbidden", "text: good"]
    close_kameleon(database, request)


class Notes(Silent):
    """Calls ``act`` once something is embedded, and keeps what is said."""

    def __init__(self, act: Callable[[], None]) -> None:
        self.act: Callable[[], None] | None = act
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)

    def update(self, counts: Counts) -> None:
        if counts.tokens and self.act is not None:
            act, self.act = self.act, None
            act()


def test_the_death_of_the_process_that_drives_the_cluster_costs_its_blocks(
    cluster: Cluster, sqlite_database: DatabaseAddress, oracle: Oracle
) -> None:
    def kill() -> None:
        children = [p for p in psutil.Process().children() if "--multiprocessing-fork" in p.cmdline()]
        (process,) = [p for p in children if any(part.path.endswith("_raylet.so") for part in p.memory_maps())]
        process.kill()

    texts = mixed_texts(400, longest=100)
    notes = Notes(kill)
    receipt = run(sqlite_database, texts, notes, cluster=cluster.address)
    assert (receipt.state, receipt.stored, receipt.rejected) == ("done", 400, 0)
    assert sum(host.records for host in receipt.hosts) >= 400 - 128
    assert any("died of SIGKILL; replaced, its blocks are given out again" in text for text in notes.said)
    oracle.check(index_rows(sqlite_database), records_of(texts))


def test_a_cluster_that_is_not_there_is_said_in_a_line(sqlite_database: DatabaseAddress) -> None:
    port = free_port()
    with pytest.raises(ClusterError, match=f"^No Ray cluster answers at 127.0.0.1:{port}: .*refused") as caught:
        run(sqlite_database, ["a text"], cluster=f"127.0.0.1:{port}")
    assert caught.value.exit_code == 5
    assert engine_processes() == []


def test_the_cluster_is_told_neither_the_command_nor_its_directory(
    cluster: Cluster, sqlite_database: DatabaseAddress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["kdb-fast", "reindex", "--db", sqlite_database.display])
    run(sqlite_database, ["a text"], cluster=cluster.address)
    # In an interpreter that has not imported Ray before the cluster's token was there.
    program = (
        "import sys; from ray._raylet import GcsClient; "
        "jobs = GcsClient(address=sys.argv[1]).get_all_job_info().values(); "
        "job = max(jobs, key=lambda job: job.start_time); "
        "print(repr((job.entrypoint, list(job.config.py_driver_sys_path), str(job))))"
    )
    command = [sys.executable, "-c", program, cluster.address]
    done = subprocess.run(command, capture_output=True, check=True, timeout=60)
    entry_point, directories, job = ast.literal_eval(done.stdout.decode())
    assert "multiprocessing.spawn" in entry_point
    assert directories == ["/"]
    assert str(tmp_path) not in job


def test_what_is_asked_of_a_host_first_needs_no_kdb_fast_there() -> None:
    """It travels by value; this interpreter stands for a host that lacks kdb-fast."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(survey)
    program = (
        "import sys, pickle; sys.modules['kdb_fast'] = None; "
        "print(pickle.loads(sys.stdin.buffer.read())(('numpy', 'no-such-package')))"
    )
    packed = cloudpickle.dumps(survey.versions)
    done = subprocess.run([sys.executable, "-c", program], input=packed, capture_output=True, check=True, timeout=60)
    there = ast.literal_eval(done.stdout.decode())
    assert there == survey.versions(("numpy", "no-such-package"))
    assert there["no-such-package"] == ""


def test_without_ray_the_message_says_how_to_install_it(
    sqlite_database: DatabaseAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"pip install 'kdb-fast\[ray\]'"):
        run(sqlite_database, ["a text"], cluster="auto")


def test_a_cluster_that_was_here_and_has_died_is_told_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from kdb_fast.engine.cluster import ray_cluster

    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:1\n")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ClusterError, match=r"^No Ray cluster answers at 127\.0\.0\.1:1: "):
        ray_cluster.connect(ClusterSpec("auto", "1", None, 1.0))


@pytest.mark.parametrize("said", ["Starting Ray client server failed.", "Proxy failed to Connect to backend!"])
def test_a_client_that_the_head_failed_to_serve_tries_until_a_deadline(
    monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    from kdb_fast.engine.cluster import ray_cluster

    tried: list[str] = []

    def fail(ray: Any, spec: ClusterSpec) -> None:
        tried.append(spec.address)
        if len(tried) == 4:
            clock.append(1000.0)
        raise ConnectionAbortedError(f"Initialization failure: {said}")

    clock = [0.0]
    still = SimpleNamespace(monotonic=lambda: clock[-1], sleep=lambda seconds: None)
    monkeypatch.setattr(ray_cluster, "time", still)
    monkeypatch.setattr(ray_cluster, "_init", fail)
    monkeypatch.setattr(ray_cluster, "_reach", lambda address: None)
    monkeypatch.setattr(ray_cluster, "import_ray", lambda: None)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    with pytest.raises(ClusterError, match=said):
        ray_cluster.connect(ClusterSpec("ray://head:10001", "1", None, 1.0))
    assert tried == ["ray://head:10001"] * 4
