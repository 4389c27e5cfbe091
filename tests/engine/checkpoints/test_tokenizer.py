"""Tokenizer files of both kinds, on a small Unigram model made here and the vocabulary of `mini`."""

from pathlib import Path

import pytest
import tokenizers
from tokenizers import models

from engine.checkpoints.tokenizer import load_sentencepiece, load_tokenizer, load_words, save_words
from engine.models.tokenizer import PromptTokenizer, SentencePieceTokenizer, Tokenizer
from engine.recipes.captions import VOCABULARY


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        load_sentencepiece(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        load_sentencepiece(tmp_path)
    other = tokenizers.Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1}, unk_token="[UNK]"))
    with pytest.raises(ValueError, match="umt5"):
        SentencePieceTokenizer(other)


def test_a_folder_tells_which_tokenizer_it_holds(
    tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = tmp_path_factory.mktemp("words")
    save_words(Tokenizer(["red"]), other / "tokenizer.json")
    both: list[PromptTokenizer] = [load_tokenizer(other), load_tokenizer(tokenizer_folder)]
    assert [type(tokenizer) for tokenizer in both] == [Tokenizer, SentencePieceTokenizer]
    assert [tokenizer.encode("red", 4) for tokenizer in both] == [[3, 1, 0, 0], [4, 1, 0, 0]]
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        load_tokenizer(other / "nothing")


def test_save_and_load(tmp_path: Path) -> None:
    tokenizer = Tokenizer(VOCABULARY)
    path = tmp_path / "tokenizer.json"
    save_words(tokenizer, path)
    assert load_words(path).words == tokenizer.words
    assert tokenizer.words[:3] == ("<pad>", "<eos>", "<unk>") and len(tokenizer) == len(VOCABULARY) + 3
    path.write_text("[]")
    with pytest.raises(ValueError, match="not a vocabulary"):
        load_words(path)
