"""Every spelling of a LoRA gives the same; what cannot be used is refused by name."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.checkpoints.lora import Lora, LoraNotFoundError, names, parse, read, shapes_of
from engine.checkpoints.store import StoreError
from engine.models.config import DiTConfig
from engine.models.dit import CausalWan

with torch.device("meta"):
    MODEL = CausalWan(DiTConfig(dim=8, ffn_dim=12, num_heads=2, num_layers=2, text_dim=6))
SHAPES = shapes_of(MODEL)
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 15518464\n"
LAYERS = [name for name, module in MODEL.named_modules() if isinstance(module, torch.nn.Linear)]
RANK, ALPHA = 2, 6.0


def factors(layers: list[str] = LAYERS) -> dict[str, tuple[Tensor, Tensor]]:
    """down [r, in] and up [out, r] of every layer."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for layer in layers:
        out, inner = SHAPES[f"{layer}.weight"]
        found[layer] = (
            torch.randn(RANK, inner, generator=generator),
            torch.randn(out, RANK, generator=generator),
        )
    return found


def diffusers_name(layer: str) -> str:
    """By hand, after the table in diffusers' `convert_wan_to_diffusers.py`."""
    for ours, theirs in [
        ("self_attn.o", "attn1.to_out.0"),
        ("cross_attn.o", "attn2.to_out.0"),
        ("self_attn.", "attn1.to_"),
        ("cross_attn.", "attn2.to_"),
        ("ffn.0", "ffn.net.0.proj"),
        ("ffn.2", "ffn.net.2"),
        ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
        ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
        ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
        ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
        ("time_projection.1", "condition_embedder.time_proj"),
        ("head.head", "proj_out"),
    ]:
        if ours in layer:
            return layer.replace(ours, theirs)
    raise AssertionError(layer)


def written(spell: Callable[[str], str], down: str, up: str, *, alpha: bool) -> dict[str, Tensor]:
    out = {}
    for layer, (a, b) in factors().items():
        out[f"{spell(layer)}.{down}.weight"], out[f"{spell(layer)}.{up}.weight"] = a, b
        if alpha:
            out[f"{spell(layer)}.alpha"] = torch.tensor(ALPHA)
    return out


FORMATS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "peft": (
        written(lambda n: f"base_model.model.{n}", "lora_A", "lora_B", alpha=False),
        {"r": RANK, "lora_alpha": ALPHA},
    ),
    "peft, named adapter": (
        written(lambda n: f"base_model.model.{n}", "lora_A.default", "lora_B.default", alpha=False),
        {"r": RANK, "lora_alpha": ALPHA},
    ),
    "diffusers": (
        written(lambda n: f"transformer.{diffusers_name(n)}", "lora_A", "lora_B", alpha=False),
        {"lora_alpha": ALPHA},
    ),
    "diffusers, alpha in the file": (
        written(lambda n: f"transformer.{diffusers_name(n)}", "lora.down", "lora.up", alpha=True),
        {},
    ),
    "original": (written(lambda n: f"diffusion_model.{n}", "lora_down", "lora_up", alpha=True), {}),
    "kohya": (written(lambda n: f"lora_unet_{n.replace('.', '_')}", "lora_down", "lora_up", alpha=True), {}),
    "kohya, diffusers names": (
        written(lambda n: f"lora_unet_{diffusers_name(n).replace('.', '_')}", "lora_down", "lora_up", alpha=True),
        {},
    ),
    "kohya, underscores then dots": (
        written(
            lambda n: "lora_unet_" + n.replace("blocks.", "blocks_").replace("embedding.", "embedding_"),
            "lora_down",
            "lora_up",
            alpha=True,
        ),
        {},
    ),
    "diffusers, lora_linear_layer": (
        written(diffusers_name, "lora_linear_layer.down", "lora_linear_layer.up", alpha=True),
        {},
    ),
    "diffusers, _lora": (
        {
            k.replace(".lora.", "_lora."): v
            for k, v in written(diffusers_name, "lora.down", "lora.up", alpha=True).items()
        },
        {},
    ),
    "without .weight": (
        {k.removesuffix(".weight"): v for k, v in written(str, "lora_A", "lora_B", alpha=True).items()},
        {},
    ),
    "longlive": (
        {
            "generator_lora": written(
                lambda n: f"base_model.model.{n}".replace("blocks.0.", "blocks.0._fsdp_wrapped_module."),
                "lora_A",
                "lora_B",
                alpha=True,
            ),
        },
        {},
    ),
}


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_gives_the_same_lora(format: str) -> None:
    tensors, settings = FORMATS[format]
    lora = parse("style", tensors, SHAPES, settings)
    assert lora.layers.keys() == set(LAYERS) and lora.differences == {}
    for layer, (down, up) in factors().items():
        found = lora.layers[layer]
        assert torch.equal(found.down, down) and torch.equal(found.up, up) and found.scale == ALPHA / RANK
        torch.testing.assert_close(found.delta(), ALPHA / RANK * up @ down, rtol=0, atol=1e-5)


def one(**more: Any) -> dict[str, Any]:
    down, up = factors(["blocks.0.self_attn.q"])["blocks.0.self_attn.q"]
    stem = "diffusion_model.blocks.0.self_attn.q"
    return {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up} | more


def test_scale() -> None:
    def scale(**settings: Any) -> float:
        return parse("style", one(), SHAPES, settings).layers["blocks.0.self_attn.q"].scale

    assert scale() == 1.0  # LongLive: alpha is the rank
    assert scale(lora_alpha=4) == 2.0
    assert scale(lora_alpha=4, use_rslora=True) == pytest.approx(4 / RANK**0.5)


def test_a_difference_may_name_the_modulation() -> None:
    lora = parse("style", {"blocks.0.modulation.diff": torch.ones(1, 6, 8)}, SHAPES)
    assert lora.differences.keys() == {"blocks.0.modulation"}


def test_plain_differences() -> None:
    """As lightx2v's distillation LoRAs for Wan carry them."""
    extra = {
        "diffusion_model.blocks.1.norm3.diff": torch.ones(8),
        "diffusion_model.blocks.1.norm3.diff_b": torch.ones(8),
        "diffusion_model.blocks.0.self_attn.norm_q.diff": torch.ones(8),
        "diffusion_model.blocks.0.diff_m": torch.ones(1, 6, 8),
        "diffusion_model.head.diff_m": torch.ones(1, 2, 8),
        "diffusion_model.patch_embedding.diff": torch.ones(8, 16, 1, 2, 2),
        "diffusion_model.blocks.0.self_attn.q.lora_B.bias": torch.ones(8),
    }
    lora = parse("style", one(**extra), SHAPES, {"lora_alpha": 4})
    assert lora.differences.keys() == {
        "blocks.1.norm3.weight",
        "blocks.1.norm3.bias",
        "blocks.0.self_attn.norm_q.weight",
        "blocks.0.modulation",
        "head.modulation",
        "patch_embedding.weight",
        "blocks.0.self_attn.q.bias",
    }
    assert torch.equal(lora.differences["blocks.0.self_attn.q.bias"], torch.full((8,), 2.0))  # scaled as in PEFT
    assert lora.touched() >= {"blocks.0.self_attn.q.weight", "head.modulation"}
    # diffusers' norm2 is Wan's norm3
    theirs = parse("style", {"transformer.blocks.1.norm2.diff": torch.ones(8)}, SHAPES)
    assert theirs.differences.keys() == {"blocks.1.norm3.weight"}


Q = "diffusion_model.blocks.0.self_attn.q"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "empty"),
        (one(**{"diffusion_model.blocks.7.self_attn.q.lora_A.weight": torch.ones(2, 8)}), r"blocks\.7.*lacks"),
        (one(**{"lora_te_text_model_0_q.lora_down.weight": torch.ones(2, 8)}), "lora_te_text.*lacks"),
        (one(**{"diffusion_model.blocks.0.cross_attn.k_img.lora_A.weight": torch.ones(2, 8)}), "k_img"),
        ({f"{Q}.lora_A.weight": torch.ones(2, 8)}, rf"{Q}.*up \(lora_B\)"),
        ({f"{Q}.lora_B.weight": torch.ones(8, 2)}, rf"{Q}.*down \(lora_A\)"),
        ({f"{Q}.alpha": torch.tensor(1.0)}, f"{Q}.alpha.*half"),
        ({f"{Q}.lora_A.weight": torch.ones(2, 8), f"{Q}.lora_B.weight": torch.ones(8, 3)}, f"{Q}.*another size"),
        ({f"{Q}.lora_A.weight": torch.ones(2, 9), f"{Q}.lora_B.weight": torch.ones(8, 2)}, f"{Q}.*another size"),
        ({f"{Q}.lora_A.weight": torch.ones(0, 8), f"{Q}.lora_B.weight": torch.ones(8, 0)}, f"{Q}.*another size"),
        (one(**{f"{Q}.alpha": torch.ones(2)}), "one number"),
        (one(**{f"{Q}.alpha": torch.tensor(float("nan"))}), "alpha.*finite"),
        (one(**{f"{Q}.lora_B.weight": torch.full((8, 2), float("inf"))}), "lora_B.*finite"),
        (one(**{f"{Q}.lora_A.second.weight": torch.ones(2, 8)}), "twice"),
        (one(**{"diffusion_model.blocks.0.norm3.diff": torch.ones(9)}), "norm3.diff.*another size"),
        (one(**{"diffusion_model.blocks.0.self_attn.norm_q.diff_b": torch.ones(8)}), "norm_q.diff_b.*no place"),
        (one(**{f"{Q}.weight": torch.ones(8, 8)}), "not a tensor of a LoRA"),
        ({"diffusion_model.patch_embedding.lora_A.weight": torch.ones(2, 64),
          "diffusion_model.patch_embedding.lora_B.weight": torch.ones(8, 2)}, "patch_embedding.*linear"),
        ({"lora_unet_blocks_0_self_attn_q.hada_w1_a": torch.ones(2, 8)}, "hada_w1_a.*LoHa"),
        ({"lora_unet_blocks_0_self_attn_q.lokr_w1": torch.ones(2, 8)}, "LoKr"),
        (one(**{f"{Q}.dora_scale": torch.ones(8)}), "dora_scale.*DoRA"),
        (one(**{"base_model.model.blocks.0.self_attn.q.lora_magnitude_vector.weight": torch.ones(8)}), "DoRA"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_named(tensors: dict[str, Any], message: str) -> None:
    with pytest.raises(StoreError, match="style") as caught:
        parse("style", tensors, SHAPES)
    assert re.search(message, str(caught.value)), str(caught.value)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"alpha_pattern": {"q": 3}}, {"lora_alpha": "x"},
                                      {"lora_alpha": float("nan")}])  # fmt: skip
def test_settings_that_cannot_be_honoured_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(StoreError, match="style"):
        parse("style", one(), SHAPES, settings)


def same(a: Lora, b: Lora) -> bool:
    return a.layers.keys() == b.layers.keys() and all(
        torch.equal(a.layers[key].down, b.layers[key].down) and a.layers[key].scale == b.layers[key].scale
        for key in a.layers
    )


def test_files_and_folders(tmp_path: Path) -> None:
    folder = tmp_path / "loras"
    (folder / "peft").mkdir(parents=True)
    save_file(one(), folder / "plain v1.2.safetensors")
    save_file(one(), folder / "peft" / "adapter_model.safetensors")
    (folder / "peft" / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": ALPHA}))
    header = {"lora_adapter_metadata": json.dumps({"transformer.r": RANK, "transformer.lora_alpha": ALPHA})}
    save_file(one(), folder / "diffusers.safetensors", metadata=header)
    (folder / "note.txt").write_text("not a LoRA")
    assert names(folder) == ["diffusers", "peft", "plain v1.2"]
    plain, peft, diffusers = (read(folder, name, SHAPES) for name in ("plain v1.2", "peft", "diffusers"))
    assert plain.layers["blocks.0.self_attn.q"].scale == 1.0
    assert peft.layers["blocks.0.self_attn.q"].scale == ALPHA / RANK
    assert same(peft, diffusers) and not same(peft, plain)


def test_names_do_not_lead_out_of_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "loras"
    (folder / "deep").mkdir(parents=True)
    for path in (tmp_path / "outside", folder / "inside", folder / "deep" / "x", folder / ".hidden"):
        save_file(one(), f"{path}.safetensors")
    (folder / "link.safetensors").symlink_to(tmp_path / "outside.safetensors")
    (folder / "alias.safetensors").symlink_to("inside.safetensors")
    (folder / "broken.safetensors").symlink_to("nothing")
    assert names(folder) == ["alias", "inside"]
    for name in ("link", "../outside", "..", "", "deep/x", ".hidden", "broken", "inside\n", "in\x00side", "none",
                 str(tmp_path / "outside"), "x" * 500):  # fmt: skip
        with pytest.raises(LoraNotFoundError):
            read(folder, name, SHAPES)


def test_a_file_that_is_overwritten_later_changes_no_lora_that_was_read(tmp_path: Path) -> None:
    save_file(one(), tmp_path / "x.safetensors")
    lora, path = read(tmp_path, "x", SHAPES), tmp_path / "x.safetensors"
    before = {name: layer.delta().clone() for name, layer in lora.layers.items()}
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert before and all(torch.equal(lora.layers[name].delta(), value) for name, value in before.items())
    os.truncate(path, 0)  # a mapped page that is gone would end the process
    assert all(torch.equal(lora.layers[name].delta(), value) for name, value in before.items())


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, b"\x80\x04\x95.", POINTER])
def test_damaged_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.safetensors").write_bytes(content)
    with pytest.raises(StoreError, match="bad.*git lfs pull" if content == POINTER else "bad"):
        read(tmp_path, "bad", SHAPES)
    (tmp_path / "peft").mkdir()
    save_file(one(), tmp_path / "peft" / "adapter_model.safetensors")
    (tmp_path / "peft" / "adapter_config.json").write_bytes(content or b"[]")
    with pytest.raises(StoreError, match="peft"):
        read(tmp_path, "peft", SHAPES)
