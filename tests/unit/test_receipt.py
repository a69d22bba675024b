"""The receipt of a run: what is printed and stored, and read again."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest

from kdb_fast.accounting import Counts
from kdb_fast.errors import KdbFastError, StoppedError, UnexpectedError
from kdb_fast.receipt import (
    FATES,
    Fidelity,
    HostShare,
    InsertReceipt,
    Phases,
    Receipt,
    RejectedLine,
    Retried,
    TargetNames,
)
from kdb_fast.stores.rejects import runs_of_input

KEYS = [
    "run", "schema", "target", "state", "input", "read", "stored", "unchanged", "reused", "superseded", "rejected",
    "foreign", "empty", "deleted", "truncated", "lost_chars", "chunks", "tokens", "padded_tokens", "seconds",
    "records_per_second",
    "tokens_per_second", "model", "dimensions", "precision", "document_prefix", "fidelity", "fingerprint", "workers",
    "hosts", "plan", "flushes", "flush_size", "bytes_written", "index", "phases", "peak_rss_bytes",
    "peak_rss_by_process", "warnings", "input_changed", "version",
]  # fmt: skip
FULL = Receipt(
    run=7,
    schema="public",
    target=TargetNames("articles", "shop.articles", "embedding", ("id", "lang")),
    state="done",
    input="/data/notes.jsonl",
    read=15,
    stored=1,
    unchanged=2,
    reused=3,
    superseded=4,
    rejected=5,
    fidelity=Fidelity(300, 0.999, 0.99, 0.97, 2.6),
    hosts=(HostShare("a (10.0.0.1)", 4, 10, 300, 1), HostShare("b (10.0.0.2)", left_out="it has left the cluster")),
    phases=Phases(embed=1.5),
    peak_rss_by_process={"parent": 1},
    warnings=("one", "two"),
)


def test_the_keys_that_programs_read_are_these_in_this_order() -> None:
    assert list(FULL.as_json()) == KEYS
    assert list(InsertReceipt().as_json()) == [*KEYS, "inserted", "ids", "pending", "rejects"]
    assert list(FULL.as_json()["phases"]) == ["prepare", "start", "embed", "write", "index"]
    retried = Retried(rejects_before=1, remaining=0, lines_of_inserts={}, lines_of_files={}, receipt=FULL)
    assert list(retried.as_json()) == ["rejects_before", "remaining", "lines_of_inserts", "lines_of_files", "receipt"]
    assert retried.as_json()["receipt"] == FULL.as_json()


def test_what_was_stored_is_read_again() -> None:
    stored = json.loads(json.dumps(FULL.as_json()))
    assert stored == FULL.as_json(), "no value is of a type that JSON lacks"
    assert Receipt.from_json(stored) == FULL


def test_values_of_other_versions_are_no_obstacle() -> None:
    read = Receipt.from_json({"run": 3, "input": "a", "phases": {"embed": 2.0, "dance": 1.0}, "of_later": True})
    assert read == Receipt(run=3, input="a", phases=Phases(embed=2.0))
    receipts = [(1, '{"input": "a"}'), (2, None), (3, '{"input": "b", "run": 3}'), (4, json.dumps(FULL.as_json()))]
    assert runs_of_input(receipts, "a") == [1]
    assert runs_of_input(receipts, "/data/notes.jsonl") == [4]


def test_an_insert_says_what_became_of_its_lines() -> None:
    receipt = InsertReceipt(**vars(FULL), ids=("x",), rejects=(RejectedLine(3, "", "wrong_type", "age is a list"),))
    assert receipt.as_json()["rejects"] == [
        {"line": 3, "record_id": "", "reason": "wrong_type", "detail": "age is a list"}
    ]
    assert receipt.as_json()["ids"] == ["x"]


def test_every_fate_is_counted_by_runs_and_receipts() -> None:
    assert sum(FULL.fates.values()) == FULL.read == 15
    assert FULL.written == 4
    assert set(FATES) <= {field.name for field in fields(Counts)}


@pytest.mark.parametrize("error", [StoppedError("Stopped."), UnexpectedError(ValueError("a record's text"))])
def test_an_error_has_room_for_the_receipt_of_its_run(error: KdbFastError) -> None:
    assert (error.receipt, error.carry_on, error.completed_by_reindex, error.file) == (None, "", False, None)
    error.receipt = FULL
    assert "a record's text" not in str(error)
