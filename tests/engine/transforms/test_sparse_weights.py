"""2:4 sparse projections: what is pruned, that the pruned model is the reference, and the choice by speed."""

import pytest
import torch

from engine.config import ROLES, QuantScheme, Role
from engine.ops.quant import Sparse24
from engine.ops.sparse import is_pruned
from engine.stream.fused_cache import FusedCache
from engine.transforms import sparse_weights
from engine.transforms.fused import FusedWan
from engine.transforms.low_bit import Policy, Projection, layers_of
from engine.transforms.sparse_weights import faster_roles, prune_weights, role_shapes
from tests.engine.transforms.test_fused import CONFIG, DIT, error, exact_cache, roll, wan

SOME: frozenset[Role] = frozenset({"qkv", "down"})


def test_what_the_policy_holds_sparse_is_pruned_and_nothing_else() -> None:
    model, policy = wan(), Policy(sparse=SOME, exact_blocks=frozenset({1}))
    before = {name: p.clone() for name, p in model.named_parameters()}
    prune_weights(model, policy)
    for index, block in enumerate(model.blocks):
        for role, layers in layers_of(block).items():
            assert [is_pruned(layer.weight) for layer in layers] == [index == 0 and role in SOME] * len(layers)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    names = [f"self_attn.{part}" for part in "qkv"] + ["ffn.2"]
    assert changed == {f"blocks.0.{name}.weight" for name in names}


@pytest.mark.parametrize(("scheme", "limit"), [(None, 1e-5), ("fp8", 0.06)])
def test_the_pruned_model_is_the_reference(scheme: QuantScheme | None, limit: float) -> None:
    policy, pruned = Policy(scheme, sparse=frozenset(ROLES)), wan()
    prune_weights(pruned, policy)
    expected = roll(pruned, exact_cache())
    model = wan()
    prune_weights(model, policy)
    fused = FusedWan(model, policy)
    assert all(isinstance(p.weight, Sparse24) for block in fused.blocks for p in block.projections.values())
    found = roll(fused, FusedCache(CONFIG, DIT))
    assert max(error(f, e) for f, e in zip(found, expected, strict=True)) < limit
    dense = roll(wan(), exact_cache(), 1)
    assert error(found[0], dense[0]) > 1e-3


def test_shapes_of_roles_are_those_of_the_projections() -> None:
    block = FusedWan(wan()).blocks[0]
    found = {role: tuple(projection.weight.shape) for role, projection in block.projections.items()}  # type: ignore[union-attr]
    assert found == {role: (width, depth) for role, (depth, width) in role_shapes(DIT).items()}


def test_a_device_without_sparse_products_has_no_faster_roles() -> None:
    assert faster_roles(DIT, 100, None, torch.device("cpu"), torch.bfloat16) == frozenset()


@pytest.mark.parametrize("fixed", [False, True])
def test_roles_are_kept_where_they_are_faster_by_more_than_scatter(
    monkeypatch: pytest.MonkeyPatch, fixed: bool
) -> None:
    """On an invented clock: `up` gains a third, `qkv` too little to tell, the others lose."""
    gains = {(192, 320): 1.5, (192, 576): 1.02}

    def measured(projection: Projection, x: torch.Tensor, with_fixed: bool, activated: bool) -> float:
        assert len(x) == 100 and with_fixed == fixed and not activated, "in fp8 GELU is a kernel of its own either way"
        if not projection.weight_format.sparse:
            return 1.0
        assert isinstance(projection.weight, Sparse24)
        width, depth = projection.weight.shape
        return 1.0 / gains.get((depth, width), 0.9)

    monkeypatch.setattr(sparse_weights, "sparse_unsupported_reason", lambda device, fp8: None)
    monkeypatch.setattr(sparse_weights, "_milliseconds", measured)
    found = faster_roles(DIT, 100, "fp8", torch.device("cpu"), torch.bfloat16, fixed=fixed)
    assert found == frozenset({"up"})


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", [None, "fp8"])
def test_on_a_gpu(scheme: QuantScheme | None) -> None:
    """A projection is that of the pruned weight, whether or not this device has sparse products; measuring runs."""
    device = torch.device("cuda")
    assert faster_roles(DIT, 960, scheme, device, torch.bfloat16) <= frozenset(ROLES)
    policy, model = Policy(scheme, sparse=frozenset(ROLES)), wan().to(device, torch.bfloat16)
    prune_weights(model, policy)
    x = torch.randn(96, DIT.dim, device=device, dtype=torch.bfloat16)
    expected = model.blocks[0].ffn[0].weight @ x.t()
    found = FusedWan(model, policy).blocks[0].up(x)
    assert error(found.float(), expected.t().float()) < (0.01 if scheme is None else 0.06)
