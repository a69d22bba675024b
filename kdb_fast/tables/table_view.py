"""A view that joins a table of vectors to what it was made from: ``<table>_with_source``."""

from __future__ import annotations

from .names import qualified
from .relation import Relation
from .table_target import STATE_COLUMNS, TSVECTOR, TableTarget

SUFFIX = "_with_source"


def view_name(target: TableTarget) -> str:
    """Its name, in the schema of the table."""
    return f"{target.table}{SUFFIX}"


def view_statement(target: TableTarget, relation: Relation) -> str:
    """The statement that makes it: every column of what is read, and the vector with what was stored beside it.

    A column of the vectors whose name what is read has too is named after the table: ``article_vectors_embedding``.
    """
    taken = {column.name.lower() for column in relation.columns}
    columns = [f"r.{target.column(column.name)}" for column in relation.columns]
    for name in target.written:
        if name not in (*STATE_COLUMNS, TSVECTOR):
            alias = f"{target.table}_{name}" if name.lower() in taken else name
            columns.append(f"v.{target.column(name)} AS {target.column(alias)}")
    same = target.same_key("r.{column}", "v.rowid" if target.vec0 else "v.{column}")
    read = qualified(relation.schema, relation.name, target.home.dialect)
    select = f"SELECT {', '.join(columns)} FROM {read} r JOIN {target.quoted} v ON {same}"  # noqa: S608 - names
    return f"CREATE VIEW {_view(target)} AS {select}"


def drop_statement(target: TableTarget) -> str:
    """The statement that removes it."""
    return f"DROP VIEW IF EXISTS {_view(target)}"


def _view(target: TableTarget) -> str:
    return qualified(target.schema, view_name(target), target.home.dialect)
