"""What the writer says at the end of a run."""

from __future__ import annotations

from typing import Any

import pytest

from kdb_fast.engine import writer
from kdb_fast.ipc.messages import Finish
from kdb_fast.tables.hidden_rows import HiddenRowsError


class _Hiding:
    """A store whose records are hidden in part."""

    def prune(self, entity: str, live_rows: Any) -> int:
        raise HiddenRowsError("a policy hides rows")


@pytest.mark.parametrize(("entity", "said"), [("", "Nothing was removed, since"), ("Note", "index for Note, since")])
def test_what_is_hidden_is_named_where_it_has_a_name(entity: str, said: str) -> None:
    store: Any = _Hiding()
    spec: Any = None
    live: Any = ()
    message = Finish(prune=(entity,), live_rows=live, build_index=False)
    assert said in writer.finish(store, spec, message, lambda text: None).warnings[0]
