"""The download of a model from FastEmbed's hub."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from ..offline import import_whole_fastembed
from .catalogue import CatalogueEntry
from .files import TOKENIZER_FILES

HUB_TIMEOUT = 6.0
"""Seconds for the hub to answer a first small request. Without this, its client retries for minutes."""


class HubError(Exception):
    """The hub does not hand over the model; the text says why, as the end of a sentence."""


def download(entry: CatalogueEntry, target: Path, staging: Path, report: Callable[[str], None]) -> None:
    """Let FastEmbed download the model, and put its files into ``target``.

    Args:
        staging: Private directory for the hub's client. What was downloaded before an interruption stays
            there for the next time; it is removed in the end.

    Raises:
        HubError: The hub cannot be reached, or the download failed.
        OSError: The files cannot be written.
    """
    if not entry.repository:
        raise HubError("FastEmbed names no hub repository for it")
    probe(entry.repository)
    report(f"Fetching {entry.name} from the model hub ({entry.size_gb:g} GB) …")
    staging.mkdir(mode=0o700, exist_ok=True)
    import_whole_fastembed()
    from fastembed import TextEmbedding

    try:
        with _quiet():
            # Not download_model(): it hides the reason of a failure and sleeps between its attempts.
            found = TextEmbedding.download_files_from_huggingface(
                entry.repository, cache_dir=str(staging), extra_patterns=[entry.model_file, *entry.additional_files]
            )
    except Exception as error:  # many kinds, of several libraries
        reason = " ".join(str(error).split()) or type(error).__name__
        raise HubError(f"the download failed ({reason[:300]})") from error
    for relative in dict.fromkeys([entry.model_file, *entry.additional_files, *TOKENIZER_FILES]):
        if (Path(found) / relative).is_file():
            _take(Path(found) / relative, target / relative)
    shutil.rmtree(staging, ignore_errors=True)


def _take(source: Path, target: Path) -> None:
    real = os.path.realpath(source)  # the hub's client keeps links to blobs
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(real, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(real, target)


def probe(repository: str) -> None:
    """Ask the hub for one small page; returns if it answers.

    Raises:
        HubError: At once where the hub cannot be reached, or after HUB_TIMEOUT seconds of silence.
    """
    import requests
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise HubError("HF_HUB_OFFLINE is set")
    trouble = [f"{constants.ENDPOINT} does not answer within {HUB_TIMEOUT:g} s"]

    def ask() -> None:
        try:
            url = f"{constants.ENDPOINT}/api/models/{repository}"
            answer = requests.get(url, timeout=HUB_TIMEOUT, headers={"Accept": "application/json"})
            # 401 and 404 are the hub's own answers: with the user's token, the download may still succeed.
            own = answer.status_code in (401, 404) or "json" in answer.headers.get("content-type", "")
            blocked = answer.status_code in (403, 407, 451) or answer.status_code >= 500
            trouble[:] = [] if own and not blocked else [f"{url} answers with HTTP status {answer.status_code}"]
        except Exception as error:  # requests' own, and those of a malformed HF_ENDPOINT or proxy
            trouble[:] = [f"{constants.ENDPOINT} cannot be reached ({type(error).__name__})"]

    # A thread, since a name server that does not answer blocks for longer than any time-out of the request.
    thread = threading.Thread(target=ask, daemon=True, name="kdb-fast-hub")
    thread.start()
    thread.join(HUB_TIMEOUT)
    if trouble:
        raise HubError(trouble[0])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the warnings, logs and progress bars of FastEmbed and the hub's client: errors come as exceptions."""
    from loguru import logger

    client = logging.getLogger("huggingface_hub")
    level = client.level
    logger.disable("fastembed")
    client.setLevel(logging.CRITICAL)
    sink = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(sink), contextlib.redirect_stdout(sink):
            warnings.simplefilter("ignore")
            yield
    finally:
        client.setLevel(level)
        logger.enable("fastembed")
