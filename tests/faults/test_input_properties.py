"""Any input: bad records cost themselves alone, and every mutation of a file ends with a right exit code.

The whole command runs in this process, on SQLite and with a stub for the model.
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from oracle import PARTS
from poison_worker import StubEncoder, vector_of
from servers import execute, index_rows

from kdb_fast.cli import run
from kdb_fast.db.address import DatabaseAddress, parse_address
from kdb_fast.embedding.models.lookup import Model
from kdb_fast.engine import inline
from kdb_fast.indexing import run_embedding

STUB = Model("stub", Path(), "stub.onnx", 384, 512, "mean", True, ())


SETTINGS: dict[str, Any] = {"deadline": None, "phases": set(Phase) - {Phase.shrink, Phase.explain}}
"""Each example is several runs: making a failing one smaller would take longer than a test may."""


@pytest.fixture(scope="module", autouse=True)
def stubbed() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_embedding, "resolve", lambda *args, **options: STUB)
        patch.setattr(inline, "Encoder", StubEncoder)
        yield


@contextlib.contextmanager
def new_database() -> Iterator[tuple[DatabaseAddress, Path]]:
    """An empty database, and its directory."""
    with tempfile.TemporaryDirectory() as directory:
        yield parse_address(f"sqlite:///{directory}/a.db"), Path(directory)


def reindex(address: DatabaseAddress, file: Path, raw: bytes, limit: str = "100%") -> tuple[int, dict[str, Any], str]:
    """Exit code, the object on standard output and standard error of a run over this input."""
    file.write_bytes(raw)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(["reindex", "--from", str(file), "--entity", "N", "--db", f"sqlite:///{address.conninfo}", "--json",
                    "--no-progress", "--max-rejects", limit])  # fmt: skip
    return code, json.loads(out.getvalue()), err.getvalue()


def check_index(address: DatabaseAddress) -> dict[str, str]:
    """Text by record id; each row has the vector of its own text."""
    rows = index_rows(address)
    for row in rows.values():
        assert row.vector is not None
        np.testing.assert_allclose(row.vector, vector_of(row.content), atol=1e-6)
    return {key[1]: row.content for key, row in rows.items()}


# -- a file with bad records ------------------------------------------------------------------------------------------

IDS = st.sampled_from([*range(8), "1", "7", "a", "é", " a"])
TEXTS = st.text(min_size=1, max_size=20).filter(
    lambda text: "\x00" not in text and not text.isspace() and text.isprintable()
)
GOOD = st.fixed_dictionaries({"id": IDS, "text": TEXTS}, optional={"more": TEXTS, "n": st.integers()}).map(
    lambda record: json.dumps(record).encode()
)
# A record whose text is empty is not among them: it takes its key out of the index.
BAD = st.sampled_from(
    [
        b"{", b"}", b"[1]", b"null", b'"text"', b"17", b'{"id": 1', b'{"id": 1} {"id": 2}', b"{'id': 1}", b"[" * 3000,
        b'{"id": 1, "id": 2}', b'{"id": 1, "text": NaN}', b'{"id": 1, "x": 1e999}', b'{"id": ' + b"9" * 5000 + b"}",
        b'{"id": "\xff"}', b"\xc3", b"\x00", b"\x1b[31m", b'{"id": 1, "text": "\\u0000"}',
        b'{"id": 1, "text": "\\ud800"}', b'{"id": 1}',
        b'{"text": "no id"}', b'{"id": null, "text": "t"}', b'{"id": [1], "text": "t"}', b'{"id": 1.5, "text": "t"}',
        b'{"id": true, "text": "t"}', b'{"id": "", "text": "t"}', b'{"id": "' + b"x" * 37 + b'", "text": "t"}',
        b'{"id": "\\u0000", "text": "t"}',
    ]
)  # fmt: skip
BLANK = st.sampled_from([b"", b"  ", b"\t", b"\r"])


@settings(max_examples=25, **SETTINGS)
@given(
    lines=st.lists(st.one_of(GOOD.map(lambda line: ("good", line)), BAD.map(lambda line: ("bad", line)),
                             BLANK.map(lambda line: ("blank", line))), max_size=25),
    end=st.sampled_from([b"\n", b"\r\n"]),
)  # fmt: skip
def test_a_file_with_bad_records_is_the_file_without_them_and_the_rejects(
    lines: list[tuple[str, bytes]], end: bytes
) -> None:
    good = [line for kind, line in lines if kind == "good"]
    bad = [line for kind, line in lines if kind == "bad"]
    # The first line decides whether all is one array, and its first bytes whether it is text at all.
    mixed = end.join([b'{"id": "first", "text": "first"}', *(line for _, line in lines), b""])
    clean = b"\n".join([b'{"id": "first", "text": "first"}', *good, b""])
    with new_database() as (one, directory), new_database() as (other, _):
        code, found, _ = reindex(one, directory / "mixed", mixed)
        without_code, without, _ = reindex(other, directory / "clean", clean)
        assert (code, without_code) == (3 if bad else 0, 0)
        assert {part: found[part] - without[part] for part in ("read", *PARTS)} == {
            "read": len(bad), "stored": 0, "unchanged": 0, "reused": 0, "superseded": 0, "rejected": len(bad),
        }  # fmt: skip
        assert found["read"] == sum(found[part] for part in PARTS)
        assert check_index(one) == check_index(other)
        listed = execute(one, "SELECT reason, detail, position FROM kdb_fast_rejects")
        assert all(reason and detail.isprintable() for reason, detail, _ in listed)
        where = [number for number, (kind, _) in enumerate(lines, 2) if kind == "bad"]
        assert sorted(position for _, _, position in listed) == where
        code, again, _ = reindex(one, directory / "mixed", mixed)
        assert (again["stored"], again["reused"], again["rejected"]) == (0, 0, len(bad))
        assert code == (3 if bad else 0)


# -- any mutation of a file -------------------------------------------------------------------------------------------

RECORDS = [{"id": i, "text": f"text {i} é", "n": 1.5, "tags": ["a", {"b": None}]} for i in range(6)]
INSERTS = [
    b"\x00", b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\xff\xfe", b"9" * 4400, b"-1e999", b"[" * 1500,
    b"{" * 1500, b"]", b"}", b'"', b"\\", b"\\u0000", b"\\ud83d", b"\n", b"\r", b"\r\n", b",", b":", b" ", b"NaN",
    b"null", b"true", b'"id": 1, ', b'{"id": 1}', b"\x1f\x8b", b"PK\x03\x04", b"\xe2\x80\xa8", b"\x1b[2J", b"/*", b"#",
]  # fmt: skip

PLACE = st.floats(0, 1, exclude_max=True)
MUTATION = st.one_of(
    st.tuples(st.just("flip"), PLACE, st.integers(1, 255)),
    st.tuples(st.just("insert"), st.one_of(st.just(0.0), PLACE), st.sampled_from(INSERTS)),
    st.tuples(st.just("cut"), PLACE, st.just(None)),
    st.tuples(st.just("delete"), PLACE, PLACE),
    st.tuples(st.just("double"), PLACE, PLACE),
)


def mutated(raw: bytes, mutations: list[tuple[str, float, Any]]) -> bytes:
    for kind, place, value in mutations:
        at = int(place * len(raw))
        if kind == "insert":
            raw = raw[:at] + value + raw[at:]
        elif kind == "cut":
            raw = raw[:at]
        elif kind == "flip" and raw:
            raw = raw[:at] + bytes([raw[at] ^ value]) + raw[at + 1 :]
        elif kind in ("delete", "double"):
            start, stop = sorted((at, int(value * len(raw))))
            raw = raw[:start] + raw[start:stop] * (2 if kind == "double" else 0) + raw[stop:]
    return raw


@settings(max_examples=60, **SETTINGS)
@given(
    array=st.booleans(),
    mutations=st.lists(MUTATION, min_size=1, max_size=4),
    limit=st.sampled_from(["1%", "2", "100%"]),
)
def test_every_mutation_of_a_file_ends_with_a_right_exit_code(
    array: bool, mutations: list[tuple[str, float, Any]], limit: str
) -> None:
    text = json.dumps(RECORDS, indent=1) if array else "".join(json.dumps(record) + "\n" for record in RECORDS)
    raw = mutated(text.encode(), mutations)
    with new_database() as (address, directory):
        code, answer, err = reindex(address, directory / "input", raw, limit)
        assert code in (0, 2, 3, 8), err
        assert "Traceback" not in err
        assert 'File "' not in err
        assert all(line.isprintable() for line in err.split("\n"))
        if code == 2:
            assert "expected" in answer["error"]["message"]
            return
        indexed = check_index(address)
        assert len(indexed) == answer["stored"] + answer["reused"]
        rejects = execute(address, "SELECT count(*) FROM kdb_fast_rejects")[0][0]
        if code == 8:
            assert answer["error"]["type"] == "RejectLimitError"
            assert rejects >= 1
            return
        assert answer["read"] == sum(answer[part] for part in PARTS)
        assert (code == 3) == (answer["rejected"] > 0) == (rejects > 0)
        assert rejects <= answer["rejected"]
        again_code, again, _ = reindex(address, directory / "input", raw, limit)
        assert (again_code, again["stored"], again["rejected"]) == (code, 0, answer["rejected"])
        assert check_index(address) == indexed
