"""The SentencePiece tokenizer, on a small Unigram model made here."""

from pathlib import Path

import pytest
import tokenizers

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
    ],
)
def test_cleaning(text: str, cleaned: str) -> None:
    assert clean(text) == cleaned
