"""SQLite: the exact nearest rows, from a matrix in memory or through sqlite-vec.

The matrix holds all vectors of the index and is kept up to date between searches. Before each search SQLite is
asked whether anything was written to the file; only then the rows are compared (0.4 s for 100,000: the times are
stored behind the JSON text of the vectors) and the changed ones read again.

sqlite-vec, where it is installed and Python can load it, picks the rows that are worth reading while there is no
matrix: in the first search of a connection, for which filling one would not pay, and in every search of an index
too large for one. Both ways rank with the same arithmetic, so their results are the same. Milliseconds of a search
of 100,000 × 384 on one core, warm page cache:

===========================================  ============  ==========
vectors                                      NumPy         sqlite-vec
===========================================  ============  ==========
first search, written by kdb-fast            1,300         450
first search, KameleonDB's JSON text only    14,600        8,000
every later search, matrix in memory         24            450
every search, index too large for a matrix   2,500         450
===========================================  ============  ==========

A command searches once, so it fills no matrix and reads the file through memory: 400 ms without sqlite-vec.

With sqlite-vec alone every search would take 450 ms. A temporary ``vec0`` table in the matrix's place takes 109 ms a
search and 2.8 s to fill.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ...db.sqlite_vec import why_no_sqlite_vec
from ...errors import DatabaseError, UsageError
from ...tables.reading import rows_of, sqlite_cursor
from ...tables.target import VECTORS, Target, columns_of
from ..scope import Scope

CACHE_BYTES = 1 << 30
"""Largest matrix kept in memory, in bytes (700,000 × 384); beyond it every search reads the file in blocks."""

BLOCK_ROWS = 8192
"""Rows read at a time: 12 MiB of vectors of 384 numbers."""

MARGIN_ROWS = 32
"""Rows that sqlite-vec picks beyond those wanted: its cosines, summed in float32, are up to about 1e-6 off."""

UNSETTLED = -1
"""Version of a row that may change without its time changing; no hash has this value."""


class Block(NamedTuple):
    """Unit vectors, in the order of ``rowids``; a row without a usable vector has only zeros.

    ``entities`` are places in the list of entity names.
    """

    rowids: npt.NDArray[np.int64]
    entities: npt.NDArray[np.int32]
    usable: npt.NDArray[np.bool_]
    matrix: npt.NDArray[np.float32]

    @classmethod
    def empty(cls, rows: int, dimensions: int) -> Block:
        numbers = np.empty((rows, dimensions), np.float32)
        return cls(np.empty(rows, np.int64), np.empty(rows, np.int32), np.empty(rows, np.bool_), numbers)

    def put(self, where: slice | npt.NDArray[Any], other: Block) -> None:
        self.rowids[where], self.entities[where] = other.rowids, other.entities
        self.usable[where], self.matrix[where] = other.usable, other.matrix

    def take(self, where: slice | npt.NDArray[Any]) -> Block:
        return Block(self.rowids[where], self.entities[where], self.usable[where], self.matrix[where])


class ExactVectorSearch:
    """Finds the nearest vectors in the database of one connection.

    Args:
        once: For one search: no matrix is filled.

    Attributes:
        keeps: Whether to fill the matrix, if it is not too large, even where sqlite-vec is at hand. Set after the
            first search.

    A row is read again when its id or its ``updated_at`` is not what it was. A time in whole seconds does not
    tell two writes within one second apart, so rows that carry the newest such second are always read again.
    """

    def __init__(self, connection: sqlite3.Connection, target: Target, *, once: bool = False) -> None:
        self._connection, self._once = connection, once
        self._target, self._index = target, target.table(target.index.name)
        self._rows = rows_of(connection, "sqlite")
        self._seen: tuple[Any, ...] | None = None
        self._block: Block | None = None
        self._versions: npt.NDArray[np.int64] = np.empty(0, np.int64)
        self._names: dict[str, int] = {}
        self._other_lengths: set[int] = set()
        self._copies = False
        self._has_sqlite_vec: bool | None = None  # not tried yet
        self.keeps = False

    def nearest(
        self, unit: npt.NDArray[np.float32], scope: Scope, limit: int, rowids: npt.NDArray[np.int64] | None
    ) -> dict[int, float]:
        """The rows nearest to ``unit``, a vector of length 1: rowid → cosine, ``limit`` of them, best first.

        Only rows of the searched entities count, and if ``rowids`` are given only those.

        Raises:
            UsageError: The index holds only vectors of another length.
        """
        best_rowids, best = np.empty(0, np.int64), np.empty(0, np.float64)
        usable = False
        picked = self._picked(unit, scope, limit, rowids)
        for block in self._blocks(len(unit), rowids) if picked is None else picked:
            scores = products(block.matrix, unit)
            allowed = block.usable
            usable = usable or bool(allowed.any())
            codes = [code for name, code in self._names.items() if scope.admits(name)]
            if len(codes) < len(self._names):
                allowed = allowed & np.isin(block.entities, codes)
            if rowids is not None:
                allowed = allowed & np.isin(block.rowids, rowids)
            chosen = np.flatnonzero(allowed)
            scores = scores[chosen]
            if len(scores) > limit:
                top = np.argpartition(scores, len(scores) - limit)[len(scores) - limit :]
                chosen = chosen[top]
            best_rowids = np.append(best_rowids, block.rowids[chosen])
            best = np.append(best, cosines(block.matrix, chosen, unit))
        if self._other_lengths and not usable:
            raise UsageError(
                f"The query vector has {len(unit)} numbers, the vectors of the index have {max(self._other_lengths)}.",
                remedy="Search with the model that the index was made with.",
            )
        order = np.argsort(-best, kind="stable")[:limit]
        return dict(zip(best_rowids[order].tolist(), best[order].tolist(), strict=True))

    def _picked(
        self, unit: npt.NDArray[np.float32], scope: Scope, limit: int, rowids: npt.NDArray[np.int64] | None
    ) -> list[Block] | None:
        """Rows among which the ``limit`` nearest are, by sqlite-vec; None where the matrix is the better way."""
        if self._block is not None:
            return None
        if self._has_sqlite_vec is None:
            self._has_sqlite_vec = load_sqlite_vec(self._connection)
        if not self._has_sqlite_vec:
            return None
        with self._one_state():
            if self.keeps and not self._once and self._matrix_bytes(len(unit)) <= CACHE_BYTES:
                return None
            self._start_reading()
            copy, join = self._float_copy(len(unit))
            named, members = (scope.hidden, "NOT IN") if scope.names is None else (scope.names, "IN")
            values: dict[str, Any] = {"unit": unit.tobytes(), "names": json.dumps(named), "rows": limit + MARGIN_ROWS}
            chosen = ""
            if rowids is not None:
                chosen = "AND s.rowid IN (SELECT value FROM json_each(:rowids))"
                values["rowids"] = json.dumps(rowids.tolist())
            distance = f"vec_distance_cosine(coalesce({copy}, CAST(s.embedding AS TEXT)), :unit)"
            try:
                found = self._rows(
                    f"SELECT s.rowid FROM {self._index} s {join} WHERE s.embedding IS NOT NULL "  # noqa: S608
                    f"AND s.entity_name {members} (SELECT value FROM json_each(:names)) {chosen} "
                    f"ORDER BY {distance} NULLS LAST LIMIT :rows",
                    values,
                )
            except DatabaseError:
                return None  # a vector of another length, or none at all: NumPy leaves out just that row
            return [block for _, block in self._read(len(unit), [row[0] for row in found], versions=False)]

    @contextlib.contextmanager
    def _one_state(self) -> Iterator[bool]:
        """One state of the file for all statements; gives whether a transaction of the caller's was open already."""
        within = self._connection.in_transaction
        if not within:
            self._connection.execute("BEGIN")
        try:
            yield within
        finally:
            if not within:
                self._connection.execute("COMMIT")

    def _matrix_bytes(self, dimensions: int) -> int:
        return int(self._rows(f"SELECT count(*) FROM {self._index}", {})[0][0]) * dimensions * 4  # noqa: S608

    def _blocks(self, dimensions: int, rowids: npt.NDArray[np.int64] | None) -> Iterator[Block]:
        """The current vectors, at least those of ``rowids`` (None: all): in one block from memory, or block by block
        from the file if they are too many or for one search."""
        if self._once:
            self._start_reading()
            chosen = None if rowids is None else rowids.tolist()
            yield from (block for _, block in self._read(dimensions, chosen, versions=False))
            return
        # Asked first: what is written after this is noticed by the next search.
        seen = (
            *self._rows("PRAGMA data_version", {})[0],  # commits of other connections
            *self._rows("PRAGMA schema_version", {})[0],
            self._connection.total_changes,  # our own writes
            dimensions,
        )
        if self._block is None or seen != self._seen:
            with self._one_state() as within:
                size = self._matrix_bytes(dimensions)
                if size > CACHE_BYTES:
                    self._block = None
                else:
                    self._refresh(size // (4 * dimensions), dimensions)
            # What the caller's transaction wrote may still be rolled back, which nothing would tell.
            self._seen = None if within else seen
        if self._block is not None:
            yield self._block
        else:
            self._start_reading()
            yield from (block for _, block in self._read(dimensions, None, versions=False))

    def _refresh(self, rows: int, dimensions: int) -> None:
        old = self._block
        if old is None or old.matrix.shape[1] != dimensions:
            return self._load(rows, dimensions)
        found = self._rows(
            f"SELECT rowid, id, coalesce(updated_at, created_at) FROM {self._index} "  # noqa: S608
            "WHERE embedding IS NOT NULL ORDER BY rowid",
            {},
        )
        rowids = np.fromiter((row[0] for row in found), np.int64, len(found))
        versions = _versions(found)
        place = np.searchsorted(old.rowids, rowids)
        known = place < len(old.rowids)
        known[known] = (old.rowids[place[known]] == rowids[known]) & (self._versions[place[known]] == versions[known])
        known &= versions != UNSETTLED
        changed = np.flatnonzero(~known)
        if 2 * len(changed) > len(rowids):
            return self._load(rows, dimensions)
        self._block = None  # if reading fails half way, all is read again
        block = old
        if not np.array_equal(old.rowids, rowids):
            block = Block.empty(len(rowids), dimensions)
            block.put(known, old.take(place[known]))
        done = 0
        for _, part in self._read(dimensions, rowids[changed].tolist()):
            block.put(changed[done : done + len(part.rowids)], part)
            done += len(part.rowids)
        self._block, self._versions = block, versions

    def _load(self, rows: int, dimensions: int) -> None:
        self._block = None  # free the memory before the new matrix is filled
        self._start_reading()
        block = Block.empty(rows, dimensions)
        read: list[tuple[Any, ...]] = []
        for part_rows, part in self._read(dimensions, None):
            block.put(slice(len(read), len(read) + len(part_rows)), part)
            read += part_rows
        self._block, self._versions = block.take(slice(len(read))), _versions(read)

    def _start_reading(self) -> None:
        self._names, self._other_lengths = {}, set()
        self._copies = VECTORS in columns_of(self._rows, self._target, [VECTORS])

    def _read(
        self, dimensions: int, rowids: list[int] | None, *, versions: bool = True
    ) -> Iterator[tuple[list[tuple[Any, ...]], Block]]:
        """Rows with an embedding (all, or those of ``rowids``) in the order of their rowid, BLOCK_ROWS at a time.

        Each with its (rowid, id, time), unless ``versions`` is False. The float32 copy is taken where it is as new as
        the row, else the JSON.
        """
        copy, join = self._float_copy(dimensions)
        chosen = "" if rowids is None else "AND s.rowid IN (SELECT value FROM json_each(:rowids))"
        version = ", s.id, coalesce(s.updated_at, s.created_at)" if versions else ""
        statement = (
            f"SELECT s.rowid, s.entity_name, {copy}, "  # noqa: S608
            f"CASE WHEN {copy} IS NULL THEN s.embedding END{version} FROM {self._index} s {join} "
            f"WHERE s.embedding IS NOT NULL {chosen} ORDER BY s.rowid"
        )
        with sqlite_cursor(self._connection) as cursor:
            cursor.execute(statement, {} if rowids is None else {"rowids": json.dumps(rowids)})
            while rows := cursor.fetchmany(BLOCK_ROWS):
                vectors = b"".join([row[2] or self._bytes(row[3], dimensions) for row in rows])
                matrix, usable = unit_rows(np.frombuffer(vectors, "<f4").reshape(len(rows), dimensions))
                codes = [self._names.setdefault(row[1], len(self._names)) for row in rows]
                block = Block(np.array([r[0] for r in rows], np.int64), np.array(codes, np.int32), usable, matrix)
                yield [(row[0], *row[4:]) for row in rows] if versions else [], block

    def _float_copy(self, dimensions: int) -> tuple[str, str]:
        """The expression for a row's float32 copy, NULL unless it is as new as the row, and the join it needs."""
        if not self._copies:
            return "NULL", ""
        return "v.vector", (
            f"LEFT JOIN {VECTORS} v ON v.search_rowid = s.rowid AND v.search_id = s.id "
            f"AND v.at = s.updated_at AND length(v.vector) = {4 * dimensions}"
        )

    def _bytes(self, embedding: Any, dimensions: int) -> bytes:
        """KameleonDB's JSON text as float32; zeros if it is no vector of this length."""
        vector = parsed(embedding)
        if vector is not None and len(vector) == dimensions:
            return vector.tobytes()
        if vector is not None:
            self._other_lengths.add(len(vector))
        return bytes(4 * dimensions)


def load_sqlite_vec(connection: sqlite3.Connection) -> bool:
    """Make sqlite-vec's functions known to this connection; False where that cannot be done.

    A database in memory is left alone: its connection is the caller's.
    """
    in_file = any(row[1] == "main" and row[2] for row in connection.execute("PRAGMA database_list"))
    return in_file and not why_no_sqlite_vec(connection)


def products(matrix: npt.NDArray[np.float32], unit: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """``matrix @ unit`` on one core, without the GIL.

    100,000 × 384 take 5 ms this way. OpenBLAS needs 12 on one core and 7 on two, and its threads then spin for some
    20 ms more on the cores that the keyword ranking and the next query's embedding need.
    """
    if hasattr(np, "vecdot"):  # NumPy 2.0
        products: npt.NDArray[np.float32] = np.vecdot(matrix, unit)
    else:
        products = np.einsum("ij,j->i", matrix, unit)
    return products


def cosines(
    matrix: npt.NDArray[np.float32], rows: npt.NDArray[np.int64], unit: npt.NDArray[np.float32]
) -> npt.NDArray[np.float64]:
    """Cosines of these rows, each summed by itself in float64: equal vectors tie, wherever they stand in a block."""
    parts = [rows[start : start + BLOCK_ROWS] for start in range(0, len(rows), BLOCK_ROWS)]
    sums = [(matrix[part].astype(np.float64) * unit).sum(axis=1) for part in parts]
    return np.concatenate([np.empty(0, np.float64), *sums])


def _versions(rows: Sequence[tuple[Any, ...]]) -> npt.NDArray[np.int64]:
    """A number for each (rowid, id, time) that changes when the row is written again."""
    times = [str(row[2]).replace("T", " ") for row in rows]
    newest = max((time[:19] for time in times), default="")
    return np.fromiter(
        (
            UNSETTLED if len(time) <= 19 and time == newest else hash((row[1], time))
            for row, time in zip(rows, times, strict=True)
        ),
        np.int64,
        len(rows),
    )


def parsed(embedding: Any) -> npt.NDArray[np.float32] | None:
    try:
        vector = np.asarray(json.loads(embedding), np.dtype("<f4"))
    except (ValueError, TypeError, OverflowError):
        return None
    return vector if vector.ndim == 1 else None


def unit_rows(matrix: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """Rows scaled to length 1, and which have a direction at all; the others become zeros."""
    with np.errstate(all="ignore"):
        norms = np.sqrt(np.einsum("ij,ij->i", matrix, matrix))
        usable = np.isfinite(norms) & (norms > 0)
        unit = np.divide(matrix, np.where(usable, norms, 1)[:, None], dtype=np.float32)
        unit[~usable] = 0
        return unit, usable
