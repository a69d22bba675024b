from __future__ import annotations

import gc
import os
from collections.abc import Mapping
from pathlib import Path

import psutil
import pytest

from kdb_fast import resources
from kdb_fast.resources import (
    GARBAGE_THRESHOLD,
    available_memory,
    collecting_rarely,
    cpu_list,
    cpu_quota,
    memory_limit,
    oom_kills,
    peak_rss_bytes,
    usable_cpus,
)

V1_NONE = "9223372036854771712\n"
HOST_MEMORY = 100 * 2**30


class Machine:
    """A fake /sys/fs/cgroup and /proc/self/cgroup."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        monkeypatch.setattr(resources, "CGROUP_ROOT", root / "cgroup")
        monkeypatch.setattr(resources, "PROC_CGROUP", root / "proc_self_cgroup")
        (root / "cgroup").mkdir()

    def process_is_in(self, *lines: str) -> None:
        (self.root / "proc_self_cgroup").write_text("".join(f"{line}\n" for line in lines))

    def cgroup(self, path: str, files: Mapping[str, str]) -> None:
        directory = self.root / "cgroup" / path.strip("/")
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (directory / name).write_text(text)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


@pytest.fixture
def cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 2, 3, 5, 6, 7, 8, 9}, raising=False)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    class Memory:
        available = HOST_MEMORY

    monkeypatch.setattr(psutil, "virtual_memory", Memory)


# -- CPUs --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("cpus")
@pytest.mark.parametrize(
    ("cpu_max", "quota", "usable"),
    [
        ("200000 100000\n", 2.0, 2),
        ("150000 100000\n", 1.5, 2),
        ("10000 100000\n", 0.1, 1),
        ("1600000 100000\n", 16.0, 8),
        ("max 100000\n", None, 8),
        ("max\n", None, 8),
        ("", None, 8),
        ("\n", None, 8),
    ],
)
def test_cpu_quota_of_cgroup_v2(machine: Machine, cpu_max: str, quota: float | None, usable: int) -> None:
    machine.process_is_in("0::/job")
    machine.cgroup("/job", {"cpu.max": cpu_max})
    assert cpu_quota() == quota
    assert usable_cpus() == usable


@pytest.mark.usefixtures("cpus")
@pytest.mark.parametrize(("own", "above"), [("max 100000", "300000 100000"), ("300000 100000", "800000 100000")])
def test_the_smallest_quota_of_a_cgroup_and_those_above_it_counts(machine: Machine, own: str, above: str) -> None:
    machine.process_is_in("0::/slice/service/job")
    machine.cgroup("/slice", {"cpu.max": above})
    machine.cgroup("/slice/service", {"cpu.max": "max 100000"})
    machine.cgroup("/slice/service/job", {"cpu.max": own})
    assert (cpu_quota(), usable_cpus()) == (3.0, 3)


@pytest.mark.usefixtures("cpus")
@pytest.mark.parametrize("controllers", ["cpu,cpuacct", "cpuacct,cpu", "cpu"])
def test_cpu_quota_of_cgroup_v1(machine: Machine, controllers: str) -> None:
    machine.process_is_in("12:cpuset:/", f"4:{controllers}:/docker/abc", "1:name=systemd:/docker/abc")
    machine.cgroup(f"{controllers}/docker/abc", {"cpu.cfs_quota_us": "250000\n", "cpu.cfs_period_us": "100000\n"})
    machine.cgroup(controllers, {"cpu.cfs_quota_us": "-1\n", "cpu.cfs_period_us": "100000\n"})
    assert (cpu_quota(), usable_cpus()) == (2.5, 3)


def test_cgroup_v1_without_a_quota_has_none(machine: Machine) -> None:
    machine.process_is_in("4:cpu,cpuacct:/")
    machine.cgroup("cpu,cpuacct", {"cpu.cfs_quota_us": "-1\n", "cpu.cfs_period_us": "100000\n"})
    assert cpu_quota() is None


def test_controllers_mounted_under_their_own_name_are_found(machine: Machine) -> None:
    machine.process_is_in("4:cpu,cpuacct:/")
    machine.cgroup("cpu", {"cpu.cfs_quota_us": "100000", "cpu.cfs_period_us": "100000"})
    assert cpu_quota() == 1.0


def test_in_a_container_the_path_of_the_host_falls_back_to_the_containers_root(machine: Machine) -> None:
    machine.process_is_in("0::/../../kubepods/pod1/abc")
    machine.cgroup("/", {"cpu.max": "400000 100000", "memory.max": "1000000"})
    assert cpu_quota() == 4.0
    assert memory_limit() == 1_000_000


@pytest.mark.usefixtures("cpus")
def test_without_cgroups_the_affinity_counts(machine: Machine) -> None:
    assert cpu_quota() is None
    assert memory_limit() is None
    assert usable_cpus() == 8
    assert cpu_list() == [0, 2, 3, 5, 6, 7, 8, 9]


def test_a_system_without_affinity_counts_all_cpus(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert (usable_cpus(), cpu_list()) == (6, [])
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cpus() == 1


# -- memory ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("host")
def test_memory_limit_of_an_ancestor_counts_in_v2(machine: Machine) -> None:
    machine.process_is_in("0::/slice/job")
    machine.cgroup("/slice", {"memory.max": "4000000000\n", "memory.current": "1000000000\n"})
    machine.cgroup("/slice/job", {"memory.max": "max\n", "memory.current": "500\n"})
    assert memory_limit() == 4_000_000_000
    assert available_memory() == 3_000_000_000


@pytest.mark.usefixtures("host")
def test_the_tightest_of_limit_less_use_counts_not_the_smallest_limit(machine: Machine) -> None:
    machine.process_is_in("0::/slice/job")
    machine.cgroup("/slice", {"memory.max": "4000", "memory.current": "3900"})
    machine.cgroup("/slice/job", {"memory.max": "3000", "memory.current": "1000"})
    assert memory_limit() == 3000
    assert available_memory() == 100


@pytest.mark.usefixtures("host")
def test_page_cache_counts_as_available_in_v2(machine: Machine) -> None:
    machine.process_is_in("0::/job")
    machine.cgroup(
        "/job",
        {
            "memory.max": "4000",
            "memory.current": "3900",
            "memory.stat": "anon 900\ninactive_file 3000\nactive_file 0\n",
        },
    )
    assert available_memory() == 3100


@pytest.mark.usefixtures("host")
def test_memory_limit_of_cgroup_v1_with_the_cache_of_the_whole_tree(machine: Machine) -> None:
    machine.process_is_in("7:memory:/docker/abc", "4:cpu,cpuacct:/docker/abc")
    machine.cgroup("memory", {"memory.limit_in_bytes": V1_NONE, "memory.usage_in_bytes": "1\n"})
    machine.cgroup(
        "memory/docker/abc",
        {
            "memory.limit_in_bytes": "2000000000\n",
            "memory.usage_in_bytes": "1500000000\n",
            "memory.stat": "inactive_file 1\ntotal_inactive_file 700000000\n",
        },
    )
    assert memory_limit() == 2_000_000_000
    assert available_memory() == 1_200_000_000


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("text", ["max\n", V1_NONE, "", "\n", str(2**63 - 1)])
def test_no_limit_in_any_spelling_is_none(machine: Machine, text: str) -> None:
    machine.process_is_in("0::/job", "7:memory:/job")
    machine.cgroup("/job", {"memory.max": text})
    machine.cgroup("memory/job", {"memory.limit_in_bytes": text})
    assert memory_limit() is None
    assert available_memory() == HOST_MEMORY


@pytest.mark.usefixtures("host")
def test_a_cgroup_beyond_its_limit_leaves_nothing(machine: Machine) -> None:
    machine.process_is_in("0::/job")
    machine.cgroup("/job", {"memory.max": "1000", "memory.current": "1200"})
    assert available_memory() == 0


@pytest.mark.usefixtures("host")
def test_the_host_counts_where_it_has_less_than_the_limit(machine: Machine) -> None:
    machine.process_is_in("0::/job")
    machine.cgroup("/job", {"memory.max": str(2 * HOST_MEMORY), "memory.current": "0"})
    assert available_memory() == HOST_MEMORY


def test_on_a_hybrid_system_v1_limits_count_beside_an_empty_v2_tree(machine: Machine) -> None:
    machine.process_is_in("7:memory:/a", "0::/a")
    machine.cgroup("memory/a", {"memory.limit_in_bytes": "5000", "memory.usage_in_bytes": "0"})
    machine.cgroup("/a", {})
    assert memory_limit() == 5000


# -- what has happened -------------------------------------------------------------------------------------


def test_kills_for_want_of_memory_are_counted_in_both_versions(machine: Machine) -> None:
    assert oom_kills() == 0
    machine.process_is_in("0::/slice/job", "7:memory:/slice/job")
    machine.cgroup("/slice/job", {"memory.events": "low 0\nmax 12\noom 3\noom_kill 2\noom_group_kill 9\n"})
    assert oom_kills() == 2
    machine.cgroup("memory/slice/job", {"memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 5\n"})
    assert oom_kills() == 5


def test_peak_memory_is_this_processs_own_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status = tmp_path / "status"
    status.write_text("Name:\tpython\nVmPeak:\t  900000 kB\nVmHWM:\t   20480 kB\nVmRSS:\t   10240 kB\n")
    monkeypatch.setattr(resources, "PROC_STATUS", status)
    assert peak_rss_bytes() == 20 * 2**20


def test_peak_memory_is_known_without_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "PROC_STATUS", tmp_path / "missing")
    assert 5 * 2**20 < peak_rss_bytes() < 2**40


def test_on_this_machine_the_answers_are_usable() -> None:
    assert 1 <= usable_cpus() <= 4096
    assert available_memory() > 0
    assert memory_limit() is None or memory_limit() > 0  # type: ignore[operator]


def test_a_callers_own_settings_come_back() -> None:
    before = gc.get_threshold()
    with collecting_rarely():
        assert gc.get_threshold() == (GARBAGE_THRESHOLD, *before[1:])
    assert gc.get_threshold() == before
    with pytest.raises(RuntimeError), collecting_rarely():
        raise RuntimeError
    assert gc.get_threshold() == before
