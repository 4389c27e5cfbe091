"""Prompts to token ids: a closed vocabulary of words for the embedded encoder, SentencePiece for the public one."""

import html
import re
import unicodedata
from collections.abc import Iterable
from typing import Protocol

import ftfy
import tokenizers

PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"

_WORD = re.compile(r"[a-z0-9]+(?:'[a-z]+)?")
_CANDIDATES = (("ies", "y"), ("es", ""), ("s", ""), ("ing", "e"), ("ing", ""), ("ed", "e"), ("ed", ""), ("ly", ""))


class PromptTokenizer(Protocol):
    """Turns a prompt into token ids."""

    def encode(self, text: str, length: int) -> list[int]:
        """Exactly `length` ids: the text, truncated where it is too long, the end token, and 0 as padding."""


class Tokenizer:
    """Word-level tokenizer over a fixed vocabulary.

    Ids: `<pad>` 0, `<eos>` 1, `<unk>` 2, then the words in sorted order. Text is lower-cased and stripped of accents
    and punctuation; a hyphen separates words. A word outside the vocabulary is folded (plural, -ing, -ed, -ly) if
    exactly one word of the vocabulary results; otherwise it is `<unk>`.
    """

    def __init__(self, vocabulary: Iterable[str]) -> None:
        self.words: tuple[str, ...] = (PAD, EOS, UNK, *sorted(set(vocabulary)))
        self._ids = {word: index for index, word in enumerate(self.words)}

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, text: str, length: int = 48) -> list[int]:
        """Exactly `length` ids: the words, `<eos>`, padding. Longer texts are truncated; `<eos>` is always kept."""
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

    def forms(self) -> frozenset[str]:
        """Every word that `encode` does not turn into `<unk>`: the vocabulary, and what is folded into it."""
        words = self.words[3:]  # without the special tokens
        stems = {
            word.removesuffix(tail) + ending for word in words for ending, tail in _CANDIDATES if word.endswith(tail)
        }
        doubled = {word + word[-1] + ending for word in words for ending in ("ing", "ed")}
        return frozenset({*words, *(form for form in stems | doubled if self._known(form) in self._ids)})

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


class SentencePieceTokenizer:
    """A tokenizer of Hugging Face's `tokenizers`; for Wan it is google/umt5-xxl's."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        """Raises ValueError unless `</s>` is known and padding is id 0, which `TextEncoder` relies on."""
        eos = tokenizer.token_to_id("</s>")
        if eos is None or tokenizer.token_to_id(PAD) != 0:
            raise ValueError(f"the tokenizer must have </s>, and {PAD} as id 0: use google/umt5-xxl's")
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer, self._eos = tokenizer, eos
        # SentencePiece's rule for UMT5, nmt_nfkc, is NFKC; a tokenizer.json that transformers 5 wrote has lost it
        normalizer = tokenizer.normalizer
        self._lacks_nfkc = normalizer is None or normalizer.normalize_str("\u2460") != "1"

    def encode(self, text: str, length: int) -> list[int]:
        """Exactly `length` ids: the cleaned text, `</s>`, zeros. Longer texts are truncated; `</s>` is always kept."""
        if length < 1:
            raise ValueError(f"length must be positive, not {length}")
        plain = clean(text)
        if self._lacks_nfkc:
            plain = unicodedata.normalize("NFKC", plain)
        found: list[int] = self._tokenizer.encode(plain, add_special_tokens=False).ids
        # a prompt may contain the padding token's text, which would leave a gap in what the encoder reads
        ids = [*[token for token in found if token != 0][: length - 1], self._eos]
        return ids + [0] * (length - len(ids))


def clean(text: str) -> str:
    """Clean text as in Wan's training: `basic_clean` and `whitespace_clean` of Wan2.1's `wan/modules/tokenizers.py`.

    ftfy mends wrongly decoded text, straightens quotes, removes control characters and composes accents (NFC); HTML
    entities are resolved twice; white space, line ends and tabs among it, collapses and is stripped.
    """
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


def _split(text: str) -> list[str]:
    # Decomposed, an accent is a character of its own and falls away; lone surrogates match no word character.
    plain = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return _WORD.findall(plain.lower().replace("\u2019", "'"))
