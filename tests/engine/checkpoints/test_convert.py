import json
import os
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import save_file
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

from engine import cli as commands
from engine.checkpoints import layouts, sources, store, wan, wan_vae
from engine.checkpoints.convert import convert, dequantise, load_dit, network
from engine.checkpoints.headers import StoreError
from engine.checkpoints.self_forcing import read_pickle
from engine.config import PRESETS
from engine.models.config import TAEW21, WAN21, DiTConfig, TextConfig
from engine.models.dit import CausalWan
from engine.models.light_vae import LightDecoder
from engine.models.text_encoder import TextEncoder
from engine.models.vae import CausalVAE

TINY = DiTConfig(dim=32, ffn_dim=64, num_heads=2, num_layers=2, text_dim=16, in_channels=4, out_channels=4, freq_dim=32)
PRESET = replace(PRESETS["self-forcing-1.3b"], name="tiny", dit=TINY)


@pytest.fixture
def weights() -> dict[str, Tensor]:
    """Original names, float32, not exact in bfloat16."""
    torch.manual_seed(0)
    return {name: torch.randn(shape) for name, shape in wan.tensors(TINY).items()}


def stored(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: value.bfloat16() if value.ndim >= 2 and name.endswith("weight") else value
        for name, value in weights.items()
    }


def diffusers_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    back = {ours: theirs for theirs, ours in wan.FROM_DIFFUSERS.items()}
    block = {ours: theirs for theirs, ours in wan.FROM_DIFFUSERS_BLOCK.items()}
    found = {}
    for name, value in weights.items():
        module, _, attribute = name.rpartition(".")
        if attribute == "modulation":
            found[module.replace("head", "") + ("." if module != "head" else "") + "scale_shift_table"] = value
        elif module.startswith("blocks."):
            _, index, rest = module.split(".", 2)
            found[f"blocks.{index}.{block[rest]}.{attribute}"] = value
        else:
            found[f"{back[module]}.{attribute}"] = value
    return found


def dit(folder: Path) -> dict[str, Tensor]:
    loaded = store.load(folder)
    return {name.removeprefix("dit."): value for name, value in loaded.items() if name.startswith("dit.")}


def converted(paths: list[Path], to: Path) -> tuple[dict[str, Tensor], list[str]]:
    said: list[str] = []
    convert(PRESET, paths, to, say=said.append)
    tensors = store.load(to)
    assert tensors["statistics.mean"].tolist() == pytest.approx(PRESET.statistics.mean)
    assert tensors["statistics.std"].tolist() == pytest.approx(PRESET.statistics.std)
    return dit(to), said


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in expected.items()
    )


def test_a_diffusers_folder(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    folder = tmp_path / "model" / "transformer"
    folder.mkdir(parents=True)
    names = diffusers_names(weights)
    assert "scale_shift_table" in names and "blocks.1.ffn.net.0.proj.weight" in names
    halves = [dict(list(names.items())[part::2]) for part in range(2)]
    for part, half in enumerate(halves):
        save_file(half, folder / f"diffusion_pytorch_model-{part}.safetensors")
    weight_map = {n: f"diffusion_pytorch_model-{part}.safetensors" for part, half in enumerate(halves) for n in half}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    found, said = converted([tmp_path / "model"], tmp_path / "native")
    assert same(found, stored(weights))
    assert "diffusers layout" in said[0]
    assert same(load_dit([tmp_path / "model"], TINY), stored(weights))
    assert same(load_dit([tmp_path / "native"], TINY), stored(weights))


def test_an_original_folder(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "google" / "umt5-xxl").mkdir(parents=True)
    (tmp_path / "google" / "umt5-xxl" / "tokenizer.json").write_text("{}")
    found, said = converted([tmp_path], tmp_path / "native")
    assert same(found, stored(weights))
    assert "original layout" in said[0]
    assert (tmp_path / "native" / "tokenizer.json").read_text() == "{}"
    assert store.verify(tmp_path / "native")["preset"] == "tiny"


@pytest.mark.parametrize("generator", ["generator_ema", "generator"])
def test_a_pickle_with_two_generators_and_prefixes(tmp_path: Path, weights: dict[str, Tensor], generator: str) -> None:
    other = "generator" if generator == "generator_ema" else "generator_ema"
    wrapped = {f"model._fsdp_wrapped_module.{name}": value for name, value in weights.items()}
    torch.save({generator: wrapped, other: {n: x + 1 for n, x in wrapped.items()}, "step": 3}, tmp_path / "sf.pt")
    said: list[str] = []
    convert(replace(PRESET, generator=generator), [tmp_path / "sf.pt"], tmp_path / "native", say=said.append)
    assert same(dit(tmp_path / "native"), stored(weights))
    assert f"key {generator}" in said[0]


def test_a_pickle_without_average_gives_its_generator(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    torch.save({"generator": weights, "critic": {}}, tmp_path / "sf.pt")
    tensors, key = read_pickle(tmp_path / "sf.pt")
    assert key == "generator" and tensors.keys() == weights.keys()
    torch.save({"optimizer": {}, "step": 3}, tmp_path / "sf.pt")
    with pytest.raises(StoreError, match="generator_ema, generator among its keys: 'optimizer', 'step'"):
        read_pickle(tmp_path / "sf.pt")


@pytest.mark.parametrize("convention", wan.SCALES)
@pytest.mark.parametrize("rows", [False, True])
def test_float8_with_scales(tmp_path: Path, weights: dict[str, Tensor], convention: str, rows: bool) -> None:
    file: dict[str, Tensor] = {"scaled_fp8": torch.zeros(0)}
    for name, value in weights.items():
        if name.startswith("blocks.") and value.ndim == 2:
            scale = (value.abs().amax(dim=1) if rows else value.abs().amax()) / 448
            file[name] = (value / (scale[:, None] if rows else scale)).to(torch.float8_e4m3fn)
            file[name.replace("weight", convention)] = scale
            file[name.replace("weight", "input_scale")] = torch.ones(())
        else:
            file[name] = value
    save_file(file, tmp_path / "fp8.safetensors")
    found, _ = converted([tmp_path / "fp8.safetensors"], tmp_path / "native")
    assert found.keys() == weights.keys()
    for name, value in weights.items():
        if name.startswith("blocks.") and value.ndim == 2:
            assert found[name].dtype == torch.bfloat16
            # e4m3 has 3 bits of mantissa: at most 1/16 off, or half the smallest step; and bfloat16's own 1/256
            step = value.abs().amax() / 448 * 2**-9
            assert ((found[name] - value).abs() <= value.abs() * (1 / 16 + 1 / 256) + step).all()
        else:
            assert torch.equal(found[name], stored({name: value})[name])


def test_float8_whose_scale_is_lost_is_refused(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    file = dict(weights)
    for name in ("blocks.0.ffn.0.weight", "blocks.1.ffn.0.weight"):
        file[name] = file[name].to(torch.float8_e4m3fn)
    save_file(file, tmp_path / "cast.safetensors")  # a plain cast: no scale anywhere
    assert load_dit([tmp_path / "cast.safetensors"], TINY)["blocks.0.ffn.0.weight"].dtype == torch.bfloat16
    file["blocks.0.ffn.0.weight_scale"] = torch.ones(())
    save_file(file, tmp_path / "fp8.safetensors")
    with pytest.raises(StoreError, match=r"blocks\.1\.ffn\.0\.weight is .* has no scale"):
        load_dit([tmp_path / "fp8.safetensors"], TINY)
    file["blocks.1.ffn.0.weight_scale"] = torch.ones(5)
    save_file(file, tmp_path / "fp8.safetensors")
    with pytest.raises(StoreError, match="5 elements"):
        load_dit([tmp_path / "fp8.safetensors"], TINY)


def test_scales_multiply() -> None:
    assert dequantise(torch.tensor([[2.0, 4.0], [6.0, 8.0]]), torch.tensor([10.0, 100.0])).tolist() == [
        [20.0, 40.0],
        [600.0, 800.0],
    ]


def test_blocks_of_float8_share_a_scale() -> None:
    """DeepSeek's `weight_scale_inv`: 128 x 128, the last blocks smaller; multiplied."""
    stored_, scale = torch.ones(130, 300).to(torch.float8_e4m3fn), torch.arange(1.0, 7.0).reshape(2, 3)
    found = dequantise(stored_, scale)
    assert found.shape == (130, 300)
    assert [found[row, column].item() for row in (127, 128) for column in (127, 128, 256)] == [1, 2, 3, 4, 5, 6]


def test_a_text_encoder_in_float8_is_multiplied_by_its_scales() -> None:
    """ComfyUI's file: scales, a marker, a copy of the tokenizer, here under a wrapper's prefix."""
    sizes = TextConfig(vocab_size=64, dim=16, ffn_dim=32, num_heads=2, head_dim=8, num_layers=1, length=9)
    expected = {name: torch.ones(shape) for name, shape in layouts.text_encoder(sizes).items()}
    file = {f"module.{name.replace('umt5.', 'encoder.')}": value for name, value in expected.items()}
    wo = "module.encoder.block.0.layer.1.DenseReluDense.wo"
    file[f"{wo}.weight"] = (file[f"{wo}.weight"] * 2).to(torch.float8_e4m3fn)
    file |= {
        f"{wo}.scale_weight": torch.tensor(0.5),
        "scaled_fp8": torch.zeros(0),
        "spiece_model": torch.ones(9).byte(),
    }
    tensors = {name: store.StoredTensor.of(value) for name, value in file.items()}
    found = network("text_encoder", tensors, layouts.text_encoder(sizes), "tiny")[1]
    for name, value in expected.items():
        assert torch.equal(found[name].read().float(), value), name


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def test_a_pickle_with_a_payload_is_refused_and_not_run(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    marker = tmp_path / "run"
    path = tmp_path / "bad.pt"
    torch.save({"generator": weights, "extra": Payload(marker)}, path)
    with pytest.raises(StoreError, match="refused") as error:
        convert(PRESET, [path], tmp_path / "native", say=lambda text: None)
    assert str(path) in str(error.value) and "any code" in str(error.value)
    assert not marker.exists()
    path.write_bytes(b"garbage")
    with pytest.raises(StoreError, match="refused"):
        read_pickle(path)


def test_serving_never_reads_a_pickle(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    torch.save({"generator": weights}, tmp_path / "sf.pt")
    with pytest.raises(StoreError, match=r"pickle: run `python -m engine convert` first"):
        load_dit([tmp_path], TINY)


def test_a_folder_in_use_is_left_alone(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    save_file(weights, tmp_path / "dit.safetensors")
    with pytest.raises(StoreError, match="is in use"):
        convert(PRESET, [tmp_path], tmp_path)


def test_a_checkpoint_of_another_size_is_refused_by_name(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    del weights["blocks.1.ffn.2.bias"]
    weights["head.head.bias"] = torch.zeros(3)
    weights["surplus"] = torch.zeros(3)
    save_file(weights, tmp_path / "dit.safetensors")
    with pytest.raises(StoreError, match=r"missing: blocks\.1\.ffn\.2\.bias; unexpected: surplus; wrong shape: head"):
        convert(PRESET, [tmp_path], tmp_path / "native")
    assert not (tmp_path / "native" / store.MANIFEST).exists()


def test_two_transformers_in_one_folder_are_named(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    save_file(weights, tmp_path / "a.safetensors")
    save_file(weights, tmp_path / "b.safetensors")
    assert "both hold a dit" in sources.find(tmp_path).faults[0]


def test_weights_are_adapted_on_the_way(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    save_file(weights, tmp_path / "dit.safetensors")
    convert(
        PRESET,
        [tmp_path],
        tmp_path / "native",
        adapt=lambda name, x: x + 1 if name == "blocks.0.self_attn.q.weight" else x,
        say=lambda text: None,
    )
    changed = weights | {"blocks.0.self_attn.q.weight": weights["blocks.0.self_attn.q.weight"] + 1}
    assert same(dit(tmp_path / "native"), stored(changed))


@pytest.mark.parametrize(("part", "dtype"), [("dit", torch.bfloat16), ("vae", torch.float32)])
def test_a_vae_keeps_its_types(part: str, dtype: torch.dtype) -> None:
    found = {name: store.StoredTensor.of(torch.ones(shape)) for name, shape in (("a.weight", (2, 2)), ("b", (2,)))}
    ours = network(part, found, {name: tensor.shape for name, tensor in found.items()}, "tiny")[1]
    assert [tensor.read().dtype for tensor in ours.values()] == [dtype, torch.float32]


@pytest.mark.parametrize("original_vae", [False, True])
def test_every_network_of_a_folder(
    tmp_path: Path, weights: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, original_vae: bool
) -> None:
    """Transformer, text encoder, VAE and a TAEHV file beside them become one store that our modules load."""
    torch.manual_seed(0)
    sizes = TextConfig(vocab_size=64, dim=16, ffn_dim=32, num_heads=2, head_dim=8, num_layers=1, length=9)
    widths = (8, 16, 32, 32)
    vae_config = replace(WAN21, encoder_widths=widths, decoder_widths=widths, decoder_inputs=(8, 16, 16))
    light_config = replace(TAEW21, widths=(16, 8, 8, 8))
    with torch.device("meta"):
        ours = {
            "dit": CausalWan(TINY),
            "text_encoder": TextEncoder(sizes),
            "vae": CausalVAE(vae_config),
            "light_vae": LightDecoder(light_config),
        }
    listed = {part: {n: tuple(x.shape) for n, x in ours[part].state_dict().items()} for part in ("vae", "light_vae")}
    (tmp_path / "tensors.json").write_text(layouts.write({"wan2.1": listed}))
    monkeypatch.setattr(layouts, "TENSORS", tmp_path / "tensors.json")

    text = UMT5EncoderModel(
        UMT5Config(
            vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_heads=2, num_layers=1, feed_forward_proj="gated-gelu"
        )
    ).state_dict()
    text.pop("encoder.embed_tokens.weight")  # the same as shared.weight
    vae = AutoencoderKLWan(base_dim=8).state_dict()
    light = LightDecoder(light_config).state_dict()
    # the first layer that makes frames may have the rows of an earlier frame before those that are meant
    first = next(name for name, value in light.items() if name.endswith("conv.weight") and value.shape[2:] == (1, 1))
    longer = {first: torch.cat([torch.zeros_like(light[first]), light[first]]), "encoder.0.weight": torch.ones(3)}
    for folder, tensors in (
        ("transformer", diffusers_names(weights)),
        ("text_encoder", text),
        ("vae", vae),
        (".", light | longer),
    ):
        (tmp_path / "model" / folder).mkdir(parents=True, exist_ok=True)
        save_file({n: x.clone() for n, x in tensors.items()}, tmp_path / "model" / folder / "model.safetensors")
    if original_vae:  # a pickle under Wan's own names, as `Wan2.1_VAE.pth` is
        (tmp_path / "model" / "vae" / "model.safetensors").unlink()
        own = {ours: vae[theirs] for theirs, ours in wan_vae.from_diffusers(vae.keys()).items()}
        torch.save(own, tmp_path / "model" / "Wan2.1_VAE.pth")
    convert(replace(PRESET, text=sizes), [tmp_path / "model"], tmp_path / "native", say=lambda text: None)

    loaded = store.load(tmp_path / "native")
    for part, module in ours.items():
        mine = {n.removeprefix(f"{part}."): x for n, x in loaded.items() if n.startswith(f"{part}.")}
        module.load_state_dict({name: value.float() for name, value in mine.items()}, assign=True)
    assert same(dict(ours["light_vae"].state_dict()), dict(light))
    decoder = ours["vae"].state_dict()["decoder.conv1.weight"]
    assert torch.equal(decoder, vae["decoder.conv_in.weight"])
    embedding = ours["text_encoder"].state_dict()["umt5.embed_tokens.weight"]
    assert torch.equal(embedding, text["shared.weight"].bfloat16().float())


def test_a_vae_of_another_model_is_refused(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    for part, tensors in (("transformer", weights), ("vae", {"decoder.conv1.weight": torch.ones(2, 2)})):
        (tmp_path / part).mkdir()
        save_file(tensors, tmp_path / part / "model.safetensors")
    with pytest.raises(StoreError, match="the vae is not tiny's: missing: "):
        convert(PRESET, [tmp_path], tmp_path / "native", say=lambda text: None)


def test_a_native_store_is_not_converted_again(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    save_file(weights, tmp_path / "dit.safetensors")
    converted([tmp_path / "dit.safetensors"], tmp_path / "native")
    with pytest.raises(StoreError, match="native store already"):
        convert(PRESET, [tmp_path / "native"], tmp_path / "again")


@pytest.mark.parametrize("pickled", [True, False])
def test_loras_are_merged_for_good(tmp_path: Path, weights: dict[str, Tensor], pickled: bool) -> None:
    name = "blocks.1.ffn.0.weight"
    down, up = torch.randn(4, 32), torch.randn(64, 4)
    peft = {
        "base_model.model.blocks.1.ffn.0.lora_A.default.weight": down,
        "base_model.model.blocks.1.ffn.0.lora_B.default.weight": up,
    }
    path = tmp_path / ("lora.pt" if pickled else "lora.safetensors")
    if pickled:
        torch.save({"generator_lora": peft}, path)
    else:
        save_file(peft, path)
    save_file(weights, tmp_path / "dit.safetensors")
    adapt = commands.merging(PRESET, [path])
    convert(PRESET, [tmp_path / "dit.safetensors"], tmp_path / "native", adapt=adapt, say=lambda text: None)
    assert same(dit(tmp_path / "native"), stored(weights | {name: weights[name] + up @ down}))


ADVICE = ("weights_only", "trust", "safe_globals", "Re-running")
"""Of torch's messages: how to read a pickle without restrictions."""


def test_a_refusal_gives_a_reason_and_not_torchs_advice(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    path = tmp_path / "x.pt"
    torch.save({"generator": weights}, path)
    sound = path.read_bytes()
    torch.save({"generator": weights, "extra": Payload(tmp_path / "run")}, path)
    cases = [
        (path.read_bytes(), r"it asks for (posix|os)\.mkdir"),
        (sound[: len(sound) // 2], "it is truncated"),
        (b"", "refused"),
        (b"garbage" * 100, "refused"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "run `git lfs pull`"),
        (b"<!DOCTYPE html>", "is a web page"),
        (bytes(5000), "begins with zeros"),
    ]
    for content, reason in cases:
        path.write_bytes(content)
        for act in (
            lambda: read_pickle(path),
            lambda: convert(PRESET, [path], tmp_path / "native", say=lambda text: None),
            lambda: commands.merging(PRESET, [path]),
        ):
            with pytest.raises(StoreError, match=reason) as error:
                act()
            assert str(path) in str(error.value)
            assert not [word for word in ADVICE if word in str(error.value)]


@pytest.mark.parametrize("pickled", [True, False])
def test_zeros_instead_of_weights_are_refused(tmp_path: Path, weights: dict[str, Tensor], pickled: bool) -> None:
    zeros = {name: torch.zeros_like(value) for name, value in weights.items()}
    path = tmp_path / ("dit.pt" if pickled else "dit.safetensors")
    if pickled:
        torch.save({"generator": zeros}, path)
    else:
        save_file(zeros, path)
    with pytest.raises(StoreError, match="holds zeros instead of weights") as error:
        convert(PRESET, [path], tmp_path / "native", say=lambda text: None)
    assert str(path) in str(error.value) and not (tmp_path / "native").exists()


def test_what_serving_will_miss_is_said(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    save_file(weights, tmp_path / "dit.safetensors")
    (tmp_path / "t5.pth").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    _, said = converted([tmp_path], tmp_path / "native")
    assert f"not used: {tmp_path / 't5.pth'} is a Git LFS pointer" in said[1]
    assert said[-1] == "missing, and needed to serve: text_encoder, vae or light_vae, tokenizer.json"
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe")
    with pytest.raises(StoreError, match=r"tokenizer\.json is not UTF-8"):
        converted([tmp_path], tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.fixture
def small_files() -> Iterator[Callable[[int], None]]:
    """Limits the size of a file, which fails a write as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("exists", [True, False])
def test_a_disk_that_fills_leaves_nothing_behind(
    tmp_path: Path, weights: dict[str, Tensor], small_files: Callable[[int], None], exists: bool
) -> None:
    save_file(weights, tmp_path / "dit.safetensors")
    to = tmp_path / "native"
    if exists:
        to.mkdir()
    small_files(20_000)
    with pytest.raises(
        StoreError, match=r"dit\.safetensors cannot be written: File too large: [0-9]{5} bytes"
    ) as error:
        convert(PRESET, [tmp_path / "dit.safetensors"], to, say=lambda text: None)
    small_files(1 << 20)
    assert str(to) in str(error.value)
    assert to.exists() == exists and (not exists or not any(to.iterdir()))
    assert same(converted([tmp_path / "dit.safetensors"], to)[0], stored(weights))


def test_an_interrupted_conversion_leaves_nothing_behind(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    save_file(weights, tmp_path / "dit.safetensors")

    def stop(name: str, value: Tensor) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(PRESET, [tmp_path / "dit.safetensors"], tmp_path / "native", adapt=stop, say=lambda text: None)
    assert not (tmp_path / "native").exists()


def test_what_a_killed_conversion_left_is_no_obstacle(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    save_file(weights, tmp_path / "dit.safetensors")
    to = tmp_path / "native"
    writer = store.Writer(to)
    writer.add("text_encoder", {"a": store.StoredTensor.of(torch.ones(3))})
    (to / "mine").write_text("")
    with pytest.raises(StoreError, match="is in use: another conversion writes to it"):
        converted([tmp_path / "dit.safetensors"], to)
    del writer  # with it goes the lock, as with its process
    assert (to / "text_encoder.safetensors").exists()
    assert same(converted([tmp_path / "dit.safetensors"], to)[0], stored(weights))
    assert {file.name for file in to.iterdir()} == {
        "dit.safetensors",
        "statistics.safetensors",
        "manifest.json",
        "mine",
    }


def test_all_networks_are_counted_before_the_first_is_written(
    tmp_path: Path, weights: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file(weights, tmp_path / "dit.safetensors")
    networks = sum(value.nbytes for value in stored(weights).values())
    assert PRESET.statistics is not None
    free = shutil.disk_usage(tmp_path)._replace(free=networks)  # not enough for the statistics
    monkeypatch.setattr("shutil.disk_usage", lambda path: free)
    needed = networks + 2 * 4 * len(PRESET.statistics.mean)
    with pytest.raises(
        StoreError, match=rf"{re.escape(str(tmp_path / 'native'))} has .* \({needed} bytes\) are needed"
    ):
        convert(PRESET, [tmp_path / "dit.safetensors"], tmp_path / "native", say=lambda text: None)
    assert not (tmp_path / "native").exists()


def test_a_full_disk_is_foreseen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr("shutil.disk_usage", lambda path: free)
    with pytest.raises(StoreError, match="GiB free"):
        store.Writer(tmp_path).add("dit", {"a": store.StoredTensor.of(torch.zeros(100))})


def test_tensors_are_written_one_at_a_time(tmp_path: Path) -> None:
    alive = peak = 0

    def read(value: int) -> Tensor:
        nonlocal alive, peak
        tensor = torch.full((100,), float(value))
        alive, peak = alive + 1, max(peak, alive + 1)
        import weakref

        weakref.finalize(tensor, gone)
        return tensor

    def gone() -> None:
        nonlocal alive
        alive -= 1

    writer = store.Writer(tmp_path)
    writer.add(
        "dit",
        {str(i): store.StoredTensor(torch.float32, (100,), lambda i=i: read(i)) for i in range(20)},  # type: ignore[misc]
        shard_bytes=2000,
    )
    writer.close()
    assert peak <= 2  # the one being written, and the next while its name still holds the last
    assert len(list(tmp_path.glob("*.safetensors"))) == 4
    assert [store.load(tmp_path)[f"dit.{i}"][0].item() for i in range(20)] == list(range(20))
