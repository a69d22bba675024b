"""``reindex`` of a table of any kind: from a description or a name to the receipt of the run."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

from ..db.address import SOURCE, DatabaseAddress, opened, parse_address, without_secrets
from ..db.reading import read
from ..db.sqlite_connection import create_sqlite
from ..embedding.prefixes import prefixes_of
from ..errors import UsageError
from ..receipt import Receipt
from ..settings import DEFAULT_MODEL, ReindexOptions, RejectLimit
from ..sources.files.columns import key_columns
from ..stores import targets
from ..stores.find import check_view, create_vector_column, find_table_target, keyword_of, make_view
from ..stores.homes import Homes
from ..tables.adapting import adapting
from ..tables.definition import Definition
from ..tables.describe import Described, Given, describe, find_kept
from ..tables.names import qualified, split_identifier
from ..tables.other_packages import made_by
from ..tables.reading import rows_of
from ..tables.target import Dialect, Rows, Target, columns_of, identifier
from .progress import Progress, Silent
from .reindex import reindex
from .run_embedding import Embedding, Records, find_embedding
from .table_reading import FileRead, open_source


class RunOptions(TypedDict, total=False):
    """What holds for one run, and is not kept; see :class:`kdb_fast.settings.ReindexOptions`."""

    model_path: Path | None
    batch_size: int
    workers: int | None
    force: bool
    limit: int | None
    wait: float
    max_rejects: RejectLimit
    min_fidelity: float | None
    cluster: str | None


class Writing(TypedDict):
    """What holds for one run and the target knows; see :class:`~kdb_fast.tables.column_target.ColumnTarget`."""

    replace: bool
    vacuum: bool


def reindex_table(
    url: str | DatabaseAddress,
    table: str | None = None,
    *,
    text: str | Sequence[str] = (),
    template: str | None = None,
    filter: str | None = None,
    key: str | Sequence[str] = (),
    query: str | None = None,
    vector: str | None = None,
    into: str | None = None,
    with_source: bool = False,
    vec0: bool = False,
    source: str | None = None,
    from_file: str | Path | None = None,
    file_format: str | None = None,
    delimiter: str | None = None,
    encoding: str | None = None,
    name: str | None = None,
    chunk: int | None = None,
    overlap: int | None = None,
    document_prefix: str | None = None,
    query_prefix: str | None = None,
    keyword: bool | None = None,
    language: str | None = None,
    index: str | None = None,
    create: bool = False,
    replace: bool = False,
    vacuum: bool = False,
    state_schema: str | None = None,
    model: str | None = None,
    provider: str | None = None,
    base_url: str | None = None,
    dimensions: int | None = None,
    precision: str | None = None,
    progress: Progress | None = None,
    **run: Unpack[RunOptions],
) -> Receipt:
    """Embed what is new or has changed in a table or query, and write the vectors into a column of that table, or
    into a table of vectors beside it.

    The description is kept in the database under a name; ``reindex_table(url, name="articles")`` does it again. What is
    given then changes the description; ``""`` (for a number 0) takes back what is kept.

    Args:
        url: Of the database: ``postgresql://…``, ``sqlite:///file.db`` or ``embedded:DIR``.
        table: What is read, as SQL names it: ``articles``, ``shop.articles``, ``"My Docs"."Big Table"``.
        text: Columns that are embedded, or SQL expressions over the columns; joined by a blank line. All columns of
            text where none is named.
        template: The text with names of columns in braces, in place of ``text``.
        filter: SQL condition that the rows meet; "" for all.
        key: Columns by which a row is told from others; the primary key where none is named.
        query: A SELECT that is read, in place of a table; needs ``key`` and ``into``.
        vector: Column of the vectors: ``vector(N)``, ``vector`` or ``halfvec(N)`` of pgvector; on SQLite a BLOB of
            float32, little-endian, one after the other, or JSON text.
        into: The table of vectors beside what is read; made where it is missing, with the key of what is read.
        with_source: Make a view ``<into>_with_source`` that joins it to what is read.
        vec0: SQLite: ``into`` is a table of sqlite-vec.
        source: Address of another database that is read, such as a replica; kept without its password.
        name: Under which the description is kept; the table's where there is none.
        from_file: A file that is read, in place of a table, with ``into``: CSV, TSV, Parquet, JSON Lines or a JSON
            array, packed or not; ``-`` for standard input. A column of ``key`` is of text, or as ``id:bigint`` says.
        file_format: ``csv``, ``tsv``, ``json`` or ``parquet``, where neither name nor content tell it.
        delimiter: Between the fields of CSV, where it is not found out.
        encoding: Of a text; UTF-8 where none is named.
        chunk: With ``into``: texts are cut into pieces of so many tokens, each with a vector of its own; 0 for whole.
        overlap: Tokens that two neighbouring pieces share.
        document_prefix: What the model reads before each text; "" for nothing. For a new target what its makers ask
            for, except where the column holds vectors already.
        query_prefix: Likewise, before each query.
        keyword: Keyword search: keep the words of the texts beside the vectors.
        language: Of keyword search: a text search configuration of PostgreSQL; on SQLite ``english``, ``simple`` or a
            tokenizer of FTS5. The database's own where none is named.
        index: What is done with the indexes of the vectors: ``keep``, ``defer``, ``concurrently`` or ``none``.
        create: Add that column where it is missing.
        replace: Overwrite vectors that another program has written, which else are left alone.
        vacuum: PostgreSQL: free the versions of rows that are left behind, during the run.
        state_schema: PostgreSQL: schema of kdb-fast's own tables. By default a target that is named is looked for in
            all of them, and a new one is kept where the session's search path leads to.
        model: As FastEmbed or the provider names it; the one that made the vectors where none is named, for a new
            target all-MiniLM-L6-v2.
        provider: ``fastembed`` or ``openai``.
        base_url: Address of an API as OpenAI's.
        dimensions: Length of a vector to ask an API for.
        precision: ``fp32``, ``bf16``, ``int8`` or ``auto``.
        progress: Shows a person what happens meanwhile.
        run: What holds for this run only: ``force`` embeds all, ``limit`` reads at most so many rows, ``wait`` is how
            many seconds another run is waited for, ``max_rejects`` when to give up; ``batch_size``, ``workers``,
            ``model_path`` and ``min_fidelity`` as for the command.

    Returns:
        What the run has done; ``target`` says where the vectors are.

    Raises:
        UsageError: Arguments make no sense together.
        SchemaError: A table, column, key or right is missing, or is not as it was described; nothing was written.
        ModelError: The model is not to be had.
        LockedError: Another run is writing the target.
        DatabaseError: The database cannot be reached, or was lost.
        KdbFastError: One of its other subclasses; ``receipt`` is set on it when the run had begun.
    """
    if not (table or query or name or from_file is not None):
        raise UsageError(
            "Nothing says what is to be embedded; expected a table, a query, a file or the name of a target."
        )
    key_names = _names(key)
    given: dict[str, Any] = {
        "table": table,
        "text": _names(text),
        "template": template,
        "filter": filter,
        "key": key_names,
        "query": query,
        "vector": vector,
        "into": into,
        "form": "vec0" if vec0 else None,
        "chunk": chunk,
        "overlap": 0 if overlap is None and chunk == 0 else overlap,
        "document_prefix": document_prefix,
        "query_prefix": query_prefix,
        "index": index,
        "source": without_secrets(source, SOURCE) if source else source,
        "model": DEFAULT_MODEL if model == "" else model,
        "provider": provider or ("openai" if base_url else None),
        "base_url": "" if provider == "fastembed" and base_url is None else base_url,
        "dimensions": dimensions,
        "precision": precision,
    }
    known: Given = {field: value for field, value in given.items() if value is not None}  # type: ignore[assignment]
    with contextlib.ExitStack() as stack:
        written = stack.enter_context(opened(parse_address(url, "url") if isinstance(url, str) else url))
        file = None
        if from_file is not None:
            create_sqlite(written)
            file = FileRead(
                str(from_file), key_columns(key_names or (), written.dialect), file_format, delimiter, encoding
            )
            if key_names is not None or not name:
                known["key"] = tuple(column.name for column in file.key)
        # What may be new says where its vectors go.
        may_be_new = bool(into or (vector and (table or query)))
        homes, home = _home(written, state_schema, None if may_be_new else name)
        written, kept = dataclasses.replace(written, schema=home.schema), homes.of(home)
        if keyword is not None or language is not None:
            if keyword is False and language is not None:
                raise UsageError("--language belongs to --keyword.")
            known["keyword"] = "" if keyword is False else keyword_of(written, language or "")
        elsewhere = _kept_source(name, into or table, kept, written.dialect) if source is None else source
        read_from = stack.enter_context(opened(parse_address(elsewhere, SOURCE), create=False)) if elsewhere else None
        described = _describe(written, read_from, homes, home, name or "", known, create, file is not None)
        writing = Writing(replace=replace, vacuum=vacuum)
        return _run(written, read_from, file, described, progress or Silent(), run, writing, with_source)


def _names(names: str | Sequence[str]) -> tuple[str, ...] | None:
    """Names as a definition has them; None where none are given, and () where '' takes back what is kept."""
    names = (names,) if isinstance(names, str) else tuple(names)
    return None if not names else () if names == ("",) else names


def _kept_source(name: str | None, place: str | None, kept: Sequence[Definition], dialect: Dialect) -> str:
    """Address of the database that a target reads, where that is another.

    Args:
        place: The table that it has its name from, where it is not named.
    """
    name = name or (split_identifier(place, dialect)[1] if place else "")
    found = find_kept(name, kept, dialect) if name else None
    return found.source if found else ""


def _home(address: DatabaseAddress, state_schema: str | None, name: str | None) -> tuple[Homes, Target]:
    """Where our own tables are, and which of it is that of this run.

    Args:
        state_schema: The schema of our own tables, where it was named.
        name: Of the target that is kept and meant; None where one is described.
    """
    schema = (state_schema or address.schema) if address.dialect == "postgresql" else None
    homes = targets.kept_in(dataclasses.replace(address, schema=schema))
    return homes, homes.home if name is None else homes.one(name).home


def _describe(
    address: DatabaseAddress,
    read_from: DatabaseAddress | None,
    homes: Homes,
    home: Target,
    name: str,
    given: Given,
    create: bool,
    from_file: bool,
) -> Described:
    """The target, which this role may bring up to date."""
    dialect = address.dialect
    if read_from is not None and read_from.dialect != dialect:
        raise UsageError(
            f"--source is {read_from.display}, and what is written is {address.display}.",
            remedy="Both must be PostgreSQL, or both SQLite.",
        )

    def work(connection: Any) -> Described:
        rows = rows_of(connection, dialect)

        def described(other: Any) -> Described:
            return describe(
                rows, dialect, name, given, homes.of(home),
                elsewhere=homes.beside(home), create=create, read=rows_of(other, dialect),
                read_from=read_from.display if read_from else "", from_file=from_file,
            )  # fmt: skip

        found = described(connection) if read_from is None else read(read_from, described)
        found = _with_prefixes(rows, found, given, dialect)
        if dialect == "postgresql":
            from ..stores.postgresql.table_rights import check_table_rights

            check_table_rights(rows, home, found.definition)
        return found

    return read(address, work)


def _with_prefixes(rows: Rows, described: Described, given: Given, dialect: Dialect) -> Described:
    """With what the makers of the model ask for, where nothing else is said and the vectors are for our own searches.

    Other programs embed their queries for a column that they have filled without it.
    """
    definition, before = described.definition, described.before
    asked = prefixes_of(definition.model)
    chosen = {"document_prefix", "query_prefix"} & given.keys()
    changed = before is None or ("model" in given and before.model != definition.model)
    ours = definition.into or described.creates or (before and (before.document_prefix or before.query_prefix))
    if chosen or not changed or not (ours or (asked.source and _is_empty(rows, definition, dialect))):
        return described
    if not ours and (package := _package_of(rows, definition)):
        left_out = (
            f"{definition.model} was trained with prefixes ({asked.source}), but {definition.written} is a table of "
            f"{package}, which embeds its queries: no prefix is used unless you give --document-prefix"
        )
        return dataclasses.replace(described, notes=(*described.notes, left_out))
    wanted = dataclasses.replace(definition, document_prefix=asked.document, query_prefix=asked.query)
    notes = described.notes
    if asked.source:
        notes += (
            f"{definition.model} reads {asked.document!r} before each text and {asked.query!r} before each query, as "
            f"{asked.source} says; to leave them out: --document-prefix '' --query-prefix ''",
        )
    return dataclasses.replace(described, definition=wanted, notes=notes)


def _is_empty(rows: Rows, definition: Definition, dialect: Dialect) -> bool:
    """Whether the column of the vectors holds none."""
    table, column = qualified(*definition.place, dialect), identifier(definition.vector, dialect)
    return not rows(f"SELECT 1 FROM {table} WHERE {column} IS NOT NULL LIMIT 1", {})  # noqa: S608 - names


def _package_of(rows: Rows, definition: Definition) -> str:
    """The package whose table the vectors go to; '' for one's own."""
    schema, table = definition.place
    return made_by(columns_of(rows, Target(schema), [table]).get(table, frozenset()))


def _run(
    address: DatabaseAddress,
    read_from: DatabaseAddress | None,
    file: FileRead | None,
    described: Described,
    progress: Progress,
    run: RunOptions,
    writing: Writing,
    with_source: bool,
) -> Receipt:
    """The run of a target, which is kept as soon as nothing is in its way.

    Args:
        read_from: The database that is read, where that is another.
        file: What is read, where that is a file.
        writing: Of what holds for this run, that which the target knows.
    """
    definition = described.definition
    if with_source:
        check_view(definition)
    with contextlib.ExitStack() as stack:
        with adapting(described.as_kept, read_from.display if read_from else ""):
            source, what = open_source(
                address, read_from, file, definition, run.get("limit"), anew=described.reads_anew
            )
        stack.callback(source.close)
        options = _options(definition, run)
        embedding: Embedding | None = None
        if described.creates:
            # Its type has the length of the vectors.
            embedding = find_embedding(options, progress, Records(address, source, lambda: False, definition.identity))
            stack.callback(embedding.close)
            create_vector_column(address, definition, embedding.dimensions)
        with adapting(described.as_kept):
            target = find_table_target(address, definition, *what, **writing)
        definition = dataclasses.replace(definition, form=target.vector.form)
        if options.provider == "openai" and options.dimensions is None:
            options = dataclasses.replace(options, dimensions=target.vector.dimensions)

        def begun(embedding: Embedding) -> None:
            made = definition.created
            if with_source and make_view(address, target, what.relation):
                made = (*made, "view")
            found = dataclasses.replace(definition, model=embedding.name, dimensions=embedding.dimensions, created=made)
            targets.keep(address, found)
            for note in described.notes:
                progress.note(note)

        return reindex(address, source, options, progress, embedding, target=target, begun=begun)


def _options(definition: Definition, run: RunOptions) -> ReindexOptions:
    of_api = definition.provider == "openai"
    return ReindexOptions(
        **run,
        model=definition.model or DEFAULT_MODEL,
        provider=definition.provider,
        base_url=definition.base_url or None,
        dimensions=(definition.dimensions or None) if of_api else None,
        precision=definition.precision,
        chunk=definition.chunk,
        overlap=definition.overlap,
        document_prefix=definition.document_prefix,
        index=definition.index or None,
    )
