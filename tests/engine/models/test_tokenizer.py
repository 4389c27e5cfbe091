"""The SentencePiece tokenizer, on a small Unigram model made here."""

from pathlib import Path

import pytest
import tokenizers
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from tokenizers import normalizers

from engine.checkpoints.tokenizer import load_sentencepiece
from engine.models.tokenizer import clean


def test_ids_end_and_are_padded(tokenizer_folder: Path) -> None:
    tokenizer = load_sentencepiece(tokenizer_folder)
    assert tokenizer.encode("a red ball", 6) == [3, 4, 5, 1, 0, 0]
    assert tokenizer.encode("", 3) == [1, 0, 0]


def test_the_end_token_survives_truncation(tokenizer_folder: Path) -> None:
    tokenizer = load_sentencepiece(tokenizer_folder)
    assert tokenizer.encode("a red ball a red ball", 4) == [3, 4, 5, 1]
    assert tokenizer.encode("a red ball", 1) == [1]
    with pytest.raises(ValueError, match="length"):
        tokenizer.encode("a", 0)


def test_it_agrees_with_the_librarys_own_truncation_and_padding(tokenizer_folder: Path) -> None:
    """Which is what Wan uses through transformers."""
    theirs = tokenizers.Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    ours = load_sentencepiece(tokenizer_folder)
    for length in (2, 5, 30):
        theirs.enable_truncation(length)
        theirs.enable_padding(length=length, pad_id=0)
        for text in ("a red ball", "a bald éland reads a red label", ""):
            assert ours.encode(text, length) == theirs.encode(text).ids


def test_settings_in_the_file_and_spelled_padding_change_nothing(tokenizer_folder: Path) -> None:
    path = tokenizer_folder / "tokenizer.json"
    theirs = tokenizers.Tokenizer.from_file(str(path))
    theirs.enable_truncation(2)
    theirs.enable_padding(length=9)
    theirs.save(str(path))
    ours = load_sentencepiece(tokenizer_folder)
    assert ours.encode("a red ball", 5) == [3, 4, 5, 1, 0]
    ids = ours.encode("a <pad> red", 8)
    end = ids.index(1)
    assert 0 not in ids[:end] and not any(ids[end + 1 :])


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  a\t red\n\n ball ", "a red ball"),
        ("a &amp;amp; b", "a & b"),
        ("&quot;a&quot; &lt;b&gt;", '"a" <b>'),
        ("\u201ca\u201d \u2018b\u2019", "\"a\" 'b'"),
        ("e\u0301", "\u00e9"),
        ("\u3000a\u00a0b", "a b"),
        ("", ""),
        ("sch\u00c3\u00b6n", "sch\u00f6n"),  # UTF-8 that was read as Latin-1
        ("\u00e2\u20ac\u0153good\u00e2\u20ac\u009d", '"good"'),  # and as Windows-1252
        ("\u00c3\x85ngstr\u00c3\u00b6m, voil\u00c3\xa0", "\u00c5ngstr\u00f6m, voil\u00e0"),
        ("\ufb01lm\x07 \x1b[31mred\x1b[0m", "film red"),
        ("a\u2028b\x0cc\rd", "a b c d"),
        ("\ufeffa\ud800", "a\ufffd"),
        ("\u2460", "\u2460"),  # NFKC is the tokenizer's part
    ],
)
def test_cleaning(text: str, cleaned: str) -> None:
    assert clean(text) == cleaned
    assert prompt_clean(text) == cleaned  # diffusers' copy of what Wan does


def test_ids_are_those_of_the_nfkc_text(tokenizer_folder: Path) -> None:
    """As SentencePiece's nmt_nfkc has it, whether the file still has that rule or not."""
    text = "\u24d0 \u1d63\u1d49\u1d48 \U0001d41b\U0001d41a\U0001d425\U0001d425"
    assert clean(text) == text
    assert load_sentencepiece(tokenizer_folder).encode(text, 6) == [3, 4, 5, 1, 0, 0]
    path = str(tokenizer_folder / "tokenizer.json")
    for rule in (normalizers.NFKC(), normalizers.Replace("x", "y")):
        theirs = tokenizers.Tokenizer.from_file(path)
        theirs.normalizer = rule
        theirs.save(path)
        assert load_sentencepiece(tokenizer_folder).encode(text, 6) == [3, 4, 5, 1, 0, 0]
