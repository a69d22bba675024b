#!/usr/bin/env python3
"""The tests that need another server, user or Python, or other packages: tools/elsewhere.py [PART]… [TEST]…

server  the store, the main job and searches by an index on the oldest PostgreSQL and pgvector that a package brings
        (pgserver)
user    a part of the tests as an ordinary user, where root runs them; other ones where they are named (tests/…)
wheel   a wheel is built, installed in environments of the oldest and the newest Python that is there, and used
recipes other packages' indexes get the vectors of another model, and the packages find by them

What cannot be done on this machine is left out, and one line says why. Run by `make test`, with the Python of .venv.
"""

from __future__ import annotations

import concurrent.futures
import importlib.util
import json
import os
import pwd
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MODELS = Path(os.environ.get("KDB_FAST_HOME") or Path.home() / ".cache" / "kdb-fast-tests")
"""Where the tests keep their model; see tests/conftest.py."""

MAIN_JOB = (
    "tests/integration/test_reindex.py::test_every_vector_is_fastembeds_own",
    "tests/integration/test_reindex.py::test_kameleondbs_records_are_indexed_and_kept_in_step",
)
SERVER_TESTS = (
    "tests/integration/test_postgresql_store.py",
    "tests/integration/test_store_contract.py",
    "tests/integration/test_index_contract.py",
    "tests/integration/test_tables_search.py::test_search_goes_through_whatever_index_there_is",
    *MAIN_JOB,
)
USER_TESTS = (
    "tests/integration/test_embedded.py::test_a_directory_of_any_name_works",
    "tests/integration/test_embedded.py::test_many_that_start_it_at_once_share_one",
    "tests/integration/test_embedded.py::test_only_its_user_reaches_it",
    "tests/integration/test_embedded.py::test_a_directory_that_is_closed_to_this_user_is_told",
    "tests/unit/test_models.py",
    "tests/unit/test_slab.py",
    "tests/faults/test_host_limits.py::test_a_read_only_disk_is_refused_before_anything_is_done",
    "tests/faults/test_host_limits.py::test_a_disk_that_fills_up_keeps_what_was_committed_and_the_rerun_does_the_rest"
    "[processes-full in the middle]",
    MAIN_JOB[0],
)
"""The embedded server, modes of files and whose they are, shared memory, mounts, the main job."""

USER = "nobody"
OLDEST_PYTHON = (3, 11)

PACKAGES = ("langchain-postgres", "llama-index-vector-stores-postgres", "sqlite-vec", "psycopg[binary]")
"""Whose indexes the recipes of docs/tables.md give another model."""


def say(text: str) -> None:
    print(f"elsewhere: {text}", file=sys.stderr, flush=True)


def pytest(*arguments: str, **how: Any) -> int:
    command = [sys.executable, "-m", "pytest", "-q", *arguments]
    return subprocess.run(command, **{"cwd": ROOT, **how}, check=False).returncode


# -- another server ----------------------------------------------------------------------------------------


def server() -> int:
    spec = importlib.util.find_spec("pgserver")
    if spec is None or not spec.submodule_search_locations:
        say("the package pgserver is not installed (it has no wheel for this Python): no test on PostgreSQL 16")
        return 0
    programs = Path(spec.submodule_search_locations[0]) / "pginstall" / "bin"
    say(f"the store and the main job on {output(programs / 'postgres', '--version')}")
    return pytest(*SERVER_TESTS, "-k", "not sqlite", env={**os.environ, "KDB_FAST_TEST_POSTGRESQL": str(programs)})


# -- another user ------------------------------------------------------------------------------------------


def user(tests: Sequence[str] = USER_TESTS) -> int:
    if os.geteuid() != 0:
        say("this is an ordinary user already: all tests have run as one")
        return 0
    account = pwd.getpwnam(USER)
    if not may_run(account):
        # The checkout or the interpreter is in a directory that only root may enter, such as /root.
        if "KDB_FAST_ELSEWHERE" in os.environ:
            say(f"left out: {USER} cannot run {sys.executable}, and what is closed to that user could not be opened")
            return 0
        command = ["unshare", "--mount", sys.executable, __file__, "user", *tests]
        try:
            with tempfile.TemporaryDirectory(prefix="kdb-fast-tests-") as layers:
                return subprocess.run(command, env={**os.environ, "KDB_FAST_ELSEWHERE": layers}, check=False).returncode
        except FileNotFoundError:
            say(f"left out: {USER} cannot run {sys.executable}, and there is no `unshare` to open its directory")
            return 0
    with tempfile.TemporaryDirectory(prefix="kdb-fast-tests-") as name:
        home = Path(name)
        (home / "tmp").mkdir()
        if (MODELS / "models").is_dir():
            shutil.copytree(MODELS / "models", home / "data" / "models", symlinks=True)
        for path in [home, *home.rglob("*")]:
            os.chown(path, account.pw_uid, account.pw_gid, follow_symlinks=False)
        say(f"some of the tests as the user {USER}")
        environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("XDG_")},
            "HOME": str(home),
            "TMPDIR": str(home / "tmp"),
            "KDB_FAST_HOME": str(home / "data"),
            "HYPOTHESIS_STORAGE_DIRECTORY": str(home / "hypothesis"),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        return pytest("-p", "no:cacheprovider", *tests, env=environment, **as_user(account))


def as_user(account: pwd.struct_passwd) -> dict[str, object]:
    return {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": ()}


def may_run(account: pwd.struct_passwd) -> bool:
    """Whether the user can import kdb-fast with this interpreter; within mounts of our own, after they were opened."""
    if "KDB_FAST_ELSEWHERE" in os.environ:
        for path in (ROOT, Path(sys.prefix), Path(sys.base_prefix)):
            open_to_all(path)
    command = [sys.executable, "-c", "import kdb_fast.db.embedded.server, pytest, numpy"]
    try:
        done = subprocess.run(command, cwd="/", capture_output=True, check=False, **as_user(account))  # type: ignore[call-overload]
    except PermissionError:
        return False
    return bool(done.returncode == 0)


def open_to_all(path: Path) -> None:
    """Lay a layer with another mode over each directory on the way that only its owner may enter.

    The layers are seen by this process and its children alone, and the directories themselves stay as they are.
    """
    for directory in [*reversed(path.resolve().parents), path.resolve()]:
        if directory.stat().st_mode & stat.S_IXOTH:
            continue
        # Seen from outside, this directory stays empty, and whoever made it removes it.
        layer = Path(os.environ["KDB_FAST_ELSEWHERE"])
        mount = ("mount", "-t")
        options = f"lowerdir={directory},upperdir={layer}/upper,workdir={layer}/work"
        if subprocess.run([*mount, "tmpfs", "tmpfs", str(layer)], capture_output=True, check=False).returncode == 0:
            (layer / "upper").mkdir(mode=0o755)
            (layer / "work").mkdir()
            subprocess.run(
                [*mount, "overlay", "overlay", "-o", options, str(directory)], capture_output=True, check=False
            )


# -- another Python ----------------------------------------------------------------------------------------


def wheel() -> int:
    found = pythons()
    if not found:
        say("left out: no Python that can make environments")
        return 0
    chosen = dict([min(found.items()), max(found.items())])
    with tempfile.TemporaryDirectory(prefix="kdb-fast-wheel-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-qq"]
        subprocess.run([*pip, "wheel", "--no-deps", "-w", str(folder), str(ROOT)], check=True)
        (built,) = folder.glob("*.whl")
        say(f"{built.name} on Python {' and '.join(f'{a}.{b}' for a, b in sorted(chosen))}")
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            jobs = [
                pool.submit(try_wheel, python, built, folder / f"venv{version[1]}", pip)
                for version, python in chosen.items()
            ]
            for job in jobs:
                job.result()
    print(f"{len(chosen)} passed, 0 failed")
    return 0


def pythons() -> dict[tuple[int, int], str]:
    """The Pythons of this machine that kdb-fast may be installed for, by version."""
    names = [*(f"python3.{minor}" for minor in range(OLDEST_PYTHON[1], 30)), "python3"]
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    candidates = [
        *map(str, sorted(pyenv.glob("*/bin/python"))),
        *filter(None, map(shutil.which, names)),
        sys.executable,
    ]
    found: dict[tuple[int, int], str] = {}
    for candidate in candidates:
        code = "import sys, venv, sqlite3, json; print(json.dumps([*sys.version_info[:2], sys.version_info[3]]))"
        try:
            major, minor, level = json.loads(output(candidate, "-c", code))
        except (OSError, ValueError):
            continue
        if (major, minor) >= OLDEST_PYTHON and level == "final":
            found.setdefault((major, minor), candidate)
    return found


def try_wheel(python: str, built: Path, environment: Path, pip: list[str]) -> None:
    """Install the wheel with its dependencies and the embedded server, and do the main job on both databases."""
    subprocess.run([python, "-m", "venv", "--without-pip", str(environment)], check=True)
    install = [*pip, "--python", str(environment / "bin" / "python"), "install", "--no-compile", f"{built}[embedded]"]
    subprocess.run(install, check=True)
    records = environment / "records.jsonl"
    records.write_text("".join(json.dumps({"id": n, "text": f"kettle number {n} is copper"}) + "\n" for n in range(50)))
    command = environment / "bin" / "kdb-fast"
    for database in (f"sqlite:///{environment}/index.db", f"embedded:{environment / 'a server'}"):
        receipt = json.loads(
            output(command, "reindex", "--db", database, "--from", records, "--entity", "Kettle", "--json", check=True)
        )
        assert receipt["stored"] == 50, receipt
        answer = json.loads(output(command, "search", "kettle number 7", "--db", database, "--json", check=True))
        assert answer["results"][0]["id"] == "7", answer


# -- other packages ----------------------------------------------------------------------------------------


def recipes() -> int:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-qq"]
    with tempfile.TemporaryDirectory(prefix="kdb-fast-recipes-", ignore_cleanup_errors=True) as name:
        environment = Path(name) / "venv"
        python = environment / "bin" / "python"
        subprocess.run([loading_python(), "-m", "venv", "--without-pip", str(environment)], check=True)
        # They pin SQLAlchemy and pgvector below those that kdb-fast is tested with.
        subprocess.run([*pip, "--python", str(python), "install", "--no-compile", *PACKAGES], check=True)
        say(f"recipes with {', '.join(PACKAGES)}")
        return pytest("tests/integration/test_recipes.py", env={**os.environ, "KDB_FAST_RECIPES": str(python)})


def loading_python() -> str:
    """A Python whose sqlite3 loads extensions, if there is one: many builds do not."""
    for python in ("/usr/bin/python3", *pythons().values()):
        code = "import venv, sqlite3; print(hasattr(sqlite3.Connection, 'enable_load_extension'))"
        if Path(python).exists() and output(python, "-c", code) == "True":
            return python
    return sys.executable


def output(*command: object, check: bool = False) -> str:
    """What a command prints; '' if it fails.

    Raises:
        CalledProcessError: It fails, and ``check`` was asked for.
    """
    environment = {**os.environ, "KDB_FAST_HOME": str(MODELS)}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [str(word) for word in command],
        cwd="/",
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=None if check else subprocess.DEVNULL,
        text=True,
        timeout=300,
        check=False,
    )
    if check and done.returncode:
        say(done.stdout)  # with --json it holds the error
        done.check_returncode()
    return done.stdout.strip() if done.returncode == 0 else ""


def main() -> int:
    tests = [word for word in sys.argv[1:] if word.startswith("tests/")]
    parts = {"server": server, "user": lambda: user(tests or USER_TESTS), "wheel": wheel, "recipes": recipes}
    wanted = [word for word in sys.argv[1:] if word not in tests] or (["user"] if tests else list(parts))
    if unknown := [name for name in wanted if name not in parts]:
        say(f"unknown: {' '.join(unknown)}; there are {', '.join(parts)}")
        return 2
    return max(parts[name]() for name in wanted)


if __name__ == "__main__":
    sys.exit(main())
