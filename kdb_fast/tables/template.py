"""Texts with names of columns in braces, such as ``{title}\\n\\n{body}``."""

from __future__ import annotations

import re

from ..errors import UsageError

_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]|\\[nt\\]|[^{}\\]+|\\")
_ESCAPES = {"{{": "{", "}}": "}", r"\n": "\n", r"\t": "\t", "\\\\": "\\"}


def split_template(template: str) -> list[str]:
    """Literal text and names of columns in turn, beginning and ending with text: an odd number of at least three.

    A brace that is text is written twice; ``\\n``, ``\\t`` and ``\\\\`` are what they are in SQL's ``E''``.

    Raises:
        UsageError: A brace stands alone, or there is no column.
    """
    pieces = [""]
    for match in _PIECE.finditer(template):
        piece = match[0]
        if match[1] is not None:
            pieces += [match[1], ""]
        elif piece in ("{", "}"):
            raise UsageError(
                f"The template has a single {piece}; expected columns in braces, such as {{title}}.",
                remedy="Write a brace that is part of the text twice: {{ or }}.",
            )
        else:
            pieces[-1] += _ESCAPES.get(piece, piece)
    if len(pieces) == 1:
        raise UsageError("The template has no column; expected columns in braces, such as {title}.")
    return pieces
