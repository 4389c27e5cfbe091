"""Captions and their tokenizer."""

import json
import random
import re

import pytest
import torch

from engine.models.tokenizer import Tokenizer
from engine.recipes import captions, world
from engine.recipes.captions import _CONVERSE, _PRESENT, _STRIPES, SYNONYMS, VOCABULARY, describe

TOKENIZER = Tokenizer(VOCABULARY)


def scenes(n: int, seed: int = 0, counts: tuple[float, float, float] = (0.4, 0.3, 0.3)) -> list[list[int]]:
    return world.sample_scenes(n, torch.Generator().manual_seed(seed), split="any", count_weights=counts).tolist()


def phrases(attribute: str, value: str) -> list[str]:
    """All ways to say a value."""
    said = list(SYNONYMS[attribute][value])
    if attribute == "motion":
        said += _PRESENT[value]
    if (attribute, value) == ("material", "striped"):
        said += _STRIPES
    return said


def mentions(text: str, attribute: str, value: str) -> bool:
    return any(re.search(rf"\b{re.escape(phrase)}\b", text.lower()) for phrase in phrases(attribute, value))


def test_tables_cover_the_world() -> None:
    for attribute, values in SYNONYMS.items():
        column = "relation2" if attribute == "relation" else attribute
        assert set(values) == set(world.ATTRIBUTES[column])
        assert all(values.values())


@pytest.mark.parametrize("attribute", list(SYNONYMS))
def test_a_synonym_belongs_to_one_value(attribute: str) -> None:
    said = [phrase for value in SYNONYMS[attribute] for phrase in set(phrases(attribute, value))]
    assert len(said) == len(set(said))


def test_complete_captions_say_everything() -> None:
    rng = random.Random(0)
    for scene in scenes(1500):
        text = describe(scene, rng, complete=True)
        for name, names in world.ATTRIBUTES.items():
            attribute, index = name.rstrip("23"), int("0" + name.lstrip("abcdefghijklmnopqrstuvwxyz"))
            if attribute == "count" or index > scene[0] + 1:
                continue
            value = names[scene[world.COLUMN[name]]]
            said = mentions(text, attribute, value)
            if attribute == "relation" and scene[0] == 1:
                said = said or mentions(text, attribute, _CONVERSE[value])
            assert said, (name, value, text)


def test_optional_clauses_are_sometimes_left_out() -> None:
    rng, n = random.Random(0), 4000
    scene = scenes(1, counts=(1.0, 0.0, 0.0))[0]
    texts = [describe(scene, rng) for _ in range(n)]
    for name in ("material", "motion", "ground", "sky", "camera"):
        value = world.ATTRIBUTES[name][scene[world.COLUMN[name]]]
        left_out = sum(not mentions(text, name, value) for text in texts) / n
        assert 0.05 < left_out < 0.09
    assert all(mentions(text, "shape", world.SHAPES[scene[1]]) for text in texts)
    assert len(set(texts)) > 0.9 * n


def test_every_phrase_is_reachable() -> None:
    rng = random.Random(0)
    text = "\n".join(describe(scene, rng) for scene in scenes(8000)).lower()
    for attribute, values in SYNONYMS.items():
        for value in values:
            assert all(re.search(rf"\b{re.escape(phrase)}\b", text) for phrase in phrases(attribute, value))


def test_the_same_seed_gives_the_same_captions() -> None:
    rows = scenes(20)
    first, second = ([describe(scene, rng) for scene in rows] for rng in (random.Random(5), random.Random(5)))
    assert first == second


def test_inactive_columns_are_ignored() -> None:
    one = scenes(1, counts=(1.0, 0.0, 0.0))[0]
    other = one[:8] + [0] * 6
    assert describe(one, random.Random(1)) == describe(other, random.Random(1))


def test_captions_are_in_the_vocabulary_and_fit() -> None:
    rng = random.Random(0)
    unknown, longest = TOKENIZER.encode("zzz")[0], 0
    for scene in scenes(4000, counts=(0.1, 0.2, 0.7)):
        text = describe(scene, rng, complete=True)
        ids = TOKENIZER.encode(text, 200)
        assert unknown not in ids, text
        assert "  " not in text and " ," not in text and ",," not in text
        longest = max(longest, ids.index(1) + 1)
    assert 40 < longest <= captions.LONGEST + 1 == 48


def test_vocabulary_is_sorted_words() -> None:
    assert list(VOCABULARY) == sorted(set(VOCABULARY))
    assert all(re.fullmatch(r"[a-z]+", word) for word in VOCABULARY)


# ---------------------------------------------------------------- tokenizer


def test_encode_has_the_length_asked_for() -> None:
    ids = TOKENIZER.encode("A red ball, please!", length=8)
    assert len(ids) == 8 and ids[4:] == [1, 0, 0, 0] and 2 not in ids
    assert TOKENIZER.decode(ids) == "a red ball please"
    cut = TOKENIZER.encode("red " * 100, length=8)
    assert len(cut) == 8 and cut[-1] == 1 and len(set(cut[:-1])) == 1
    assert TOKENIZER.encode("") == [1] + [0] * 47
    with pytest.raises(ValueError, match="positive"):
        TOKENIZER.encode("red", length=0)


def test_case_accents_punctuation_and_hyphens() -> None:
    plain = TOKENIZER.encode("a red ball by the sea")
    for text in (
        "A RED BALL BY THE SEA",
        "a (red) ball: by the sea...",
        "a réd-ball\nby\tthe sea",
        "á red ball by the sea",
    ):
        assert TOKENIZER.encode(text) == plain


def test_endings_fold() -> None:
    assert TOKENIZER.encode("balls boxes cubes") == TOKENIZER.encode("ball box cube")
    assert TOKENIZER.unknown_words("cones donuts") == []


def test_unknown_words() -> None:
    assert TOKENIZER.unknown_words("A red Zebra and a zebra on a Trampoline") == ["zebra", "trampoline"]
    assert TOKENIZER.encode("zebra")[0] == 2


def test_forms_are_the_words_that_encode_knows() -> None:
    forms = TOKENIZER.forms()
    assert {"ball", "balls", "boxes", "sliding"} <= forms
    assert not any(TOKENIZER.unknown_words(form) for form in forms)
    endings = ("", "s", "es", "ies", "ing", "ed", "ly", "ning", "ped", "er")
    tried = {word + ending for word in TOKENIZER.words[3:] for ending in endings}
    tried |= {word[:-1] + ending for word in TOKENIZER.words[3:] for ending in endings if len(word) > 3}
    assert {word for word in tried if not TOKENIZER.unknown_words(word)} <= forms


@pytest.mark.parametrize("text", ["\ud800", "red \udfff ball", "🎈", "\x00\x00", "красный шар", "e\u0301" * 1000, "ﬁ"])
def test_any_text_encodes(text: str) -> None:
    assert len(TOKENIZER.encode(text)) == 48
    json.dumps(TOKENIZER.unknown_words(text)).encode()
