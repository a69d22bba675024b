"""FastEmbed in a worker: imported without what it needs for downloads alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

REAL = {
    "huggingface_hub/__init__.py": "def snapshot_download(): return 'downloaded'",
    "huggingface_hub/utils/__init__.py": "class HubError(Exception): pass",
    "requests.py": "def get(): return 'got'",
    "PIL/Image.py": "class Image: pass",
    "tqdm.py": "def tqdm(): return 'bar'",
    "loguru.py": "1 / 0",
    "fastembed/image.py": "1 / 0",
    "fastembed/text.py": "from loguru import logger\ndef warn(): logger.warning('odd')",
}
USUAL = """
from typing import Union
import requests
from PIL import Image
from huggingface_hub import snapshot_download
from huggingface_hub.utils import HubError, httpx

Picture = Union[str, Image.Image]

def fetch():
    return snapshot_download()

def guarded():
    try:
        raise KeyError
    except (HubError, httpx.TransportError, KeyError):
        return 'caught'
"""
NEEDS_THEM = "import requests\nanswer = requests.get()\n"


def run(directory: Path, fastembed: str, code: str) -> str:
    """What a process prints that imports this FastEmbed as a worker does."""
    for name, text in {**REAL, "fastembed/__init__.py": fastembed}.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)
    program = f"import sys; sys.path.insert(0, {str(directory)!r})\n"
    program += f"from kdb_fast.embedding.offline import import_fastembed\nimport_fastembed()\nimport fastembed\n{code}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_names_stand_where_errors_are_caught(tmp_path: Path) -> None:
    assert run(tmp_path, USUAL, "print(fastembed.guarded())") == "caught"


def test_a_download_says_why_it_cannot_be(tmp_path: Path) -> None:
    code = "try:\n    fastembed.fetch()\nexcept RuntimeError as error:\n    print(error)"
    said = run(tmp_path, USUAL, code)
    assert said == "huggingface_hub and requests are left out in a worker: it downloads nothing"


def test_others_get_the_real_packages(tmp_path: Path) -> None:
    code = "import huggingface_hub as hub, requests\nprint(hub.snapshot_download(), requests.get(), len(sys.meta_path))"
    plain = subprocess.run(
        [sys.executable, "-c", "import sys; print(len(sys.meta_path))"], capture_output=True, text=True, check=True
    )
    assert run(tmp_path, USUAL, code) == f"downloaded got {plain.stdout.strip()}"


def test_other_kinds_of_models_are_left_out_and_the_log_is_pythons_own(tmp_path: Path) -> None:
    code = "import logging\nlogging.basicConfig(format='%(name)s: %(message)s', stream=sys.stdout)\n"
    usual = "from fastembed.image import ImageEmbedding\nfrom fastembed.text import warn\n"
    assert run(tmp_path, usual, f"{code}fastembed.warn()") == "fastembed: odd"


def test_the_whole_of_it_can_be_imported_after_all(tmp_path: Path) -> None:
    code = "from kdb_fast.embedding.offline import import_whole_fastembed\nimport_whole_fastembed()\n"
    usual = "from huggingface_hub import snapshot_download\ndef fetch(): return snapshot_download()"
    assert run(tmp_path, usual, f"{code}import fastembed\nprint(fastembed.fetch())") == "downloaded"


def test_a_version_that_needs_them_gets_them(tmp_path: Path) -> None:
    assert run(tmp_path, NEEDS_THEM, "print(fastembed.answer)") == "got"


def test_an_error_of_the_import_itself_comes_out(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        run(tmp_path, "1 / 0", "")
