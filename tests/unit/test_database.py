from __future__ import annotations

import re
import sqlite3
import traceback
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdb_fast.db.address import DatabaseAddress, opened, parse_address, redact
from kdb_fast.db.pg_connection import connect_postgresql
from kdb_fast.db.sqlite_connection import connect_sqlite
from kdb_fast.errors import DatabaseError, KdbFastError, RefusedError, UsageError
from kdb_fast.paths import default_data_dir

if TYPE_CHECKING:
    from servers import Server

SECRET = "hunter2-SENTINEL@x"
ESCAPED = "hunter2-SENTINEL%40x"


@pytest.fixture(autouse=True)
def no_libpq_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PGHOST", "PGPORT", "PGDATABASE", "PGPASSWORD", "PGCONNECT_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)


def everything_said(error: KdbFastError) -> str:
    """All that a person could come to see of an error."""
    return f"{error} {error.message} {error.remedy} {error!r} {''.join(traceback.format_exception(error))}"


# -- addresses ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["postgresql", "postgres", "postgresql+psycopg", "postgresql+psycopg2"])
def test_postgresql_address_with_any_driver_suffix_is_read(scheme: str) -> None:
    from psycopg.conninfo import conninfo_to_dict

    address = parse_address(f"{scheme}://ann:{ESCAPED}@db.example:5433/shop?sslmode=require")
    assert address.dialect == "postgresql"
    assert address.display == "postgresql://db.example:5433/shop"
    assert conninfo_to_dict(address.conninfo) == {
        "user": "ann",
        "password": SECRET,
        "host": "db.example",
        "port": "5433",
        "dbname": "shop",
        "sslmode": "require",
    }


@pytest.mark.parametrize(
    ("url", "display"),
    [
        ("postgresql://h/db", "postgresql://h:5432/db"),
        ("postgresql://ann@h", "postgresql://h:5432/ann"),
        ("postgresql:///db?host=/run/pg", "postgresql:///run/pg:5432/db"),
        ("postgresql://", "postgresql://local socket:5432/?"),
        ("postgresql://a:1,b:2/db", "postgresql://a:1,b:2/db"),
        ("postgresql://a:1,b/db", "postgresql://a:1,b:5432/db"),
        ("postgresql://a,b/db?port=7", "postgresql://a:7,b:7/db"),
        ("postgresql://[::1]:5433/db", "postgresql://::1:5433/db"),
    ],
)
def test_what_is_shown_of_a_postgresql_address_names_host_port_and_database(url: str, display: str) -> None:
    assert parse_address(url).display == display


def test_environment_of_libpq_fills_what_the_address_leaves_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGHOST", "db.example")
    monkeypatch.setenv("PGPORT", "6000")
    monkeypatch.setenv("PGDATABASE", "shop")
    assert parse_address("postgresql://").display == "postgresql://db.example:6000/shop"


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("sqlite:///shop.db", Path.cwd() / "shop.db"),
        ("sqlite:////tmp/shop.db", Path("/tmp/shop.db")),
        ("sqlite+pysqlite:////tmp/shop.db", Path("/tmp/shop.db")),
        ("sqlite:////tmp/my%20shop.db?mode=ro", Path("/tmp/my shop.db")),
        ("sqlite:///~/shop.db", Path.home() / "shop.db"),
    ],
)
def test_sqlite_address_becomes_an_absolute_path(url: str, path: Path) -> None:
    address = parse_address(url)
    assert (address.dialect, address.conninfo) == ("sqlite", str(path))


@pytest.mark.parametrize("url", ["sqlite:", "sqlite://", "sqlite:///", "sqlite://shop.db", "sqlite:///?mode=ro"])
def test_incomplete_sqlite_address_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match=r"expected sqlite:///file\.db"):
        parse_address(url)


def test_sqlite_in_memory_is_refused_since_no_other_process_could_open_it() -> None:
    with pytest.raises(UsageError, match="no other process can open"):
        parse_address("sqlite:///:memory:")


def test_embedded_address_names_a_directory(tmp_path: Path) -> None:
    for url in (f"embedded:{tmp_path}", f"embedded://{tmp_path}"):
        address = parse_address(url)
        assert address.embedded_dir == tmp_path
        assert address.dialect == "postgresql"
        assert str(tmp_path) in address.display
    assert parse_address("embedded:~/db").embedded_dir == Path.home() / "db"
    with pytest.raises(UsageError, match="without a directory"):
        parse_address("embedded:")


def test_without_an_address_the_embedded_server_of_the_user_is_meant(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KDB_FAST_HOME", str(tmp_path))
    assert parse_address(None).embedded_dir == tmp_path / "postgresql"
    assert parse_address("").embedded_dir == tmp_path / "postgresql"
    monkeypatch.delenv("KDB_FAST_HOME")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_data_dir() == tmp_path / "kdb-fast"
    monkeypatch.delenv("XDG_DATA_HOME")
    assert default_data_dir() == Path.home() / ".local" / "share" / "kdb-fast"


@pytest.mark.parametrize(
    ("url", "scheme"),
    [
        ("mysql://u:p@h/db", "'mysql:'"),
        ("shop.db", "has no scheme; expected"),
        ("/tmp/shop.db", "no scheme"),
        ("host=h password=x", "no scheme"),
    ],
)
def test_other_addresses_are_refused_by_their_scheme(url: str, scheme: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_address(url)
    assert scheme in caught.value.message
    assert url not in caught.value.message


def test_an_address_that_needs_no_server_of_ours_is_passed_through() -> None:
    address = parse_address("sqlite:////tmp/shop.db")
    with opened(address) as same:
        assert same is address


# -- secrets -----------------------------------------------------------------------------------------------


def test_neither_repr_nor_display_show_the_password() -> None:
    address = parse_address(f"postgresql://ann:{ESCAPED}@h/db")
    assert SECRET in address.conninfo or ESCAPED in address.conninfo, "else this test shows nothing"
    for text in (repr(address), str(address), address.display, f"{address}"):
        assert "SENTINEL" not in text


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://ann:hunter2-SENTINEL%zz@h/db",
        "postgresql://ann:hunter2-SENTINEL%4@h/db",
        "postgresql://ann:%00hunter2-SENTINEL@h/db",
        "postgresql://ann:hunter2@SENTINEL@h/db",
        "postgresql://ann:hunter2?x@SENTINEL@h/db",
        "postgresql://ann:hunter2/SENTINEL@h/db",
        "postgresql://ann:12345/SENTINEL@h/db",
        "postgresql://ann:12345/SENTINEL@h",
        "postgresql://ann:12345/SENTI?NEL@h/db",
        "postgresql://ann:hunter2 SENTINEL@h/db",
        "postgresql://ann:hunter2-SENTINEL@h:port/db",
        "postgresql://ann@h/db?passwrd=hunter2-SENTINEL",
        "postgresql://ann:hunter2-SENTINEL@h/db?nosuchoption=1",
        "postgresql:ann:hunter2-SENTINEL@h/db",
        "mysql://ann:hunter2-SENTINEL@h/db",
        "ann:hunter2-SENTINEL@h/db",
    ],
)
def test_malformed_address_is_refused_without_a_piece_of_the_password(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_address(url)
    said = everything_said(caught.value)
    assert "SENTINEL" not in said
    assert "hunter2" not in said


@pytest.mark.parametrize("form", ["@h/db", "@h:5433/db?sslmode=require", "@[::1]/db", "@"])
@settings(deadline=None)
@given(password=st.text(alphabet=st.characters(codec="ascii", min_codepoint=33), min_size=1, max_size=12))
def test_no_password_as_typed_gets_into_display_or_message(password: str, form: str) -> None:
    # The mark stands at the end, where it would land in host, port or database if the password were cut.
    typed = f"{password}SENTINEL"
    try:
        address = parse_address(f"postgresql://ann:{typed}{form}")
        said = f"{address!r} {address.display}"
    except UsageError as error:
        said = everything_said(error)
    assert "SENTINEL" not in said


@settings(deadline=None)
@given(st.text(min_size=1, max_size=20).filter(lambda s: "\x00" not in s and s.isascii()))
def test_an_escaped_password_survives_and_stays_secret(password: str) -> None:
    from psycopg.conninfo import conninfo_to_dict

    address = parse_address(f"postgresql://ann:{quote(password, safe='')}@host.example/db")
    assert conninfo_to_dict(address.conninfo)["password"] == password
    assert address.display == "postgresql://host.example:5432/db"


@pytest.mark.parametrize("form", [SECRET, ESCAPED, quote(SECRET), quote(SECRET, safe="")])
def test_redact_hides_the_password_in_every_form(form: str) -> None:
    address = parse_address(f"postgresql://ann:{ESCAPED}@h/db")
    assert redact(f"cannot use {form} here", address) == "cannot use ******** here"


def test_redact_hides_passwords_of_the_environment_and_of_the_key_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGPASSWORD", "from-environment")
    address = parse_address("postgresql://ann@h/db?sslpassword=of-the-key")
    assert redact("from-environment of-the-key plain", address) == "******** ******** plain"


def test_redact_hides_a_password_that_holds_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGPASSWORD", "hunter2")
    address = parse_address(f"postgresql://ann:{ESCAPED}@h/db")
    assert redact(f"<{SECRET}> <hunter2>", address) == "<********> <********>"


def test_redact_leaves_text_alone_where_there_is_no_password() -> None:
    for address in (parse_address("sqlite:////tmp/x.db"), parse_address("postgresql://h/db"), parse_address(None)):
        assert redact("the quick brown fox", address) == "the quick brown fox"


def test_a_refused_connection_is_told_without_the_password(tmp_path: Path) -> None:
    # No server listens on a socket in an empty directory.
    address = parse_address(f"postgresql://ann:{ESCAPED}@/db?host={quote(str(tmp_path), safe='')}")
    with pytest.raises(DatabaseError) as caught:
        connect_postgresql(address, role="test")
    assert caught.value.message.startswith(f"Cannot connect to postgresql://{tmp_path}:5432/db: ")
    assert caught.value.remedy
    assert "SENTINEL" not in everything_said(caught.value)
    assert "\n" not in str(caught.value)


# -- SQLite ------------------------------------------------------------------------------------------------


def test_sqlite_connection_is_in_autocommit_mode(tmp_path: Path) -> None:
    address = parse_address(f"sqlite:///{tmp_path}/shop.db")
    connection = connect_sqlite(address, must_exist=False)
    connection.execute("CREATE TABLE t (x)")
    connection.execute("INSERT INTO t VALUES (1)")
    assert not connection.in_transaction
    connection.close()
    again = connect_sqlite(address)
    assert again.execute("SELECT x FROM t").fetchall() == [(1,)]
    again.close()


def test_missing_sqlite_file_is_told_and_not_created(tmp_path: Path) -> None:
    with pytest.raises(DatabaseError, match=re.escape(f"There is no SQLite file {tmp_path}/shop.db")):
        connect_sqlite(parse_address(f"sqlite:///{tmp_path}/shop.db"))
    assert not (tmp_path / "shop.db").exists()


def test_a_file_that_is_no_database_is_told_and_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shop.db").write_text("not a database, but longer than the header of one" * 20)
    made: list[sqlite3.Connection] = []
    connect = sqlite3.connect

    def recording(*args: object, **options: object) -> sqlite3.Connection:
        made.append(connect(*args, **options))  # type: ignore[call-overload]
        return made[-1]

    monkeypatch.setattr(sqlite3, "connect", recording)
    with pytest.raises(DatabaseError, match="file is not a database") as caught:
        connect_sqlite(parse_address(f"sqlite:///{tmp_path}/shop.db"))
    assert caught.value.remedy == "Is it a SQLite database?"
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        made[0].execute("SELECT 1")


def test_address_is_a_value() -> None:
    assert parse_address("sqlite:////tmp/a.db") == parse_address("sqlite:////tmp/a.db")
    assert isinstance(parse_address("sqlite:////tmp/a.db"), DatabaseAddress)


# -- what is refused is named, and no part of a password ---------------------------------------------------


@pytest.mark.parametrize(
    ("query", "named", "remedy"),
    [
        ("schema=app", "'schema'", "options=-csearch_path%3Dapp"),
        ("currentSchema=app", "'currentSchema'", "options=-csearch_path%3Dapp"),
        ("search_path=a%2Cb", "'search_path'", "options=-csearch_path%3DNAME"),
        ("sslmode=require&schema=app", "'schema'", "options=-csearch_path%3Dapp"),
        ("ssl_mode=require", "'ssl_mode'", "Did you mean sslmode?"),
        ("pgbouncer=true", "'pgbouncer'", "libpq"),
        ("sslmode", "'sslmode'", "name=value"),
        ("options=-csearch_path=app", "'options'", "%3D"),
        ("x%1b[2J=1", r"'x\\x1b[2J'", "libpq"),
    ],
)
@pytest.mark.parametrize("start", [f"postgresql://ann:{ESCAPED}@h:5432/db", "postgresql://h/db", "postgresql:///db"])
def test_an_unknown_option_of_a_postgresql_address_is_named(start: str, query: str, named: str, remedy: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_address(f"{start}?{query}")
    assert named in caught.value.message
    assert remedy in caught.value.remedy
    assert "hunter2" not in everything_said(caught.value)
    assert "password" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://ann:hunter2/SENTINEL?SENTINEL=x@h/db",
        "postgresql://ann:hunter2?SENTINEL=x",
        "postgresql://ann@h/db?password=hunter2&SENTINEL=x",
        "postgresql://ann@h/db?sslpassword=hunter2&SENTINEL",
        "postgresql://ann:hunter2%zzSENTINEL@h/db",
    ],
)
def test_what_may_be_part_of_a_password_is_not_named(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_address(url)
    assert "SENTINEL" not in everything_said(caught.value)
    assert "password" in str(caught.value)


@pytest.mark.parametrize(
    ("parts", "said", "remedy"),
    [
        ({"dbname": "nope"}, "nope", "database name"),
        ({"user": "nope"}, "nope", "user"),
        ({"options": "-cfoo=bar"}, "foo", "option"),
        ({"options": "-cwork_mem=x"}, "work_mem", "option"),
        ({"sslmode": "foo"}, "sslmode", "option"),
        ({"connect_timeout": "abc"}, "connect_timeout", "option"),
        ({"service": "nope"}, "nope", "option"),
        ({"target_session_attrs": "standby"}, "standby", "target_session_attrs"),
        ({"port": "1"}, ".1", "host and port"),
        ({"host": "nohost.invalid"}, "nohost", "host and port"),
    ],
)
def test_what_keeps_a_connection_from_being_made_is_what_the_remedy_is_about(
    postgres: Server, parts: dict[str, str], said: str, remedy: str
) -> None:
    from psycopg.conninfo import make_conninfo

    address = DatabaseAddress("postgresql", make_conninfo(postgres.address.conninfo, **parts), "postgresql://tests/db")
    with pytest.raises(DatabaseError) as caught:
        connect_postgresql(address, role="test")
    assert said in caught.value.message
    assert remedy in caught.value.remedy


def test_an_sqlite_that_is_too_old_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 29, 0))
    monkeypatch.setattr(sqlite3, "sqlite_version", "3.29.0")
    with pytest.raises(RefusedError, match=r"SQLite is 3\.29\.0; kdb-fast needs 3\.30 or newer"):
        parse_address(f"sqlite:///{tmp_path}/new.db")
    assert not list(tmp_path.iterdir())
