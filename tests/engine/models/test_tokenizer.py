"""The SentencePiece tokenizer, on a small Unigram model made here."""

from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from engine.models.tokenizer import PromptTokenizer, SentencePieceTokenizer, Tokenizer, clean, load_tokenizer

SPECIAL = ["<pad>", "</s>", "<unk>"]
PIECES = ["▁a", "▁red", "▁ball", "▁", "a", "b", "e", "d", "l", "r", "&", '"', "é"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tokenizer.json as google/umt5-xxl's is built: Unigram, Metaspace, `</s>` from the post-processor."""
    vocabulary = [(piece, 0.0) for piece in SPECIAL] + [(piece, -1.0 - i / 10) for i, piece in enumerate(PIECES)]
    made = tokenizers.Tokenizer(models.Unigram(vocabulary, unk_id=2, byte_fallback=False))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.add_special_tokens(SPECIAL)
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_ids_end_and_are_padded(folder: Path) -> None:
    tokenizer = SentencePieceTokenizer.load(folder)
    assert tokenizer.encode("a red ball", 6) == [3, 4, 5, 1, 0, 0]
    assert tokenizer.encode("", 3) == [1, 0, 0]


def test_the_end_token_survives_truncation(folder: Path) -> None:
    tokenizer = SentencePieceTokenizer.load(folder)
    assert tokenizer.encode("a red ball a red ball", 4) == [3, 4, 5, 1]
    assert tokenizer.encode("a red ball", 1) == [1]
    with pytest.raises(ValueError, match="length"):
        tokenizer.encode("a", 0)


def test_it_agrees_with_the_librarys_own_truncation_and_padding(folder: Path) -> None:
    """Which is what Wan uses through transformers."""
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ours = SentencePieceTokenizer.load(folder)
    for length in (2, 5, 30):
        theirs.enable_truncation(length)
        theirs.enable_padding(length=length, pad_id=0)
        for text in ("a red ball", "a bald éland reads a red label", ""):
            assert ours.encode(text, length) == theirs.encode(text).ids


def test_settings_in_the_file_and_spelled_padding_change_nothing(folder: Path) -> None:
    path = folder / "tokenizer.json"
    theirs = tokenizers.Tokenizer.from_file(str(path))
    theirs.enable_truncation(2)
    theirs.enable_padding(length=9)
    theirs.save(str(path))
    ours = SentencePieceTokenizer.load(folder)
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


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        SentencePieceTokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        SentencePieceTokenizer.load(tmp_path)
    other = tokenizers.Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1}, unk_token="[UNK]"))
    with pytest.raises(ValueError, match="umt5"):
        SentencePieceTokenizer(other)


def test_a_folder_tells_which_tokenizer_it_holds(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("words")
    Tokenizer(["red"]).save(other / "tokenizer.json")
    both: list[PromptTokenizer] = [load_tokenizer(other), load_tokenizer(folder)]
    assert [type(tokenizer) for tokenizer in both] == [Tokenizer, SentencePieceTokenizer]
    assert [tokenizer.encode("red", 4) for tokenizer in both] == [[3, 1, 0, 0], [4, 1, 0, 0]]
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        load_tokenizer(other / "nothing")
