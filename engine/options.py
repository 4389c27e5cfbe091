"""The command line of the engine process. Parsing loads no torch, which takes seconds."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn, get_args

from engine.config import PRESETS, ROLES, PlainPrecision, QuantScheme, TextFormat, TextPlacement

MAX_THREADS = 1024


def positive(text: str) -> int:
    """Type of an option that is a whole number of at least 1."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} must be at least 1")
    return number


def threads(text: str) -> int:
    """Type of an option that is a number of threads."""
    if (number := positive(text)) > MAX_THREADS:
        raise argparse.ArgumentTypeError(f"{number} must be at most {MAX_THREADS}")
    return number


def folder(text: str) -> Path:
    """Type of an option that is a folder whose files can be read."""
    try:
        if not (path := Path(text)).is_dir():
            raise argparse.ArgumentTypeError(f"{text} is not a folder")
        os.scandir(os.path.join(path, ".")).close()  # the dot takes the right to enter, as opening a file does
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text} cannot be read: {error.strerror}") from None
    return path


def model(text: str) -> str:
    """Type of an option that is the name of a preset."""
    if text not in PRESETS:
        raise argparse.ArgumentTypeError(f"there is no model {text!r}: choose from {', '.join(sorted(PRESETS))}")
    return text


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line: these options were given to the gateway, which has another usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"engine: {message.removeprefix('argument model: ')}\n")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of an engine process; exits with status 2 and a message where they are wrong."""
    return create_parser().parse_args(arguments)


def create_parser() -> argparse.ArgumentParser:
    """The parser of an engine process; docs/options.md is written from it."""
    parser = Parser(prog="python -m engine", description="The engine process.", allow_abbrev=False)
    parser.add_argument("model", type=model, choices=sorted(PRESETS), help="the preset to serve")
    link = parser.add_argument_group("link", "Set by the gateway when it starts an engine.")
    link.add_argument("--socket", required=True, metavar="ADDRESS", help="ZeroMQ address that the gateway is bound to")
    link.add_argument(
        "--frames-fd", type=int, required=True, metavar="FD", help="file descriptor of the memory that frames go into"
    )
    link.add_argument("--parent-pid", type=int, metavar="PID", help="exit when this process is no longer the parent")
    link.add_argument(
        "--spare",
        action="store_true",
        help="start as a standby: prepare at the lowest priority and wait for the gateway's word to serve; on a CPU "
        "with everything loaded and warm, on a GPU before anything is put there",
    )
    parser.add_argument(
        "--weights", type=Path, metavar="DIR", help="folder of the weights (default: those in the repository)"
    )
    parser.add_argument("--loras", type=folder, metavar="DIR", help="folder of LoRAs that may be applied while serving")
    parser.add_argument(
        "--threads",
        type=threads,
        default=os.cpu_count() or 1,
        metavar="N",
        help="CPU threads for the model (default: one for each core)",
    )
    parser.add_argument("--device", help="torch device (default: the first GPU, or the CPU)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of weights and activations (default: what is fast here)"
    )
    parser.add_argument(
        "--decoder", choices=("light", "full"), default="light", help="full is the VAE's own decoder (%(default)s)"
    )
    parser.add_argument(
        "--text-encoder",
        choices=get_args(TextPlacement),
        default="resident",
        help="keep it on the device, copy it there layer by layer while it runs, or run it on the CPU (%(default)s)",
    )
    parser.add_argument(
        "--text-encoder-weights", choices=get_args(TextFormat), help="keep its weights in 8 bits (default: as they are)"
    )
    parser.add_argument(
        "--batch",
        type=positive,
        default=1,
        metavar="N",
        help="generate the chunks of up to N streams in one batch, if that is measured to be faster here; chunks then "
        "arrive later, and a stream's frames depend slightly on the others in its batch (%(default)s)",
    )
    add_speed(parser)
    return parser


def add_speed(parser: argparse.ArgumentParser) -> None:
    """Add the options of every command that runs a model; `transforms.apply.from_arguments` reads them."""
    group = parser.add_argument_group(
        "speed", "Kernels and CUDA graphs, which lose no precision, are the default on a GPU; lossy options are opt-in."
    )
    group.add_argument("--plain", action="store_true", help="run the model as written, without transforms")
    group.add_argument(
        "--kv-cache", choices=get_args(PlainPrecision), default="exact", help="how past chunks are kept (%(default)s)"
    )
    group.add_argument("--low-bit", choices=get_args(QuantScheme), help="the transformer's projections in fewer bits")
    group.add_argument(
        "--fixed-scales", action="store_true", help="with --low-bit: scales of inputs from a calibration at the start"
    )
    group.add_argument(
        "--sparse-weights",
        nargs="*",
        choices=ROLES,
        metavar="ROLE",
        help=f"projections with 2:4 sparse weights, of {', '.join(ROLES)} (default: those that this device speeds up)",
    )
    group.add_argument("--low-bit-attention", action="store_true", help="queries and keys in int8, values in float8")
    group.add_argument(
        "--keep", type=float, default=1.0, metavar="SHARE", help="share of the past that is attended to (default: all)"
    )
    group.add_argument(
        "--pruned-heads",
        type=Path,
        metavar="FILE",
        help="heads that do not attend to the past, as `python -m engine.bench.heads` writes them",
    )
    group.add_argument(
        "--no-context-pass", action="store_true", help="keep the K and V that the last denoising step wrote instead"
    )
