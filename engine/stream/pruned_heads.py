"""Which heads of the self-attention leave the past out: a policy that is plain data.

A file of it is JSON, `{"0": [1, 3], "5": [0]}`: by layer, counted from 0, its heads. `python -m engine.bench.heads`
measures which heads look at the past so little that they need not, and writes one.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from engine.models.config import DiTConfig

Heads = frozenset[tuple[int, int]]
"""(layer, head), both counted from 0."""


def check(heads: Heads, dit: DiTConfig) -> None:
    """Raises ValueError where the model has no such layer or head."""
    for layer, head in sorted(heads):
        if not 0 <= layer < dit.num_layers:
            raise ValueError(f"pruned heads: there is no layer {layer}: layers are 0 to {dit.num_layers - 1}")
        if not 0 <= head < dit.num_heads:
            raise ValueError(f"pruned heads: layer {layer} has no head {head}: heads are 0 to {dit.num_heads - 1}")


def load(path: Path, dit: DiTConfig) -> Heads:
    """The policy in a file, for a model of these sizes.

    Raises:
        ValueError: it cannot be read, is not of the form above, or does not fit the model; the message says which.
    """
    try:
        layers = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"pruned heads: {path} cannot be read ({error.strerror})") from None
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are such
        raise ValueError(f"pruned heads: {path} is not JSON ({error})") from None
    example = 'such as {"0": [1, 3]}'
    if not isinstance(layers, dict):
        raise ValueError(f"pruned heads: {path} must hold an object from layers to lists of heads, {example}")
    found = set()
    for layer, heads in layers.items():
        if not (layer.isascii() and layer.isdecimal()):
            raise ValueError(f"pruned heads: {path}: {layer!r} is no layer: name layers by number, {example}")
        if not isinstance(heads, list) or not all(type(head) is int for head in heads):
            raise ValueError(f"pruned heads: {path}: layer {layer} must have a list of numbers of heads, {example}")
        found |= {(int(layer), head) for head in heads}
    policy = frozenset(found)
    try:
        check(policy, dit)
    except ValueError as error:
        raise ValueError(f"{error} (in {path})") from None
    return policy


def save(heads: Heads, path: Path) -> None:
    """Write what `load` reads, layer by layer."""
    layers = {str(layer): sorted(head for at, head in heads if at == layer) for layer in sorted(dict(heads))}
    lines = ",\n".join(f' "{layer}": {json.dumps(numbers)}' for layer, numbers in layers.items())
    path.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


def first(dit: DiTConfig, share: float) -> Heads:
    """The first `share` of every layer's heads, rounded: for measuring speed, which does not depend on which.

    Raises ValueError where the share is not within 0 to 1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"the share of pruned heads must be from 0 to 1, got {share}")
    return frozenset((layer, head) for layer in range(dit.num_layers) for head in range(round(share * dit.num_heads)))


def below(past: Sequence[Sequence[float]], threshold: float) -> Heads:
    """The heads whose mass on the past, by layer and head, is below a threshold."""
    return frozenset(
        (layer, head) for layer, heads in enumerate(past) for head, mass in enumerate(heads) if mass < threshold
    )
