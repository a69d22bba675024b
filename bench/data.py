"""The data sets: seeded, made here, no network. The same seed gives the same texts on every machine.

``contacts``  short records, about 15 tokens
``tickets``   English sentences, about 60 tokens, lengths log-normal, the longest beyond 256 tokens
``mixed``     address book entries, products and notes, about 30 tokens, 30 % exact duplicates
``docs``      the records of ``kdb-fast demo``: the documentation of this interpreter's standard library
``long``      texts of 5,000 words, for memory
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from kdb_fast.records import content_of

from . import words

DUPLICATES = 0.3
"""Share of ``mixed`` that repeats an earlier record's text."""

TICKET_WORDS, TICKET_SIGMA = 22.0, 0.75
"""Median words of a ticket's body and sigma of the log-normal: mean 60 tokens, one in 400 beyond 256."""

LONG_WORDS = 5000


def contacts(n: int, seed: int) -> list[str]:
    """Name, role and company. (With e-mail address, and names in two fields, a record has 30 tokens: see mixed.)"""
    rng = random.Random(f"contacts {seed}")
    return [
        f"name: {rng.choice(words.FIRST_NAMES)} {rng.choice(words.LAST_NAMES)} | role: {_role(rng)} | "
        f"company: {rng.choice(words.COMPANIES)}"
        for _ in range(n)
    ]


def tickets(n: int, seed: int) -> list[str]:
    """Subject and body of support tickets."""
    rng = random.Random(f"tickets {seed}")
    return [_ticket(rng) for _ in range(n)]


def questions(n: int, seed: int) -> list[str]:
    """What a person might type to find a ticket."""
    rng = random.Random(f"questions {seed}")
    return [f"{rng.choice(words.PRODUCTS)} {rng.choice(words.PROBLEMS)}" for _ in range(n)]


def mixed(n: int, seed: int) -> list[str]:
    """Three kinds of record of about 30 tokens; DUPLICATES of them are exact copies of earlier ones."""
    rng = random.Random(f"mixed {seed}")
    texts: list[str] = []
    for _ in range(n):
        if texts and rng.random() < DUPLICATES:
            texts.append(rng.choice(texts))
        else:
            texts.append(rng.choice((_address, _product, _note))(rng))
    return texts


def docs(n: int, seed: int) -> list[str]:
    """At most ``n`` records of the demo, in a seeded order. How many there are depends on the interpreter."""
    command = [sys.executable, "-W", "ignore", "-m", "kdb_fast.cli.demo_docs"]
    done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, timeout=300, check=True)
    fields = ("name", "kind", "module", "summary", "text")
    texts = [content_of(json.loads(line), fields) for line in done.stdout.decode().splitlines()]
    random.Random(f"docs {seed}").shuffle(texts)
    return texts[:n]


def long(n: int, seed: int) -> list[str]:
    """Texts of LONG_WORDS words."""
    rng = random.Random(f"long {seed}")
    return [" ".join(_sentences(rng, LONG_WORDS)) for _ in range(n)]


SETS: dict[str, Callable[[int, int], list[str]]] = {
    "contacts": contacts, "tickets": tickets, "mixed": mixed, "docs": docs, "long": long,
}  # fmt: skip


def write(path: Path, texts: list[str]) -> None:
    """One JSON string a line: every contender reads the same file."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(text) + "\n" for text in texts)


def read(path: Path | str, n: int | None = None) -> Iterator[str]:
    """The first ``n`` texts of a file, one at a time."""
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file):
            if number == n:
                return
            yield json.loads(line)


def _role(rng: random.Random) -> str:
    role = rng.choice(words.ROLES)
    return f"{rng.choice(words.RANKS)} {role}" if rng.random() < 0.4 else role


def _address(rng: random.Random) -> str:
    first, last = rng.choice(words.FIRST_NAMES), rng.choice(words.LAST_NAMES)
    host = rng.choice(words.COMPANIES).lower().replace(" ", "")
    return (
        f"first_name: {first} | last_name: {last} | email: {first}.{last}@{host}.com".lower() + f" | role: {_role(rng)}"
    )


def _product(rng: random.Random) -> str:
    return (
        f"product: {rng.choice(words.PRODUCTS)} | vendor: {rng.choice(words.COMPANIES)} | "
        f"price: {rng.randint(5, 900)} | contact: {rng.choice(words.FIRST_NAMES)} {rng.choice(words.LAST_NAMES)} | "
        f"note: {rng.choice(words.PROBLEMS)}"
    )


def _note(rng: random.Random) -> str:
    return f"note: {' '.join(_sentences(rng, 20))}"


def _ticket(rng: random.Random) -> str:
    length = max(6, round(rng.lognormvariate(0.0, TICKET_SIGMA) * TICKET_WORDS))
    body = _sentences(rng, length)
    if length > 30:
        body.append(rng.choice(words.REQUESTS))
    return f"subject: {rng.choice(words.PRODUCTS)} {rng.choice(words.PROBLEMS)} | body: {' '.join(body)}"


def _sentences(rng: random.Random, length: int) -> list[str]:
    """Sentences of about ``length`` words in all, at least one."""
    result: list[str] = []
    while length > 0 or not result:
        sentence = _sentence(rng)
        result.append(sentence)
        length -= sentence.count(" ") + 1
    return result


def _sentence(rng: random.Random) -> str:
    people, moment = rng.choice(words.PEOPLE), rng.choice(words.MOMENTS)
    return rng.choice(words.SENTENCES).format(
        product=rng.choice(words.PRODUCTS), product2=rng.choice(words.PRODUCTS), problem=rng.choice(words.PROBLEMS),
        people=people, People=people[0].upper() + people[1:], moment=moment, Moment=moment[0].upper() + moment[1:],
        action=rng.choice(words.ACTIONS), number=rng.randint(2, 9999),
    )  # fmt: skip
