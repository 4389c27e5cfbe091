"""Ship: write a run's student, VAE and light decoder, and apart from them the probes, into stores of the repository.

Matrices become int8 with one scale per row, which brings everything under 32 MiB; the light decoder, whose error is
seen directly, stays bfloat16. `engine.recipes.evaluate --served` measures what is lost.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from engine.assemble import WEIGHTS
from engine.checkpoints import store
from engine.checkpoints.tokenizer import save_words
from engine.config import MINI
from engine.models.tokenizer import Tokenizer
from engine.recipes import captions, probe, teacher, train_vae
from engine.recipes.run import Run, arguments, channels_last

LOW_BIT = {"dit", "text_encoder", "vae"}
JUDGES = WEIGHTS / "probes"


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries under `prefix.`, without it."""
    return {name.removeprefix(prefix + "."): x for name, x in tensors.items() if name.startswith(prefix + ".")}


def export(run: Run, folder: Path) -> None:
    student, vae = run.load("student"), run.load("vae")
    components = {
        "dit": part(student, "dit"),
        "text_encoder": part(student, "text"),
        "light_vae": part(vae, "light"),
        "vae": part(vae, "vae"),
        "statistics": part(vae, "statistics"),
    }
    tokenizer = folder / "tokenizer.json"
    folder.mkdir(parents=True, exist_ok=True)
    save_words(Tokenizer(captions.VOCABULARY), tokenizer)
    store.save(folder, components, low_bit=LOW_BIT, extra={tokenizer.name: tokenizer.read_text()})
    store.save(JUDGES, {name: run.load(name) for name in probe.PROBES}, low_bit=set(probe.PROBES), extra={})
    for written in (folder, JUDGES):
        size = sum(path.stat().st_size for path in written.glob("*.safetensors"))
        run.say(f"{written}: {size / 2**20:.1f} MiB of weights")


class Shipped:
    """The store read back as the recipes' own modules, for evaluation."""

    def __init__(self, device: torch.device, folder: Path = WEIGHTS / MINI.name) -> None:
        self.device, self.tensors = device, store.load(folder) | store.load(JUDGES)

    def _fill(self, module: nn.Module, tensors: dict[str, Tensor]) -> None:
        module.load_state_dict(tensors)
        module.to(self.device).float().eval().requires_grad_(False)

    def bundle(self) -> train_vae.Bundle:
        bundle = train_vae.Bundle(MINI)
        for name, module in (("vae", bundle.vae), ("light_vae", bundle.light), ("statistics", bundle.statistics)):
            self._fill(module, part(self.tensors, name))
        channels_last(bundle)
        return bundle

    def student(self) -> teacher.Model:
        model = teacher.Model(MINI)
        self._fill(model.dit, part(self.tensors, "dit"))
        self._fill(model.text, part(self.tensors, "text_encoder"))
        return model

    def probe(self, name: str) -> probe.Probe:
        judge = probe.Probe(probe.PROBES[name])
        self._fill(judge, part(self.tensors, name))
        channels_last(judge)
        return judge


def restore(run: Run) -> None:
    """Write what is shipped back as checkpoints of a run, to train on: student, teacher, VAE and probes.

    The teacher's weights are not kept: it begins as the student.
    """
    shipped = Shipped(torch.device("cpu"))
    student = shipped.student().state_dict()
    for name in ("student", "teacher"):
        run.save(name, student)
    run.save("vae", shipped.bundle().state_dict(), torch.float32)
    for name in probe.PROBES:
        run.save(name, shipped.probe(name).state_dict(), torch.float32)


def main() -> None:
    parser = arguments(__doc__, 0)
    parser.add_argument("--restore", action="store_true", help="the other way: from the store to the checkpoints")
    parser.add_argument("--to", type=Path, default=WEIGHTS / MINI.name, help="folder of the store")
    options = parser.parse_args()
    run = Run("export", options.folder, 0)
    if options.restore:
        restore(run)
    else:
        export(run, options.to)


if __name__ == "__main__":
    main()
