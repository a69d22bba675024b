"""Where records come from: KameleonDB's tables or a JSON Lines file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..db.address import DatabaseAddress
from .base import Source


@dataclass(frozen=True)
class SourceSpec:
    """What the options of ``reindex`` name: KameleonDB's entities (none of them means all), or with ``from_file`` a
    file of JSON, ``"-"`` for standard input.

    ``entity``, ``id_field`` and ``fields`` are those of a file.
    """

    entities: Sequence[str] = ()
    from_file: str | None = None
    entity: str | None = None
    id_field: str = "id"
    fields: Sequence[str] = ()
    limit: int | None = None

    def open(self, address: DatabaseAddress) -> Source:
        """The source.

        Raises:
            SchemaError: No KameleonDB tables, or an entity that is not there.
            UsageError: A file that cannot be read.
        """
        if self.from_file is not None:
            from .jsonl import JsonlSource

            path: Path | str = "-" if self.from_file == "-" else Path(self.from_file)
            return JsonlSource(path, self.entity or "", id_field=self.id_field, fields=self.fields, limit=self.limit)
        from .kameleondb import KameleonDBSource

        return KameleonDBSource(address, self.entities, limit=self.limit)
