"""A LoRA for mini through the whole server: HTTP in, frames out."""

import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import save_file
from websockets.sync.client import connect

from engine.config import MINI

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A random LoRA of rank 4 on every value projection."""
    generator = torch.Generator().manual_seed(1)
    tensors, dim = {}, MINI.dit.dim
    for block in range(MINI.dit.num_layers):
        stem = f"diffusion_model.blocks.{block}.self_attn.v"
        tensors[f"{stem}.lora_down.weight"] = torch.randn(4, dim, generator=generator) / dim**0.5
        tensors[f"{stem}.lora_up.weight"] = torch.randn(dim, 4, generator=generator) / 4
    save_file(tensors, tmp_path / "ink.safetensors")
    return tmp_path


def frames(address: str) -> dict[bytes, bytes]:
    """Two chunks of one and the same stream: pixels by media time, for a viewer on a busy machine may miss some."""
    body = {"prompt": "a red cube on grass", "seed": 7, "duration_s": 1.0}
    stream = httpx.post(f"{address}v1/streams", json=body).json()
    with connect(stream["ws_url"] + "?format=rgb24", compression=None, max_size=None) as viewer:
        return {item[8:16]: item[16:] for item in viewer if isinstance(item, bytes)}


def test_frames_change_and_come_back_bit_for_bit(folder: Path) -> None:
    command = [sys.executable, "-m", "server", "--port", "0", "--engine-threads", "1", "--loras", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert process.stdout is not None
        match = re.search(r"http://\S+", process.stdout.readline())
        assert match is not None
        address, url = match[0], f"{match[0]}v1/loras"

        def listed(strength: float | None) -> dict[str, object]:
            return {"object": "list", "data": [{"id": "ink", "object": "lora", "strength": strength}]}

        assert httpx.get(url).json() == listed(None)
        clean = frames(address)
        assert httpx.put(url, json={"loras": {"ink": 1.0}}).json() == listed(1.0)
        styled = frames(address)
        refused = httpx.put(url, json={"loras": {"oil": 1.0}})
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "lora_not_found")
        assert httpx.put(url, json={"loras": {}}).json() == listed(None)
        again = frames(address)
        assert min(len(clean), len(styled), len(again)) >= 8
        assert all(clean[pts] != styled[pts] for pts in clean.keys() & styled.keys())
        assert all(clean[pts] == again[pts] for pts in clean.keys() & again.keys())
    finally:
        process.terminate()
        process.communicate(timeout=20)
    assert process.returncode == 0
