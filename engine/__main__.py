"""python -m engine MODEL --socket ADDRESS: the engine process. Or a command: models, check, convert."""

import argparse
import ctypes
import os
import signal
import sys
from pathlib import Path
from typing import get_args

# A thread that waits for its fellows gives its core up early: with few cores, gateway and encoder need them too, and
# spinning through a time slice makes a chunk take up to ten times as long. libgomp reads this when torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from engine import commands
from engine.config import PRESETS


def main() -> int:
    return commands.run(sys.argv[1:]) if sys.argv[1:2] and sys.argv[1] in commands.NAMES else serve()


def serve() -> int:
    """The engine process, until the gateway ends it; returns the exit status."""
    import torch

    from engine import wire
    from engine.assemble import assemble, best_device, best_dtype, describe, warm
    from engine.checkpoints.store import StoreError
    from engine.offload.text import Place
    from engine.ops.linear import Format
    from engine.stream.kv_cache import Precision
    from engine.transforms.accelerate import add_arguments, from_arguments
    from engine.worker import Wire, Worker

    parser = argparse.ArgumentParser(prog="python -m engine", description=__doc__)
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
    add_arguments(parser)
    parser.add_argument("--parent-pid", type=int, help="leave when this process is no longer the parent")
    options = parser.parse_args()
    if options.threads < 1:
        parser.error("--threads must be at least 1")
    if options.loras is not None and not options.loras.is_dir():
        parser.error(f"--loras {options.loras} is not a folder")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the gateway decides when the engine leaves
    torch.set_num_threads(options.threads)
    device = torch.device(options.device) if options.device else best_device()
    dtype = getattr(torch, options.dtype) if options.dtype else best_dtype(device)
    try:
        speed = from_arguments(options, device, PRESETS[options.model].dit)
    except ValueError as error:
        parser.error(str(error))
    if speed.fused and options.kv_cache != "exact":
        parser.error("--kv-cache needs --plain; --float8-attention halves the fused model's cache")
    if options.parent_pid is not None:
        end_with(options.parent_pid)
    link = Wire(options.socket, options.parent_pid)
    link.start()
    try:
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
    except StoreError as error:
        link.send(wire.Fault("weights", str(error)))
        link.finish()
        print(f"engine: {error}", file=sys.stderr, flush=True)
        return 3
    warmth = warm(pipeline)
    link.send(wire.Ready(wire.PROTOCOL, os.getpid(), [describe(pipeline, warmth)]))
    status = 0
    try:
        Worker(pipeline, link, options.frames_fd, options.loras).run()
    except torch.AcceleratorError as error:
        print(f"engine: the device is lost: {error}", file=sys.stderr, flush=True)
        status = 4
    link.finish()
    return status


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
