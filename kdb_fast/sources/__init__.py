"""Where records come from: KameleonDB's tables or a JSON Lines file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..database import DatabaseAddress
from .base import Source


def open_source(
    address: DatabaseAddress,
    entities: Sequence[str] = (),
    from_file: str | None = None,
    entity: str | None = None,
    id_field: str = "id",
    fields: Sequence[str] = (),
    limit: int | None = None,
) -> Source:
    """The source that the options of ``reindex`` name.

    Raises:
        SchemaError: No KameleonDB tables, or an entity that is not there.
        UsageError: A file that cannot be read.
    """
    if from_file is not None:
        from .jsonl import JsonlSource

        path: Path | str = "-" if from_file == "-" else Path(from_file)
        return JsonlSource(path, entity or "", id_field=id_field, fields=fields, limit=limit)
    from .kameleondb import KameleonDBSource

    return KameleonDBSource(address, entities, limit=limit)
