"""The choice between references and kernels: by device alone, and both have one name and one signature."""

import inspect
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.ops import attention, dispatch, fused, quant
from engine.ops.attention import AttentionOperands, BlockLists

pytest.importorskip("triton")

OPERATORS = {
    "fused": ["add_norm", "gelu", "quantise", "rms_norm", "qk_norm_rope", "qk_norm_rope_int8", "store_rotated"],
    "linear": ["rescale", "small_batch_linear"],
    "blocks": ["quantise_blocks"],
    "attention": ["attend", "padded_attention", "pool_blocks", "choose_blocks", "pack_values"],
}


def reference(name: str) -> Callable[..., Any]:
    found: Callable[..., Any] = next(
        getattr(module, name) for module in (quant, fused, attention) if name in vars(module)
    )
    return found


def test_every_dispatched_operator_is_listed() -> None:
    public = {
        name for name, value in vars(dispatch).items() if hasattr(value, "__wrapped__") and name in vars(dispatch)
    }
    chosen = {name.lstrip("_") for name in public if name not in ("wraps", "converts_fp8", "is_hopper", "kernels")}
    assert chosen == {name for names in OPERATORS.values() for name in names}


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in OPERATORS.items() for name in names])
def test_kernel_and_reference_share_one_signature(module: str, name: str) -> None:
    kernel = getattr(dispatch.kernels(module), name)
    assert inspect.signature(kernel) == inspect.signature(reference(name))
    assert inspect.signature(getattr(dispatch, name)) == inspect.signature(reference(name))


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in OPERATORS.items() for name in names])
def test_a_gpu_gets_the_kernel_and_a_cpu_the_reference(module: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told by the first operand's device; the kernel itself is replaced."""
    called = []
    monkeypatch.setattr(dispatch.kernels(module), name, lambda *_: called.append(name))
    monkeypatch.setattr(dispatch, "converts_fp8", dispatch.on_gpu)
    monkeypatch.setattr(dispatch, "is_hopper", dispatch.on_gpu)

    def call(device: str) -> None:
        operand = SimpleNamespace(device=torch.device(device), dtype=torch.float32, format="fp8", plain=False)
        getattr(dispatch, name)(*[operand] * (1 if name == "attend" else 2))

    call("cuda")
    assert called == [name]
    with pytest.raises((AttributeError, TypeError)):  # the reference ran, and its operands are no tensors
        call("cpu")
    assert called == [name]


def test_plain_dense_attention_is_pytorchs_except_on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (torch.randn(1, 8, 2, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    plain = AttentionOperands(q, k, v)
    assert plain.plain and torch.equal(dispatch.attend(plain), attention.attention(q, k, v))
    ours: list[AttentionOperands] = []
    monkeypatch.setattr(dispatch, "_attend", ours.append)
    dispatch.attend(plain)
    assert not ours
    sparse = AttentionOperands(q, k, v, blocks=BlockLists(torch.zeros(1, 2, 1, 1, dtype=torch.int32)))
    scaled = AttentionOperands(q, k, v, out_scale=torch.ones(1))
    monkeypatch.setattr(dispatch, "is_hopper", lambda _: True)
    for operands in (plain, sparse, scaled):
        dispatch.attend(operands)
    assert ours == [plain, sparse, scaled]


def test_a_cpu_has_no_kernels() -> None:
    cpu = torch.device("cpu")
    assert not dispatch.on_gpu(cpu) and not dispatch.converts_fp8(cpu) and not dispatch.is_hopper(cpu)


def test_linear_gelu_is_the_product_and_gelu() -> None:
    x, weight, bias = torch.randn(3, 8), torch.randn(5, 8), torch.randn(5)
    expected: Tensor = torch.nn.functional.gelu(x @ weight.t() + bias, approximate="tanh")
    torch.testing.assert_close(dispatch.linear_gelu(x, weight, bias), expected)


def test_references_import_no_triton() -> None:
    """A CPU installation has none."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from engine.ops import blocks, cublas, dispatch, linear, sparse\n"
        "assert not any(name.startswith('engine.ops.triton') for name in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
