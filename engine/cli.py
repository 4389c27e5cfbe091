"""The commands of `python -m engine` that serve nothing. Torch is loaded by `convert` and `download` alone."""

import argparse
import shutil
import sys
from collections import Counter
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from engine import memory
from engine.checkpoints import hub, layouts, sources, wan
from engine.checkpoints.headers import StoreError, Weights
from engine.config import PRESETS, Preset

if TYPE_CHECKING:
    from engine.checkpoints.convert import Adapt

NAMES = ("models", "check", "convert", "download")
GIB = 2**30


def create_parser() -> argparse.ArgumentParser:
    """The parser of the commands; docs/options.md is written from it."""
    parser = argparse.ArgumentParser(prog="python -m engine")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("models", help="list the presets")
    check_parser = commands.add_parser(
        "check", help="check that weights are complete and that the preset fits into memory"
    )
    check_parser.add_argument("preset", choices=sorted(PRESETS), help="what the weights are for")
    check_parser.add_argument(
        "--weights", type=Path, nargs="+", required=True, metavar="PATH", help="folders or files, in any known layout"
    )
    check_parser.add_argument("--gpu-memory", type=float, metavar="GIB", help="memory of the device, to check against")
    check_parser.add_argument(
        "--resolution", type=_resolution, metavar="WxH", help="size of a frame in pixels (default: the preset's)"
    )

    convert_parser = commands.add_parser("convert", help="write published weights as a store that the engine loads")
    convert_parser.add_argument("preset", choices=sorted(PRESETS), help="what the weights are for")
    convert_parser.add_argument(
        "--from", dest="paths", type=Path, nargs="+", required=True, metavar="PATH", help="folders or files to read"
    )
    convert_parser.add_argument(
        "--lora", type=Path, nargs="+", default=[], metavar="FILE", help="LoRAs to merge permanently"
    )
    convert_parser.add_argument(
        "--to", type=Path, required=True, metavar="FOLDER", help="where to write: a new or empty folder"
    )

    download_parser = commands.add_parser(
        "download", help="fetch the published weights of a preset and convert them; goes on where it was interrupted"
    )
    download_parser.add_argument("preset", choices=sorted(PRESETS), help="what to fetch the weights of")
    download_parser.add_argument(
        "--to",
        type=Path,
        metavar="FOLDER",
        help=f"where to write the store (default: NAME in ${hub.FOLDER_VARIABLE} or "
        "~/.local/share/livereel/weights, where the engine finds it by itself)",
    )
    download_parser.add_argument("--yes", action="store_true", help="do not ask before the download")
    download_parser.add_argument("--keep", action="store_true", help="keep the downloaded files after the conversion")
    return parser


def run(arguments: list[str]) -> int:
    """Run the command that `arguments` begin with; returns the exit status."""
    options = create_parser().parse_args(arguments)
    try:
        match options.command:
            case "models":
                return models()
            case "check":
                return check(PRESETS[options.preset], options.weights, options.gpu_memory, options.resolution)
            case "download":
                preset = PRESETS[options.preset]
                return download(preset, options.to or hub.default_folder(preset.name), options.yes, options.keep)
            case _:
                return convert(PRESETS[options.preset], options.paths, options.to, options.lora)
    except (StoreError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _resolution(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    return int(width), int(height)


def models() -> int:
    rows = [("name", "parameters", "frames", "fps", "steps", "window", "about")]
    for preset in PRESETS.values():
        parameters = sum(map(prod, wan.tensors(preset.dit).values()))
        first = f"{len(preset.first_steps)} then " if preset.first_steps else ""
        rows.append(
            (
                preset.name,
                f"{parameters / 1e9:.1f}B" if parameters > 5e8 else f"{parameters / 1e6:.0f}M",
                f"{preset.width}x{preset.height}",
                str(preset.fps),
                f"{first}{len(preset.steps)}",
                f"{preset.window}" + (f", sink {preset.sink}" if preset.sink else ""),
                preset.description,
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def check(
    preset: Preset, paths: list[Path], gpu_memory: float | None = None, resolution: tuple[int, int] | None = None
) -> int:
    """Print what is there, what is wrong with it, and what memory it takes; 0 if everything is there, else 2."""
    setting = memory.default(preset)
    if resolution is not None:
        unit = preset.spatial_stride * preset.dit.patch[1]
        if min(resolution) < unit or any(side % unit for side in resolution):
            raise StoreError(f"--resolution must be multiples of {unit} for {preset.name}")
        setting = replace(setting, width=resolution[0], height=resolution[1])
    found = sources.find_all(paths)
    setting = replace(setting, light_vae=setting.light_vae or "light_vae" in found.parts)
    faults = list(found.faults)
    expected = layouts.expected(preset)
    for part in ("dit", "text_encoder", "vae", "light_vae"):
        if part in found.parts:
            faults += _check_part(part, found.parts[part], expected[part])
    if found.tokenizer is not None:
        print(f"{'tokenizer':13} {found.tokenizer}")
    for path in found.unused:
        print(f"{'not used':13} {path}")
    for path in found.pickles:
        if fault := sources.pickle_fault(path):
            faults.append(fault)
            continue
        print(f"{'pickle':13} {path}: is not looked into, and never read to serve; `python -m engine convert` reads it")
    lacking = found.lacking()
    faults += [f"missing: {part}" for part in lacking]
    print()
    for fault in faults:
        print(fault)
    print("incomplete" if faults else "everything is there")
    if lacking and preset.weights:
        print(f"{preset.name} needs {preset.weights}")
    print()
    _print_memory(preset, setting, gpu_memory)
    return 2 if faults else 0


def _check_part(part: str, weights: Weights, expected: dict[str, wan.Shape]) -> list[str]:
    """Print a line about a network; returns its faults."""
    faults = list(weights.faults)
    found = {name: entry.shape for name, entry in weights.entries.items()}
    layout = "native layout"
    if weights.native:
        found = {name: shape for name, shape in found.items() if not name.endswith("weight_scale")}
        differences = wan.compare(expected, found)
    else:
        try:
            match = layouts.match(part, found, expected)
        except StoreError as error:
            return [*faults, f"{part}: {error}"]
        layout, differences = match.layout, match.differences
    faults += [f"{part}: {line}" for line in wan.sentences(differences)]
    dtypes = Counter(entry.dtype for entry in weights.entries.values())
    described = [
        f"{weights.files[0].parent}: {', '.join(file.name for file in weights.files)}",
        f"{len(weights.entries)} tensors",
        f"{weights.bytes / GIB:.2f} GiB {'/'.join(dtype for dtype, _ in dtypes.most_common())}",
        *([layout] if layout else []),
    ]
    print(f"{part:13} {'; '.join(described)}")
    return faults


def _print_memory(preset: Preset, setting: memory.Setting, gpu_memory: float | None) -> None:
    parts = memory.parts(preset, setting)
    needed = sum(parts.values())
    decoder = "light VAE" if setting.light_vae else "full VAE"
    print(
        f"device memory for one stream, {setting.width}x{setting.height}, window {setting.window}, {decoder}, bfloat16:"
    )
    for name, size in parts.items():
        print(f"  {name:22}{size / GIB:8.2f} GiB")
    print(f"  {'in all, at least':22}{needed / GIB:8.2f} GiB")
    if gpu_memory is None:
        return
    limit = int(gpu_memory * GIB)
    if needed <= limit:
        print(f"fits into {gpu_memory:g} GiB")
        return
    print(f"does not fit into {gpu_memory:g} GiB: {(needed - limit) / GIB:.2f} GiB too much")
    remedies = memory.remedies(preset, setting, limit)
    if not remedies:
        print("no option makes it fit: take a smaller model")
    for remedy in remedies:
        print(f"  would fit with: {' and '.join(remedy)}")


def convert(preset: Preset, paths: list[Path], to: Path, loras: list[Path]) -> int:
    from engine.checkpoints.convert import convert as write

    write(preset, paths, to, adapt=merging(preset, loras) if loras else None)
    print(f"written to {to}; now run: python -m engine check {preset.name} --weights {to}")
    return 0


def download(preset: Preset, to: Path, yes: bool = True, keep: bool = False) -> int:
    """Fetch the files that the preset names and convert them into the store `to`; 0 if it is there, 1 if refused."""
    if to.exists() and any(to.iterdir()):
        raise StoreError(
            f"{to} is not empty: `python -m engine check {preset.name} --weights {to}` tells what it holds"
        )
    folder = to.with_name(f"{to.name}.downloads")
    listings = hub.look_up(preset)
    files = [file for listing in listings for file in listing.files]
    for listing in listings:
        print(f"{listing.source.repository} (licence: {listing.licence})")
        for file in listing.files:
            print(f"  {file.size / 1e9:8.2f} GB  {file.path}")
    missing = sum(hub.missing_bytes(file, folder) for file in files)
    size = store_bytes(preset)
    print(f"{missing / 1e9:.2f} GB to download into {folder}, then {size / 1e9:.2f} GB to write to {to}", flush=True)
    hub.check_room(folder, missing + size)
    if not yes and sys.stdin.isatty() and input("Download? [y/N] ").strip().lower() not in ("y", "yes"):
        return 1
    for file in files:
        hub.fetch(file, folder)
    places = [place for listing in listings for place in hub.places(listing, folder)]
    status = convert(preset, places, to, [lora for listing in listings for lora in hub.loras(listing, folder)])
    if not keep:
        shutil.rmtree(folder)
    return status


def store_bytes(preset: Preset) -> int:
    """About how large the store of a preset becomes: two bytes per weight."""
    parts = layouts.expected(preset)
    return 2 * sum(prod(shape) for part in ("dit", "text_encoder", "vae") for shape in parts[part].values())


def merging(preset: Preset, paths: list[Path]) -> "Adapt":
    """What adds LoRAs at strength 1, from safetensors or pickles (LongLive's `lora.pt`), to the transformer's weights.

    Raises:
        StoreError: a file is damaged, or for another model.
    """
    from engine.checkpoints import lora
    from engine.checkpoints.self_forcing import read_pickle
    from engine.transforms.lora import merge

    shapes = wan.tensors(preset.dit)
    active = [
        (
            lora.parse(path.stem, read_pickle(path, "generator_lora")[0], shapes)
            if path.suffix in sources.PICKLES
            else lora.read(path.parent, path.stem, shapes),
            1.0,
        )
        for path in paths
    ]
    return lambda name, weight: merge(name, weight, active)
