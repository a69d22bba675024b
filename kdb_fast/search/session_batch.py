"""A batch that an SQLAlchemy session's commit carries, in the session's own database transaction."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ..errors import UsageError
from .batches import Operation, as_delete, as_list, as_put, as_puts


class SessionBatch:
    """Records that an SQLAlchemy session's commit will carry; made by :meth:`SearchEngine.for_session`.

    They stay in memory until then. A savepoint that is rolled back takes with it what was queued since it began.
    ``len()`` is the number of operations queued.

    Args:
        write: Writes operations within the transaction of a connection of the database's driver.
        session: The SQLAlchemy ``Session``.
    """

    def __init__(self, write: Callable[[Any, Sequence[Operation]], None], session: Any) -> None:
        from sqlalchemy import event

        self._write_on, self._session = write, session
        self._operations: list[Operation] = []
        self._savepoints: dict[Any, int] = {}
        self._committing = False
        event.listen(session, "after_transaction_create", self._begun)
        event.listen(session, "before_commit", self._before_commit)
        event.listen(session, "after_flush_postexec", self._flushed)
        event.listen(session, "after_rollback", self._rolled_back)
        event.listen(session, "after_transaction_end", self._ended)

    def index_record(self, entity_name: str, record_id: str, content: str) -> None:
        """Queue a record for the session's commit; see :meth:`SearchEngine.index_record`.

        Raises:
            RecordError: It cannot be stored.
            UsageError: The session's transaction has failed or is at its end.
        """
        self._queue(as_list(as_put((entity_name, record_id, content))))

    def index_records_batch(self, records: Iterable[tuple[str, str, str]]) -> None:
        """Queue records for the session's commit, all or none. Raises as :meth:`index_record`."""
        self._queue(list(as_puts(records)))

    def delete_record(self, entity_name: str, record_id: str) -> None:
        """Queue a deletion for the session's commit. Raises as :meth:`index_record`."""
        self._queue(as_list(as_delete((entity_name, record_id))))

    def __len__(self) -> int:
        return len(self._operations)

    def _queue(self, operations: Sequence[Operation]) -> None:
        if not self._session.in_transaction():
            # A rollback of a session that has not begun is no event, and would leave the queue as it is.
            self._session.begin()
        elif not self._session.is_active:
            raise UsageError(
                "The session's transaction has failed or is at its end; nothing can be added to it.",
                remedy="Roll the session back first; index before its commit, not in after_commit.",
            )
        self._operations.extend(operations)

    def _write(self) -> None:
        if not self._operations:
            return
        self._write_on(self._session.connection().connection.driver_connection, self._operations)
        # Only now: after an error the caller may mend the cause and commit again.
        self._operations.clear()

    def _begun(self, session: Any, transaction: Any) -> None:
        if transaction.nested:
            self._savepoints[transaction] = len(self._operations)

    def _before_commit(self, session: Any) -> None:
        # The commit of a savepoint also comes here; only the outermost commit makes anything durable.
        if session.in_nested_transaction():
            return
        session.flush()  # what fails there costs no embedding, and its listeners may queue something
        self._write()
        self._committing = True

    def _flushed(self, session: Any, flush_context: Any) -> None:
        if self._committing:  # another listener of before_commit has changed something after ours
            self._write()

    def _rolled_back(self, session: Any) -> None:
        # By a failed flush as well, which rolls back the savepoint around it and says so only here.
        savepoint = session.get_nested_transaction()
        kept = 0 if savepoint is None else self._savepoints.get(savepoint, 0)
        del self._operations[kept:]

    def _ended(self, session: Any, transaction: Any) -> None:
        self._savepoints.pop(transaction, None)
        if transaction.parent is None:
            # Also the end of a session that was closed without commit or rollback.
            self._operations.clear()
            self._committing = False


def sqlalchemy_session(session: Any) -> Any:
    """The ``Session`` itself, or that of a ``scoped_session``. Raises UsageError for anything else."""
    try:
        from sqlalchemy.orm import Session, scoped_session
    except ImportError:
        raise UsageError("for_session needs SQLAlchemy, which is not installed.") from None
    real = session() if isinstance(session, scoped_session) else session
    if not isinstance(real, Session):
        raise UsageError(f"session is {type(session).__name__}; expected an SQLAlchemy Session.")
    return real
