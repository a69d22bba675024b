from __future__ import annotations

import dataclasses
import pickle
import signal
from typing import Any

import click
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdb_fast import errors
from kdb_fast.cli.options import Workers
from kdb_fast.errors import KdbFastError, StoppedError, UsageError
from kdb_fast.settings import (
    DEFAULT_BATCH_SIZE,
    DEFAULT_MODEL,
    MAX_BATCH_SIZES,
    MAX_WORKERS,
    ReindexOptions,
    RejectLimit,
)

EXIT_CODES = {
    "KdbFastError": 70,
    "UsageError": 2,
    "OptionError": 2,
    "MissingPackageError": 2,
    "RecordError": 3,
    "RefusedError": 4,
    "SchemaError": 4,
    "ModelError": 4,
    "DatabaseError": 5,
    "ClusterError": 5,
    "LockedError": 6,
    "ResourceError": 7,
    "ProviderError": 7,
    "ProviderKeyError": 4,
    "RejectLimitError": 8,
}


@pytest.mark.parametrize(("name", "code"), EXIT_CODES.items())
def test_each_error_has_the_exit_code_of_the_command_line(name: str, code: int) -> None:
    error = getattr(errors, name)("What happened.", remedy="What to do.")
    assert isinstance(error, KdbFastError)
    assert error.exit_code == code
    assert (error.message, error.remedy) == ("What happened.", "What to do.")
    assert str(error) == "What happened. What to do."


def test_no_error_class_is_without_a_known_exit_code() -> None:
    found = {n for n, c in vars(errors).items() if isinstance(c, type) and issubclass(c, KdbFastError)}
    assert found == {*EXIT_CODES, "ProviderInputError", "StoppedError", "UnexpectedError"}


def test_text_of_an_error_without_a_remedy_has_no_trailing_space() -> None:
    assert str(KdbFastError("What happened.")) == "What happened."


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_exit_code_of_a_stop_is_128_and_the_signal(signum: int) -> None:
    assert StoppedError("Stopped.", signum=signum).exit_code == 128 + signum
    assert StoppedError.exit_code == KdbFastError.exit_code, "the code of one stop must not stick to the class"


def test_refusals_are_told_apart_from_failures_by_their_class() -> None:
    assert issubclass(errors.SchemaError, errors.RefusedError)
    assert issubclass(errors.ModelError, errors.RefusedError)
    assert not issubclass(errors.DatabaseError, errors.RefusedError)


@pytest.mark.parametrize(
    ("text", "count", "share"), [("0", 0, None), ("25", 25, None), ("1%", None, 0.01), ("0.5%", None, 0.005)]
)
def test_reject_limit_is_a_count_or_a_share(text: str, count: int | None, share: float | None) -> None:
    limit = RejectLimit.parse(text)
    assert limit.count == count
    assert limit.share == (pytest.approx(share) if share is not None else None)
    assert str(limit) == text


@pytest.mark.parametrize("text", ["", "%", "-1", "-1%", "101%", "nan%", "inf%", "1.5", "one", "1%%", "1 %x"])
def test_reject_limit_refuses_what_is_neither(text: str) -> None:
    with pytest.raises(UsageError, match="--max-rejects") as caught:
        RejectLimit.parse(text)
    assert repr(text) in caught.value.message
    assert "expected a number such as 25 or a share such as 1%" in caught.value.message


@settings(deadline=None)
@given(st.text(max_size=8))
def test_reject_limit_answers_any_text_with_a_limit_or_a_usage_error(text: str) -> None:
    try:
        limit = RejectLimit.parse(text)
    except UsageError:
        return
    assert (limit.count is None) != (limit.share is None)
    assert RejectLimit.parse(str(limit)).count == limit.count


@settings(deadline=None)
@given(st.integers(0, 50), st.integers(0, 50))
def test_a_count_is_exceeded_by_one_more(count: int, rejected: int) -> None:
    limit = RejectLimit(count=count, share=None)
    assert limit.exceeded(rejected=rejected, read=10**6) is (rejected > count)
    assert limit.exceeded(rejected=rejected, read=rejected) is (rejected > count)


def test_a_share_is_not_judged_before_a_hundred_records_unless_all_were_read() -> None:
    limit = RejectLimit(share=0.01)
    assert not limit.exceeded(rejected=50, read=99)
    assert limit.exceeded(rejected=50, read=100)
    assert limit.exceeded(rejected=50, read=99, finished=True)


def test_a_share_always_allows_one_record() -> None:
    limit = RejectLimit(share=0.01)
    assert not limit.exceeded(rejected=1, read=2, finished=True)
    assert limit.exceeded(rejected=2, read=2, finished=True)
    assert not limit.exceeded(rejected=10, read=1000)
    assert limit.exceeded(rejected=11, read=1000)


def test_default_reject_limit_is_one_per_cent() -> None:
    assert str(ReindexOptions().max_rejects) == "1%"


def test_default_options_are_the_specified_ones() -> None:
    options = ReindexOptions()
    assert options.batch_size == DEFAULT_BATCH_SIZE == 100
    assert options.model == DEFAULT_MODEL == "sentence-transformers/all-MiniLM-L6-v2"
    assert (options.entities, options.workers, options.limit, options.force) == ((), None, None, False)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("batch_size", 1),
        ("batch_size", MAX_BATCH_SIZES["fastembed"]),
        ("workers", None),
        ("workers", 1),
        ("workers", MAX_WORKERS),
        ("limit", None),
        ("limit", 1),
        ("wait", 0.0),
    ],
)
def test_options_at_their_bounds_are_taken(option: str, value: Any) -> None:
    assert getattr(ReindexOptions(**{option: value}), option) == value


@pytest.mark.parametrize(
    ("option", "value", "name"),
    [
        ("batch_size", 0, "--batch-size"),
        ("batch_size", MAX_BATCH_SIZES["fastembed"] + 1, "--batch-size"),
        ("workers", 0, "--workers"),
        ("workers", MAX_WORKERS + 1, "--workers"),
        ("limit", 0, "--limit"),
        ("wait", -0.1, "--wait"),
    ],
)
def test_options_beyond_their_bounds_are_refused_by_name_and_value(option: str, value: Any, name: str) -> None:
    with pytest.raises(UsageError) as caught:
        ReindexOptions(**{option: value})
    assert caught.value.message.startswith(f"{name} is {value}; expected ")


def test_a_cluster_has_more_workers_than_a_machine() -> None:
    assert ReindexOptions(cluster="auto", workers=MAX_WORKERS + 1).workers == MAX_WORKERS + 1


@pytest.mark.parametrize("address", ["auto", "ray://head:10001", "10.0.0.1:6379", "ray://[::1]:10001"])
def test_addresses_of_clusters_are_taken(address: str) -> None:
    assert ReindexOptions(cluster=address).cluster == address


@pytest.mark.parametrize("address", ["", "head", "ray://head", "http://head:8265", "ray://user@head:10001"])
def test_what_is_no_address_of_a_cluster_is_refused(address: str) -> None:
    with pytest.raises(UsageError, match=r"^--cluster is '.*'; expected auto, ray://HOST:10001 or HOST:6379\."):
        ReindexOptions(cluster=address)


def test_a_provider_needs_no_cluster() -> None:
    with pytest.raises(UsageError, match="--cluster is for models on its hosts, not for openai"):
        ReindexOptions(cluster="auto", provider="openai")


@pytest.mark.parametrize(("value", "workers"), [("all", None), ("ALL", None), ("3", 3)])
def test_workers_are_a_number_or_all(value: str, workers: int | None) -> None:
    command = click.Command("try", params=[click.Option(["--workers"], type=Workers())], callback=lambda **found: found)
    assert command.main(["--workers", value], standalone_mode=False) == {"workers": workers}
    with pytest.raises(click.BadParameter, match="expected a number or all, not 'three'"):
        command.main(["--workers", "three"], standalone_mode=False)


def test_options_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ReindexOptions().batch_size = 5  # type: ignore[misc]


def test_options_survive_a_pipe() -> None:
    options = ReindexOptions(entities=("Product",), max_rejects=RejectLimit.parse("3"))
    assert pickle.loads(pickle.dumps(options)) == options
