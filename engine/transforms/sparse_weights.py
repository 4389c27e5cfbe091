"""2:4 sparse projections: prunes a loaded model before its weights are quantised.

Of every four neighbours along the input, the two of smaller magnitude are set to zero in the model itself, so the
pruned `CausalWan` is the reference of the sparse one. Removing half of the weights costs quality: models should be
trained for it.
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
"""A sparse product is used if it is faster than the dense one by this factor, which exceeds measurement noise."""


@torch.no_grad()
def prune_weights(wan: CausalWan, policy: Policy) -> None:
    """Prune the weights that are sparse under `policy`, in place."""
    for index, block in enumerate(wan.blocks):
        for role, layers in layers_of(cast(Block, block)).items():
            if policy.of(index, role).sparse:
                for layer in layers:
                    layer.weight.copy_(prune(layer.weight))


def role_shapes(config: DiTConfig) -> dict[Role, tuple[int, int]]:
    """(inputs, outputs) of the joined layers of each role."""
    dim, ffn = config.dim, config.ffn_dim
    shapes: dict[Role, tuple[int, int]] = dict.fromkeys(ROLES, (dim, dim))
    return shapes | {"qkv": (dim, 3 * dim), "up": (dim, ffn), "down": (ffn, dim)}


@torch.inference_mode()
def faster_roles(
    config: DiTConfig,
    rows: int,
    scheme: QuantScheme | None,
    device: torch.device,
    dtype: torch.dtype,
    *,
    fixed: bool = False,
) -> frozenset[Role]:
    """The roles whose sparse product measures faster than the dense one on this device.

    Args:
        rows: of the inputs.
        fixed: inputs have fixed scales.

    Returns:
        No roles if the device has no sparse products.
    """
    if dtype != torch.bfloat16 or sparse_unsupported_reason(device, fp8=scheme is not None) is not None:
        return frozenset()
    gains: dict[tuple[int, int, bool], bool] = {}
    kinds = {role: (*shape, role == "up" and scheme is None) for role, shape in role_shapes(config).items()}
    for depth, width, activated in set(kinds.values()):
        weight = torch.randn(width, depth, device=device, dtype=dtype)
        x, bias = (torch.randn(*shape, device=device, dtype=dtype) for shape in ((rows, depth), (width,)))
        dense_time, sparse_time = (
            _milliseconds(Projection.from_weight(weight, WeightFormat(scheme, sparse), bias), x, fixed, activated)
            for sparse in (False, True)
        )
        gains[depth, width, activated] = dense_time > GAIN * sparse_time
    return frozenset(role for role, kind in kinds.items() if gains[kind])


def _milliseconds(projection: Projection, x: Tensor, fixed: bool, activated: bool) -> float:
    """Time of a product whose input is already quantised; `activated`: with GELU, which the dense product includes."""
    if fixed:
        projection.start_calibration()
        projection(x)
        projection.finish_calibration()
    operand = projection.quantised(x) if projection.weight_format.input_format else x
    work: Callable[[], Any] = partial(projection.gelu, operand, None) if activated else partial(projection, operand)
    return milliseconds([work], x.device, seconds=0.05, warm=0.05)
