"""English captions of scenes in many phrasings, and the vocabulary that they are made of.

Every synonym belongs to one value of its attribute. The main object is always named before its companions, which are
placed by reference to "it", "the big one" or its shape.
"""

import random
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from engine.models.tokenizer import Tokenizer
from engine.recipes.world import ATTRIBUTES, COLUMN

SYNONYMS: dict[str, dict[str, tuple[str, ...]]] = {
    "shape": {
        "sphere": ("sphere", "ball", "orb", "globe"),
        "cube": ("cube", "box", "block", "dice"),
        "cylinder": ("cylinder", "drum", "barrel", "tube"),
        "cone": ("cone", "funnel"),
        "ring": ("ring", "donut", "torus", "hoop"),
        "diamond": ("diamond", "octahedron", "gem", "crystal"),
        "cross": ("cross", "plus", "plus sign"),
    },
    "colour": {
        "red": ("red", "crimson", "scarlet"),
        "orange": ("orange", "tangerine"),
        "yellow": ("yellow", "lemon"),
        "green": ("green", "emerald"),
        "teal": ("teal", "turquoise", "cyan"),
        "blue": ("blue", "cobalt", "navy"),
        "purple": ("purple", "violet"),
        "pink": ("pink", "rose"),
        "white": ("white", "ivory"),
        "black": ("black", "ebony"),
    },
    "material": {
        "matte": ("matte", "plain", "rubber"),
        "metal": ("metal", "metallic", "shiny", "chrome", "polished"),
        "striped": ("striped", "stripy", "banded"),
    },
    "motion": {
        "still": ("standing still", "resting", "sitting motionless", "at rest"),
        "spinning": ("spinning", "rotating", "spinning around", "turning on the spot", "twirling"),
        "bouncing": ("bouncing", "bouncing up and down", "jumping", "hopping"),
        "sliding": ("sliding", "sliding from side to side", "gliding back and forth", "sliding to and fro"),
        "circling": ("circling", "moving in a circle", "going round in circles", "driving in circles"),
        "pulsing": ("pulsing", "pulsating", "growing and shrinking", "throbbing"),
        "floating": ("floating", "hovering", "floating in the air", "levitating", "hovering in the air"),
    },
    "ground": {
        "grass": ("grass", "a meadow", "a lawn", "green grass", "a field"),
        "sand": ("sand", "desert sand", "a beach", "sand dunes", "the desert"),
        "snow": ("snow", "a snowy plain", "white snow", "a snowfield"),
        "tiles": ("tiles", "a checkerboard", "a chessboard floor", "a tiled floor", "checkered tiles"),
        "water": ("water", "the sea", "a lake", "the ocean", "rippling water"),
    },
    "sky": {
        "day": ("by day", "on a sunny day", "at noon", "under a clear sky", "under a blue sky", "in daylight"),
        "sunset": ("at sunset", "at dusk", "in the evening", "at golden hour", "at sundown"),
        "night": ("at night", "under a starry sky", "at midnight", "by moonlight", "under the moon"),
        "overcast": ("under an overcast sky", "on a cloudy day", "under a grey sky", "in gloomy weather"),
        "aurora": ("under an aurora", "under the northern lights", "beneath polar lights", "with an aurora above"),
    },
    "camera": {
        "static": ("static camera", "fixed camera", "locked camera", "steady camera"),
        "orbiting": ("orbiting camera", "camera orbits", "camera arcs around it", "orbit shot"),
        "zooming": ("zooming camera", "camera zooms in and out", "zoom shot", "dolly shot"),
        "panning": ("panning camera", "camera pans", "camera looks left and right", "pan shot"),
        "rising": ("rising camera", "camera rises and sinks", "crane shot", "camera cranes up and down"),
    },
    "relation": {
        "left": ("to the left of", "on the left side of", "left of"),
        "right": ("to the right of", "on the right side of", "right of"),
        "front": ("in front of", "before", "nearer than"),
        "behind": ("behind", "at the back of", "beyond"),
    },
}
"""Attribute -> value -> phrases. `shape2`, `colour3` and so on share the tables of `shape`, `colour`, `relation`."""

_CONVERSE = {"left": "right", "right": "left", "front": "behind", "behind": "front"}
_PRESENT = {
    "still": ("stands still", "rests", "sits motionless", "does not move"),
    "spinning": ("spins", "rotates", "spins around", "twirls"),
    "bouncing": ("bounces", "bounces up and down", "jumps", "hops"),
    "sliding": ("slides from side to side", "slides", "glides back and forth"),
    "circling": ("circles", "moves in a circle", "goes round in circles"),
    "pulsing": ("pulses", "pulsates", "grows and shrinks", "throbs"),
    "floating": ("floats", "hovers", "floats in the air", "levitates", "hovers in the air"),
}
_STRIPES = ("with stripes", "with bands", "with white stripes")
_LEADS = (
    "a video of", "a clip of", "a scene with", "footage of", "an animation of", "a render of", "show", "please show",
    "show me", "i want to see", "there is", "let us see", "make a video of", "generate",
)  # fmt: skip
_BIG, _SMALL = ("big", "large", "huge"), ("small", "little", "tiny")
_DROP = 0.07

LONGEST = 47
"""Words of the longest caption: with `<eos>` it fills the tokenizer's 48 places."""


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


NEUTRAL = tuple(_words(
    "again also any beautiful calm clean could create cute draw film fast good happy have here i image just keep like "
    "look make me more movie my new next nice now object our picture place put quickly really realistic scene see "
    "shot simple slowly smooth so soft some something thing then these they time us very video view want we when who "
    "will would you your colorful colourful cool floor background landscape weather"
))  # fmt: skip
"""Words that say nothing of a scene, strewn into captions so that the text encoder learns to pass over them."""

FILLERS = (
    "about across all along am another are around as away be become becomes below beside between bright but "
    "can change changes clear close color colour come dark day do does down every for from full get give go ground has "
    "he her high him his how if inside instead into is its large later left lets long lots low many move much near no "
    "not object objects off one only onto or other out outside over same she single solid stay still that their them "
    "there things this those three together too top turn turns until up was what where which while without world"
)
"""Further common words of prompts, for the vocabulary only."""


def _vocabulary() -> tuple[str, ...]:
    phrases = [phrase for values in SYNONYMS.values() for several in values.values() for phrase in several]
    phrases += [phrase for several in _PRESENT.values() for phrase in several]
    phrases += [*_STRIPES, *_LEADS, *_BIG, *_SMALL, *NEUTRAL, FILLERS, "a an and it one over above the with"]
    return tuple(sorted({word for phrase in phrases for word in _words(phrase)}))


VOCABULARY: tuple[str, ...] = _vocabulary()
"""Every word that `describe` can emit, and common words of prompts besides; lower case, sorted."""


def _article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def describe(scene: Sequence[int], rng: random.Random, *, complete: bool = False) -> str:
    """An English sentence of at most 47 words about one scene, a row of class indices in `world.ATTRIBUTES`' order.

    Material, motion, ground, sky and camera are each left out now and then, unless `complete`; the objects, their
    colours and relations never are. Inactive columns are ignored.
    """
    while True:  # now and then one of three objects is too long
        text = _compose(scene, rng, complete)
        if not complete and rng.random() < 0.2:
            parts = text.split(", ")
            at = rng.randrange(len(parts))
            strewn = " ".join(rng.sample(NEUTRAL, rng.randint(1, 3)))
            parts[at] = f"{strewn} {parts[at]}" if rng.random() < 0.5 else f"{parts[at]} {strewn}"
            text = ", ".join(parts)
        if text.count(" ") < LONGEST:
            return text


def write(scenes: Tensor, seed: int, wordings: int, *, complete: bool = False) -> list[list[str]]:
    """`wordings` differently worded captions of each of the scenes [N, A]."""
    rng = random.Random(seed)
    return [[describe(scene, rng, complete=complete) for _ in range(wordings)] for scene in scenes.tolist()]


def encode(scenes: Tensor, seed: int, length: int, wordings: int, *, complete: bool = False) -> Tensor:
    """Token ids, int64 [N, wordings, length], of `write`'s captions."""
    tokenizer = Tokenizer(VOCABULARY)
    texts = write(scenes, seed, wordings, complete=complete)
    return torch.tensor([[tokenizer.encode(text, length) for text in several] for several in texts])


def _compose(scene: Sequence[int], rng: random.Random, complete: bool) -> str:
    row = scene.tolist() if hasattr(scene, "tolist") else scene
    value = {name: names[row[COLUMN[name]]] for name, names in ATTRIBUTES.items()}
    random_, choice = rng.random, rng.choice

    def say(attribute: str, suffix: str = "") -> str:
        return choice(SYNONYMS[attribute][value[attribute + suffix]])

    def told() -> bool:
        return complete or random_() >= _DROP

    companions = ("2", "3")[: row[0]]

    # ---- the main object
    shape, colour = say("shape"), say("colour")
    adjectives = [colour]
    tail = ""
    if told():
        if value["material"] == "striped" and random_() < 0.4:
            tail = " " + choice(_STRIPES if value["colour"] != "white" else _STRIPES[:2])
        else:
            material = say("material")
            adjectives = [material, colour] if random_() < 0.75 else [colour, material]
    if random_() < (0.6 if companions else 0.25):
        adjectives.insert(0, choice(_BIG))
    main = _article(" ".join([*adjectives, shape]) + tail)

    # ---- where and how it moves
    motion = value["motion"] if told() else ""
    ground = say("ground") if told() else ""
    over = choice(("over", "above")) if motion == "floating" and random_() < 0.6 else "on"
    place = f"{over} {ground}" if ground else ""
    sky = say("sky") if told() else ""
    camera = say("camera") if told() else ""

    # ---- companions
    others = []
    alike = any(value["shape" + suffix] == value["shape"] for suffix in companions)  # "the ball" would be two
    for suffix in companions:
        words = f"{say('colour', suffix)} {say('shape', suffix)}"
        if random_() < 0.6:
            words = f"{choice(_SMALL)} {words}"
        relation = value["relation" + suffix]
        if len(companions) == 1 and random_() < 0.2:
            # The other way round; the main object stays the first that is named.
            phrase = choice(SYNONYMS["relation"][_CONVERSE[relation]])
            others.append(("converse", f"{phrase} {_article(words)}"))
        else:
            anchor = choice(("it", "it", f"the {choice(_BIG)} one", "it" if alike else f"the {shape}"))
            others.append(("direct", f"{_article(words)} {choice(SYNONYMS['relation'][relation])} {anchor}"))

    # ---- put together
    converse = " ".join(text for kind, text in others if kind == "converse")
    direct = [text for kind, text in others if kind == "direct"]
    finite = motion and random_() < 0.4
    doing = choice(_PRESENT[motion]) if finite else choice(SYNONYMS["motion"][motion]) if motion else ""
    around = [part for part in (place, sky) if part]
    rng.shuffle(around)
    lead = "" if finite or random_() < 0.45 else choice(_LEADS)

    front, after = "", ""
    if around and random_() < 0.2 and not lead:
        front = around.pop(0)
    companion_text = ""
    if direct:
        joined = " and ".join(direct)
        companion_text = choice((", with ", " with ", " and ", ", and "))
        if companion_text.endswith("and ") and random_() < 0.5:
            companion_text = choice((". there is ", ", there is "))
        companion_text += joined
    body = " ".join(part for part in (lead, main, doing, converse) if part)
    early = random_() < 0.5
    if early:
        body += companion_text
        companion_text = ""
    if around:
        glue = ", " if (early and direct) or random_() < 0.4 else " "
        body += glue + choice((", ", " ")).join(around)
    if front:
        body = f"{front}, {body}"
    if camera:
        camera_shot = camera
        if camera.startswith("camera "):
            camera_shot = choice(("the ", "")) + camera
        elif random_() < 0.4:
            camera_shot = "with " + _article(camera) if random_() < 0.5 else _article(camera)
        if random_() < 0.15 and not front and not lead:
            body = f"{camera_shot}: {body}" if not camera.startswith("camera ") else f"{camera_shot}, {body}"
        else:
            after = choice((", ", ". ")) + camera_shot
    text = body + companion_text + after
    if random_() < 0.5:
        text = text[0].upper() + text[1:]
    if random_() < 0.5:
        text += "."
    return text
