"""Merges LoRAs into a model's weights while it serves.

Merged LoRAs cost nothing per chunk, however many there are. The original weights of changed layers are kept in host
memory. Each change starts from them, not from a rounded sum, so removing a LoRA restores the weights bit for bit. The
cost is host memory of the size of the changed layers, and one product of thin matrices per layer and change. Weights
change in place, so CUDA graphs, which captured their addresses, use the new values.

One model serves all streams of an engine process, so a change applies to all of them.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from engine.checkpoints.lora import Lora
from engine.ops.dispatch import on_gpu


def merge(parameter: str, clean: Tensor, active: Iterable[tuple[Lora, float]]) -> Tensor:
    """The original value of a parameter plus what the LoRAs add, summed in float32, in the dtype of `clean`."""
    total = clean.float()
    for lora, strength in active:
        if layer := lora.layers.get(parameter.removesuffix(".weight")):
            total = total + strength * layer.delta(clean.device)
        if (difference := lora.differences.get(parameter)) is not None:
            total = total + strength * difference.to(device=clean.device, dtype=torch.float32)
    return total.to(clean.dtype)


class Adapters:
    """The LoRAs of one model. Not thread-safe: change them between chunks, in the thread that runs the model."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters = dict(model.named_parameters())
        self._clean: dict[str, Tensor] = {}
        self._active: dict[str, tuple[Lora, float]] = {}

    @property
    def active(self) -> dict[str, tuple[Lora, float]]:
        """The LoRAs that are set and their strengths, by name. Strength 0 keeps a LoRA loaded without effect."""
        return dict(self._active)

    @property
    def strengths(self) -> dict[str, float]:
        return {name: strength for name, (_, strength) in self._active.items()}

    @torch.no_grad()
    def set(self, wanted: Sequence[tuple[Lora, float]]) -> bool:
        """Apply these LoRAs and no others. Returns whether a weight changed.

        Each must have been read for this model (`engine.checkpoints.lora.read`). If memory runs out, no LoRA stays
        applied.
        """
        # in a fixed order, so that the same set gives the same bits: sums round
        active = {lora.name: (lora, strength) for lora, strength in sorted(wanted, key=lambda pair: pair[0].name)}
        stale: set[str] = set()
        for name in self._active.keys() | active.keys():
            old, new = self._active.get(name), active.get(name)
            if old != new:
                stale |= {parameter for pair in (old, new) if pair and pair[1] for parameter in pair[0].touched()}
        try:
            for parameter in sorted(stale):
                effective = [(lora, s) for lora, s in active.values() if s and parameter in lora.touched()]
                self._write(parameter, effective)
        except BaseException:
            self._active = {}
            for parameter in list(self._clean):
                self._write(parameter, [])
            raise
        self._active = active
        return bool(stale)

    def _write(self, parameter: str, effective: list[tuple[Lora, float]]) -> None:
        weight = self._parameters[parameter]
        if not effective:
            if (clean := self._clean.get(parameter)) is not None:
                weight.copy_(clean)
                del self._clean[parameter]
            return
        if parameter not in self._clean:
            clean = weight.detach().to("cpu", copy=True)
            self._clean[parameter] = clean.pin_memory() if on_gpu(weight.device) else clean
        weight.copy_(merge(parameter, self._clean[parameter].to(weight.device), effective))
