"""What a run on a table of any kind reads: a table, view or query, or a file."""

from __future__ import annotations

from typing import Any, NamedTuple

from ..db.address import DatabaseAddress
from ..db.reading import read
from ..errors import SchemaError
from ..sources.base import Source
from ..sources.files.input import FileInput
from ..sources.table.input import TableInput
from ..tables.definition import Definition
from ..tables.find_relation import find_relation
from ..tables.key import KeyColumn
from ..tables.names import as_typed
from ..tables.reading import rows_of
from ..tables.relation import Relation


class FileRead(NamedTuple):
    """A file that is read, as it was described."""

    path: str
    key: tuple[KeyColumn, ...]
    format: str | None
    delimiter: str | None
    encoding: str | None

    def input(self, address: DatabaseAddress, definition: Definition, limit: int | None) -> FileInput:
        """What a run reads: the columns of the key have the types of those of a table of vectors that is there."""

        def look(connection: Any) -> tuple[KeyColumn, ...]:
            rows = rows_of(connection, address.dialect)
            try:
                into = find_relation(rows, address.dialect, as_typed(*definition.place))
            except SchemaError:
                return self.key
            found = {column.name: column for key in into.keys for column in key}
            there = tuple(found[name] for name in definition.key if name in found)
            return there if len(there) == len(definition.key) else self.key

        return FileInput(
            self.path,
            read(address, look),
            definition.text,
            definition.template,
            self.format or "",
            self.delimiter or "",
            self.encoding or "",
            limit,
        )


class WhatIsRead(NamedTuple):
    """What is read, as the target must know it."""

    key: tuple[KeyColumn, ...]
    relation: Relation | None
    text: str


def open_source(
    address: DatabaseAddress,
    read_from: DatabaseAddress | None,
    file: FileRead | None,
    definition: Definition,
    limit: int | None,
    *,
    anew: bool = False,
) -> tuple[Source, WhatIsRead]:
    """The source, and what it reads.

    Args:
        anew: What is read has not been read so before.
    """
    if file is not None:
        records = file.input(address, definition, limit)
        return records.open(address), WhatIsRead(records.key, None, "")
    source = TableInput(definition, limit, read_from, anew=anew).open(address)
    selection = source.selection
    return source, WhatIsRead(selection.key, selection.relation, selection.text)
