"""A table with an index of sqlite-vec beside it; run by a Python that loads extensions. Jobs are as for
``langchain_job.py``, with the kind of table that is searched: ``blob`` or ``vec0``."""

from __future__ import annotations

import json
import sqlite3
import sys
from typing import Any

import sqlite_vec


def main(job: dict[str, Any]) -> list[str]:
    connection = sqlite3.connect(job["file"])
    connection.enable_load_extension(True)
    sqlite_vec.load(connection)
    if job["do"] == "make":
        length = len(next(iter(job["vectors"].values())))
        connection.execute("CREATE TABLE notes (id INTEGER PRIMARY KEY, body TEXT NOT NULL)")
        connection.execute(f"CREATE VIRTUAL TABLE notes_index USING vec0(embedding float[{length}])")
        for number, text in enumerate(job["texts"], 1):
            connection.execute("INSERT INTO notes VALUES (?, ?)", (number, text))
            vector = sqlite_vec.serialize_float32(job["vectors"][text])
            connection.execute("INSERT INTO notes_index (rowid, embedding) VALUES (?, ?)", (number, vector))
        connection.commit()
        return []
    query = sqlite_vec.serialize_float32(job["vectors"][job["query"]])
    statement = {
        "blob": "SELECT n.body FROM note_vectors v JOIN notes n ON n.id = v.id "
        "ORDER BY vec_distance_cosine(v.embedding, ?) LIMIT ?",
        "vec0": "SELECT n.body FROM note_vectors v JOIN notes n ON n.id = v.rowid "
        "WHERE v.embedding MATCH ? AND k = ? ORDER BY v.distance",
    }[job["kind"]]
    return [text for (text,) in connection.execute(statement, (query, job["count"]))]


print(json.dumps(main(json.load(sys.stdin))))
