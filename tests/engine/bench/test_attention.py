"""The attention benchmark's inputs and operands. Its kernels take minutes in the interpreter: run `--toy` by hand."""

import pytest
import torch

from engine.bench import attention as bench
from engine.ops import attention as reference
from engine.ops.attention import BlockLists

SHAPE = (1, 136, 200, 2, 64)


def test_operands_of_every_mode_give_nearly_the_exact_result() -> None:
    torch.manual_seed(0)
    x = bench.make(*SHAPE, "cpu", torch.float32)
    index = bench.random_lists(1, 2, 136, 200, 1, "cpu")
    assert index.shape == (1, 2, 2, 1) and index.dtype == torch.int32
    for mode in bench.MODES:
        operands = bench.operands(mode, x, index)
        assert operands.eight_bit == operands.packed == mode.startswith("8-bit")
        assert operands.blocks == (BlockLists(index) if mode.endswith("sparse") else None)
        expected = bench.exact(x, index if mode.endswith("sparse") else None)
        error = bench.relative(reference.attend(operands)[0, :, 0], expected)
        assert error < (0.1 if operands.eight_bit else 1e-5), mode


def test_candidates_fit_their_mode() -> None:
    pytest.importorskip("triton")
    for mode in bench.MODES:
        found = list(bench.candidates(mode))
        assert len(found) > 8
        assert all(config.block_m == 128 for config in found if config.specialized)
