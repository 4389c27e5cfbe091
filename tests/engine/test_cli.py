import json
import os
import subprocess
import sys
import time
from math import prod
from pathlib import Path

import pytest

from engine import cli as commands
from engine.checkpoints import layouts, wan
from engine.checkpoints.headers import DTYPES
from engine.config import DIT_1_3B, PRESETS

ROOT = Path(__file__).parents[2]


def sparse(path: Path, tensors: dict[str, wan.Shape], dtype: str = "BF16") -> Path:
    """A safetensors file of real size that takes little room on the disk: zeros, but for the starts of tensors."""
    header, position = {}, 0
    for name, shape in tensors.items():
        end = position + prod(shape) * DTYPES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + position)
    with path.open("r+b") as file:
        for entry in header.values():
            start, end = entry["data_offsets"]
            file.seek(8 + len(text) + start)
            file.write(b"?" * min(64, end - start))
    return path


def diffusers_names(tensors: dict[str, wan.Shape]) -> dict[str, wan.Shape]:
    back = {ours: theirs for theirs, ours in (wan.FROM_DIFFUSERS | wan.FROM_DIFFUSERS_BLOCK).items()}
    found = {}
    for name, shape in tensors.items():
        start, rest = name.split(".", 2)[:2], name.split(".", 2)[-1]
        prefix = ".".join(start) + "." if start[0] == "blocks" else ""
        module, _, attribute = (rest if prefix else name).rpartition(".")
        if attribute == "modulation":
            found[f"{prefix}scale_shift_table"] = shape
        else:
            found[f"{prefix}{back[module]}.{attribute}"] = shape
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A complete diffusers folder of Wan 2.1 T2V 1.3B, in real size, with two shards."""
    names = list(diffusers_names(wan.tensors(DIT_1_3B)).items())
    transformer = tmp_path / "transformer"
    shards = {f"model-{i}.safetensors": dict(names[i::2]) for i in range(2)}
    for name, tensors in shards.items():
        sparse(transformer / name, tensors)
    (transformer / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {tensor: name for name, tensors in shards.items() for tensor in tensors}})
    )
    expected = layouts.expected(PRESETS["self-forcing-1.3b"])
    text = {name.replace("umt5.", "encoder."): shape for name, shape in expected["text_encoder"].items()}
    text["shared.weight"] = text.pop("encoder.embed_tokens.weight")
    sparse(tmp_path / "text_encoder" / "model.safetensors", text)
    sparse(tmp_path / "vae" / "diffusion_pytorch_model.safetensors", expected["vae"], "F32")
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    return tmp_path


def check(*arguments: str) -> tuple[int, str, float]:
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "engine", "check", *arguments], cwd=ROOT, check=False, capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr, time.monotonic() - started


def rewrite(folder: Path, shard: str, change) -> None:  # type: ignore[no-untyped-def]
    path = folder / "transformer" / shard
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    tensors = {name: tuple(entry["shape"]) for name, entry in header.items()}
    change(tensors)
    sparse(path, tensors)


def test_a_complete_folder(folder: Path) -> None:
    status, text, _ = check("self-forcing-1.3b", "--weights", str(folder), "--gpu-memory", "80")
    assert status == 0, text
    assert "diffusers layout" in text and "825 tensors" in text
    assert "everything is there" in text and "fits into 80 GiB" in text


def test_missing_misshaped_and_truncated_are_all_named_at_once(folder: Path) -> None:
    def spoil(tensors: dict[str, wan.Shape]) -> None:
        name = next(name for name in tensors if name.startswith("blocks.7.attn1") and name.endswith("weight"))
        lost.append(name)
        del tensors[name]
        tensors["condition_embedder.time_proj.bias"] = (77,)
        tensors["odd"] = (3,)

    lost: list[str] = []
    names = list(diffusers_names(wan.tensors(DIT_1_3B)))
    shard = names.index("condition_embedder.time_proj.bias") % 2
    rewrite(folder, f"model-{shard}.safetensors", spoil)
    other = folder / "transformer" / f"model-{1 - shard}.safetensors"
    os.truncate(other, other.stat().st_size - 5)
    (folder / "tokenizer" / "tokenizer.json").unlink()

    status, text, seconds = check("self-forcing-1.3b", "--weights", str(folder), "--gpu-memory", "24")
    assert status == 2
    [(ours, _)] = [item for item in wan.to_native([*names]).native.items() if item[1] == lost[0]]
    assert f"missing: {ours}" in text
    assert "wrong shape: time_projection.1.bias is [77], must be [9216]" in text
    assert "unexpected: odd" in text
    assert f"{other} is truncated" in text
    assert "missing: tokenizer.json" in text
    assert "missing: dit" not in text
    # the bar is two seconds; a busy machine is no fault of ours, loading torch would be
    assert seconds < 2, f"{seconds:.1f} s"


def test_another_models_weights_and_pickles(tmp_path: Path) -> None:
    sparse(tmp_path / "krea.safetensors", {f"model.{n}": s for n, s in wan.tensors(PRESETS["krea-14b"].dit).items()})
    (tmp_path / "Wan2.1_VAE.pth").write_bytes(b"x")
    status, text, _ = check("self-forcing-1.3b", "--weights", str(tmp_path))
    assert status == 2
    assert "unexpected: blocks.30." in text
    assert "patch_embedding.weight is [5120, 16, 1, 2, 2], must be [1536, 16, 1, 2, 2]" in text
    assert "Wan2.1_VAE.pth: is not looked into" in text
    assert "missing: text_encoder" in text
    status, text, _ = check("krea-14b", "--weights", str(tmp_path))
    assert "dit:" not in text and "original layout" in text


def test_nothing_there(tmp_path: Path) -> None:
    assert check("mini", "--weights", str(tmp_path))[:1] == (2,)
    status, text, _ = check("mini", "--weights", str(tmp_path / "none"))
    assert status == 2 and "is missing" in text


def test_the_shipped_model_is_complete() -> None:
    status, text, _ = check("mini", "--weights", str(ROOT / "engine" / "weights" / "mini"))
    assert status == 0, text
    assert "native layout" in text


def test_what_a_store_lacks_is_said_without_hashing_it(tmp_path: Path) -> None:
    """One of real size: hashing its 2.6 GiB would take seconds."""
    names = {f"dit.{name}": shape for name, shape in wan.tensors(DIT_1_3B).items()}
    path = sparse(tmp_path / "dit.safetensors", names)
    (tmp_path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    files = {file.name: {"bytes": file.stat().st_size, "sha256": ""} for file in (path, tmp_path / "tokenizer.json")}
    (tmp_path / "manifest.json").write_text(json.dumps({"files": files}))
    status, text, seconds = check("self-forcing-1.3b", "--weights", str(tmp_path))
    assert status == 2 and seconds < 2, f"{seconds:.1f} s"
    assert f"{tmp_path / 'tokenizer.json'} is a Git LFS pointer" in text
    for part in ("text_encoder", "vae or light_vae", "statistics", "tokenizer.json"):
        assert f"missing: {part}\n" in text
    assert "missing: dit" not in text


def test_models_lists_every_preset(capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.run(["models"]) == 0
    listed = capsys.readouterr().out
    assert all(f"\n{name} " in listed for name in PRESETS)
    assert "4 then 2" in listed and "12, sink 3" in listed


def test_commands_are_no_presets_names() -> None:
    assert not set(commands.NAMES) & PRESETS.keys()


def test_checking_loads_no_torch() -> None:
    code = (
        "import sys, engine.cli as c; c.run(['models']);"
        "c.run(['check', 'mini', '--weights', 'engine/weights/mini', '--gpu-memory', '1']);"
        "sys.exit(int('torch' in sys.modules or 'numpy' in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, capture_output=True).returncode == 0


@pytest.mark.parametrize("value", ["831x480", "8x8", "0x0", "axb", "832"])
def test_a_resolution_that_the_model_cannot_make(value: str) -> None:
    status, text, _ = check("self-forcing-1.3b", "--weights", str(ROOT / "engine"), "--resolution", value)
    assert status == 2 and "resolution" in text


def test_the_list_of_vae_tensors_is_the_modules() -> None:
    """If not: python -m engine.checkpoints.layouts"""
    assert layouts.TENSORS.read_text() == layouts.write(layouts.vae_tensors())
    for preset in PRESETS.values():
        assert set(layouts.expected(preset)) == {"dit", "text_encoder", "vae", "light_vae"}


def test_faults_of_every_network_are_named(folder: Path) -> None:
    expected = layouts.expected(PRESETS["self-forcing-1.3b"])
    vae = {name: shape for name, shape in expected["vae"].items() if name != "conv2.bias"}
    sparse(folder / "vae" / "diffusion_pytorch_model.safetensors", vae | {"conv2.weight": (7,)})
    sparse(folder / "text_encoder" / "model.safetensors", {"shared.weight": (8, 4096)})
    sparse(folder / "taew2_1.safetensors", expected["light_vae"] | {"decoder.1.bias": (3,), "encoder.0.bias": (3,)})
    status, text, _ = check("self-forcing-1.3b", "--weights", str(folder))
    assert status == 2
    assert "vae: missing: conv2.bias" in text
    assert "vae: wrong shape: conv2.weight is [7], must be [16, 16, 1, 1, 1]" in text
    assert "text_encoder: missing: umt5.block.0.layer.0.SelfAttention.q.weight" in text
    assert "text_encoder: wrong shape: umt5.embed_tokens.weight is [8, 4096], must be [256384, 4096]" in text
    assert "light_vae: wrong shape: decoder.1.bias is [3], must be [256]" in text
    assert "dit:" not in text
