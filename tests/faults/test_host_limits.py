"""The machine refuses something: disk, memory, open files, streams, a home directory, a clock.

Each time the message is clear, the exit code right and nothing half done; the same command completes the job once there
is room.
"""

from __future__ import annotations

import ast
import contextlib
import errno
import functools
import gc
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import limited
import poison_worker
import psutil
import pytest
from limited import Result, needs_private_mounts
from servers import ListSource, index_rows, records_of

import kdb_fast
from kdb_fast import resources
from kdb_fast.db.address import parse_address
from kdb_fast.embedding.encoder import EncoderSpec
from kdb_fast.embedding.models.lookup import Model
from kdb_fast.engine import child_processes, plan, start
from kdb_fast.engine.base import Event
from kdb_fast.engine.process_pool import ProcessPool
from kdb_fast.engine.sharding import SHARD_ROWS
from kdb_fast.errors import RefusedError, ResourceError
from kdb_fast.indexing import run_embedding
from kdb_fast.indexing.reindex import reindex as run_reindex
from kdb_fast.ipc.slab import SlabShape
from kdb_fast.paths import default_data_dir
from kdb_fast.settings import ReindexOptions

GOOD, BAD = 180, 4
"""Records of the input, few enough for one process, and lines of it that are none."""

PROCESSES = pytest.mark.parametrize("workers", [(), ("--workers", "1")], ids=["one process", "processes"])


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of GOOD records of some 500 characters, and BAD lines at its end."""
    file = tmp_path_factory.mktemp("input") / "notes.jsonl"
    lines = [json.dumps({"id": i, "text": f"{i} about lamps {'x' * 500}"}) for i in range(GOOD)]
    file.write_text("\n".join([*lines, *(f"[{i}]" for i in range(BAD)), ""]))
    return file


def reindex(notes: Path, db: Path, *options: str, **how: Any) -> Result:
    """The command whose job must be complete in the end."""
    command = ("reindex", "--db", f"sqlite:///{db}", "--from", notes, "--entity", "Note", "--json", "--no-progress")
    return limited.run(*command, "--max-rejects", "10", *options, **how)


def check_complete(db: Path, last: dict[str, Any], before: int | None = None) -> None:
    """All is stored once, the rejects too, and the file is sound; the last run did only what was left to do."""
    assert last["rejected"] == BAD
    assert last["stored"] + last["unchanged"] == GOOD
    assert before is None or last["unchanged"] == before
    assert len(index_rows(parse_address(f"sqlite:///{db}"))) == GOOD
    with contextlib.closing(sqlite3.connect(db)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("SELECT count(*) FROM kdb_fast_rejects").fetchall() == [(BAD,)]
        assert connection.execute("SELECT count(*) FROM kdb_fast_runs WHERE state = 'running'").fetchall() == [(0,)]


# -- disk ------------------------------------------------------------------------------------------------------------

SMALL_DISK = """
mount -t tmpfs -o size=$SIZE tmpfs "$DISK" || exit 99
"$@" >"$OUT/first.json" 2>"$OUT/first.err"
echo $? >"$OUT/first.code"
mount -o remount,size=100m tmpfs "$DISK" || exit 99
"$@"
code=$?
cp "$DISK"/* "$OUT"
exit $code
"""


@pytest.mark.parametrize("size", ["64k", "1m"], ids=["no room for tables", "full in the middle"])
@PROCESSES
def test_a_disk_that_fills_up_keeps_what_was_committed_and_the_rerun_does_the_rest(
    notes: Path, tmp_path: Path, size: str, workers: tuple[str, ...]
) -> None:
    needs_private_mounts()
    disk, out = tmp_path / "disk", tmp_path / "out"
    disk.mkdir()
    out.mkdir()
    last = reindex(
        notes, disk / "a.db", *workers, script=SMALL_DISK, private_mounts=True, SIZE=size, DISK=disk, OUT=out
    )
    first = Result(int((out / "first.code").read_text()), *((out / f"first.{x}").read_text() for x in ("json", "err")))
    assert first.code == ResourceError.exit_code
    assert "The disk is full" in first.complaint
    assert "Free disk space, then run the same command again" in first.complaint
    assert first.json["error"]["exit_code"] == first.code
    committed = first.json.get("stored", 0)
    assert (committed > 0) == (size == "1m")
    assert last.code == 3, last
    check_complete(out / "a.db", last.json, committed)


def test_a_limit_of_the_size_of_files_is_told_and_the_rerun_completes(notes: Path, tmp_path: Path) -> None:
    # SIGXFSZ would end a process without a word; Python ignores it, so that the write fails.
    first = reindex(notes, tmp_path / "a.db", script='ulimit -f 600; exec "$@"')
    assert first.code == ResourceError.exit_code
    assert "The disk is full or failing" in first.complaint
    assert 0 < first.json["stored"] < GOOD
    shared = reindex(notes, tmp_path / "a.db", "--workers", "1", script='ulimit -f 2000; exec "$@"')
    assert shared.code == ResourceError.exit_code
    assert "ulimit -f" in shared.complaint
    again = reindex(notes, tmp_path / "a.db")
    assert again.code == 3
    check_complete(tmp_path / "a.db", again.json, first.json["stored"])
    opened = limited.run("status", "--db", f"sqlite:///{tmp_path}/a.db", script='ulimit -f 0; exec "$@"')
    assert opened.code in (0, ResourceError.exit_code)
    assert "Traceback" not in opened.err


def test_a_read_only_disk_is_refused_before_anything_is_done(notes: Path, tmp_path: Path) -> None:
    needs_private_mounts()
    assert reindex(notes, tmp_path / "a.db").code == 3
    script = 'mount --bind "$DISK" "$DISK" && mount -o remount,bind,ro "$DISK" || exit 99; exec "$@"'
    read_only: dict[str, Any] = {"script": script, "private_mounts": True, "DISK": tmp_path}
    for db in ("a.db", "new.db"):
        done = reindex(notes, tmp_path / db, **read_only)
        assert done.code == 4, done
        assert "Make its directory writable" in done.complaint
    fill = ("reindex", "--from", notes, "--entity", "Note")
    home = limited.run(*fill, **read_only, unset=("KDB_FAST_HOME",), HOME=tmp_path / "home")
    assert home.code == 4
    assert "Is the directory writable" in home.complaint
    assert not (tmp_path / "home").exists()


def test_a_full_or_missing_place_for_temporary_files_is_not_needed(notes: Path, tmp_path: Path) -> None:
    needs_private_mounts()
    script = 'mount --bind "$DISK" /mnt && mount -t tmpfs -o ro tmpfs /tmp || exit 99; exec "$@"'
    (tmp_path / "notes.jsonl").write_bytes(notes.read_bytes())
    in_tmp = str(limited.TESTS).startswith("/tmp/") or sys.executable.startswith("/tmp/")
    if in_tmp:
        pytest.skip("the tests themselves are in /tmp")
    files = (Path("/mnt/notes.jsonl"), Path("/mnt/a.db"))
    done = reindex(*files, "--workers", "1", script=script, private_mounts=True, DISK=tmp_path, TMPDIR="/tmp")
    assert done.code == 3, done
    check_complete(tmp_path / "a.db", done.json)


# -- memory ----------------------------------------------------------------------------------------------------------


def test_a_tiny_dev_shm_is_not_used(notes: Path, tmp_path: Path) -> None:
    needs_private_mounts()
    script = 'mount -t tmpfs -o size=64k tmpfs /dev/shm || exit 99; exec "$@"'
    done = reindex(notes, tmp_path / "a.db", "--workers", "2", script=script, private_mounts=True)
    assert done.code == 3, done
    assert done.json["workers"] == 2
    check_complete(tmp_path / "a.db", done.json)


@pytest.mark.usefixtures("minilm")
@PROCESSES
def test_a_limit_of_memory_ends_the_run_with_a_word_about_memory(
    tmp_path: Path, notes: Path, workers: tuple[str, ...]
) -> None:
    # The real model: ONNX Runtime reports in exceptions of its own that memory ran out. How much is too little
    # depends on the machine.
    for kilobytes in (450_000, 330_000, 280_000):
        limit = f'ulimit -v {kilobytes}; exec "$@"'
        done = reindex(notes, tmp_path / "a.db", "--force", *workers, stub=False, script=limit)
        if done.code != 3:
            break
    assert done.code == ResourceError.exit_code, done
    assert "emory" in done.complaint
    assert "again" in done.complaint or "was committed is safe" in done.complaint
    assert done.json["rejected"] <= BAD, "no record is to blame"
    with contextlib.closing(sqlite3.connect(tmp_path / "a.db")) as connection:
        states = connection.execute("SELECT state FROM kdb_fast_runs ORDER BY run DESC LIMIT 1").fetchall()
    assert states == [("failed",)]


@pytest.fixture
def cgroup(tmp_path: Path) -> Iterator[Path]:
    """A cgroup of this machine for one process, with a limit of 600 MB."""
    for root, limit in (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")):
        directory = Path(root) / f"kdb-fast-test-{os.getpid()}"
        try:
            directory.mkdir()
        except OSError:
            continue
        try:
            with (directory / limit).open("r+") as file:  # the kernel's: in a real cgroup it is there
                file.write("600000000")
            yield directory
            return
        except OSError:
            continue
        finally:
            directory.rmdir()
    pytest.skip("no cgroup can be made here: that needs root and a cgroup file system that may be written")


def test_a_cgroup_limit_below_the_hosts_memory_sets_the_plan(cgroup: Path, tmp_path: Path) -> None:
    code = (
        "from kdb_fast import resources; from kdb_fast.engine import plan; "
        "p = plan.make_plan(workers=None, dimensions=384, model_bytes=90_000_000); "
        "print(resources.memory_limit(), resources.available_memory(), p.workers, p.shape.total_bytes)"
    )
    script = f'echo $$ >{cgroup}/cgroup.procs && exec "$@"'
    done = subprocess.run(
        ["sh", "-c", script, "sh", sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    limit, available, workers, slab = map(int, done.stdout.split())
    assert limit <= 600_000_000
    assert available < limit
    assert workers == 1
    assert slab <= max(limit // plan.MEMORY_FOR_SLAB, 4 * SlabShape(1, SHARD_ROWS, 384).slot_bytes)


def test_fake_limit_of_a_container_is_seen_though_the_host_has_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = tmp_path / "kubepods" / "pod"
    box.mkdir(parents=True)
    (box / "memory.max").write_text("max\n")
    (box.parent / "memory.max").write_text("2000000000\n")
    (box.parent / "memory.current").write_text("800000000\n")
    (tmp_path / "cgroup").write_text("0::/kubepods/pod\n")
    monkeypatch.setattr(resources, "CGROUP_ROOT", tmp_path)
    monkeypatch.setattr(resources, "PROC_CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(plan, "usable_cpus", lambda: 64)
    made = plan.make_plan(workers=None, dimensions=384, model_bytes=90_000_000)
    assert resources.available_memory() <= 1_200_000_000
    assert made.workers == 1
    assert "memory: 1.2 GB available" in made.describe()


STUB = Model("stub", Path(), "stub.onnx", 384, 512, "mean", True, ())


class Starved(ProcessPool):
    """The kernel ends one of its workers in the middle of a shard because memory ran out."""

    kills = 0

    def collect(self, ready: set[Any]) -> list[Event]:
        busy = [worker for worker in self._workers if worker.ready and self._queue.tasks_of(worker)]
        if busy and not Starved.kills:
            os.kill(busy[0].process.pid, signal.SIGKILL)
            Starved.kills = 1
        return super().collect(ready)


def test_a_worker_killed_for_want_of_memory_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = records_of([f"about lamp {i}" for i in range(200)])
    address = parse_address(f"sqlite:///{tmp_path}/a.db")
    sqlite3.connect(tmp_path / "a.db").close()
    pool = functools.partial(Starved, worker_target=poison_worker.run)
    monkeypatch.setattr(run_embedding, "resolve", lambda *args, **options: STUB)
    monkeypatch.setattr(start, "ProcessPool", pool)
    monkeypatch.setattr(child_processes, "oom_kills", lambda: Starved.kills)
    monkeypatch.setattr(plan, "SHARD_ROWS", 4)
    receipt = run_reindex(address, ListSource(records), ReindexOptions(workers=2))
    assert (receipt.stored, receipt.workers) == (200, 1)
    (note,) = receipt.warnings
    assert note.endswith("was killed because memory ran out; going on with 1 worker")
    assert {key[1] for key in index_rows(address)} == {record.key[1] for record in records}


FLAT = """
import numpy as np
from kdb_fast.embedding.encoder import Encoder, EncoderSpec
from kdb_fast.embedding.models.lookup import resolve

def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS"))

encoder = Encoder(EncoderSpec(resolve("{model}"), 100))
words = "lamp orbit river stone quiet memory".split()
random = np.random.default_rng(0)
text = lambda length: " ".join(random.choice(words, length))
for length in (2, 60, 500):
    encoder.embed([text(length)] * min(100, 1000 // length))
before = resident()
for _ in range(8):
    encoder.embed([text(int(length)) for length in random.integers(1, 120, 12)])
print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_a_worker_does_not_grow_with_the_shapes_it_has_seen(minilm: Model) -> None:
    code = FLAT.replace("{model}", minilm.name)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True)
    assert int(done.stdout) < 60_000, "kB"


# -- files, processes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [7, 22])
def test_a_low_limit_of_open_files_is_told_and_the_rerun_completes(notes: Path, tmp_path: Path, most: int) -> None:
    first = reindex(notes, tmp_path / "a.db", "--workers", "3", script=f'ulimit -n {most}; exec "$@"')
    assert first.code in (4, ResourceError.exit_code), first
    assert "Too many open files" in first.complaint or "unable to open" in first.complaint
    again = reindex(notes, tmp_path / "a.db", "--workers", "1")
    assert again.code == 3
    check_complete(tmp_path / "a.db", again.json)


def test_a_limit_of_processes_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr("multiprocessing.popen_spawn_posix.Popen.__init__", refuse)
    gc.collect()
    before = psutil.Process().num_fds()
    alone = start.workers_alone(SlabShape(2, 2, 4), EncoderSpec(STUB, 100), workers=1, cpus=[])
    with (
        pytest.raises(ResourceError, match="The process worker-1 could not be started: Resource temp") as caught,
        alone,
    ):
        pass
    assert "ulimit -u" in caught.value.remedy
    del caught, alone
    gc.collect()
    assert psutil.Process().num_fds() == before


# -- streams, encodings ----------------------------------------------------------------------------------------------

STREAMS = {
    "no output": '"$@" >&-',
    "no error output": '"$@" 2>&-',
    "none at all": '"$@" <&- >&- 2>&-',
}


@pytest.mark.parametrize("script", STREAMS.values(), ids=STREAMS)
def test_closed_streams_change_nothing_but_what_is_shown(notes: Path, tmp_path: Path, script: str) -> None:
    done = reindex(notes, tmp_path / "a.db", "--workers", "1", script=script)
    assert done.code == 3, done
    assert "Traceback" not in done.err + done.out
    again = reindex(notes, tmp_path / "a.db")
    check_complete(tmp_path / "a.db", again.json, GOOD)


def test_closed_streams_keep_the_exit_code_of_an_error(tmp_path: Path) -> None:
    for script in (STREAMS["no error output"], STREAMS["none at all"]):
        assert limited.run("status", "--json", "--db", f"sqlite:///{tmp_path}/none.db", script=script).code == 5
    closed = limited.run("reindex", "--db", f"sqlite:///{tmp_path}/a.db", "--from", "-", "--entity", "N", stub=False,
                         script='"$@" <&-')  # fmt: skip
    assert closed.code == 2
    assert "Standard input is closed" in closed.complaint


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_an_output_that_cannot_be_written_is_an_error_and_the_job_is_done(notes: Path, tmp_path: Path) -> None:
    done = reindex(notes, tmp_path / "a.db", script='"$@" >/dev/full')
    assert done.code == ResourceError.exit_code
    assert "No space left on device" in done.complaint
    again = reindex(notes, tmp_path / "a.db")
    check_complete(tmp_path / "a.db", again.json, GOOD)
    both = limited.run("status", "--db", f"sqlite:///{tmp_path}/none.db", script='"$@" >/dev/full 2>/dev/full')
    assert both.code == 5


UNTAKEN = {
    "its reader leaves": '{ "$@" >"$OUT"; echo $? >"$CODE"; } 2>&1 | head -1',
    "its reader leaves at once": '{ "$@" >"$OUT"; echo $? >"$CODE"; } 2>&1 | true',
    "its reader reads nothing": (
        '{ head -c 65536 /dev/zero; "$@" 2>&1 >"$OUT"; echo $? >"$CODE"; }'
        ' | { until test -e "$CODE"; do sleep 0.1; done; }'
    ),
    "its disk is full": '"$@" >"$OUT" 2>/dev/full; echo $? >"$CODE"',
    "it is closed": '"$@" >"$OUT" 2>&-; echo $? >"$CODE"',
}


@pytest.mark.parametrize("script", UNTAKEN.values(), ids=UNTAKEN)
def test_progress_that_nobody_takes_ends_no_job(notes: Path, tmp_path: Path, script: str) -> None:
    done = reindex(
        notes, tmp_path / "a.db", "--workers", "1", script=script, OUT=tmp_path / "out", CODE=tmp_path / "code"
    )
    assert (tmp_path / "code").read_text().strip() == "3", done
    receipt = json.loads((tmp_path / "out").read_text())
    assert (receipt["state"], receipt["stored"], receipt["rejected"]) == ("done", GOOD, BAD)


def test_every_exit_code_is_in_the_help_and_in_the_readme() -> None:
    from kdb_fast import errors

    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.KdbFastError)]
    codes = {kind.exit_code for kind in kinds if kind is not errors.StoppedError}
    codes |= {errors.EXIT_REJECTS, errors.EXIT_PIPE, 0, *(128 + number for number in (1, 2, 15))}
    for text in (limited.run("--help", stub=False).out, (Path(__file__).parents[2] / "README.md").read_text()):
        assert codes <= {int(number) for number in re.findall(r"\b\d+\b", text)}


def test_a_reader_that_has_gone_ends_the_command_quietly(notes: Path, tmp_path: Path) -> None:
    script = '{ "$@"; echo $? >&3; } 3>&2 2>"$OUT" | true'
    out = tmp_path / "err"
    done = limited.run("models", "list", "--json", script=f"sleep 0.2; {script}", stub=False, OUT=out)
    assert done.err.strip() in ("141", "0")
    assert out.read_text() == ""


@pytest.mark.parametrize("environment", [{"LC_ALL": "C"}, {"PYTHONIOENCODING": "ascii"}])
def test_any_locale_stores_and_shows_all_of_unicode(tmp_path: Path, environment: dict[str, Any]) -> None:
    file = tmp_path / "notes.jsonl"
    file.write_text('{"id": "Zürich 東京", "text": "naïve café 🙂"}\n', encoding="utf-8")
    db = f"sqlite:///{tmp_path}/ä.db"
    arguments = ("reindex", "--db", db, "--from", file, "--entity", "Grüße 東京")
    done = limited.run(*arguments, **environment)
    assert done.code == 0, done
    rows = index_rows(parse_address(db))
    assert {key: row.content for key, row in rows.items()} == {("Grüße 東京", "Zürich 東京"): "text: naïve café 🙂"}
    for command in (("search", "café", "--mode", "keyword"), ("status",)):
        shown = limited.run(*command, "--db", db, **environment)
        assert shown.code == 0, shown
        assert "Gr" in shown.out


def test_an_argument_that_is_not_utf8_is_refused_and_not_stored(tmp_path: Path) -> None:
    db = tmp_path / "a.db"
    (tmp_path / "n.jsonl").write_text('{"id": 1, "text": "a"}\n')
    raw = b"N\xff\x1b[31m"
    done = limited.run("reindex", "--db", f"sqlite:///{db}", "--from", tmp_path / "n.jsonl", "--entity",
                       os.fsdecode(raw))  # fmt: skip
    assert done.code == 2
    assert "cannot be stored: a lone surrogate (U+DCFF) is not valid text" in done.complaint
    assert done.complaint.isprintable()
    missing = limited.run("status", "--db", f"sqlite:///{tmp_path}/{os.fsdecode(raw)}")
    assert missing.code == 5
    assert missing.complaint.isprintable()


# -- home, time ------------------------------------------------------------------------------------------------------


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("KDB_FAST_HOME", "XDG_DATA_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", unknown)
    with pytest.raises(RefusedError) as caught:
        default_data_dir()
    assert "KDB_FAST_HOME" in caught.value.remedy
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_data_dir() == tmp_path / "kdb-fast"


def test_a_home_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    # A command that only reads makes nothing, so what it tells is that there is no database.
    for code, command in ((5, ("status",)), (4, ("models", "path")), (4, ("reindex",))):
        done = limited.run(*command, unset=("KDB_FAST_HOME", "XDG_DATA_HOME"), HOME="/dev/null", stub=False)
        assert done.code == code, done
        assert "/dev/null/.local/share/kdb-fast" in done.complaint or "models pull" in done.complaint


def test_the_time_zone_does_not_make_records_look_changed(notes: Path, tmp_path: Path) -> None:
    assert reindex(notes, tmp_path / "a.db", TZ="Etc/GMT+12").code == 3
    assert reindex(notes, tmp_path / "a.db", TZ="Pacific/Kiritimati").json["unchanged"] == GOOD
    status = limited.run("status", "--json", "--db", f"sqlite:///{tmp_path}/a.db", TZ="Pacific/Kiritimati")
    (entity,) = status.json["entities"]
    assert (entity["indexed"], entity["stale"]) == (GOOD, 0)


def test_no_clock_that_may_jump_measures_a_duration() -> None:
    """Time-outs, rates and leases use the monotonic clock, or that of the database."""
    # A server names the time at which to ask again by the clock on the wall.
    # Ids of new rows hold the time; where it jumps, they are only out of order.
    # When a file was written is told by that clock; where it jumps, the file is read under its locks, or without.
    allowed = {"embedding/providers/openai/answers.py", "stores/new_ids.py", "db/sqlite_reading.py"}
    package = Path(kdb_fast.__file__).parent
    for file in package.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            name = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
            assert name not in ("time.time", "time.time_ns") or str(file.relative_to(package)) in allowed, file
