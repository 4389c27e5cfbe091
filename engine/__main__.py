"""python -m engine MODEL --socket ADDRESS: the engine process. Or a command: models, check, convert."""

import argparse
import contextlib
import ctypes
import functools
import importlib
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, get_args

# A thread that waits for its fellows gives its core up early: with few cores, gateway and encoder need them too, and
# spinning through a time slice makes a chunk take up to ten times as long. libgomp reads this when torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

from engine import cli as commands
from engine.config import PRESETS
from engine.standby import aside, expendable

if TYPE_CHECKING:
    from engine.worker import Wire


def main() -> int:
    return commands.run(sys.argv[1:]) if sys.argv[1:2] and sys.argv[1] in commands.NAMES else serve()


def serve() -> int:
    """The engine process, until the gateway ends it; returns the exit status."""
    # What counts before anything is loaded, which takes seconds.
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--parent-pid", type=int, help="leave when this process is no longer the parent")
    early.add_argument(
        "--spare",
        action="store_true",
        help="prepare at the lowest priority and wait to be told to serve: on a CPU with everything loaded and warm, "
        "on a GPU before anything is put there",
    )
    known, _ = early.parse_known_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the gateway decides when the engine leaves
    if known.parent_pid is not None:
        end_with(known.parent_pid)
    with contextlib.ExitStack() as until_wanted:
        if known.spare:
            until_wanted.enter_context(expendable())
            for name in ("engine.assemble", "engine.worker"):
                aside(functools.partial(importlib.import_module, name))
        return _serve(early, until_wanted)


def _serve(early: argparse.ArgumentParser, until_wanted: contextlib.ExitStack) -> int:
    import torch

    from engine import wire
    from engine.assemble import WarmupResult, assemble, best_device, best_dtype, describe, warm
    from engine.checkpoints.store import StoreError
    from engine.offload.text import Place
    from engine.ops.linear import Format
    from engine.pipeline import Pipeline
    from engine.stream.kv_cache import Precision
    from engine.transforms.apply import add_arguments, from_arguments
    from engine.worker import Wire, Worker

    parser = argparse.ArgumentParser(prog="python -m engine", description=__doc__, parents=[early])
    parser.add_argument("model", choices=sorted(PRESETS), help="the preset to serve")
    parser.add_argument(
        "--socket", required=True, metavar="ADDRESS", help="ZeroMQ address that the gateway is bound to"
    )
    parser.add_argument(
        "--frames-fd", type=int, required=True, metavar="FD", help="file descriptor of the memory that frames go into"
    )
    parser.add_argument("--weights", type=Path, help="folder of the weights (default: those in the repository)")
    parser.add_argument("--loras", type=Path, metavar="DIR", help="folder of LoRAs that may be applied while serving")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads for the model")
    parser.add_argument("--device", help="torch device (default: the first GPU, or the CPU)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of weights and activations (default: what is fast here)"
    )
    parser.add_argument("--kv-cache", choices=get_args(Precision), default="exact", help="how past chunks are kept")
    parser.add_argument("--decoder", choices=("light", "full"), default="light", help="the VAE's own decoder is full")
    parser.add_argument(
        "--text-encoder",
        choices=get_args(Place),
        default="resident",
        help="keep it on the device, bring it there layer by layer while it works, or run it on the CPU (%(default)s)",
    )
    parser.add_argument("--text-encoder-weights", choices=get_args(Format), help="keep its weights in 8 bits")
    parser.add_argument(
        "--batch",
        type=int,
        default=1,
        metavar="N",
        help="make the chunks of up to N streams at once, if that is faster here: they come later for it, and what a "
        "stream shows depends on those beside it, if little (%(default)s)",
    )
    add_arguments(parser)
    options = parser.parse_args()
    if options.threads < 1:
        parser.error("--threads must be at least 1")
    if options.batch < 1:
        parser.error("--batch must be at least 1")
    if options.loras is not None and not options.loras.is_dir():
        parser.error(f"--loras {options.loras} is not a folder")
    torch.set_num_threads(options.threads)
    device = torch.device(options.device) if options.device else best_device()
    dtype = getattr(torch, options.dtype) if options.dtype else best_dtype(device)
    link = Wire(options.socket, options.parent_pid)
    link.start()
    warm_spare = options.spare and device.type == "cpu"  # two of them are too many for a GPU's memory
    if options.spare and not warm_spare and not wanted(link, until_wanted, warm=False):
        return 0
    try:
        speed = from_arguments(options, device, PRESETS[options.model].dit)
        if speed.fused and options.kv_cache != "exact":
            raise ValueError("--kv-cache needs --plain; --low-bit-attention halves the fused model's cache")
    except ValueError as error:
        link.finish()
        parser.error(str(error))

    def load() -> tuple[Pipeline, WarmupResult]:
        pipeline = assemble(
            options.model,
            weights=options.weights,
            device=device,
            dtype=dtype,
            kv_precision=options.kv_cache,
            decoder=options.decoder,
            text_encoder=options.text_encoder,
            text_weights=options.text_encoder_weights,
            speed=speed,
            loras=options.loras is not None,
        )
        return pipeline, warm(pipeline, batch=options.batch)

    try:
        pipeline, warmth = aside(load) if warm_spare else load()
    except StoreError as error:
        link.send(wire.Fault("weights", str(error)))
        link.finish()
        print(f"engine: {error}", file=sys.stderr, flush=True)
        return 3
    if warm_spare and not wanted(link, until_wanted, warm=True):
        return 0
    link.moved()  # what counts until now is loading and warming up
    link.send(wire.Ready(wire.PROTOCOL, os.getpid(), [describe(pipeline, warmth)]))
    status = 0
    try:
        Worker(pipeline, link, options.frames_fd, options.loras, batch=warmth.batch).run()
    except torch.AcceleratorError as error:
        print(f"engine: the device is lost: {error}", file=sys.stderr, flush=True)
        status = 4
    link.finish()
    return status


def wanted(link: "Wire", until_wanted: contextlib.ExitStack, *, warm: bool) -> bool:
    """Wait as a spare, and give up what is for waiting; false when the gateway leaves instead, and `link` is over."""
    from engine import wire

    link.send(wire.Waiting(warm))
    while not isinstance(message := link.inbox.get(), wire.Serve | wire.Shutdown):
        pass
    until_wanted.close()
    if isinstance(message, wire.Shutdown):
        link.finish()
    return isinstance(message, wire.Serve)


def end_with(parent: int) -> None:
    """Have the kernel kill this process when its parent dies, even while it hangs or is stopped.

    Linux can do that; elsewhere the wire thread sees it within a second, unless it is stopped too.
    """
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)  # it died before that


if __name__ == "__main__":
    sys.exit(main())
