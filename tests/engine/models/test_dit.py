from dataclasses import replace

import torch

from engine.config import MINI
from engine.models.config import DiTConfig
from engine.models.dit import CausalWan, text_lengths, timestep_embedding

WAN_BLOCK = {
    "modulation",
    "norm3.weight",
    "norm3.bias",
    "ffn.0.weight",
    "ffn.0.bias",
    "ffn.2.weight",
    "ffn.2.bias",
    *(
        f"{attn}.{name}"
        for attn in ("self_attn", "cross_attn")
        for name in (*(f"{p}.{w}" for p in "qkvo" for w in ("weight", "bias")), "norm_q.weight", "norm_k.weight")
    ),
}


def test_parameter_names_and_sizes_are_wan_2_1s() -> None:
    with torch.device("meta"):
        wan = CausalWan(DiTConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30, text_dim=4096))
    names = dict(wan.named_parameters())
    block = {name.removeprefix("blocks.7.") for name in names if name.startswith("blocks.7.")}
    assert block == WAN_BLOCK
    assert {name for name in names if not name.startswith("blocks.")} == {
        "patch_embedding.weight",
        "patch_embedding.bias",
        "head.modulation",
        "head.head.weight",
        "head.head.bias",
        "time_projection.1.weight",
        "time_projection.1.bias",
        *(
            f"{part}.{i}.{w}"
            for part in ("text_embedding", "time_embedding")
            for i in (0, 2)
            for w in ("weight", "bias")
        ),
    }
    assert sum(p.numel() for p in names.values()) == 1_418_996_800  # the published 1.3B transformer
    assert names["patch_embedding.weight"].shape == (1536, 16, 1, 2, 2)
    assert names["head.head.weight"].shape == (64, 1536)


def test_timestep_embedding_is_cosines_then_sines() -> None:
    e = timestep_embedding(torch.tensor([[0.0, 937.5]]), 256)
    assert e.shape == (1, 2, 256)
    assert torch.equal(e[0, 0], torch.cat([torch.ones(128), torch.zeros(128)]))
    assert torch.allclose(e[0, 1, 0], torch.tensor(937.5, dtype=torch.float64).cos().float())


def test_unpatchify_keeps_channels_last_in_a_patch() -> None:
    model = CausalWan(
        DiTConfig(
            dim=32, ffn_dim=32, num_heads=1, num_layers=1, text_dim=8, in_channels=4, out_channels=4, pooled_text=True
        )
    )
    tokens = torch.arange(2 * 16, dtype=torch.float32).reshape(1, 2, 16)  # one frame of 1 x 2 tokens
    x = model.unpatchify(tokens, 1, 1, 2)
    assert x.shape == (1, 4, 1, 2, 4)
    assert x[0, :, 0, 0, 0].tolist() == [0, 1, 2, 3]
    assert x[0, 0, 0, :, 1].tolist() == [4, 12]


def test_text_may_differ_between_runs_of_frames() -> None:
    """Two halves of a row under two texts equal each half under its own, where frames do not see each other."""
    torch.manual_seed(0)
    model = CausalWan(
        DiTConfig(
            dim=32, ffn_dim=64, num_heads=2, num_layers=2, text_dim=8, in_channels=4, out_channels=4, pooled_text=True
        )
    )

    class Blind:
        def at(self, layer: int):  # type: ignore[no-untyped-def]
            return lambda q, k, v: v

    x, t = torch.randn(1, 4, 2, 4, 4), torch.full((1, 2), 500.0)
    text = model.encode_text(torch.randn(2, 3, 8))
    both = model(x, t, text, Blind())
    for half in range(2):
        one = text.map(lambda x, half=half: x[half : half + 1])
        alone = model(x[:, :, half : half + 1], t[:, :1], one, Blind())
        assert torch.allclose(both[:, :, half : half + 1], alone, atol=1e-5)


def test_text_ends_where_its_padding_begins() -> None:
    text = torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(0))
    text[0] = 0
    text[1, 1:] = 0
    text[2, 4:] = 0
    text[2, 2] = 0  # not the end yet
    assert text_lengths(text).tolist() == [0, 1, 4, 6]
    assert text_lengths(text).dtype == torch.int32


@torch.inference_mode()
def test_patches_are_embedded_alike_in_bfloat16_and_float32() -> None:
    """torch 2.13's bfloat16 convolution with a kernel and a stride of 4 is wrong on CPUs with AMX: error 1.2."""
    torch.manual_seed(0)
    model = CausalWan(replace(MINI.dit, num_layers=1)).eval()
    x, t = torch.randn(2, 16, 3, 32, 32), torch.full((2, 3), 500.0)
    text = model.encode_text(torch.randn(2, 8, MINI.dit.text_dim))
    exact = model.embed(x, t, text).tokens
    assert torch.allclose(exact, model.patch_embedding(x).flatten(2).transpose(1, 2), atol=1e-5)
    model.bfloat16()
    rounded = model.embed(x.bfloat16(), t, text.map(lambda y: y.bfloat16())).tokens.float()
    assert (rounded - exact).norm() < 1e-2 * exact.norm()
