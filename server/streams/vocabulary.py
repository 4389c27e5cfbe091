"""Which words of a prompt a model ignores. Pure: standard library and the engine's contract only."""

import itertools
import re
import unicodedata

from engine.wire import ModelInfo

_WORD = re.compile(r"[a-z0-9]+(?:'[a-z]+)?")


def split(text: str) -> list[str]:
    """The words that the engine's word tokenizer sees: runs of ASCII letters and digits, lower case, no accents."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return _WORD.findall(plain.lower().replace("\u2019", "'"))


def ignored_words(model: ModelInfo | None, *prompts: str) -> list[str] | None:
    """The words of any prompt that the model does not know, and those past the number that it reads; each once.

    Words in other alphabets are among them. None if the model takes any text, or if the engine has not started yet
    (`model` is None).
    """
    if model is None or model.vocabulary is None:
        return None
    ignored: dict[str, None] = {}  # a set that keeps its order
    for prompt in prompts:
        read = 0
        for letters, run in itertools.groupby(unicodedata.normalize("NFKC", prompt).lower(), _in_word):
            word = "".join(run) if letters else ""
            for seen in split(word):
                read += 1
                if seen not in model.vocabulary or (model.prompt_words is not None and read > model.prompt_words):
                    ignored[seen] = None
            if any(map(str.isalnum, word)) and not split(word):
                ignored[word] = None
    return list(ignored)


def _in_word(character: str) -> bool:
    return character.isalnum() or unicodedata.category(character).startswith("M") or character in "'\u2019"
