"""Every form of a checkpoint through the whole `convert` command: the store equals that of the plain safetensors file
with the same values, and so do the outputs of the network that is loaded from it."""

import json
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from engine import cli
from engine.checkpoints import layouts, store, umt5
from engine.config import PRESETS, CacheConfig
from engine.models.config import DiTConfig, TextConfig
from engine.models.dit import CausalWan
from engine.models.text_encoder import TextEncoder
from engine.stream.kv_cache import BlockCausal

Tensors = dict[str, Tensor]
TINY = DiTConfig(dim=32, ffn_dim=64, num_heads=2, num_layers=2, text_dim=32, in_channels=4, out_channels=4, freq_dim=32)
TEXT = TextConfig(vocab_size=64, dim=32, ffn_dim=64, num_heads=2, head_dim=16, num_layers=2, length=9)
PRESET = replace(PRESETS["self-forcing-1.3b"], name="tiny", dit=TINY, text=TEXT)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, PRESET.name, PRESET)


def random_tensors(part: str) -> Tensors:
    torch.manual_seed(0)
    return {name: torch.randn(shape) * 0.3 for name, shape in layouts.expected(PRESET)[part].items()}


@pytest.fixture
def dit() -> Tensors:
    return random_tensors("dit")


@pytest.fixture
def text(dit: Tensors) -> Tensors:
    return random_tensors("text_encoder")


def convert(paths: list[Path], to: Path) -> Tensors:
    assert cli.run(["convert", PRESET.name, "--from", *map(str, paths), "--to", str(to)]) == 0
    return store.load(to)


def outputs(loaded: Tensors, part: str) -> Tensor:
    """Of one forward in float32: the transformer's prediction for a chunk, or the encoding of two prompts."""
    tensors = {name.removeprefix(f"{part}."): x.float() for name, x in loaded.items() if name.startswith(f"{part}.")}
    torch.manual_seed(1)
    with torch.device("meta"):
        model = CausalWan(TINY) if part == "dit" else TextEncoder(TEXT)
    model.load_state_dict(tensors, assign=True)
    with torch.inference_mode():
        if isinstance(model, TextEncoder):
            return model(torch.tensor([[5, 9, 30, 1] + [0] * 5, [7, 1] + [0] * 7]))
        config = CacheConfig(chunk=3, window=6, sink=0, rows=2, columns=2)
        x, prompt = torch.randn(1, 4, 3, 4, 4), torch.randn(1, 5, TINY.text_dim)
        attend = BlockCausal(3, config, head_dim=TINY.head_dim)
        return model(x, torch.full((1, 3), 750.0), model.encode_text(prompt), attend)


def same(folder: Path, form: list[Path], part: str, values: Tensors) -> None:
    """A form gives the store, and the outputs, of the plain file with these values, by our names."""
    names = {name: name.replace("umt5.", "encoder.") for name in values}
    plain = folder / f"plain-{part}.safetensors"
    save_file({names[name]: value.contiguous() for name, value in values.items()}, plain)
    # a store needs a transformer
    others = [] if part == "dit" else [plain_dit(folder)]
    expected, found = convert([plain, *others], folder / "expected"), convert([*form, *others], folder / "found")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
    assert torch.equal(outputs(found, part), outputs(expected, part))


def plain_dit(folder: Path) -> Path:
    path = folder / "dit.safetensors"
    save_file(random_tensors("dit"), path)
    return path


def write_gguf(path: Path, tensors: Tensors, kind: gguf.GGMLQuantizationType) -> Tensors:
    """Write matrices in blocks of 32 as `kind` and everything else as float32, as ComfyUI-GGUF's converter does.

    Returns the values that the file then has, by the `gguf` package.
    """
    types = gguf.GGMLQuantizationType
    writer = gguf.GGUFWriter(path, "wan")
    values = {}
    for name, value in tensors.items():
        array = value.numpy()
        of = kind if array.ndim == 2 and array.shape[1] % 32 == 0 and name.endswith("weight") else types.F32
        data = array.astype(np.float16) if of == types.F16 else gguf.quants.quantize(array, of)
        writer.add_tensor(name, data, raw_dtype=of)
        values[name] = torch.from_numpy(gguf.quants.dequantize(data, of).astype(np.float32)).reshape(value.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


KINDS = ["F32", "F16", "BF16", "Q8_0"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_transformer_in_gguf(tmp_path: Path, dit: Tensors, kind: str) -> None:
    """Under the original names, as city96 publishes them; 5 dimensions are kept."""
    path = tmp_path / f"wan-{kind}.gguf"
    values = write_gguf(path, dit, gguf.GGMLQuantizationType[kind])
    assert (kind == "F32") == all(torch.equal(values[name], dit[name]) for name in dit)
    same(tmp_path, [path], "dit", values)


def test_a_transformer_in_gguf_by_llama_cpp(tmp_path: Path, dit: Tensors) -> None:
    """It drops slowest dimensions of 1 and has at most 4; here under ComfyUI's prefix."""
    changed = {
        "patch_embedding.weight": dit["patch_embedding.weight"].reshape(-1, 1, 2, 2),
        **{name: value.squeeze(0) for name, value in dit.items() if name.endswith("modulation")},
    }
    stored = {f"model.diffusion_model.{name}": changed.get(name, value) for name, value in dit.items()}
    write_gguf(tmp_path / "wan.gguf", stored, gguf.GGMLQuantizationType.F32)
    same(tmp_path, [tmp_path / "wan.gguf"], "dit", dit)


LLAMA = {
    "layer.0.layer_norm": "attn_norm", "layer.0.SelfAttention.q": "attn_q", "layer.0.SelfAttention.k": "attn_k",
    "layer.0.SelfAttention.v": "attn_v", "layer.0.SelfAttention.o": "attn_o",
    "layer.0.SelfAttention.relative_attention_bias": "attn_rel_b", "layer.1.layer_norm": "ffn_norm",
    "layer.1.DenseReluDense.wi_0": "ffn_gate", "layer.1.DenseReluDense.wi_1": "ffn_up",
    "layer.1.DenseReluDense.wo": "ffn_down",
}  # fmt: skip
"""llama.cpp's `gguf-py/gguf/tensor_mapping.py`, where the gate of the feed-forward network is wi_0."""


def llama_name(name: str) -> str:
    if not name.startswith("umt5.block."):
        return {umt5.EMBEDDING: "token_embd.weight", umt5.NORM: "enc.output_norm.weight"}[name]
    _, _, index, rest = name.split(".", 3)
    return f"enc.blk.{index}.{LLAMA[rest.removesuffix('.weight')]}.weight"


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_encoder_in_gguf(tmp_path: Path, text: Tensors, kind: str) -> None:
    stored = {llama_name(name): value for name, value in text.items()}
    values = write_gguf(tmp_path / "umt5.gguf", stored, gguf.GGMLQuantizationType[kind])
    same(tmp_path, [tmp_path / "umt5.gguf"], "text_encoder", {name: values[llama_name(name)] for name in text})


def test_llama_cpps_names_are_the_packages() -> None:
    """Of every tensor of our encoder under Hugging Face's name, by the package's own map for T5."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, TEXT.num_layers)
    for name in layouts.text_encoder(TEXT):
        theirs = "shared" if name == umt5.EMBEDDING else name.replace("umt5.", "encoder.").removesuffix(".weight")
        assert names.get_name(theirs) == llama_name(name).removesuffix(".weight")
        assert umt5.to_native([llama_name(name)]) == {llama_name(name): name}


def test_other_types_of_gguf_are_refused_by_the_command(
    tmp_path: Path, dit: Tensors, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "wan-Q4_0.gguf"
    write_gguf(path, dit, gguf.GGMLQuantizationType.Q4_0)
    assert cli.run(["convert", PRESET.name, "--from", str(path), "--to", str(tmp_path / "to")]) == 2
    said = capsys.readouterr().err
    assert f"error: {path}: " in said and "is of type Q4_0, which is not read" in said
    assert "get the weights in Q8_0, F16 or BF16, or as safetensors" in said and not (tmp_path / "to").exists()
    assert cli.run(["check", PRESET.name, "--weights", str(path)]) == 2
    assert "is of type Q4_0, which is not read" in capsys.readouterr().out


@pytest.mark.parametrize(("dtype", "form"), [(torch.float8_e4m3fn, "float8_e4m3fn"), (torch.int8, "int8_tensorwise")])
@pytest.mark.parametrize("part", ["dit", "text_encoder"])
def test_comfyuis_mixed_formats(tmp_path: Path, part: str, dtype: torch.dtype, form: str) -> None:
    """Some layers in a format, their marks beside them, in one file that has other layers in bfloat16."""
    mark = torch.tensor(
        list(json.dumps({"format": form, "full_precision_matrix_mult": True}).encode()), dtype=torch.uint8
    )
    values, file = random_tensors(part), {}
    for name, value in values.items():
        theirs = name.replace("umt5.", "encoder.")
        if value.ndim == 2 and ".1." in name and name.endswith("weight"):
            layer = theirs.removesuffix(".weight")
            scale = value.abs().amax() / (448 if dtype.is_floating_point else 127)
            stored = (value / scale if dtype.is_floating_point else (value / scale).round()).to(dtype)
            file |= {theirs: stored, f"{layer}.weight_scale": scale, f"{layer}.comfy_quant": mark.clone()}
            values[name] = stored.float() * scale
        else:
            file[theirs] = value.bfloat16()
            values[name] = file[theirs].float()
    assert sum(name.endswith("comfy_quant") for name in file) > 3
    save_file(file, tmp_path / "mixed.safetensors")
    same(tmp_path, [tmp_path / "mixed.safetensors"], part, values)
