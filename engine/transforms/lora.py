"""LoRAs merged into a model's weights, changed while it serves.

Merged, a LoRA costs nothing per chunk, however many there are. The weights of touched layers are kept as they were
on the host, so a change starts from these, never from a sum that was rounded before, and removal is exact, bit for
bit. The price is host memory of the size of the touched layers, and one product of thin matrices per touched layer
and change. Weights change in place: whoever captured their addresses (CUDA graphs) sees the new values.

A model serves every stream of an engine process, so LoRAs are the model's: a change concerns all streams at once.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from engine.checkpoints.lora import Lora
from engine.ops.dispatch import on_gpu


def merge(parameter: str, clean: Tensor, active: Iterable[tuple[Lora, float]]) -> Tensor:
    """The clean value of a parameter plus what the LoRAs add, summed in float32, in the format of `clean`."""
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
        """What is applied now, with its strength, by name. Strength 0 keeps a LoRA at hand without effect."""
        return dict(self._active)

    @property
    def strengths(self) -> dict[str, float]:
        return {name: strength for name, (_, strength) in self._active.items()}

    @torch.no_grad()
    def set(self, wanted: Sequence[tuple[Lora, float]]) -> bool:
        """Apply these LoRAs and no others; true if a weight changed.

        Each must have been made for this model (`engine.checkpoints.lora.read`). When it fails for want of memory,
        no LoRA is left applied.
        """
        # in one order, whatever the caller's: sums round, and the same set is to give the same bits
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
