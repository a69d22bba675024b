"""How often Python looks for garbage in cycles. Imports nothing of the project.

Records, rows and keys are tuples that live for seconds and form no cycles, yet every 700 of them start a search. On
100,000 records with a free encoder the parent needs 1.4 s of CPU time instead of 1.7 with the threshold below.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

THRESHOLD = 50_000
"""Objects more than were freed, after which the youngest are searched: about 5 MB, three windows of records."""


def collect_rarely() -> None:
    """From now on, in this process."""
    gc.set_threshold(THRESHOLD, *gc.get_threshold()[1:])


@contextlib.contextmanager
def collecting_rarely() -> Iterator[None]:
    """Within the block; a caller's own process gets its settings back."""
    before = gc.get_threshold()
    collect_rarely()
    try:
        yield
    finally:
        gc.set_threshold(*before)
