"""Errors about what a target reads: of which database, and how the target is described anew."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from ..db.address import SOURCE
from ..errors import SchemaError
from ..records import shell_word, storable_key
from .definition import Definition


@contextlib.contextmanager
def adapting(before: Definition | None, read_from: str = "") -> Iterator[None]:
    """Errors say in which other database that was found, and of a target that is kept how it is described anew.

    Args:
        before: The target, where it is kept.
        read_from: Address of the database that is read, where that is another than the one that is written.
    """
    try:
        yield
    except SchemaError as error:
        if before is None and not read_from:
            raise
        message = f"{SOURCE} {read_from}: {error.message}" if read_from else error.message
        if before is None:
            raise SchemaError(message, remedy=error.remedy) from None
        word = shell_word(before.name)
        raise SchemaError(
            f"The target {storable_key(before.name)} is not as it was described: {message}",
            remedy=f"{error.remedy} Or say what it is now, such as: kdb-fast reindex {word} --table TABLE "
            f"--text COLUMN --vector COLUMN; or forget it: kdb-fast targets drop {word}".lstrip(),
        ) from None
