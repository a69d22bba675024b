"""``insert``: new records from JSON into KameleonDB's table and into the index, in one go."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from ..db.address import DatabaseAddress
from ..errors import KdbFastError, RejectLimitError, StoppedError
from ..receipt import InsertReceipt, Receipt, RejectedLine
from ..records import number_of, storable_key
from ..settings import ReindexOptions, RejectLimit
from ..sources.insert.source import REJECTS_KEPT, InsertingSource
from .progress import Progress
from .reindex import reindex
from .rejects import list_rejects
from .run_embedding import Embedding


@dataclass(frozen=True, kw_only=True)
class _ShareOfInput(RejectLimit):
    """The user's limit, as a share of the whole input: the pipeline sees no records without text."""

    limit: RejectLimit
    source: InsertingSource

    def exceeded(self, *, rejected: int, read: int, finished: bool = False) -> bool:
        return self.limit.exceeded(rejected=rejected, read=max(read, self.source.read), finished=finished)

    def __str__(self) -> str:
        return str(self.limit)


def insert(
    address: DatabaseAddress,
    entity: str,
    path: Path | str | BinaryIO,
    options: ReindexOptions,
    progress: Progress | None = None,
    *,
    created_by: str | None = None,
    embedding: Embedding | None = None,
) -> InsertReceipt:
    """Insert the records of a JSON Lines file or JSON array as new records of an entity, and index them.

    Each page is committed to KameleonDB's table before it is embedded. A run that ends early leaves records that are
    inserted and not indexed: ``reindex`` of the entity completes them.

    Args:
        address: The database; an embedded server must be running.
        entity: Name of an entity that KameleonDB has defined there.
        path: The file, ``"-"`` for standard input, or an open stream, which is not closed.
        options: As for a reindex; ``force``, ``limit`` and ``entities`` have no meaning here.
        progress: Shows a person what happens meanwhile.
        created_by: Who creates the records, for KameleonDB's column of that name.
        embedding: As for a reindex.

    Returns:
        The receipt of the run, with the first IDS_KEPT ids and the first REJECTS_KEPT rejects.

    Raises:
        KdbFastError: One of its subclasses; its ``receipt`` is an InsertReceipt when the run had begun. When records
            had been inserted by then, ``completed_by_reindex`` is true on it and its remedy says how to go on.
    """
    source = InsertingSource(address, entity, path, options.max_rejects, created_by)
    with contextlib.closing(source):
        limited = replace(options, max_rejects=_ShareOfInput(limit=options.max_rejects, source=source))
        try:
            receipt = reindex(address, source, limited, progress, embedding)
        except KdbFastError as error:
            if error.receipt is not None:
                error.receipt = _extended(error.receipt, source, address)
            _explain(error, entity, source, options)
            raise
        except KeyboardInterrupt:
            if not source.inserted:
                raise
            stopped = StoppedError("Stopped at once; the transactions in progress were rolled back.")
            _explain(stopped, entity, source, options)
            raise stopped from None
    return _extended(receipt, source, address)


def _extended(receipt: Receipt, source: InsertingSource, address: DatabaseAddress) -> InsertReceipt:
    """The receipt with what became of the input."""
    rejects = [RejectedLine(r.position, str(r.key[-1]), r.reason, r.detail) for r in source.rejects]
    rejected_later = max(0, receipt.rejected - source.rejected)
    if rejected_later and len(rejects) < REJECTS_KEPT:
        # Inserted and then refused by the model or the index; a database that is away cannot say which.
        with contextlib.suppress(KdbFastError):
            rejects += [
                RejectedLine(row.position, row.record_id, row.reason, row.detail)
                for row in list_rejects(address, source.entities[0])
                if row.run == receipt.run and row.record_id
            ][: REJECTS_KEPT - len(rejects)]
    indexed = receipt.written + receipt.superseded + receipt.unchanged
    return InsertReceipt(
        **vars(receipt),
        inserted=source.inserted,
        ids=tuple(source.ids),
        pending=max(0, source.inserted - source.empty - indexed - rejected_later),
        rejects=tuple(rejects),
    )


def _explain(error: KdbFastError, entity: str, source: InsertingSource, options: ReindexOptions) -> None:
    """Say what of the input is in the database: the same command again would insert it twice."""
    if isinstance(error, RejectLimitError):
        rejected = max(source.rejected, error.receipt.rejected if error.receipt else 0)
        error.message = (
            f"{rejected:,} of the first {number_of(source.read, 'record was', 'records were')} rejected; "
            f"--max-rejects allows {options.max_rejects}."
        )
        error.remedy = "Nothing was inserted. Correct them, or raise the limit with --max-rejects."
    if not source.inserted:
        return
    name = storable_key(entity)
    error.completed_by_reindex = True
    error.remedy = (
        f"{number_of(source.inserted, 'record was', 'records were')} inserted, all of the input up to line "
        f"{source.line:,} but those rejected: "
        f"a reindex of {name} completes their index. Insert only what follows that line, since a record inserted "
        "again would be there twice."
    )
