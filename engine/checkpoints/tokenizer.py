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
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a tokenizer: {error}") from None
    if isinstance(content, dict) and "words" in content:
        return load_words(path)
    return load_sentencepiece(folder)


def save_words(tokenizer: Tokenizer, path: str | Path) -> None:
    """Write the vocabulary as JSON, without the special tokens."""
    Path(path).write_text(json.dumps({"words": tokenizer.words[3:]}, indent=0) + "\n", encoding="utf-8")


def load_words(path: str | Path) -> Tokenizer:
    """Read what `save_words` wrote. Raises ValueError where the file holds something else."""
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    words = content.get("words") if isinstance(content, dict) else None
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise ValueError(f"{path} is not a vocabulary")
    return Tokenizer(words)


def load_sentencepiece(folder: str | Path) -> SentencePieceTokenizer:
    """Read Hugging Face's `tokenizer.json` in `folder`. Raises ValueError where it is missing or something else."""
    path = Path(folder) / FILE
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"{path} cannot be read as a tokenizer: {error}") from None
    return SentencePieceTokenizer(tokenizer)
