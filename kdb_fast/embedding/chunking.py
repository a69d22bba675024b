"""A long text → pieces that the model reads whole: cut where a sentence ends, else where a word does, else anywhere.

Counted is what the model's own tokenizer makes of a piece, with the special tokens and the prefix. A text is tokenised
in windows, so that memory does not grow with it, and each piece once more, since its first and last words may have
other tokens alone. The same text gives the same pieces everywhere.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import ModelError, UsageError
from ..records import is_blank
from ..settings import LEAST_CHUNK
from .models.files import Model

VERSION = 1
"""To be raised where the same text would be cut elsewhere: pieces of the version before are made again then."""

LEAST_ROOM = LEAST_CHUNK // 2
"""Tokens that a piece must have left beside special tokens and prefix: one character may take ten (U+FDFA in NFKC)."""

WINDOW_PIECES = 32
"""Pieces of a window, about: the last one of each is tokenised again with the next window."""

CHARS_PER_TOKEN = 4
"""For the size of a window only: English has so many."""

SENTENCE_END = re.compile(
    r"[.!?…‽؟۔।॥։።]+[\"'”’»)\]]*(?=\s)"  # a mark that may stand within a number or a name: white space follows
    r"|[。！？｡]+[\"'”’」』】）]*"
    r"|(?:\r?\n[^\S\r\n]*)(?=\r?\n)"  # an empty line
)
"""Behind it a sentence or a paragraph has ended."""


class Piece(NamedTuple):
    """A part of a text: from character ``start`` to ``end`` (exclusive), without white space at its ends."""

    start: int
    end: int


class Splitter:
    """Cuts texts for one model.

    Args:
        tokenizer: The model's, of the package ``tokenizers``; it must neither cut nor pad.
        size: Most tokens of a piece, special tokens and ``prefix`` among them.
        overlap: Most tokens at the end of a piece that the next one begins with.
        prefix: Written before each piece when it is embedded.

    Raises:
        UsageError: There is no room for a text beside prefix and overlap.
    """

    def __init__(self, tokenizer: Any, size: int, overlap: int = 0, prefix: str = "") -> None:
        self._tokenizer, self._size, self._overlap, self._prefix = tokenizer, size, overlap, prefix
        self._room = size - self.count("")
        if self._room < LEAST_ROOM or overlap > self._room // 2:
            raise UsageError(
                f"Pieces of {size} tokens have room for {max(0, self._room)} tokens of text beside special tokens and "
                f"prefix; expected at least {max(LEAST_ROOM, 2 * overlap)}, twice the overlap.",
                remedy="Give a larger --chunk, or a smaller --overlap.",
            )
        self._window = WINDOW_PIECES * size * CHARS_PER_TOKEN

    @classmethod
    def of_model(cls, model: Model, size: int, overlap: int = 0, prefix: str = "") -> Splitter:
        """Cuts texts for a model on this machine.

        Raises:
            UsageError: The model reads fewer tokens than a piece would have, or the other numbers do not fit.
            ModelError: Its tokenizer cannot be read.
        """
        check_size(model, size)
        return cls(load_tokenizer(model.path), size, overlap, prefix)

    def count(self, text: str) -> int:
        """Tokens that the model reads for a piece, special tokens and prefix among them."""
        return len(self._tokenizer.encode_batch_fast([self._prefix + text])[0])

    def split(self, text: str) -> list[Piece]:
        """The pieces of a text, in order. Every character that shows something is in one at least.

        A piece has at most ``size`` tokens, but for a single character that has more.
        """
        pieces: list[Piece] = []
        covered = 0
        for piece in self._pieces(text):
            trimmed = _trimmed(text, piece)
            if not is_blank(text[max(covered, trimmed.start) : trimmed.end]):
                pieces.append(trimmed)
            covered = piece.end
        return pieces

    def _pieces(self, text: str) -> Iterator[Piece]:
        start = covered = 0  # where the next piece begins, and up to where the last one goes
        window = self._window
        while covered < len(text):
            tokens = _Tokens(self._tokenizer, text, start, start + window)
            while (piece := self._next_piece(tokens, start, covered)) is not None:
                yield piece
                covered, window = piece.end, self._window
                if covered == len(text):
                    return
                start = self._next_start(tokens, piece)
            if start == tokens.first:  # not even one piece ends in this window
                window *= 2

    def _next_piece(self, tokens: _Tokens, start: int, covered: int) -> Piece | None:
        """The piece that begins at ``start`` and goes beyond ``covered``; None where the window may not tell.

        It begins at ``covered`` where nothing new has room behind the words that the piece before ends with.
        """
        first = tokens.at(start)
        last = first + self._room
        if last >= tokens.count and not tokens.is_last:
            return None
        while (end := tokens.find_end(first, last, covered)) is not None:
            too_many = self.count(tokens.text[start:end].strip()) - self._size
            if too_many <= 0:
                return Piece(start, end)
            last = min(last, tokens.at(end)) - too_many
            if tokens.find_end(first, last, covered) == end:
                if start == covered:
                    return Piece(start, end)  # a single character
                start = covered
                first = tokens.at(start)
                last = first + self._room
        return None

    def _next_start(self, tokens: _Tokens, piece: Piece) -> int:
        """Where the piece after this one begins."""
        if not self._overlap:
            return piece.end
        start = tokens.find_start(tokens.at(piece.end) - self._overlap, piece.end)
        return start if start > _trimmed(tokens.text, piece).start else piece.end


class _Tokens:
    """The tokens of a part of a text, as positions in the whole text.

    Attributes:
        text: All of it.
        first: Where the part begins.
        count: How many tokens it has.
        is_last: It goes to the end of the text.
    """

    def __init__(self, tokenizer: Any, text: str, first: int, stop: int) -> None:
        self.text, self.first, self.is_last = text, first, stop >= len(text)
        offsets = tokenizer.encode(text[first:stop], add_special_tokens=False).offsets
        # Several tokens of one character have its place; those of nothing may have any.
        self._starts: list[int] = list(accumulate((first + start for start, _ in offsets), max))
        self._ends: list[int] = list(accumulate((first + end for _, end in offsets), max))
        self.count = len(offsets)

    def at(self, position: int) -> int:
        """Number of the first token that begins at ``position`` or behind it."""
        return bisect_left(self._starts, position)

    def find_end(self, first: int, last: int, covered: int) -> int | None:
        """Where a piece may end that has the tokens from ``first`` to before ``last``, and goes beyond ``covered``.

        A sentence or a word must not end in its first half: pieces would be many. Where no place is left, the first one
        behind ``last``; None where the window has none.
        """
        if last >= self.count:
            if self.is_last:
                return len(self.text)
            last = self.count - 1
        least = max(first + 1, bisect_right(self._starts, covered))
        half = max(least, (first + last) // 2 + 1)
        if last >= half:
            low, high = self._starts[half - 1], self._starts[last]
            marks = [match.end() for match in SENTENCE_END.finditer(self.text, low, high + 1)]
            for number in (self.at(mark) for mark in reversed(marks)):
                if half <= number <= last and self._is_end(number):
                    return self._starts[number]
            for number in range(last, half - 1, -1):
                if self._is_word(number) and self._is_end(number):
                    return self._starts[number]
        # Behind a token; where one begins, if tokens share characters throughout; behind the first character.
        ends = [number for number in range(last, least - 1, -1) if self._is_token_end(number)]
        ends = ends or list(range(last, least - 1, -1))
        for number in ends:
            if not _is_joined(self.text, self._starts[number]):
                return self._starts[number]
        if ends:
            return self._starts[ends[0]]
        if least < self.count:
            return self._starts[least]
        return len(self.text) if self.is_last else None

    def find_start(self, number: int, end: int) -> int:
        """Where a piece may begin: at the token ``number`` or behind it, at a word if there is one before ``end``."""
        last = self.at(end)
        numbers = [i for i in range(max(1, number), last) if self._is_end(i)]
        words = (i for i in numbers if self._is_word(i))
        return self._starts[next(words, numbers[0])] if numbers else end

    def _is_word(self, number: int) -> bool:
        """Whether there is white space before this token, or it begins with some."""
        start = self._starts[number]
        return self.text[start].isspace() or (start > 0 and self.text[start - 1].isspace())

    def _is_end(self, number: int) -> bool:
        return self._is_token_end(number) and not _is_joined(self.text, self._starts[number])

    def _is_token_end(self, number: int) -> bool:
        """Whether no token covers characters on both sides of where this one begins."""
        return self._starts[number] >= self._ends[number - 1]


def _is_joined(text: str, position: int) -> bool:
    """Whether what a reader takes for one character goes on at ``position``."""
    here, before = text[position], text[position - 1]
    if here.isascii():
        return here == "\n" and before == "\r"
    if here == "\u200d" or before == "\u200d" or "\U0001f3fb" <= here <= "\U0001f3ff" or "\u1160" <= here <= "\u11ff":
        return True
    return unicodedata.category(here).startswith("M")


def _trimmed(text: str, piece: Piece) -> Piece:
    """Without white space at its ends."""
    start, end = piece
    part = text[start:end]
    return Piece(end - len(part.lstrip()), start + len(part.rstrip()))


def check_size(model: Model, size: int) -> None:
    """Raise UsageError where the model reads fewer tokens than a piece would have."""
    if size > model.max_tokens:
        raise UsageError(
            f"--chunk is {size}; {model.name} reads at most {model.max_tokens} tokens.",
            remedy=f"Give --chunk {model.max_tokens} or less.",
        )


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a model on disk as FastEmbed has it, but that it neither cuts nor pads.

    Raises:
        ModelError: It cannot be read.
    """
    import json

    from tokenizers import AddedToken, Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        file = path / "special_tokens_map.json"
        names: dict[str, Any] = json.loads(file.read_text("utf-8")) if file.exists() else {}
    except Exception as error:  # the package raises nothing narrower
        raise ModelError(f"The tokenizer in {path} cannot be read: {error}.", remedy="Fetch the model again.") from None
    for value in names.values():
        for token in value if isinstance(value, list) else [value]:
            tokenizer.add_special_tokens([AddedToken(**token) if isinstance(token, dict) else token])
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def chunked_fingerprint(fingerprint: str, size: int, overlap: int) -> str:
    """That of a model whose texts are cut into pieces: the vectors are still that model's
    (:func:`kdb_fast.origins.same_model`), but of other texts."""
    return f"{fingerprint}-c{VERSION}.{size}.{overlap}"
