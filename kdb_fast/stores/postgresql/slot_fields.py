"""PostgreSQL: what a slot holds of its rows, as fields of COPY."""

from __future__ import annotations

import numpy as np

from ..base import FlushSlot
from . import pgcopy


def taken(rows: list[int]) -> list[int] | slice:
    """What takes these rows, in ascending order, from an array: without a copy where none is left out."""
    return slice(rows[0], rows[-1] + 1) if rows[-1] - rows[0] == len(rows) - 1 else rows


def vector_fields(flush_slot: FlushSlot, rows: list[int]) -> pgcopy.Matrix:
    """The fields of these rows' vectors, which are those that the worker wrote."""
    flush_slot.verify()
    return pgcopy.vector_fields(flush_slot.slot.vectors[taken(rows)])


def place_fields(flush_slot: FlushSlot, rows: list[int]) -> list[pgcopy.Fields]:
    """The fields of each row's place: the number of its slot, and its own."""
    return [pgcopy.int_field(flush_slot.slot.number, 4), pgcopy.number_fields(np.array(rows), 4)]
