"""Marks of ComfyUI's mixed formats, in tensors and in the header; `test_forms.py` converts what is read."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.checkpoints import comfy_quant, headers, sources

LAYER = "model.diffusion_model.blocks.0.cross_attn.q"
FP8 = {"format": "float8_e4m3fn"}


def mark(content: Any) -> Tensor:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return torch.tensor(list(text), dtype=torch.uint8)


def write(path: Path, *, layers: Any = None, weight: Tensor | None = None, **marks: Any) -> Path:
    """A layer in float8 with a scale, whose mark is `mark`, or is in the metadata."""
    tensors = {
        f"{LAYER}.weight": torch.ones(4, 4).to(torch.float8_e4m3fn) if weight is None else weight,
        f"{LAYER}.weight_scale": torch.tensor(2.0),
    }
    tensors |= {f"{LAYER}.comfy_quant": mark(marks["mark"])} if "mark" in marks else {}
    metadata = (
        None
        if layers is None
        else {"_quantization_metadata": layers if isinstance(layers, str) else json.dumps(layers)}
    )
    save_file(tensors, path, metadata)
    return path


def faults(path: Path) -> list[str]:
    return comfy_quant.faults(headers.read_weights([path], path.parent))


def test_what_is_read_has_no_fault(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    assert faults(write(path)) == []
    assert faults(write(path, mark=FP8 | {"full_precision_matrix_mult": True})) == []
    assert faults(write(path, layers={"format_version": "1.0", "layers": {LAYER: FP8}})) == []
    assert faults(write(path, layers={"layers": {"blocks.0.cross_attn.q": FP8}})) == []  # without the prefix
    assert faults(write(path, mark={"format": "int8_tensorwise"}, weight=torch.ones(4, 4).to(torch.int8))) == []
    assert faults(write(path, mark={"format": "float8_e5m2"}, weight=torch.ones(4, 4).to(torch.float8_e5m2))) == []
    assert set(comfy_quant.FORMATS.values()) <= headers.DTYPES.keys()


@pytest.mark.parametrize(
    "form", ["nvfp4", "mxfp8", "convrot_w4a4", "asym_w4a8_int8", "awq_w4a16", "float8_e4m3fn_blockwise"]
)
@pytest.mark.parametrize("in_metadata", [True, False])
def test_other_formats_are_named(tmp_path: Path, form: str, in_metadata: bool) -> None:
    path = tmp_path / "x.safetensors"
    write(path, layers={"layers": {LAYER: {"format": form}}}) if in_metadata else write(path, mark={"format": form})
    assert faults(path) == [
        f"{path}: {LAYER}: ComfyUI's format {form!r} is not read: get the weights in bfloat16, or in float8_e4m3fn"
    ]
    assert sources.find(path).parts["dit"].faults == faults(path)


def test_rotated_weights_are_not_misread(tmp_path: Path) -> None:
    """Their types, shapes and scales are those of a format that is read."""
    path, rotated = tmp_path / "x.safetensors", {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 256}
    weight = torch.ones(4, 4).to(torch.int8)
    for written in (
        write(path, mark=rotated, weight=weight),
        write(path, layers={"layers": {LAYER: rotated}}, weight=weight),
    ):
        assert "with rotated weights (convrot) is not read" in faults(written)[0]


def test_layers_of_one_format_are_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write(path, layers={"layers": {f"blocks.{index}.ffn.0": {"format": "nvfp4"} for index in range(3)}})
    assert f"{path}: blocks.0.ffn.0 and 2 more layers: ComfyUI's format 'nvfp4'" in faults(path)[0]


def test_damaged_marks_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for content in (b"", b"{", b"[]", {}, {"format": 3}, b"[" * 4000, FP8 | {"x": "y" * 5000}):
        assert "its comfy_quant names no format: download" in faults(write(path, mark=content))[0]
    for layers in ("", "{", "[]", {}, {"layers": 3}, {"layers": {LAYER: 3}}):
        assert "names no format: download" in faults(write(path, layers=layers))[0]
    assert "but its weight is F32: download" in faults(write(path, mark=FP8, weight=torch.ones(4, 4)))[0]
    assert "but its weight is missing" in faults(write(path, layers={"layers": {"other": FP8}}))[0]
    save_file({f"{LAYER}.weight": torch.ones(1).to(torch.float8_e4m3fn), f"{LAYER}.comfy_quant": mark(FP8)}, path)
    assert "but has no weight_scale" in faults(path)[0]
