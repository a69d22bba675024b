"""PostgreSQL: pieces of records in one flush → the table of vectors, in which a record appears whole or not at all.

A record whose last piece comes with this flush is made visible by it: its rows are replaced in the flush's transaction.
Pieces of others are put aside until then, in a table of ours; so a long text holds no slot longer than a short one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...records import decode_key
from ...tables.pieces import PieceOf, piece_of
from ...tables.table_target import TableTarget
from ..base import FlushSlot, RunSpec
from .flush import Group
from .foreign_key import Reference
from .table_flush import STAGED_KEY, TableWriter, staged_words

if TYPE_CHECKING:
    import psycopg

CREATE_STAGING = (
    "CREATE TEMP TABLE {staging} (slot int4, row int4, {keys}, revision text, chunk text, chunks text, "
    "start_char text, end_char text, text_hash text, content text, vector {vector}, piece_hash bytea, seal bytea) "
    "ON COMMIT DROP"
)
OF_STAGING = (
    "SELECT {typed_keys}, s.chunk::int4, s.start_char::int4, s.end_char::int4, s.chunks::int4, s.content, s.vector, "
    "decode(s.text_hash, 'hex'), s.seal, %(fingerprint)s::text, %(run)s, now(){tsvector}<revision> FROM {staging} s "
    "WHERE s.revision::int8 = ANY(%(revisions)s)"
)
PUT_ASIDE = "INSERT INTO {aside} ({columns}, {written}, {revision}) " + OF_STAGING.replace(
    "<revision>", ", s.revision::int8"
)
COUNT_ASIDE = "SELECT {revision}, count(*) FROM {aside} WHERE {revision} = ANY(%s) GROUP BY 1"

LIVING = "SELECT DISTINCT s.revision::int8 FROM {staging} s WHERE s.revision::int8 = ANY(%s) AND {has_record}"

REMOVE = (
    "DELETE FROM {table} t USING (SELECT DISTINCT {typed_keys} FROM {staging} s "
    "WHERE s.revision::int8 = ANY(%(revisions)s)) AS k({names}) WHERE {same_row}"
)
INSERT = "INSERT INTO {table} ({columns}, {written}) " + OF_STAGING.replace("<revision>", "")
INSERT_ASIDE = (
    "INSERT INTO {table} ({columns}, {written}) SELECT {columns}, {written} FROM {aside} "
    "WHERE {revision} = ANY(%(revisions)s)"
)
CLEAR_ASIDE = "DELETE FROM {aside} WHERE {revision} = ANY(%s)"
UNWRITTEN = "SELECT slot, row, revision::int8 = ANY(%s) FROM {staging} WHERE revision::int8 = ANY(%s) ORDER BY 1, 2"


class _DroppedError(Exception):
    """A trigger or rule has left out rows, without an error."""


class ChunkWriter(TableWriter):
    """Pieces of one flush on their way into the table, within the flush's transaction.

    Attributes:
        whole: Revisions of the records that this flush has made visible.
    """

    def __init__(
        self,
        cursor: psycopg.Cursor[tuple[Any, ...]],
        target: TableTarget,
        run: RunSpec,
        now: int,
        *,
        reference: Reference,
        pieces: int = 1,
    ) -> None:
        super().__init__(cursor, target, run, now, reference=reference, merge_all=True, pieces=pieces)
        self.whole: set[int] = set()
        self._staged: list[PieceOf] = []
        self._gone: list[int] = []
        self._dropped: list[int] = []

    def _chunk_statement(self, template: str) -> bytes:
        target = self._target
        return self._statement(
            template,
            typed_keys=target.each_key(STAGED_KEY),
            names=target.each_key("key_{number}"),
            same_row=target.same_key("t.{column}", "k.key_{number}"),
            tsvector=f", {staged_words(target.keyword)}" if target.keyword else "",
            has_record=self._has_record or "true",
        )

    def _create_staging(self) -> bytes:
        return self._statement(CREATE_STAGING, keys=self._target.each_key("key_{number} text"))

    def _stage(self, groups: list[Group]) -> int:
        self._staged = [piece for flush_slot, rows in groups for piece in pieces_of(flush_slot, rows)]
        return super()._stage(groups)

    def _merge_staged(self, staged: int, parameters: dict[str, Any]) -> int:
        counts = {piece.revision: piece.of for piece in self._staged}
        here = Counter(piece.revision for piece in self._staged)
        partly = [revision for revision, count in counts.items() if here[revision] < count]
        aside = dict(self.cursor.execute(self._chunk_statement(COUNT_ASIDE), (partly,)).fetchall()) if partly else {}
        whole = [revision for revision, count in counts.items() if here[revision] + aside.get(revision, 0) == count]
        self._gone, self._dropped = [], []
        if later := sorted(counts.keys() - set(whole)):
            self.cursor.execute(self._chunk_statement(PUT_ASIDE), {**parameters, "revisions": later})
        if whole:
            self._show(whole, counts, bool(aside), parameters)
            if aside:
                self.cursor.execute(self._chunk_statement(CLEAR_ASIDE), (whole,))
        unwritten = {*self._gone, *self._dropped}
        return staged - sum(here[revision] for revision in unwritten)

    def _show(self, whole: list[int], counts: dict[int, int], aside: bool, parameters: dict[str, Any]) -> None:
        """Make records visible whose pieces are all here or put aside."""
        import psycopg

        living = whole
        if self._target.source:
            found = self.cursor.execute(self._chunk_statement(LIVING), (whole,)).fetchall()
            living = sorted(revision for (revision,) in found)
            self._gone += sorted(set(whole) - set(living))
        if not living:
            return
        try:
            with self.cursor.connection.transaction():
                self._replace(living, sum(counts[revision] for revision in living), aside, parameters)
        except (_DroppedError, psycopg.errors.ForeignKeyViolation) as error:
            if len(living) > 1:
                for revision in living:  # which of them it is
                    self._show([revision], counts, aside, parameters)
            elif isinstance(error, _DroppedError):
                self._dropped += living
            else:
                self._gone += living  # in that very moment
        else:
            self.whole.update(living)

    def _replace(self, revisions: list[int], rows: int, aside: bool, parameters: dict[str, Any]) -> None:
        parameters = {**parameters, "revisions": revisions}
        self.cursor.execute(self._chunk_statement(REMOVE), parameters)
        written = self.cursor.execute(self._chunk_statement(INSERT), parameters).rowcount
        if aside:
            written += self.cursor.execute(self._chunk_statement(INSERT_ASIDE), parameters).rowcount
        if written != rows:
            raise _DroppedError

    def _unwritten(self, parameters: dict[str, Any]) -> list[tuple[Any, ...]]:
        values = (self._gone, [*self._gone, *self._dropped])
        return self.cursor.execute(self._statement(UNWRITTEN), values).fetchall()


def pieces_of(flush_slot: FlushSlot, rows: Sequence[int]) -> list[PieceOf]:
    """What the keys of these rows of a slot say."""
    raw = flush_slot.slot.raw_rows()
    return [piece_of(decode_key(raw[i][0])) for i in rows]
