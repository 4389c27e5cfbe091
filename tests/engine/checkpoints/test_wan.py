from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file
from torch import Tensor

from engine.checkpoints import wan
from engine.checkpoints.convert import load_dit
from engine.checkpoints.headers import StoreError
from engine.config import DIT_1_3B, DIT_5B, DIT_14B, CacheConfig
from engine.models.config import DiTConfig
from engine.models.dit import CausalWan
from engine.stream.kv_cache import BlockCausal, KVCache

TINY = DiTConfig(dim=48, ffn_dim=96, num_heads=2, num_layers=2, text_dim=32, in_channels=4, out_channels=4, freq_dim=32)


def diffusers_model(config: DiTConfig) -> WanTransformer3DModel:
    return WanTransformer3DModel(
        patch_size=config.patch,
        num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        text_dim=config.text_dim,
        freq_dim=config.freq_dim,
        ffn_dim=config.ffn_dim,
        num_layers=config.num_layers,
    )


def random_model(seed: int = 0) -> WanTransformer3DModel:
    """Every parameter random, and exact in bfloat16, so that storing it loses nothing."""
    torch.manual_seed(seed)
    model = diffusers_model(TINY).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter).mul_(0.1).bfloat16())
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            parameter.add_(1)
    return model


def original(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Diffusers' tensors under Wan's own names."""
    return {ours: state[theirs] for ours, theirs in wan.to_native(state).native.items()}


@pytest.mark.parametrize("config", [DIT_1_3B, DIT_14B, DIT_5B], ids=["1.3B", "14B", "5B"])
def test_every_tensor_of_the_real_models_has_its_place(config: DiTConfig) -> None:
    with torch.device("meta"):
        theirs, ours = diffusers_model(config), CausalWan(config)
    names = wan.to_native(theirs.state_dict())
    assert names.layout == "diffusers"
    found = {name: tuple(theirs.state_dict()[foreign].shape) for name, foreign in names.native.items()}
    expected = {name: tuple(value.shape) for name, value in ours.state_dict().items()}
    assert found == expected == wan.tensors(config)
    same = wan.to_native(ours.state_dict())
    assert same.layout == "original"
    assert same.native == {name: name for name in expected}


@pytest.mark.parametrize("layout", ["diffusers", "original", "wrapped"])
@pytest.mark.parametrize("cached", [False, True])
def test_one_chunk_equals_diffusers(tmp_path: Path, layout: str, cached: bool) -> None:
    theirs = random_model()
    state = dict(theirs.state_dict())
    if layout != "diffusers":
        state = original(state)
    if layout == "wrapped":
        state = {f"model._fsdp_wrapped_module.{k.replace('.ffn', '._orig_mod.ffn')}": v for k, v in state.items()}
    save_file(state, tmp_path / "dit.safetensors")
    with torch.device("meta"):
        ours = CausalWan(TINY)
    ours.load_state_dict(load_dit([tmp_path], TINY), assign=True)
    ours.float().eval()

    torch.manual_seed(1)
    x, text = torch.randn(1, 4, 3, 8, 12), torch.randn(1, 16, 32)
    text[:, 5:] = 0
    with torch.inference_mode():
        expected = theirs(x, torch.tensor([937.5]), text, return_dict=False)[0]
        config = CacheConfig(chunk=3, window=6, sink=0, rows=4, columns=6)
        attend = (
            KVCache(config, layers=2, heads=2, head_dim=24)
            if cached
            else BlockCausal(3, config, head_dim=TINY.head_dim)
        )
        found = ours(x, torch.full((1, 3), 937.5), ours.encode_text(text), attend)
    error = (found - expected).abs().max() / expected.abs().max()
    assert error < 1e-4, f"relative error {error:.2e}"


def test_prefixes_are_stripped_wherever_they_stand() -> None:
    for name in (
        "model.blocks.0.ffn.0.weight",
        "model._fsdp_wrapped_module.blocks.0._checkpoint_wrapped_module.ffn.0.weight",
        "_orig_mod.net.module.blocks.0._orig_mod.ffn.0.weight",
        "model.diffusion_model.blocks.0.ffn.0.weight",
    ):
        assert wan.unwrapped(name) == "blocks.0.ffn.0.weight"
    assert wan.unwrapped("net.blocks.0.ffn.net.0.proj.weight") == "blocks.0.ffn.net.0.proj.weight"


def test_norms_two_and_three_are_swapped() -> None:
    names = wan.to_native(["blocks.3.norm2.weight", "blocks.3.attn1.to_q.weight"])
    assert names.native["blocks.3.norm3.weight"] == "blocks.3.norm2.weight"


@pytest.mark.parametrize(
    "name",
    [
        "img_emb.proj.0.weight",
        "blocks.0.cross_attn.k_img.weight",
        "condition_embedder.image_embedder.norm1.weight",
        "blocks.0.attn2.add_k_proj.weight",
    ],
)
def test_image_to_video_is_refused(name: str) -> None:
    with pytest.raises(StoreError, match="image-to-video") as error:
        wan.to_native(["blocks.0.ffn.0.weight", name])
    assert name in str(error.value)


def test_one_tensor_under_two_names_is_refused() -> None:
    with pytest.raises(StoreError, match="keep one"):
        wan.to_native(["model.head.head.bias", "head.head.bias"])


def test_a_scale_without_its_weight_is_unexpected() -> None:
    names = wan.to_native(["blocks.0.ffn.0.weight", "blocks.0.ffn.0.weight_scale", "blocks.0.ffn.2.weight_scale"])
    assert names.scales == {"blocks.0.ffn.0.weight": "blocks.0.ffn.0.weight_scale"}
    assert "blocks.0.ffn.2.weight_scale" in names.native


def test_differences_are_named() -> None:
    found = dict(wan.tensors(TINY))
    del found["blocks.1.ffn.0.bias"]
    found["extra"] = (1,)
    found["head.head.bias"] = (3,)
    differences = wan.compare(wan.tensors(TINY), found)
    assert wan.sentences(differences) == [
        "missing: blocks.1.ffn.0.bias",
        "unexpected: extra",
        "wrong shape: head.head.bias is [3], must be [16]",
    ]
