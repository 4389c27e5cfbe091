"""Tokenizer files: `tokenizer.json` of either kind, read and written."""

import json
from pathlib import Path

import tokenizers

from engine.models.tokenizer import PromptTokenizer, SentencePieceTokenizer, Tokenizer

FILE = "tokenizer.json"


def load_tokenizer(folder: str | Path) -> PromptTokenizer:
    """The tokenizer in `folder`: a vocabulary of words, or Hugging Face's format.

    Raises:
        ValueError: `tokenizer.json` is missing, or is neither.
    """
    path = Path(folder) / FILE
    return parse_tokenizer(_read(path), path)


def parse_tokenizer(text: str, path: Path) -> PromptTokenizer:
    """The tokenizer that a file of either kind describes. Raises ValueError, which names `path`, if it is neither."""
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as a tokenizer: {error}") from None
    if isinstance(content, dict) and "words" in content:
        return _words(content, path)
    return _sentencepiece(text, path)


def save_words(tokenizer: Tokenizer, path: str | Path) -> None:
    """Write the vocabulary as JSON, without the special tokens."""
    Path(path).write_text(json.dumps({"words": tokenizer.words[3:]}, indent=0) + "\n", encoding="utf-8")


def load_words(path: str | Path) -> Tokenizer:
    """Read what `save_words` wrote. Raises ValueError where the file holds something else."""
    return _words(json.loads(Path(path).read_text(encoding="utf-8")), path)


def load_sentencepiece(folder: str | Path) -> SentencePieceTokenizer:
    """Read Hugging Face's `tokenizer.json` in `folder`. Raises ValueError where it is missing or something else."""
    path = Path(folder) / FILE
    return _sentencepiece(_read(path), path)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a tokenizer: {error}") from None


def _words(content: object, path: str | Path) -> Tokenizer:
    words = content.get("words") if isinstance(content, dict) else None
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise ValueError(f"{path} is not a vocabulary")
    return Tokenizer(words)


def _sentencepiece(text: str, path: Path) -> SentencePieceTokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"{path} cannot be read as a tokenizer: {error}") from None
    return SentencePieceTokenizer(tokenizer)
