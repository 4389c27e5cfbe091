"""2:4 sparse products: what is kept, and that every way of multiplying gives the product of the pruned weight."""

from itertools import combinations

import pytest
import torch
from torch import Tensor

from engine.ops.quant import SPARSE_ROWS, FixedScale, QuantTensor, quantise
from engine.ops.sparse import compress, is_pruned, pad_rows, prune, sparse_linear, sparse_unsupported_reason

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(DEVICE, DTYPE)


def test_the_two_larger_of_four_are_kept() -> None:
    weight = random(6, 32)
    pruned = prune(weight)
    for before, after in zip(weight.view(-1, 4).tolist(), pruned.view(-1, 4).tolist(), strict=True):
        best = max(combinations(range(4), 2), key=lambda pair: sum(abs(before[i]) for i in pair))
        assert after == [x if i in best else 0.0 for i, x in enumerate(before)]


def test_of_equal_ones_the_first_are_kept_and_pruning_again_changes_nothing() -> None:
    weight = torch.tensor([[1.0, -1, 1, 1, 0, 0, 0, 2]])
    assert prune(weight).tolist() == [[1, -1, 0, 0, 0, 0, 0, 2]]
    pruned = prune(random(8, 64))
    assert torch.equal(prune(pruned), pruned)
    assert is_pruned(pruned) and not is_pruned(random(8, 64))


def test_width_must_be_whole_groups() -> None:
    with pytest.raises(ValueError, match="multiple of 4, got 6"):
        prune(random(2, 6))


@pytest.mark.parametrize("rows", [1, 40, 64])
def test_product_as_it_is(rows: int) -> None:
    x, weight = random(2, rows, 64), prune(random(96, 64, seed=1))
    packed = compress(weight, fp8=False)
    assert packed.compressed == (sparse_unsupported_reason(DEVICE, fp8=False) is None)
    found, expected = sparse_linear(x, packed, DTYPE), x.float() @ weight.float().t()
    assert found.shape == (2, rows, 96) and found.dtype == DTYPE
    assert (found.float() - expected).norm() / expected.norm() < (1e-2 if DEVICE.type == "cuda" else 1e-6)


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("rows", [1, 40, 64])
def test_product_in_fp8(rows: int, fixed: bool) -> None:
    x, weight = 5 * random(rows, 64), prune(random(96, 64, seed=1))
    packed = compress(weight, fp8=True)
    assert packed.compressed == (sparse_unsupported_reason(DEVICE, fp8=True) is None)
    operand = quantise(x, FixedScale("fp8", torch.full((1,), 0.1, device=DEVICE)) if fixed else "fp8")
    expected = operand.dequantise() @ quantise(weight, "fp8").dequantise().t()
    found = sparse_linear(operand, packed, DTYPE)
    assert (found.float() - expected).norm() / expected.norm() < (1e-2 if DEVICE.type == "cuda" else 1e-6)


def test_float8_keeps_the_pattern() -> None:
    pruned = prune(random(32, 64))
    assert is_pruned(quantise(pruned, "fp8").dequantise())


def test_rows_are_filled_up_without_a_copy_where_there_is_room() -> None:
    room = torch.arange(4.0 * SPARSE_ROWS, device=DEVICE).view(SPARSE_ROWS, 4)
    rows = room[:3]
    longer = pad_rows(rows, SPARSE_ROWS)
    assert longer.shape == (SPARSE_ROWS, 4) and longer.data_ptr() == rows.data_ptr()
    copied = pad_rows(rows.clone(), SPARSE_ROWS)
    assert copied.shape == (SPARSE_ROWS, 4) and torch.equal(copied[:3], rows) and not copied[3:].any()
    assert pad_rows(room, SPARSE_ROWS) is room
    last = room[SPARSE_ROWS - 3 :]  # nothing of its own follows it
    assert (
        torch.equal(pad_rows(last, SPARSE_ROWS)[:3], last) and pad_rows(last, SPARSE_ROWS).data_ptr() != last.data_ptr()
    )


@pytest.mark.gpu
def test_a_hopper_gpu_has_sparse_products() -> None:
    if torch.cuda.get_device_capability() == (9, 0):
        assert sparse_unsupported_reason(DEVICE, fp8=False) is None
        assert sparse_unsupported_reason(DEVICE, fp8=True) is None


@pytest.mark.gpu
def test_rows_that_do_not_follow_one_another() -> None:
    weight = prune(random(96, 64, seed=1))
    x = random(40, 3, 64)[:, 1]
    found, expected = sparse_linear(x, compress(weight, fp8=False), DTYPE), x.float() @ weight.float().t()
    assert (found.float() - expected).norm() / expected.norm() < 1e-2


@pytest.mark.gpu
def test_in_a_cuda_graph_and_with_rows_that_need_filling() -> None:
    from engine.ops.dispatch import quantise as quantise_on_device

    x, packed = random(100, 256), compress(prune(random(128, 256, seed=1)), fp8=True)

    def run() -> Tensor:
        rows = quantise_on_device(x, "fp8")
        assert isinstance(rows, QuantTensor)
        return sparse_linear(rows, packed, DTYPE)

    expected = run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    graph.replay()
    assert torch.equal(out, expected)
