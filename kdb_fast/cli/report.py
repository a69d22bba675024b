"""What commands print for people. Everything that came from records is shown without control characters."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..accounting import clock
from ..receipt import HostShare, InsertReceipt, Receipt, Retried
from ..records import local_time, number_of, shell_word, storable_key
from ..tables.target import Target
from .console import with_database

if TYPE_CHECKING:
    from ..records import KeptReject
    from ..search.commands import Status
    from ..search.tables.results import TableResult
    from ..stores.past_runs import LastRun
    from ..stores.targets import TargetStatus
    from ..tables.definition import Definition

SHOWN_CHARS = 100
"""Characters of a text in a list of results."""

NOTE_CHARS = 1000
"""Characters of a note: a server's notice may quote anything."""

SHOWN_HOSTS = 16
"""Hosts of a cluster in a summary."""

SHOWN_REJECTS = 10
"""Rejected lines that are printed at the end of an insert."""


def print_receipt(receipt: Receipt, database: str) -> None:
    """The summary of a run."""
    database = _with_schema(database, receipt.schema)
    written, read = receipt.written, receipt.read
    if not read and receipt.empty:
        print(f"{database}: none of {number_of(receipt.empty, 'record')} has any text.")
    elif not read:
        print(f"{database}: there were no records to read.")
    elif not written and not receipt.rejected:
        ours = receipt.unchanged - receipt.foreign
        left = f", {receipt.foreign:,} left alone" if receipt.foreign else ""
        print(f"{database}: nothing changed: {number_of(ours, 'record is', 'records are')} up to date{left}.")
    else:
        print(
            f"{database}: {written:,} of {number_of(read, 'record')} written in {clock(receipt.seconds)} "
            f"({receipt.records_per_second:,.0f} records/s, {receipt.tokens_per_second:,.0f} tokens/s)"
        )
    ends = [f"{count:,} {fate}" for fate, count in receipt.fates.items() if count or fate == "stored"]
    rows = [("target", receipt.target.describe())] if receipt.target else []
    rows.append(("records", ", ".join(ends)))
    also = (
        (receipt.foreign, "with a vector of another program, left alone (--replace overwrites)"),
        (receipt.deleted, "removed" if receipt.target else "removed from the index"),
        (receipt.empty, "without text, not indexed"),
        (receipt.truncated, f"longer than the model reads{_lost(receipt)}"),
    )
    extra = [f"{count:,} {text}" for count, text in also if count]
    if extra:
        rows.append(("also", ", ".join(extra)))
    if receipt.chunks:
        rows.append(("pieces", f"{receipt.chunks:,} ({receipt.chunks / max(1, written):.1f} a record)"))
    if receipt.tokens:
        padding = 1 - receipt.tokens / max(1, receipt.padded_tokens)
        rows.append(
            ("tokens", f"{receipt.tokens:,} ({receipt.tokens / max(1, receipt.stored):.0f} a record, "
                       f"padding {padding:.1%})")
        )  # fmt: skip
        rows.append(("plan", receipt.plan))
    rows += [("host", _host(share)) for share in receipt.hosts[:SHOWN_HOSTS]]
    if len(receipt.hosts) > SHOWN_HOSTS:
        rows.append(("host", f"and {len(receipt.hosts) - SHOWN_HOSTS} more: see --json"))
    rows.append(("model", f"{receipt.model}, {receipt.dimensions} dimensions, {receipt.precision}, "
                          f"fingerprint {receipt.fingerprint}"))  # fmt: skip
    if receipt.document_prefix:
        rows.append(("prefix", f"{receipt.document_prefix!r} before each text"))
    if receipt.bytes_written:
        rows.append(("flushes", f"{receipt.flushes}: {receipt.flush_size}"))
    if receipt.index:
        rows.append(("index", receipt.index))
    if written:
        phases = receipt.phases
        rows.append(("time", f"embedding {phases.embed:.1f} s of worker time, writing {phases.write:.1f} s, "
                             f"index {phases.index:.1f} s"))  # fmt: skip
        here = " of this machine" if receipt.hosts else ""
        rows.append(("memory", f"{receipt.peak_rss_bytes / 1e6:,.0f} MB at most, all processes{here} together"))
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        print(f"  {name:<{width}}  {printable(text, NOTE_CHARS)}")
    for warning in receipt.warnings:
        print(f"  note: {printable(warning, NOTE_CHARS)}")
    if receipt.rejected:
        which = f" --target {shell_word(receipt.target.name)}" if receipt.target else ""
        print(f"  See the rejected records: {with_database('kdb-fast rejects list')}{which}")


def _with_schema(database: str, schema: str | None) -> str:
    """The address and the schema, where it is not the one that everybody expects."""
    return database if schema in (None, "public") else f"{database}, schema {Target(schema).shown()}"


def _host(share: HostShare) -> str:
    """What a host of a cluster has done."""
    text = f"{share.name}: {share.records:,} texts, {share.tokens:,} tokens"
    if share.deaths:
        text += f", {share.deaths} processes died"
    return f"{text}; {share.left_out}" if share.left_out else text


def _lost(receipt: Receipt) -> str:
    """How much of the long records the model has not read, where that is known."""
    return f" (about {receipt.lost_chars:,} of their characters have no part in a vector)" if receipt.lost_chars else ""


def printable(text: str, limit: int = SHOWN_CHARS) -> str:
    """One line without control characters, cut at ``limit`` characters."""
    return storable_key(" ".join(text.split()), limit)


def print_results(query: str, results: Sequence[Mapping[str, Any]]) -> None:
    """Search results, best first."""
    if not results:
        print("no results")
        return
    for number, result in enumerate(results, 1):
        print(f"{number:>3}. {result['score']:.4f}  {printable(result['entity'], 40)}/{printable(result['id'], 40)}")
        print(f"     {printable(result['matched_text'])}")


def print_table_results(results: Sequence[TableResult]) -> None:
    """Results of the search of a table, best first."""
    if not results:
        print("no results")
        return
    for number, result in enumerate(results, 1):
        key = ", ".join(f"{printable(name, 40)} {printable(str(value), 60)}" for name, value in result.key.items())
        piece = f", characters {result.chunk.start} to {result.chunk.end}" if result.chunk else ""
        print(f"{number:>3}. {result.score:.4f}  {key}{piece}")
        print(f"     {printable(result.matched_text)}")
        for name, value in result.columns.items():
            print(f"     {printable(name, 40)}: {printable(_of_database(value))}")


def _of_database(value: object) -> str:
    """A value for a person: as SQL or JSON writes it where Python has words of its own."""
    if value is None:
        return "NULL"
    if isinstance(value, (bytes, memoryview)):
        return bytes(value).hex()
    if isinstance(value, (bool, list, dict)):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)


def _last(run: LastRun | None) -> str:
    """What became of the newest run, and when it began."""
    if run is None:
        return "never"
    state = "stopped without an end" if run.state == "abandoned" else run.state
    return f"{state}, began {local_time(run.started_at)}"


def _place(definition: Definition) -> str:
    """Table and column of the vectors of a target."""
    return f"{definition.written}.{storable_key(definition.vector)}"


def print_status(status: Status, database: str) -> None:
    """A table of entities, and one of targets."""
    entities, targets = status.entities, status.targets
    database = _with_schema(database, status.schema)
    if entities or not targets:
        print(f"{database}: {number_of(status.indexed, 'record')} indexed")
    else:
        print(f"{database}: no index of KameleonDB")
    if entities:
        _print_entities(status)
    if targets:
        print_targets(targets)


def _print_entities(status: Status) -> None:
    from rich.console import Console
    from rich.table import Table

    entities = status.entities
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("entity")
    for name in ("indexed", "pending", "stale", "rejected"):
        table.add_column(name, justify="right")
    table.add_column("last update")
    for row in entities:
        pending = "?" if row.pending is None else f"{row.pending:,}"
        updated = local_time(row.last_updated) if row.last_updated else "never"
        table.add_row(printable(row.entity, 60), f"{row.indexed:,}", pending, f"{row.stale:,}",
                      f"{row.rejected:,}", updated)  # fmt: skip
    Console(highlight=False, markup=False, soft_wrap=True).print(table)
    if run := status.run:
        print(f"last run: {run.run}, {_last(run)}")


def print_targets(targets: Sequence[TargetStatus]) -> None:
    """A table of targets."""
    if not targets:
        print("There are no targets. Describe one: kdb-fast reindex --table TABLE --text COLUMN --vector COLUMN")
        return
    lines = [("target", "vectors in", "rows", "rejected", "last run")]
    for target in targets:
        rows = "?" if target.rows is None else f"{target.rows:,}"
        name, place = printable(target.definition.name, 60), printable(_place(target.definition))
        lines.append((name, place, rows, f"{target.rejected:,}", _last(target.run)))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for name, place, rows, rejected, last in lines:
        print(
            f"{name:<{widths[0]}}  {place:<{widths[1]}}  {rows:>{widths[2]}}  {rejected:>{widths[3]}}  {last}".rstrip()
        )


def print_target(target: TargetStatus) -> None:
    """What is kept of a target, and what there is of it."""
    run, kept = target.run, target.definition
    read = Target(kept.schema).shown(kept.table) if kept.table else kept.query or "files"
    lines = {
        "target": kept.name,
        "reads": read
        + (f" of {kept.source}" if kept.source else "")
        + (f" where {kept.filter}" if kept.filter else ""),
        "text": kept.template or ", ".join(kept.text),
        "key": ", ".join(kept.key),
        "vectors in": _place(kept),
        "model": f"{kept.model}, {kept.dimensions} dimensions, {kept.precision}"
        + (f", {kept.provider} {kept.base_url}".rstrip() if kept.provider != "fastembed" else ""),
        "pieces": f"of {kept.chunk} tokens, {kept.overlap} of them shared" if kept.chunk else "",
        "prefixes": f"{kept.document_prefix!r} before texts, {kept.query_prefix!r} before queries"
        if kept.document_prefix or kept.query_prefix
        else "",
        "keywords": kept.keyword,
        "indexes": kept.index,
        "rows": "the table or column is not there, or cannot be read"
        if target.rows is None
        else f"{target.rows:,} with a vector" + (f", {number_of(target.pieces, 'piece')}" if target.pieces else ""),
        "rejected": f"{target.rejected:,}" if target.rejected else "",
        "last run": f"{run.run}, {_last(run)}" if run else "never",
        "kept in": target.home.shown() if target.home.schema else "",
    }
    for name, text in lines.items():
        if text:
            print(f"{name:<11} {printable(text, NOTE_CHARS)}")


def print_models(entries: Iterable[Any]) -> None:
    """All models, those on this machine first."""
    for entry in sorted(entries, key=lambda e: (not e.installed, e.name)):
        mark = "here" if entry.installed else "    "
        print(f"{mark}  {entry.dimensions:>5}  {entry.size_gb:>6.2f} GB  {entry.name}")
    sys.stdout.flush()


def print_inserted(receipt: InsertReceipt, entity: str, database: str) -> None:
    """The summary of an insert."""
    print(f"{database}: {number_of(receipt.inserted, 'record')} inserted into {printable(entity, 60)}")
    if receipt.read:
        print_receipt(receipt, database)
    elif receipt.empty:
        print(f"  None of the {receipt.empty:,} has any text, so nothing was indexed.")
        for warning in receipt.warnings:
            print(f"  note: {printable(warning, NOTE_CHARS)}")


def print_rejected_lines(receipt: Receipt | None) -> None:
    """The first rejected lines of an insert's input, to standard error."""
    if not isinstance(receipt, InsertReceipt):
        return
    for reject in receipt.rejects[:SHOWN_REJECTS]:
        where = f"line {reject.line}" if reject.line else f"record {printable(reject.record_id, 60)}"
        print(f"{where}: {reject.reason}: {printable(reject.detail, 500)}", file=sys.stderr)
    if receipt.rejected > SHOWN_REJECTS:
        print(f"and {receipt.rejected - SHOWN_REJECTS:,} more", file=sys.stderr)


def print_rejects(rows: Sequence[KeptReject], limit: int) -> None:
    """Rejected records, one line each."""
    if not rows:
        print("There are no rejected records.")
        return
    for row in rows[:limit]:
        where = printable(row.target or row.entity, 60)
        if row.record_id:
            where += f"/{printable(row.record_id, 60)}"
        if row.position:
            where += f" line {row.position}"
        reason = printable(f"{row.reason}: {row.detail}", 500)
        print(f"{where}: {reason} (run {row.run}, {local_time(row.rejected_at)})")
    if len(rows) > limit:
        print(f"and {len(rows) - limit:,} more: see --limit")


def print_retried(result: Retried, database: str) -> None:
    """What became of rejected records that were tried again."""
    if not result.rejects_before:
        print("There are no rejected records.")
        return
    if result.receipt is not None:
        print_receipt(result.receipt, database)
        print(f"{number_of(result.remaining, 'rejected record remains', 'rejected records remain')}")
    there = with_database("kdb-fast status").removeprefix("kdb-fast status")
    for entity, count in result.lines_of_inserts.items():
        name = printable(entity, 60)
        word = shell_word(entity)
        print(
            f"{count:,} rejected lines for {name} became no record: correct them and insert only them "
            f"(kdb-fast insert {word} FILE{there}), then forget these: kdb-fast rejects clear --entity {word}{there}"
        )
    for entity, count in result.lines_of_files.items():
        name = printable(entity, 60)
        print(
            f"{count:,} rejected lines of {name} are of a file and not in the database: correct them, then run "
            f"kdb-fast reindex --from FILE --entity {shell_word(entity)} again{there and ' with'}{there} "
            "(what is stored is skipped)"
        )
