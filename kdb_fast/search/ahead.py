"""COMMAND: embeds the query by the model that has most likely made the index, before anything else has answered.

Which models a query needs is known when the database has counted what made its vectors. Until then the sums of the
files of one model are computed, beside the connection to the database and the imports; it is loaded as soon as a row
says that it is the right one. The command has the model's vector when the count is there, or a little later.
"""

from __future__ import annotations

import contextlib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from ..embedding.models.cache import find
from ..embedding.models.lookup import resolve
from ..errors import KdbFastError
from ..origins import IndexModel, Maker, same_name
from ..settings import DEFAULT_MODEL
from .query_model import chosen, embedded

if TYPE_CHECKING:
    from ..embedding.models.files import Model
    from .query_model import Vector


class QueryAhead:
    """Begins to verify the model that was asked for, or the default one, if it is on this disk.

    For processes of our own only, as :func:`kdb_fast.embedding.offline.import_fastembed`.

    Args:
        provider, model, model_path: As of :func:`.query_model.embed_query`.
    """

    def __init__(self, provider: str | None, model: str | None, model_path: Path | None) -> None:
        self._provider, self._model, self._path = provider, model, model_path
        self._verifying: Future[Model] | None = None
        with contextlib.suppress(KdbFastError, OSError):
            if model_path is not None or find(model or DEFAULT_MODEL):
                pool = ThreadPoolExecutor(1, "kdb-fast-model")
                self._verifying = pool.submit(resolve, model or DEFAULT_MODEL, model_path, once=True)
                pool.shutdown(wait=False)

    def embed(self, query: str, likely: Future[IndexModel | None]) -> tuple[Vector, Maker] | None:
        """Import what embeds, and embed the query if this model has made what is ``likely``.

        None if not, and where something is wrong with the model: whoever needs it will say so.
        """
        from ..embedding.offline import import_for, import_libraries

        import_libraries()
        if self._verifying is None:
            return None
        from ..embedding import encoder  # noqa: F401

        provider, name = chosen(likely.result(), self._provider, self._model, self._path, None)
        if provider != "fastembed" or not same_name(name or DEFAULT_MODEL, self._model or DEFAULT_MODEL):
            return None
        with contextlib.suppress(KdbFastError):
            model = self._verifying.result()
            import_for(model)
            return embedded(query, model)
        return None
