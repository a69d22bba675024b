"""``kdb-fast kameleondb``: KameleonDB's own command line, with the release and the development branch."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from development import develop
from kameleon import Kameleon, close_kameleon, open_kameleon

from kdb_fast import faults
from kdb_fast.embedding.encoder import Encoder
from kdb_fast.embedding.models.lookup import Model
from kdb_fast.errors import LockedError
from kdb_fast.kameleondb import installed

pytest.importorskip("kameleondb")
pytestmark = [
    pytest.mark.filterwarnings("ignore:The default datetime adapter is deprecated:DeprecationWarning"),
    pytest.mark.usefixtures("minilm"),
]

DOCUMENT = Path(__file__).parents[2] / "docs" / "kameleondb.md"
RECORDS = [{"name": "Alice", "note": "sells coffee"}, {"name": "Bob", "note": "repairs bicycles"}, {"age": 7}]
FIELDS = [{"name": "name", "type": "string"}, {"name": "age", "type": "int"}, {"name": "note", "type": "text"}]
LINES = b"".join(json.dumps(record).encode() + b"\n" for record in RECORDS)


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch: pytest.MonkeyPatch, encoder: Encoder) -> None:
    """Runs in this process share one loaded model."""
    monkeypatch.setattr("kdb_fast.engine.inline.Encoder", lambda spec: encoder)


@pytest.fixture(params=["sqlite-release", "postgresql-release", "sqlite-development"])
def kameleon(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> Iterator[Kameleon]:
    kind, branch = request.param.split("-")
    if branch == "development":
        develop(monkeypatch)
    found = open_kameleon(kind, request, capsys, tmp_path)
    found.client.create_entity("Contact", fields=FIELDS)
    yield found
    close_kameleon(found, request)
    assert not installed()


def test_the_two_lines_of_the_specification(kameleon: Kameleon) -> None:
    answer = kameleon.kameleondb("data", "insert", "Contact", "--batch-size", "100", stdin=LINES)
    assert answer.code == 0, answer
    assert "Inserted 3 records" in answer.out
    assert "finishing the index" in answer.err, "our progress"
    assert sorted(kameleon.index().values()) == [
        "name: Alice | note: sells coffee",
        "name: Bob | note: repairs bicycles",
    ]
    answer = kameleon.kameleondb("embeddings", "reindex", "Contact", "--batch-size", "100")
    assert answer.code == 0, answer
    assert "Reindexed 0 records" in answer.out
    kameleon.client.entity("Contact").insert({"name": "Carol"})
    answer = kameleon.kameleondb("--json", "embeddings", "reindex")
    assert answer.code == 0
    assert (answer.json["records_indexed"], answer.json["indexed"], answer.json["skipped"]) == (1, 1, 2)
    assert kameleon.kameleondb("--json", "embeddings", "reindex", "Contact", "--force").json["indexed"] == 3


FORMS = ["array", "pretty array", "lines", "object", "pretty object"]
WAYS = ["input", "-", "--from-file", "--from-file -", "inline"]


@pytest.mark.parametrize("kameleon", ["sqlite-release"], indirect=True)
@pytest.mark.parametrize(
    ("form", "how"), [*((form, "input") for form in FORMS), *(("pretty object", how) for how in WAYS[1:])]
)
def test_the_form_of_the_input_is_seen_from_it(kameleon: Kameleon, tmp_path: Path, form: str, how: str) -> None:
    indent = 2 if form.startswith("pretty") else None
    records = RECORDS[:1] if "object" in form else RECORDS
    text = (
        "\n".join(json.dumps(r) for r in records)
        if form == "lines"
        else json.dumps(records if "array" in form else records[0], indent=indent)
    )
    file = tmp_path / "input.json"
    file.write_text(text)
    arguments = {
        "input": [],
        "-": ["-"],
        "--from-file": ["-f", str(file)],
        "--from-file -": ["-f", "-"],
        "inline": [text],
    }
    answer = kameleon.kameleondb("--json", "data", "insert", "Contact", *arguments[how], stdin=text.encode())
    assert answer.code == 0, answer
    assert len(kameleon.index()) == min(2, len(records))
    if len(records) == 1:
        assert set(answer.json) == {"success", "message", "id"}
        assert [answer.json["id"]] == [row[0] for row in kameleon.execute("SELECT id FROM kdb_records")]
    else:
        assert answer.json["count"] == len(answer.json["ids"]) == 3


def test_search_and_status(kameleon: Kameleon) -> None:
    kameleon.kameleondb("data", "insert", "Contact", "--created-by", "me", stdin=LINES)
    assert kameleon.execute("SELECT DISTINCT created_by FROM kdb_records") == [("me",)]
    found = kameleon.kameleondb("-j", "search", "somebody who mends bikes", "-e", "Contact", "-n", "1").json
    assert found["count"] == 1
    assert found["results"][0]["data"]["name"] == "Bob"
    assert kameleon.kameleondb("-j", "search", "coffee", "--where", '{"name": "Bob"}').json["count"] == 1
    assert "Bob" in kameleon.kameleondb("search", "bicycles").out
    status = kameleon.kameleondb("-j", "embeddings", "status").json
    (row,) = status.pop("indexed_entities")
    assert (row["entity"], row["indexed"], row["pending"]) == ("Contact", 2, 0)
    assert status == {
        "enabled": True,
        "provider": "fastembed",
        "model": "sentence-transformers/all-MiniLM-L6-v2",
        "dimensions": 384,
    }
    assert "Contact" in kameleon.kameleondb("embeddings", "status").out


def test_embeddings_off_by_the_environment(kameleon: Kameleon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAMELEONDB_EMBEDDINGS", "0")
    answer = kameleon.kameleondb("-j", "data", "insert", "Contact", stdin=LINES)
    assert (answer.code, answer.json["count"]) == (0, 3)
    assert len(kameleon.shared("Contact")) == 3
    assert kameleon.kameleondb("-j", "embeddings", "status").json == {"enabled": False}
    answer = kameleon.kameleondb("-j", "embeddings", "reindex")
    assert answer.code == 2
    assert "KAMELEONDB_EMBEDDINGS=1" in answer.json["error"]["remedy"]
    assert kameleon.kameleondb("data", "insert", "Contact", stdin=b"[1]").code == 3
    assert len(kameleon.shared("Contact")) == 3


def test_rejected_records_are_named_and_give_exit_code_3(kameleon: Kameleon) -> None:
    answer = kameleon.kameleondb("-j", "data", "insert", "Contact", stdin=LINES + b'{"nme": "x"}\n')
    assert answer.code == 3, answer
    assert (answer.json["count"], answer.json["rejected"]) == (3, 1)
    assert "line 4: " in answer.err
    answer = kameleon.kameleondb("-j", "data", "insert", "Contact", "{")
    assert answer.code == 3
    assert answer.json["error"] == "Inserted no record: 1 rejected"


def test_exit_codes_are_right_although_its_commands_catch_everything(
    kameleon: Kameleon, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert kameleon.kameleondb("-j", "data", "insert", "Nobody", stdin=LINES).code == 1
    assert kameleon.kameleondb("data", "get", "Contact", "nothing").code == 1
    assert kameleon.kameleondb("data", "no-such-command").code == 2
    assert kameleon.kameleondb("embeddings", "reindex", "Nobody").code == 4
    assert kameleon.kameleondb("data", "insert", "Contact", "{}", "--from-file", "x").code == 2
    answer = kameleon.kameleondb("-j", "embeddings", "reindex", "--batch-size", "1001")
    assert (answer.code, answer.json["error"]["type"]) == (2, "UsageError")
    assert kameleon.kameleondb("search", "coffee", "--where", "[]").code == 2
    kameleon.kameleondb("data", "insert", "Contact", stdin=LINES)
    key, *_ = kameleon.index()

    def refuse(*arguments: Any) -> None:
        raise LockedError("Another run holds the index.")

    monkeypatch.setattr("kdb_fast.search.engine.SearchEngine.index_records_batch", refuse)
    answer = kameleon.kameleondb("data", "update", "Contact", key, '{"name": "Anna"}')
    assert answer.code == 6
    assert "stored and not indexed" in answer.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["embeddings", "reindex", "Contact", "--background"],
        ["embeddings", "cancel"],
        ["embeddings", "cache", "status"],
        ["embeddings", "cache", "clear"],
    ],
)
def test_what_is_not_there_yet_says_so_in_one_line(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from kdb_fast.cli import run

    monkeypatch.setenv("KAMELEONDB_URL", f"sqlite:///{tmp_path / 'a.db'}")
    assert run(["kameleondb", *arguments]) == 2
    said = capsys.readouterr().err
    assert "is not there yet" in said
    assert said.count("\n") == 1


def test_an_insert_that_fails_says_how_to_complete_it(kameleon: Kameleon) -> None:
    faults.load_plan("source.page:1:raise")
    try:
        answer = kameleon.kameleondb("data", "insert", "Contact", stdin=LINES)
    finally:
        faults.load_plan(None)
    assert answer.code == 70
    assert "3 records were inserted" in answer.err
    assert "To carry on: kdb-fast kameleondb embeddings reindex Contact" in answer.err
    assert kameleon.kameleondb("-j", "embeddings", "reindex", "Contact").json["indexed"] == 2


def test_a_missing_package_is_named_with_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from kdb_fast.cli import run

    for package in ("typer", "kameleondb"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            assert run(["kameleondb", "version"]) == 2
        assert f"no package {package}. Run: pip install 'kdb-fast[kameleondb]'" in capsys.readouterr().err


def test_its_own_commands_run_as_they_are(kameleon: Kameleon) -> None:
    import kameleondb

    assert kameleondb.__version__ in kameleon.kameleondb("version").out
    assert "--batch-size" in kameleon.kameleondb("data", "insert", "--help").out
    assert "Contact" in kameleon.kameleondb("-j", "schema", "list").out


# -- the document ------------------------------------------------------------------------------------------------


def block(language: str, holding: str) -> str:
    """The block of code of the document in this language that has this text."""
    blocks = re.findall(rf"```{language}\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    (found,) = [text for text in blocks if holding in text]
    return str(found)


def test_the_alias_of_the_document(tmp_path: Path, minilm: Model) -> None:
    script = block("bash", "alias kameleondb")
    (tmp_path / "records.jsonl").write_bytes(LINES)
    setup = f'kdb-fast() {{ "{sys.executable}" -m kdb_fast "$@"; }}\nshopt -s expand_aliases\nset -e\n'
    create = "kameleondb schema create Contact --field name:string --field note:text --field age:int\n"
    alias, _, lines = script.partition("\n")
    answer = subprocess.run(
        ["bash", "-c", f"{setup}{alias}\n{create}{lines}"],
        cwd=tmp_path,
        env={**os.environ, "KAMELEONDB_URL": "sqlite:///contacts.db"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert answer.returncode == 0, answer
    assert "Inserted 3 records" in answer.stdout
    assert "Reindexed 0 records" in answer.stdout
    assert "bicycles" in answer.stdout


def test_the_patch_of_the_document(tmp_path: Path, minilm: Model) -> None:
    import shutil

    import kameleondb

    copy = tmp_path / "src" / "kameleondb"
    shutil.copytree(Path(kameleondb.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    patch = block("diff", "kdb_fast.kameleondb")
    for name, hunk in re.findall(r"^\+\+\+ b/(\S+)\n@@.*@@\n((?:[ +-].*\n|\n)*?)(?=--- |\Z)", patch, re.MULTILINE):
        lines = [line or " " for line in hunk.splitlines()]
        before = "".join(f"{line[1:]}\n" for line in lines if line[0] in " -")
        after = "".join(f"{line[1:]}\n" for line in lines if line[0] in " +")
        text = (tmp_path / name).read_text()
        assert text.count(before) == 1, name
        (tmp_path / name).write_text(text.replace(before, after))
    program = (
        "import kameleondb; from kameleondb import KameleonDB\n"
        "assert 'src' in kameleondb.__file__\n"
        "db = KameleonDB('sqlite:///own.db')\n"
        "contacts = db.create_entity('Contact', fields=[{'name': 'name', 'type': 'string'}])\n"
        "contacts.insert_many([{'name': 'Alice'}, {'name': 'Bob'}])\n"
        "print(db.embedding_status())\n"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "src"), "KAMELEONDB_URL": "sqlite:///own.db"}
    command = "import sys; from kameleondb.cli.main import main; sys.argv[1:] = ['data', 'insert', 'Contact', "
    command += "'[{\"name\": \"Carol\"}]', '--batch-size', '100']; main()"
    for code, expected in ((program, "'indexed': 2"), (command, "Inserted record")):
        answer = subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        assert answer.returncode == 0, answer
        assert expected in answer.stdout, answer
