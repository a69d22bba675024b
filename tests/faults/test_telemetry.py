"""No library reports its use: the home directory stays empty, and nothing is sent to another machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import networks
import pytest

from kdb_fast import telemetry
from kdb_fast.embedding.models.lookup import Model
from kdb_fast.embedding.precision.support import unsupported
from kdb_fast.ipc.spawning import WORKER_ENVIRONMENT

pytestmark = pytest.mark.timeout(400)  # int8 is calibrated: ten seconds of two idle cores

RECORDS = 250
"""More than one process embeds by itself (``plan.INLINE_ROWS``)."""


class Machine:
    """Commands of a user whose home directory is empty and who has set no variable.

    Attributes:
        home: The user's home directory.
        folder: Where everything else is, KDB_FAST_HOME too.
    """

    def __init__(self, folder: Path, model: Model) -> None:
        self.home, self.folder, self.model = folder / "home", folder, model
        self.home.mkdir()
        left_out = ("XDG_", "ORT_", "HF_", "KDB_FAST_DB", "PG")
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(left_out)}
        self.environment |= {"HOME": str(self.home), "KDB_FAST_HOME": str(folder / "kdb-fast")}

    def reindex(self, *options: str) -> networks.Watched:
        file = self.folder / "records.jsonl"
        texts = [f"copper kettle number {n} of shelf {n % 7}" for n in range(RECORDS)]
        file.write_text("".join(json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(texts)))
        return self.run(
            "-m", "kdb_fast", "reindex", "--db", f"sqlite:///{self.folder}/index.db", "--from", str(file),
            "--entity", "Thing", "--model-path", str(self.model.path), "--workers", "2", *options
        )  # fmt: skip

    def run(self, *arguments: str) -> networks.Watched:
        """Run a Python program, of which nothing may be left in the home directory or have been sent."""
        done = networks.run([sys.executable, *arguments], self.environment)
        assert done.code == 0, done.output
        assert [str(path) for path in self.home.rglob("*")] == []
        if done.sent is None:
            pytest.skip(
                "the home directory stayed empty; whether something was sent was not seen: needs strace, or network "
                "namespaces (unshare --net)"
            )
        assert done.sent == []
        return done


@pytest.fixture
def machine(tmp_path: Path, minilm: Model) -> Machine:
    return Machine(tmp_path, minilm)


def test_what_is_sent_is_seen(tmp_path: Path) -> None:
    program = """
import contextlib, socket
with contextlib.suppress(OSError), socket.socket(type=socket.SOCK_DGRAM) as s:
    s.connect(("192.0.2.1", 9))
"""
    found = networks.run([sys.executable, "-c", program], dict(os.environ))
    assert found.code == 0
    if found.sent is None:
        pytest.skip("needs strace, or network namespaces (unshare --net)")
    assert found.sent in (["192.0.2.1"], ["OutNoRoutes=1"])


def test_fp32_reports_nothing(machine: Machine) -> None:
    machine.reindex()
    machine.run("-m", "kdb_fast", "search", "kettle", "--db", f"sqlite:///{machine.folder}/index.db",
                "--model-path", str(machine.model.path))  # fmt: skip


@pytest.mark.parametrize("precision", ["bf16", pytest.param("int8", marks=pytest.mark.slow)])
def test_a_lower_precision_and_its_preparation_report_nothing(machine: Machine, precision: str) -> None:
    if reason := unsupported(precision):
        pytest.skip(f"a run in {precision} was not watched: {reason}")
    done = machine.reindex("--precision", precision)
    assert f"Comparing {precision} with fp32" in done.output
    assert f"{precision}: cosine with fp32" in done.output


def test_the_library_reports_nothing(machine: Machine) -> None:
    program = """
import sys
from kdb_fast import FastEmbedProvider, SearchEngine

search = SearchEngine(sys.argv[1], FastEmbedProvider("sentence-transformers/all-MiniLM-L6-v2", model_path=sys.argv[2]))
search.index_records_batch([("Note", "1", "a cat sat on the mat"), ("Note", "2", "stocks fell today")])
assert search.search("feline animal", limit=1)[0].id == "1"
"""
    machine.run("-c", program, f"sqlite:///{machine.folder}/library.db", str(machine.model.path))


def test_what_the_user_has_set_stays_and_reaches_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    ort, hub = telemetry.VARIABLES
    monkeypatch.setenv(ort, "0")
    monkeypatch.setenv(hub, "")
    telemetry.turn_off()
    assert (os.environ[ort], os.environ[hub]) == ("0", "1")
    assert set(telemetry.VARIABLES) <= set(WORKER_ENVIRONMENT)


def test_openvino_is_whole_without_its_reports(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    program = """
from kdb_fast.telemetry import import_openvino
openvino = import_openvino()
assert import_openvino() is openvino
print(callable(openvino.convert_model))
import openvino_telemetry  # for whoever wants it
"""
    environment = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60,
                          check=False)  # fmt: skip
    assert (done.stdout.strip(), done.stderr) == ("True", "")
    assert list(tmp_path.iterdir()) == []
