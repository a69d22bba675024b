"""A record in pieces: each is a row of its own on its way to the index, and its key says which piece of what it is."""

from __future__ import annotations

from typing import NamedTuple

from ..records import Key


class PieceOf(NamedTuple):
    """What a piece's key says beside the record's.

    Attributes:
        revision: Number of the record in the order of reading: two of one key differ in it.
        number: Of the piece, from 0.
        of: How many pieces the record has.
        start: First character of the piece in the record's text.
        end: The one behind its last.
        content_hash: SHA-256 of the whole text.
    """

    revision: int
    number: int
    of: int
    start: int
    end: int
    content_hash: bytes


PARTS = len(PieceOf._fields)


def piece_key(key: Key, piece: PieceOf) -> Key:
    """The key of a piece. What is added is text, as every key of a table of PostgreSQL is."""
    return (*key, *map(str, piece[:-1]), piece.content_hash.hex())


def record_key(key: Key) -> Key:
    """The key of the record that a piece with this key is of."""
    return key[:-PARTS]


def piece_of(key: Key) -> PieceOf:
    """What the key of a piece says beside the record's."""
    revision, number, of, start, end, content_hash = map(str, key[-PARTS:])
    return PieceOf(int(revision), int(number), int(of), int(start), int(end), bytes.fromhex(content_hash))
