"""Which words of a prompt a model ignores, against the engine's tokenizer and through the API."""

import random
from typing import Any

import msgspec
import pytest

from engine.assemble import WEIGHTS
from engine.checkpoints.tokenizer import load_tokenizer
from engine.config import MINI
from engine.models.tokenizer import Tokenizer
from engine.wire import ModelInfo
from server.backends.fake import FakeBackend
from server.streams.vocabulary import ignored_words, split

TOKENIZER = load_tokenizer(WEIGHTS / "mini")
assert isinstance(TOKENIZER, Tokenizer)
MODEL = ModelInfo(
    "mini", 8, 4, 16, 12, 9, 2, 0.1, 1, "", vocabulary=TOKENIZER.forms(), prompt_words=MINI.text.length - 1
)
OPEN = msgspec.structs.replace(MODEL, vocabulary=None, prompt_words=None)
HARD = [
    "A red Zebra and a zebra on a Trampoline",
    "a (r\u00e9d)-ball\nby\tthe se\u0301a...",
    "the ball's donkey\u2019s 3rd cube\u2122 _big_ \u2460 \u00bd \ufb01lm \u0130ce",
    "q\u0301r '' ' don''t 'tis",
    "",
]


@pytest.mark.parametrize("text", HARD)
def test_words_are_split_as_the_engine_splits_them(text: str) -> None:
    assert [word for word in dict.fromkeys(split(text)) if word not in TOKENIZER.forms()] == TOKENIZER.unknown_words(
        text
    )
    assert ignored_words(MODEL, text) == TOKENIZER.unknown_words(text)


def test_random_text_too() -> None:
    generator = random.Random(5)
    letters = [*"aeinrst '-_.\u2019", "\u0301", "\u00e9", "\u2122", "\u2460", "red", "balls", "\ufb01"]
    for _ in range(2000):
        text = "".join(generator.choices(letters, k=generator.randrange(12)))
        known = ignored_words(MODEL, text)
        assert known == TOKENIZER.unknown_words(text), ascii(text)


def test_other_alphabets_are_named() -> None:
    text = "\u041a\u0440\u0430\u0441\u043d\u044b\u0439 ball \u7403 \u2019"
    assert ignored_words(MODEL, text) == ["\u043a\u0440\u0430\u0441\u043d\u044b\u0439", "\u7403"]


def test_words_past_those_that_the_model_reads() -> None:
    read = MINI.text.length - 1  # one token is for the end
    assert ignored_words(MODEL, "ball " * read) == []
    assert ignored_words(MODEL, "ball " * read + "on red red grass") == ["on", "red", "grass"]
    assert ignored_words(MODEL, "a zeppelin", "a red ball", "a zeppelin on lava") == ["zeppelin", "lava"]


def test_a_model_without_a_vocabulary_ignores_nothing_that_is_known() -> None:
    assert ignored_words(OPEN, "a zeppelin") is None
    assert ignored_words(None, "a zeppelin") is None


@pytest.mark.anyio
async def test_the_api_says_which(run_gateway: Any) -> None:
    backend = FakeBackend(width=64, height=48, chunk_seconds=0.02, vocabulary=frozenset({"a", "red", "ball", "on"}))
    async with run_gateway(backend) as gateway:
        stream = await gateway.open(prompt="a red zeppelin", duration_s=4)
        assert stream["ignored_words"] == ["zeppelin"]
        seen = await gateway.watch(stream, until=lambda seen: len(seen.frames) > 2)
        assert seen.events[0]["stream"]["ignored_words"] == ["zeppelin"]
        changed = (await gateway.patch(stream, prompt="a ball on Lava, lava")).json()
        assert changed["ignored_words"] == ["lava"]
        extra = {"prompts": [{"at_s": 0.5, "prompt": "a cone"}]}
        video = {"prompt": "a blue ball", "seconds": "1", "extra": extra}
        assert (await gateway.http.post("/v1/videos", json=video)).json()["extra"]["ignored_words"] == ["blue", "cone"]


@pytest.mark.anyio
async def test_a_model_that_takes_any_text(run_gateway: Any) -> None:
    async with run_gateway(FakeBackend(width=64, height=48, chunk_seconds=0.02)) as gateway:
        assert (await gateway.open(prompt="a red zeppelin", duration_s=1))["ignored_words"] is None
