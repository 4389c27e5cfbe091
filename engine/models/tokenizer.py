"""Words to token ids for the embedded text encoder: a closed vocabulary, so a prompt costs a dictionary look-up."""

import json
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"

_WORD = re.compile(r"[a-z0-9]+(?:'[a-z]+)?")
_CANDIDATES = (("ies", "y"), ("es", ""), ("s", ""), ("ing", "e"), ("ing", ""), ("ed", "e"), ("ed", ""), ("ly", ""))


class Tokenizer:
    """Word-level tokenizer over a fixed vocabulary.

    Ids: `<pad>` 0, `<eos>` 1, `<unk>` 2, then the words in sorted order. Text is lower-cased and stripped of accents
    and punctuation; a hyphen parts words. A word outside the vocabulary is folded (plural, -ing, -ed, -ly) if exactly
    one word of the vocabulary results; otherwise it is `<unk>`.
    """

    def __init__(self, vocabulary: Iterable[str]) -> None:
        self.words: tuple[str, ...] = (PAD, EOS, UNK, *sorted(set(vocabulary)))
        self._ids = {word: index for index, word in enumerate(self.words)}

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, text: str, length: int = 48) -> list[int]:
        """Exactly `length` ids: the words, `<eos>`, padding. Longer texts are cut; `<eos>` always stays."""
        if length < 1:
            raise ValueError(f"length must be positive, not {length}")
        unknown = self._ids[UNK]
        ids = [self._ids.get(self._known(word), unknown) for word in _split(text)][: length - 1]
        return ids + [self._ids[EOS]] + [self._ids[PAD]] * (length - 1 - len(ids))

    def decode(self, ids: Iterable[int]) -> str:
        """The words of `ids` up to `<eos>`, joined by spaces."""
        words = []
        for index in ids:
            if self.words[index] == EOS:
                break
            if self.words[index] != PAD:
                words.append(self.words[index])
        return " ".join(words)

    def unknown_words(self, text: str) -> list[str]:
        """The words of `text`, as split and lower-cased, that the vocabulary lacks; each once, in order."""
        return list(dict.fromkeys(word for word in _split(text) if self._known(word) not in self._ids))

    def save(self, path: str | Path) -> None:
        """Writes the vocabulary as JSON."""
        Path(path).write_text(json.dumps({"words": self.words[3:]}, indent=0) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Reads what `save` wrote. Raises ValueError if the file is something else."""
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        words = content.get("words") if isinstance(content, dict) else None
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise ValueError(f"{path} is not a vocabulary")
        return cls(words)

    def _known(self, word: str) -> str:
        if word in self._ids:
            return word
        found = set()
        for ending, replacement in _CANDIDATES:
            if word.endswith(ending) and len(word) - len(ending) >= 3:
                stem = word.removesuffix(ending)
                found |= {stem + replacement} & self._ids.keys()
                if ending in ("ing", "ed") and stem[-1] == stem[-2]:
                    found |= {stem[:-1]} & self._ids.keys()
        return found.pop() if len(found) == 1 else word


def _split(text: str) -> list[str]:
    # Decomposed, an accent is a character of its own and falls away; lone surrogates match no word character.
    plain = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return _WORD.findall(plain.lower().replace("\u2019", "'"))
