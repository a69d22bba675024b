"""What a migration is made of, besides statements."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Rewrite(NamedTuple):
    """Rows that are changed by what the database itself cannot compute.

    Attributes:
        select: The rows.
        change: Parameters of ``statement`` for one of them.
        statement: Run for each; its parameters are written as ``%s``.
    """

    select: str
    change: Callable[[tuple[Any, ...]], tuple[Any, ...]]
    statement: str


Step = str | Rewrite
