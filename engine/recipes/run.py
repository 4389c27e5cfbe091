"""What every recipe shares: where its files are, how long it may run, what it prints, how it resumes.

A recipe is one command, `python -m engine.recipes.NAME`. It reads the newest checkpoints in `--folder`, trains for
`--seconds` and writes its own back, so that it resumes when it is called again. Under `torchrun` the ranks share a
model: each draws its own data, gradients are averaged, and rank 0 tells the time, prints and saves.
"""

import argparse
import os
import time
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

SHARD_BYTES = 15 << 20
"""A checkpoint is cut into files of at most this size, which our machines can pass on."""


class Run:
    """A folder of checkpoints, a time budget and a progress line."""

    def __init__(self, name: str, folder: Path, seconds: float) -> None:
        self.name = name
        self.folder = folder
        self.seconds = seconds
        self.rank, self.ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.device = torch.device("cuda", self.rank) if torch.cuda.is_available() else torch.device("cpu")
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.cuda.set_stream(torch.cuda.Stream())  # steps are recorded, which the default stream does not allow
            torch.backends.cudnn.benchmark = True
        if self.ranks > 1 and not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        self.started = time.monotonic()
        self._printed = 0.0
        folder.mkdir(parents=True, exist_ok=True)
        self.say(f"on {self.ranks} x {self.device.type}, {seconds:.0f} s, checkpoints in {folder}")

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(f"[{self.name}] {text}", flush=True)

    def seed(self, seed: int) -> None:
        """Seed both generators: the CPU's alike on every rank, for decisions; the GPU's apart, for noise."""
        torch.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(1000 * seed + self.rank)

    def generator(self, seed: int) -> torch.Generator:
        """A generator of data on this rank's device, different on every rank."""
        return torch.Generator(self.device).manual_seed(1000 * seed + self.rank)

    def align(self, module: nn.Module) -> None:
        """Give every rank the parameters of rank 0."""
        if self.ranks > 1:
            for p in module.parameters():
                dist.broadcast(p.data, 0)

    def elapsed(self) -> float:
        return time.monotonic() - self.started

    def progress(self) -> float:
        """Share of the budget that is used, 0 to 1: rank 0's clock, so that all ranks stop at the same step."""
        share = torch.tensor(min(self.elapsed() / self.seconds, 1.0))
        if self.ranks > 1:
            dist.broadcast(share, 0)
        return float(share)

    def restart_clock(self) -> None:
        """Count the budget from here: call once when set-up is over."""
        self.started = time.monotonic()

    def log(self, step: int, values: Mapping[str, Tensor | float], every: float = 10.0) -> None:
        """Print at most every `every` seconds; tensors are read only then, so the GPU is not held up."""
        now = self.elapsed()
        if self.rank > 0 or now - self._printed < every:
            return
        self._printed = now
        figures = " ".join(
            f"{key} {float(value.detach() if isinstance(value, Tensor) else value):.4g}"
            for key, value in values.items()
        )
        print(f"[{self.name}] {now:5.0f}/{self.seconds:.0f} s  step {step}  {figures}", flush=True)

    def path(self, checkpoint: str) -> Path:
        return self.folder / f"{checkpoint}.safetensors"

    def save(self, checkpoint: str, tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.bfloat16) -> None:
        """Write tensors (floating ones as dtype) in files of at most `SHARD_BYTES`."""
        if self.rank == 0:
            self._write(checkpoint, tensors, dtype)
        if self.ranks > 1:
            dist.barrier()

    def _write(self, checkpoint: str, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        shards: list[dict[str, Tensor]] = [{}]
        room = SHARD_BYTES
        for name, value in tensors.items():
            kept = value.detach().to("cpu", dtype if value.is_floating_point() else value.dtype).contiguous().clone()
            size = kept.numel() * kept.element_size()
            if size > room and shards[-1]:
                shards.append({})
                room = SHARD_BYTES
            shards[-1][name] = kept
            room -= size
        for old in self.folder.glob(f"{checkpoint}-*.safetensors"):
            old.unlink()
        for index, shard in enumerate(shards):
            save_file(shard, self.folder / f"{checkpoint}-{index}.safetensors")

    def has(self, checkpoint: str) -> bool:
        return (self.folder / f"{checkpoint}-0.safetensors").exists()

    def load(self, checkpoint: str) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for path in sorted(self.folder.glob(f"{checkpoint}-*.safetensors")):
            tensors |= {
                name: value.float() if value.is_floating_point() else value for name, value in load_file(path).items()
            }
        if not tensors:
            raise FileNotFoundError(f"{self.folder}: no checkpoint '{checkpoint}'; run its recipe first")
        return {name: value.to(self.device) for name, value in tensors.items()}


def arguments(description: str | None, seconds: float) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/mini"), help="folder of checkpoints")
    parser.add_argument("--seconds", type=float, default=seconds, help="training time")
    return parser


def learning_rate(progress: float, step: int, warmup: int = 100, decay_from: float = 0.6) -> float:
    """Factor on the peak rate: linear warm-up by steps, constant, then linear to 2 % by the end of the budget."""
    falling = 1.0 if progress < decay_from else max(0.02, (1 - progress) / (1 - decay_from))
    return min(1.0, (step + 1) / warmup) * falling


def channels_last(module: nn.Module) -> None:
    """Lay the weights of convolutions out with channels last, 2-D and 3-D ones in one module."""
    for p in module.parameters():
        if p.ndim == 5:
            p.data = p.data.contiguous(memory_format=torch.channels_last_3d)
        elif p.ndim == 4 and p.shape[-1] > 1:
            p.data = p.data.contiguous(memory_format=torch.channels_last)
