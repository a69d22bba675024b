"""Nothing of the database's address reaches a Ray cluster, and Ray sends nothing of ours anywhere else."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import networks
import psutil
import pytest
from clusters import ACCESS, Cluster
from commands import RealCommands
from psycopg.conninfo import conninfo_to_dict
from servers import Oracle, Server, eventually, execute, index_rows, mixed_texts

from kdb_fast.cli.demo import sqlalchemy_url
from kdb_fast.db.address import DatabaseAddress
from kdb_fast.embedding.models.lookup import Model
from kdb_fast.records import Record, content_from_fields

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="nothing was run on a cluster: ray is missing"),
    pytest.mark.timeout(300),
]

PASSWORD = "unheardOfPassword"
OWNER = "unheard_of_owner"

TEXTS = mixed_texts(60, longest=30)

KEPT = """
import sys
import ray
from ray._raylet import GcsClient
from ray.experimental import internal_kv
ray.init(sys.argv[1], log_to_driver=False, configure_logging=False)
client = GcsClient(address=sys.argv[1])
print("JOBS", client.get_all_job_info())
print("NODES", client.get_all_node_info())
print("ACTORS", ray._private.state.actors())
for space in (None, b"fun", b"session", b"cluster", b"job", b"serve", b"runtime_env", b"tracing", b"usage_stats"):
    for key in internal_kv._internal_kv_list(b"", namespace=space):
        print("KEY", space, key, internal_kv._internal_kv_get(key, namespace=space))
"""
"""Prints what the head keeps of jobs, actors and hosts, and all of its table of keys and values."""

UV = "ray._private.runtime_env.uv_runtime_env_hook.hook"
"""Makes a run under ``uv run`` take its working directory along to the hosts. It looks for the words ``uv run`` among
the processes above."""

HOOKED = f"import {UV.rpartition('.')[0]} as module; print(module.hook(dict()))"
"""Prints what that hook would have Ray do."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    found = Cluster((1, 1), environment={"KDB_FAST_HOME": str(tmp_path_factory.mktemp("hosts"))})
    yield found
    found.close()
    assert found.left() == []


@pytest.fixture
def commands(tmp_path: Path) -> Iterator[RealCommands]:
    (tmp_path / "commands").mkdir()
    found = RealCommands(tmp_path / "commands")
    yield found
    found.close()


@pytest.fixture
def owned(postgres: Server, database: DatabaseAddress) -> Iterator[DatabaseAddress]:
    """The database for a user whose name says nothing elsewhere."""
    execute(database, f"CREATE ROLE {OWNER} SUPERUSER LOGIN")
    yield database
    execute(database, f"REASSIGN OWNED BY {OWNER} TO CURRENT_USER")
    execute(database, f"DROP OWNED BY {OWNER}")
    execute(database, f"DROP ROLE {OWNER}")


def url(address: DatabaseAddress) -> str:
    parts = conninfo_to_dict(address.conninfo)
    where = f"host={quote(str(parts['host']), safe='')}&port={parts['port']}"
    return f"postgresql://{OWNER}:{PASSWORD}@/{parts['dbname']}?{where}"


def secrets_of(address: DatabaseAddress) -> list[bytes]:
    """What must not be found: user, password, and where the server listens, as it is and as it is typed."""
    host = str(conninfo_to_dict(address.conninfo)["host"])
    return [word.encode() for word in (OWNER, PASSWORD, host, quote(host, safe=""), "KDB_FAST_DB")]


def check_secret(secrets: list[bytes], where: str, said: bytes) -> None:
    for secret in secrets:
        found = said.find(secret)
        around = said[max(0, found - 100) : found + 100]
        assert found < 0, f"{secret!r} in {where}: {around!r}"


def check_process(secrets: list[bytes], process: psutil.Process, *, memory: bool) -> None:
    """Nothing of the address is in its arguments and environment.

    Args:
        memory: Neither in its memory. Ray's driver looks through the commands of all processes of this machine for a
            raylet, so its memory may hold that of ours.
    """
    check_secret(secrets, f"arguments of {process}", " ".join(process.cmdline()).encode())
    check_secret(secrets, f"environment of {process}", Path(f"/proc/{process.pid}/environ").read_bytes())
    if memory:
        with contextlib.suppress(PermissionError):  # some kernels let only root look
            for part in memory_of(process):
                check_secret(secrets[:2], f"memory of {process}", part)


def loads_ray(process: psutil.Process) -> bool:
    """Whether it has loaded Ray."""
    return any("_raylet" in mapping.path for mapping in process.memory_maps())


def memory_of(process: psutil.Process) -> Iterator[bytes]:
    """All that a process can write to: its objects, its environment, its arguments, and the object store."""
    maps = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
    with open(f"/proc/{process.pid}/mem", "rb", buffering=0) as memory:
        for line in maps:
            span, rights, *_ = line.split()
            if rights.startswith("rw"):
                start, end = (int(number, 16) for number in span.split("-"))
                with contextlib.suppress(OSError, OverflowError):
                    memory.seek(start)
                    yield memory.read(end - start)


def kept_by(cluster: Cluster) -> bytes:
    """See KEPT."""
    words = [sys.executable, "-c", KEPT, cluster.address]
    done = subprocess.run(words, env={**os.environ, **ACCESS}, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert b"JOBS" in done.stdout
    return done.stdout


def notes(folder: Path) -> Path:
    file = folder / "notes.jsonl"
    file.write_text("".join(json.dumps({"id": f"r{i}", "text": text}) + "\n" for i, text in enumerate(TEXTS)))
    return file


def test_nothing_of_the_address_is_anywhere_in_the_cluster(
    commands: RealCommands, cluster: Cluster, owned: DatabaseAddress, tmp_path: Path
) -> None:
    """It is given twice, in the command's arguments and in its environment."""
    secrets, address = secrets_of(owned), url(owned)
    job = ["reindex", "--from", str(notes(tmp_path)), "--entity", "Note", "--cluster", cluster.address, "--json"]
    command = commands.start(
        *job,
        "--db",
        address,
        KDB_FAST_DB=address,
        PGPASSWORD=PASSWORD,
        KDB_FAST_FAULT="pipeline.flush:1:hang",
        **ACCESS,
    )
    command.wait_until_stopped()
    assert cluster.actors(), command.err
    (driver,) = [child for child in psutil.Process(command.pid).children() if loads_ray(child)]
    for process in (driver, *cluster.processes()):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, psutil.NoSuchProcess):  # it has just ended
            check_process(secrets, process, memory=process.pid != driver.pid)
    kept = kept_by(cluster)
    assert b"EmbeddingActor" in kept
    check_secret(secrets, "what the head keeps", kept)
    command.send(signal.SIGCONT)
    assert command.wait() == 0, command.err
    eventually(lambda: not cluster.actors())
    logs = list(cluster.logs())
    assert any("worker" in file.name for file in logs)
    for file in logs:
        check_secret(secrets, str(file), file.read_bytes())


def test_vectors_of_a_cluster_are_those_of_processes(
    commands: RealCommands, cluster: Cluster, database: DatabaseAddress, tmp_path: Path, oracle: Oracle
) -> None:
    """The same fingerprint too, so a run here finds nothing to do."""
    job = ["reindex", "--from", str(notes(tmp_path)), "--entity", "Note", "--json", "--db", sqlalchemy_url(database)]
    command = commands.start(*job, "--cluster", cluster.address, **ACCESS)
    assert command.wait() == 0, command.err
    records = [Record(("Note", f"r{i}"), content_from_fields([("text", text)])) for i, text in enumerate(TEXTS)]
    oracle.check(index_rows(database), records)
    assert sum(host["records"] for host in command.receipt["hosts"]) == len(TEXTS)
    again = commands.start(*job, "--workers", "2")
    assert again.wait() == 0, again.err
    assert again.receipt["fingerprint"] == command.receipt["fingerprint"]
    assert (again.receipt["unchanged"], again.receipt["stored"]) == (len(TEXTS), 0)


def test_uv_run_takes_no_directory_along(cluster: Cluster, tmp_path: Path, minilm: Model) -> None:
    """A shell stands for uv, whose words it has."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "run").write_text('"$@"\n')
    (folder / "only_here.txt").write_text("unheard of content")
    environment = {**os.environ, **ACCESS, "RAY_RUNTIME_ENV_HOOK": UV}

    def uv_run(*words: str) -> str:
        done = subprocess.run(
            ["uv", "run", sys.executable, *words],
            executable="/bin/sh", cwd=folder, env=environment, capture_output=True, text=True, timeout=100, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert f"'working_dir': '{folder}'" in uv_run("-c", HOOKED)
    job = ("reindex", "--from", str(notes(tmp_path)), "--entity", "Note", "--cluster", cluster.address, "--json")
    receipt = json.loads(uv_run("-m", "kdb_fast", *job, "--db", f"sqlite:///{tmp_path}/index.db"))
    assert receipt["stored"] == len(TEXTS)
    kept = kept_by(cluster)
    for word in (b"only_here", b"gcs://_ray_pkg", str(folder).encode()):
        assert word not in kept
    for file in cluster.logs():
        assert "only_here" not in file.name
        assert b"unheard of content" not in file.read_bytes(), file


def test_the_command_speaks_with_the_cluster_only(cluster: Cluster, tmp_path: Path, minilm: Model) -> None:
    job = ("reindex", "--from", str(notes(tmp_path)), "--entity", "Note", "--cluster", cluster.address)
    words = [sys.executable, "-m", "kdb_fast", *job, "--db", f"sqlite:///{tmp_path}/index.db"]
    done = networks.run(words, {**os.environ, **ACCESS})
    assert done.code == 0, done.output
    if done.sent is None:
        pytest.skip("the command ran on the cluster; whether it spoke with others was not seen: needs strace")
    hosts = {host.address for host in (cluster.head, *cluster.hosts)}
    assert {address.removeprefix("::ffff:") for address in done.sent} <= hosts
