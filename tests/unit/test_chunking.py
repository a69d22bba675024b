"""A long text in pieces: none too long for the model, none of the text lost, cuts where a reader would make them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from kdb_fast.embedding.chunking import Piece, Splitter, chunked_fingerprint, load_tokenizer
from kdb_fast.embedding.models.files import Model
from kdb_fast.errors import ModelError, UsageError
from kdb_fast.origins import same_model
from kdb_fast.records import is_blank

SENTENCES = (
    "The ship came in late. Nobody had waited for it, and the quay was dark! Was it the fog? "
    "Dr. Reed paid 3.50 for tea; “so much?” she said. "
)
CORPUS = [
    SENTENCES,
    "Grüße aus Köln, naïve café über Straßen",
    "東京は今日も雨です。明日は晴れるでしょう。",
    "สวัสดีชาวโลก",
    "🙂🚲",
]
BERT, BYTES, UNIGRAM = "bert", "bytes", "unigram"
"""Words in parts of the vocabulary (all-MiniLM-L6-v2's own), parts of bytes, and parts with the space before."""


@pytest.fixture(scope="module")
def tokenizers(minilm: Model) -> dict[str, Any]:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    of_bytes = Tokenizer(models.BPE())
    of_bytes.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    of_bytes.decoder = decoders.ByteLevel()
    byte_trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    of_bytes.train_from_iterator(CORPUS, byte_trainer)
    unigram = Tokenizer(models.Unigram())
    unigram.normalizer = normalizers.NFKC()
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    names = ["<s>", "</s>", "<unk>"]
    unigram.train_from_iterator(
        CORPUS, trainers.UnigramTrainer(vocab_size=140, special_tokens=names, unk_token="<unk>", show_progress=False)
    )
    special = [(name, unigram.token_to_id(name)) for name in names[:2]]
    unigram.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=special)
    return {BERT: load_tokenizer(minilm.path), BYTES: of_bytes, UNIGRAM: unigram}


Make = Callable[..., Splitter]


@pytest.fixture(scope="module")
def splitter(tokenizers: dict[str, Any]) -> Make:
    return lambda size=40, overlap=0, prefix="", kind=BERT: Splitter(tokenizers[kind], size, overlap, prefix)


def parts(text: str, pieces: list[Piece]) -> list[str]:
    return [text[start:end] for start, end in pieces]


def check(splitter: Splitter, text: str, size: int) -> list[Piece]:
    """What holds for every text."""
    pieces = splitter.split(text)
    assert splitter.split(text) == pieces
    for piece in parts(text, pieces):
        assert piece == piece.strip()
        assert not is_blank(piece)
        assert splitter.count(piece) <= size
    for before, after in pairwise(pieces):
        assert before.start < after.start
        assert before.end < after.end
    covered = {position for start, end in pieces for position in range(start, end)}
    lost = [i for i, character in enumerate(text) if i not in covered and not is_blank(character)]
    assert not lost
    return pieces


TEXTS = st.one_of(
    st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=400),
    st.lists(
        st.sampled_from(["word ", "longer-words, ", "End. ", "So?\r\n", "\r\n\r\n", "東京", "雨です。", "สวัสดี",
                         "🚲", "👩‍👩‍👧", "é", "\u0301", "\u200d", "x" * 150, " " * 30, "\n", "ﷺ", "1.5"]),
        max_size=120,
    ).map("".join),
)  # fmt: skip


@pytest.mark.parametrize("kind", [BERT, BYTES, UNIGRAM])
def test_every_text_is_covered_by_pieces_that_are_short_enough(splitter: Make, kind: str) -> None:
    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(TEXTS, st.integers(36, 80), st.integers(0, 9), st.sampled_from(["", "passage: "]))
    @example("\u0301" * 300, 36, 0, "")
    @example("ﷺ" * 60, 36, 9, "passage: ")
    @example(" ", 36, 0, "")
    def holds(text: str, size: int, overlap: int, prefix: str) -> None:
        overlap = min(overlap, (size - splitter(80, prefix=prefix, kind=kind).count("")) // 2)
        check(splitter(size, overlap, prefix, kind), text, size)

    holds()


@pytest.mark.parametrize("kind", [BERT, BYTES, UNIGRAM])
def test_a_text_of_many_windows_is_cut_as_a_text_of_one(splitter: Make, kind: str) -> None:
    text = SENTENCES * 60
    whole = splitter(40, 8, kind=kind)
    whole._window = len(text)
    assert check(splitter(40, 8, kind=kind), text, 40) == whole.split(text)


def test_cuts_are_where_sentences_end_else_where_words_do(splitter: Make) -> None:
    text = SENTENCES * 3
    pieces = parts(text, check(splitter(40), text, 40))
    assert len(pieces) > 3
    assert all(piece.endswith((".", "!", "?", "”")) for piece in pieces)
    assert not any(piece.endswith("Dr") or piece.endswith("3.") for piece in pieces)
    text = "river stone lamp orbit quiet " * 30
    for piece in parts(text, check(splitter(40), text, 40)):
        assert f" {piece} " in f" {text}"
    paragraphs = "\r\n\r\n".join(["river stone lamp orbit " * 6] * 8)
    assert set(parts(paragraphs, check(splitter(40), paragraphs, 40))) == {("river stone lamp orbit " * 6).strip()}


def test_scripts_without_spaces_are_cut_at_their_marks_else_between_characters(splitter: Make) -> None:
    text = "東京は今日も雨です。" * 30
    assert all(piece.endswith("。") for piece in parts(text, check(splitter(40), text, 40)))
    for text in ("東京は今日も雨です" * 40, "สวัสดีชาวโลก" * 40):
        for kind in (BERT, BYTES, UNIGRAM):
            assert len(check(splitter(40, kind=kind), text, 40)) > 1 or kind == BERT


@pytest.mark.parametrize("kind", [BERT, BYTES, UNIGRAM])
def test_one_word_of_a_hundred_thousand_characters(splitter: Make, kind: str) -> None:
    text = "before it. " + "supercalifragilistic" * 5_000 + " and behind"
    pieces = check(splitter(64, 8, kind=kind), text, 64)
    assert pieces[0].start == 0
    assert pieces[-1].end == len(text)


def test_what_a_reader_takes_for_one_character_stays_whole(splitter: Make) -> None:
    for one in ("👩‍👩‍👧", "👍🏽", "e\u0301", "\r\n"):
        text = ("x" if one == "\r\n" else "") + one
        text *= 60
        for start, end in check(splitter(40, 6, kind=BYTES), text, 40):
            for place in (start, end):
                assert not any(text.startswith(one, place - inside) for inside in range(1, len(one)) if place >= inside)


def test_neighbours_share_the_words_that_were_asked_for(splitter: Make) -> None:
    words = [f"{random.Random(i).choice(['river', 'stone', 'lamp', 'orbit'])}" for i in range(400)]
    text = " ".join(words)
    cut = splitter(40, 10)
    pieces = check(cut, text, 40)
    for before, after in pairwise(pieces):
        assert len(text[after.start : before.end].split()) == 10
    assert [after.start - before.end for before, after in pairwise(splitter(40).split(text))] == [1] * (
        len(splitter(40).split(text)) - 1
    )


def test_short_text_is_one_piece_and_prefix_and_special_tokens_count(splitter: Make) -> None:
    text = "  one two three \n"
    assert splitter().split(text) == [Piece(2, 15)]
    assert splitter().count("one two three") == 5
    assert splitter(prefix="passage: ").count("one two three") == 7
    assert splitter().split(" \n\u200b") == []
    exactly = "word " * 38
    assert len(splitter(40).split(exactly)) == 1
    assert len(splitter(40).split(exactly + "word")) == 2
    assert len(splitter(40, prefix="passage: ").split(exactly)) == 2


def test_a_megabyte_takes_one_windows_memory(splitter: Make) -> None:
    text = SENTENCES * (1_000_000 // len(SENTENCES))
    cut = splitter(200, 20)
    seen: list[int] = []
    encode = cut._tokenizer.encode

    class Counted:
        def encode(self, part: str, **options: Any) -> Any:
            seen.append(len(part))
            return encode(part, **options)

        encode_batch_fast = cut._tokenizer.encode_batch_fast

    cut._tokenizer = Counted()
    pieces = cut.split(text)
    assert 1_000 < len(pieces) < 3_000
    assert max(seen) <= cut._window
    assert sum(seen) < 1.2 * len(text)


def test_what_leaves_no_room_is_refused(splitter: Make, minilm: Model, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="larger --chunk"):
        splitter(32, 20)
    with pytest.raises(UsageError, match="have room for 4 tokens"):
        splitter(36, prefix="word " * 30)
    with pytest.raises(UsageError, match=f"reads at most {minilm.max_tokens} tokens"):
        Splitter.of_model(minilm, minilm.max_tokens + 1)
    assert Splitter.of_model(minilm, minilm.max_tokens, 20).split("one. two.") == [Piece(0, 9)]
    with pytest.raises(ModelError, match=r"tokenizer in .* cannot be read"):
        Splitter.of_model(replace(minilm, path=tmp_path), 100)


def test_special_tokens_that_the_model_names_are_known(minilm: Model, tmp_path: Path) -> None:
    for name in ("tokenizer.json",):
        (tmp_path / name).write_bytes((minilm.path / name).read_bytes())
    names = {"mask_token": "[ONE]", "additional_special_tokens": [{"content": "[TWO]", "lstrip": False}]}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(names))
    tokenizer = load_tokenizer(tmp_path)
    assert len(tokenizer.encode("[ONE][TWO]", add_special_tokens=False)) == 2


def test_the_fingerprint_tells_how_texts_are_cut_and_still_the_model() -> None:
    one, other = chunked_fingerprint("0123-bf16", 200, 20), chunked_fingerprint("0123-bf16", 200, 0)
    assert len({one, other, "0123-bf16"}) == 3
    assert same_model(one, other)
    assert same_model(one, "0123")
