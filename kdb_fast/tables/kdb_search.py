"""KameleonDB's search table as a target: its key."""

from __future__ import annotations

from ..records import Key
from .key import KeyColumn, unfit_for

MAX_ENTITY_CHARS = 255
"""``entity_name`` is varchar(255)."""

MAX_RECORD_ID_CHARS = 36
"""``record_id`` is varchar(36)."""

KEY = (
    KeyColumn("entity_name", "varchar", "entity", MAX_ENTITY_CHARS, ("bad_entity", "bad_entity")),
    KeyColumn("record_id", "varchar", "record id", MAX_RECORD_ID_CHARS, ("missing_id", "id_too_long")),
)
"""A record's key is the name of its entity and its id within it."""

unfit = unfit_for(KEY)


def entity_and_id(key: Key) -> tuple[str, str]:
    """The two parts of a key."""
    entity, record_id = key
    return str(entity), str(record_id)
