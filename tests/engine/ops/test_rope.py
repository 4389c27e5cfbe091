import torch

from engine.ops.rope import axis_pairs, rope_angles, rotate


def test_rope_split_and_relative_positions() -> None:
    assert axis_pairs(128) == (22, 21, 21)
    q, k = torch.randn(1, 1, 1, 128), torch.randn(1, 1, 1, 128)

    def score(a: int, b: int) -> torch.Tensor:
        turn = [rope_angles(torch.tensor([x]), 1, 1, 128) for x in (a, b)]
        return (rotate(q, turn[0]) * rotate(k, turn[1])).sum()

    assert torch.allclose(score(5, 2), score(100_005, 100_002), atol=1e-3)
    assert not torch.allclose(score(5, 2), score(5, 3), atol=1e-3)
    assert torch.allclose(rotate(q, rope_angles(torch.tensor([9]), 1, 1, 128)).norm(), q.norm())
