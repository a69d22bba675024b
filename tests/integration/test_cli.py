"""The command line as a user and as a program see it: real processes, real model, SQLite files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kdb_fast.cli.demo import sqlalchemy_url
from kdb_fast.db.address import DatabaseAddress

SENTINEL = "hunter2-SENTINEL"


def kdb_fast(*arguments: str, stdin: str | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command without a terminal; its output is text."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PG", "KDB_FAST_DB"))}
    return subprocess.run(
        [sys.executable, "-m", "kdb_fast", *arguments],
        capture_output=True,
        text=True,
        input=stdin or "",
        timeout=100,
        env={**clean, **environment},
        check=False,
    )


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    file = tmp_path / "notes.jsonl"
    texts = ["a cat sat on the mat", "stock markets fell sharply today", "how to bake bread at home"]
    file.write_text("".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate(texts)))
    return file


def reindex(db: str, file: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return kdb_fast("reindex", "--db", db, "--from", str(file), "--entity", "Note", *more)


@pytest.mark.usefixtures("minilm")
def test_a_file_is_indexed_searched_and_up_to_date_the_second_time(tmp_path: Path, notes: Path) -> None:
    db = f"sqlite:///{tmp_path}/n.db"
    first = reindex(db, notes)
    assert (first.returncode, "3 of 3 records written" in first.stdout) == (0, True), first.stderr
    assert "loading the model" in first.stderr
    second = reindex(db, notes, "--json", "--no-progress")
    receipt = json.loads(second.stdout)
    assert (second.returncode, second.stderr) == (0, "")
    assert (receipt["read"], receipt["stored"], receipt["unchanged"]) == (3, 0, 3)
    counts = {"run", "read", "stored", "unchanged", "reused", "superseded", "rejected", "deleted", "flushes"}
    work = {"tokens", "padded_tokens", "seconds", "records_per_second", "tokens_per_second", "peak_rss_bytes", "phases"}
    what = {"model", "dimensions", "precision", "fingerprint", "workers", "index"}
    keys = counts | work | what
    assert keys <= receipt.keys()
    assert receipt["phases"].keys() == {"prepare", "start", "embed", "write", "index"}
    typo = kdb_fast("search", "cat", "--db", db, "--mode", "keyword", "--entity", "Noet")
    assert (typo.stdout, typo.stderr) == ("no results\n", "note: There is no entity Noet; nearest: Note.\n")
    found = json.loads(kdb_fast("search", "making dough", "--db", db, "--mode", "vector", "--json").stdout)
    assert found["results"][0]["id"] == "2"
    keyword = json.loads(kdb_fast("search", "markets", "--db", db, "--mode", "keyword", "--json").stdout)
    assert [r["id"] for r in keyword["results"]] == ["1"]
    status = json.loads(kdb_fast("status", "--db", db, "--json").stdout)
    assert (status["indexed"], status["stale"], status["rejected"]) == (3, 0, 0)
    assert status["run"]["state"] == "done"
    people = kdb_fast("status", "--db", db).stdout
    assert "Note" in people
    assert "3 records indexed" in people


@pytest.mark.usefixtures("minilm")
def test_search_loads_no_package_for_downloads(tmp_path: Path, notes: Path) -> None:
    db = f"sqlite:///{tmp_path / 'notes.db'}"
    assert reindex(db, notes).returncode == 0
    done = kdb_fast("search", "something", "--db", db, "--json", PYTHONPROFILEIMPORTTIME="1")
    assert json.loads(done.stdout)["results"]
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "onnxruntime" in imported
    assert not {name for name in imported if name.partition(".")[0] in ("urllib3", "httpx", "httpcore")}, (
        "of requests and huggingface_hub"
    )


@pytest.mark.usefixtures("minilm")
@pytest.mark.usefixtures("minilm")
def test_search_imports_in_one_thread(tmp_path: Path, notes: Path, address: DatabaseAddress) -> None:
    """Two threads that import numpy at once break it, now and then: this looks at who imports, not at what breaks."""
    db, noted = sqlalchemy_url(address), tmp_path / "imports"
    assert reindex(db, notes).returncode == 0
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(
        "import sys, threading\n"
        "class Noting:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        where = 'main' if threading.current_thread() is threading.main_thread() else 'other'\n"
        f"        print(where, name, file=open({str(noted)!r}, 'a'))\n"
        "sys.meta_path.insert(0, Noting())\n"
    )
    done = kdb_fast("search", "something", "--db", db, "--json", PYTHONPATH=str(hook))
    assert json.loads(done.stdout)["results"], done.stdout
    imports = [line.split() for line in noted.read_text().splitlines()]
    main, other = ({name for by, name in imports if by == thread} for thread in ("main", "other"))
    assert {"numpy", "kdb_fast.search.retrieval"} <= main
    packages = {name for name in other if name.partition(".")[0] not in sys.stdlib_module_names}
    assert packages <= {"sqlite_vec", "kdb_fast.db.pg_characters"}, "these import nothing that others do"


def test_rejected_records_give_exit_code_3_and_too_many_8(tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text('{"id": 1, "text": "fine"}\n{"id": 2, "text": "bad \\u0000 nul"}\n{"id": 3}\n')
    db = f"sqlite:///{tmp_path}/n.db"
    tolerant = reindex(db, file, "--max-rejects", "2", "--json")
    receipt = json.loads(tolerant.stdout)
    assert (tolerant.returncode, receipt["stored"], receipt["rejected"]) == (3, 1, 2)
    strict = reindex(db, file, "--max-rejects", "1", "--json")
    answer = json.loads(strict.stdout)
    assert strict.returncode == 8
    assert (answer["error"]["type"], answer["error"]["exit_code"]) == ("RejectLimitError", 8)
    assert "To carry on:" in strict.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["frob"], 2, "No such command"),
        (["reindex", "--batch-size", "5000"], 2, "expected 1 to 1,000"),
        (["reindex", "--workers", "0"], 2, "--workers is 0"),
        (["reindex", "--max-rejects", "few"], 2, "expected a number such as 25"),
        (["reindex", "--db", "mysql://x"], 2, "expected postgresql://"),
        (["reindex", "--db", "sqlite:///missing.db"], 5, "no SQLite file"),
        (["reindex", "--db", "postgresql://u:pw@127.0.0.1:1/x"], 5, "Cannot connect to postgresql://127.0.0.1:1/x"),
        (["reindex", "--from", "x.jsonl"], 2, "--from needs --entity"),
        (["search", "x", "--db", "sqlite:///missing.db"], 5, "no SQLite file"),
        (["search", "x", "--where", "[1]", "--db", "sqlite:///missing.db"], 2, "expected an object"),
        (["search", "", "--mode", "vector", "--db", "sqlite:///missing.db"], 2, "The query is blank"),
        (["search", " \n", "--db", "sqlite:///missing.db"], 2, "The query is blank"),
        (["search", "-20", "--db", "sqlite:///m.db"], 2, 'behind --: kdb-fast search --db sqlite:///m.db -- "-word'),
        (["search", "-noisy pump"], 2, "A query that begins with a dash goes behind --"),
        (["search", "?!", "--mode", "keyword", "--db", "sqlite:///missing.db"], 2, "The query is blank"),
        (["search", "--db", "sqlite:///missing.db", "--", "-pump"], 2, "The query only excludes words"),
        (
            ["search", "x", "--min-score", "0.5", "--db", "sqlite:///missing.db"],
            2,
            "expected 0 to 0.03278, the score of",
        ),
        (["search", "x", "--mode", "vector", "--min-score", "0.02"], 2, "expected 0 to 0.01639, the score of"),
        (["search", "x", "--min-score", "-0.1"], 2, "--min-score is -0.1"),
        (["search", "x", "--min-score", "nan"], 2, "--min-score is nan"),
        (["models", "path", "nobody/nothing"], 4, "nobody/nothing"),
    ],
)
def test_a_mistake_gets_one_clear_line_and_its_exit_code(
    arguments: list[str], code: int, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = kdb_fast(*arguments)
    assert done.returncode == code, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("kdb-fast: ")]
    assert len(errors) == 1
    assert says in errors[0]
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


def test_help_tells_the_scale_of_the_scores() -> None:
    shown = " ".join(kdb_fast("search", "--help").stdout.split())
    assert "at place n of a ranking gets 1/(60+n) from it: the highest is 2/61 = 0.03278" in shown
    assert "in the modes vector and keyword 1/61 = 0.01639" in shown


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://u:{SENTINEL}%zz@127.0.0.1:1/x",
        f"postgresql://u:{SENTINEL}%25@127.0.0.1:1/x",
        f"postgresql://u:{SENTINEL}@x@127.0.0.1:1/x",
        f"postgresql://u:{SENTINEL}/x@127.0.0.1:1/x",
        f"postgresql://u:{SENTINEL}%40%2F%25@127.0.0.1:1/x",
    ],
)
def test_no_output_holds_the_password(url: str) -> None:
    for done in (kdb_fast("reindex", "--json", "--db", url), kdb_fast("status", KDB_FAST_DB=url)):
        assert done.returncode in (2, 5)
        assert SENTINEL not in done.stdout + done.stderr


def test_json_is_one_object_also_for_an_error(tmp_path: Path) -> None:
    done = kdb_fast("reindex", "--json", "--db", f"sqlite:///{tmp_path}/missing.db")
    assert json.loads(done.stdout)["error"]["exit_code"] == done.returncode == 5


@pytest.mark.usefixtures("minilm")
def test_a_signal_ends_the_run_with_what_is_embedded(tmp_path: Path) -> None:
    file = tmp_path / "many.jsonl"
    file.write_text(
        "".join(json.dumps({"id": i, "text": f"record {i} of many, to be embedded"}) + "\n" for i in range(9000))
    )
    command = [sys.executable, "-m", "kdb_fast", "reindex", "--db", f"sqlite:///{tmp_path}/n.db", "--from", str(file),
               "--entity", "Note", "--json", "--workers", "1"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines = [process.stderr.readline()]
    while "records/s" not in lines[-1] and ", 0/s" not in lines[-1] and process.poll() is None:
        lines.append(process.stderr.readline())
        if "plan:" in lines[-1]:
            time.sleep(6)
            break
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    receipt = json.loads(out)
    assert process.returncode == 143, err
    assert receipt["state"] == "stopped"
    assert "To carry on:" in err
    again = kdb_fast("status", "--db", f"sqlite:///{tmp_path}/n.db", "--json")
    assert json.loads(again.stdout)["indexed"] == receipt["stored"]


def test_help_names_every_command_and_the_readme_too() -> None:
    from kdb_fast.cli import cli

    readme = (Path(__file__).parents[2] / "README.md").read_text()
    shown = kdb_fast("--help").stdout
    for name in cli.commands:
        assert name in shown
        assert f"kdb-fast {name}" in readme
        assert kdb_fast(name, "--help").returncode == 0


def test_a_command_imports_what_it_needs_itself() -> None:
    command = (
        "import sys; from kdb_fast.cli import run; code = run(['search', '-h']); "
        "print([name for name in sys.modules if name.startswith('kdb_fast.cli.')]); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, timeout=60, check=True)
    assert "kdb_fast.cli.searching" in done.stdout
    for name in ("indexing", "tables", "targets", "rejects", "models", "demo"):
        assert f"kdb_fast.cli.{name}" not in done.stdout


def test_the_demo_has_thousands_of_records_of_real_documentation() -> None:
    from kdb_fast.cli.demo import read_documentation

    records = read_documentation()
    names = [record["name"] for record in records]
    assert len(names) == len(set(names)) > 5000
    assert {"csv", "csv.reader", "json.loads", "pathlib.Path.glob"} <= set(names)
    assert all(0 < len(record["summary"]) <= 255 for record in records)
    assert sum(bool(record["text"]) for record in records) > 1000
    assert not any(record["text"].startswith(record["summary"]) for record in records)
    assert max(len(record["text"]) for record in records) <= 300
