"""2:4 sparse projections: a step on a finished model, before its weights are rounded.

The smaller two of every four neighbours along the input are set to zero, by magnitude and for good; the model as it is
written is then the reference of the sparse one. Half of a weight is much to lose: models are to be trained for it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from engine.config import ROLES, QuantScheme, Role
from engine.models.config import DiTConfig
from engine.models.dit import Block, CausalWan
from engine.ops.sparse import prune, sparse_unsupported_reason
from engine.timing import milliseconds
from engine.transforms.low_bit import Policy, Projection, WeightFormat, layers_of

GAIN = 1.03
"""A sparse product is kept where it is faster than the dense one by more than measurements scatter."""


@torch.no_grad()
def prune_weights(wan: CausalWan, policy: Policy) -> None:
    """Prune what `policy` holds sparse, in place."""
    for index, block in enumerate(wan.blocks):
        for role, layers in layers_of(cast(Block, block)).items():
            if policy.of(index, role).sparse:
                for layer in layers:
                    layer.weight.copy_(prune(layer.weight))


def role_shapes(config: DiTConfig) -> dict[Role, tuple[int, int]]:
    """Inputs and outputs of the joined layers of each role."""
    dim, ffn = config.dim, config.ffn_dim
    shapes: dict[Role, tuple[int, int]] = dict.fromkeys(ROLES, (dim, dim))
    return shapes | {"qkv": (dim, 3 * dim), "up": (dim, ffn), "down": (ffn, dim)}


@torch.inference_mode()
def faster_roles(
    config: DiTConfig,
    rows: int,
    form: QuantScheme | None,
    device: torch.device,
    dtype: torch.dtype,
    *,
    fixed: bool = False,
) -> frozenset[Role]:
    """The roles whose sparse product is faster than the dense one here, for inputs of so many rows: measured.

    None where the device has no sparse products. `fixed`: with fixed scales of the inputs.
    """
    if dtype != torch.bfloat16 or sparse_unsupported_reason(device, fp8=form is not None) is not None:
        return frozenset()
    gains: dict[tuple[int, int, bool], bool] = {}
    kinds = {role: (*shape, role == "up" and form is None) for role, shape in role_shapes(config).items()}
    for depth, width, activated in set(kinds.values()):
        weight = torch.randn(width, depth, device=device, dtype=dtype)
        x, bias = (torch.randn(*shape, device=device, dtype=dtype) for shape in ((rows, depth), (width,)))
        dense, sparse = (
            _time(Projection.of(weight, WeightFormat(form, sparse=kept), bias), x, fixed, activated)
            for kept in (False, True)
        )
        gains[depth, width, activated] = dense > GAIN * sparse
    return frozenset(role for role, kind in kinds.items() if gains[kind])


def _time(projection: Projection, x: Tensor, fixed: bool, activated: bool) -> float:
    """Of a product on an input that comes rounded; `activated`: and GELU, which the dense product has inside."""
    if fixed:
        projection.watch()
        projection(x)
        projection.settle()
    operand = projection.rounded(x) if projection.held.rows else x
    work: Callable[[], Any] = partial(projection.gelu, operand, None) if activated else partial(projection, operand)
    return milliseconds([work], x.device, seconds=0.05, warm=0.05)
