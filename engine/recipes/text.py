"""Teach the text encoder, alone, to tell every attribute of a scene from its caption. It stands still ever after.

The transformer reads the encoder's output, worked out once for every caption of its pools. Cost on one H100: half a
minute.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.config import MINI, Preset
from engine.models.dit import pool_text
from engine.models.text_encoder import TextEncoder
from engine.recipes import captions, world
from engine.recipes.optimizer import Optimiser, fit
from engine.recipes.run import Run, arguments

SCENES = 60_000
BATCH = 512


class Reader(nn.Module):
    """The encoder, and a linear reading of the mean of its output: logits of every attribute's values."""

    def __init__(self, preset: Preset) -> None:
        super().__init__()
        self.encoder = TextEncoder(preset.text)
        self.sizes = [len(values) for values in world.ATTRIBUTES.values()]
        self.heads = nn.Linear(preset.text.dim, sum(self.sizes))

    def loss(self, ids: Tensor, scenes: Tensor, active: Tensor) -> Tensor:
        """Mean cross-entropy of the attributes that show. ids [B, length], scenes and active [B, A]."""
        logits = self.heads(pool_text(self.encoder(ids))).float().split(self.sizes, dim=1)
        loss = torch.zeros((), device=ids.device)
        for column, logit in enumerate(logits):
            each = F.cross_entropy(logit, scenes[:, column], reduction="none")
            loss = loss + (each * active[:, column]).sum() / active[:, column].sum().clamp(min=1)
        return loss / len(logits)


def train(run: Run, preset: Preset, count: int = SCENES, batch: int = BATCH) -> None:
    run.seed(4)
    reader = Reader(preset).to(run.device)
    scenes = world.sample_scenes(count, run.generator(4), split="any", count_weights=(0.35, 0.35, 0.3))
    ids = captions.encode(scenes, 4, preset.text.length, wordings=1)[:, 0].to(run.device)
    active, labels = world.active(scenes), world.canonical(scenes)
    parameters = dict(reader.named_parameters())
    matrices = {name for name, p in parameters.items() if "block" in name and p.ndim == 2 and "bias" not in name}
    optimiser = Optimiser(parameters, matrices, 2e-3)

    def loss() -> Tensor:
        index = torch.randint(0, count, (batch,), device=run.device)
        return reader.loss(ids[index], labels[index], active[index])

    run.say(f"captions after {run.elapsed():.0f} s")
    run.restart_clock()
    report = fit(run, optimiser, loss)
    reader.load_state_dict(optimiser.averages)
    run.save("text", reader.encoder.state_dict())
    run.say(report)


def main() -> None:
    options = arguments(__doc__, 25).parse_args()
    train(Run("text", options.folder, options.seconds), MINI)


if __name__ == "__main__":
    main()
