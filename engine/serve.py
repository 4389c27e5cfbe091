"""The engine process from its options to its end: load, warm up, report ready, run the worker.

Importing this loads no torch: a standby does that at the lowest priority.
"""

import argparse
import contextlib
import ctypes
import functools
import importlib
import os
import signal
import sys
from typing import TYPE_CHECKING

from engine import wire
from engine.config import PRESETS
from engine.standby import low_priority_process, run_at_idle_priority

if TYPE_CHECKING:
    import torch

    from engine.gateway_link import GatewayLink
    from engine.pipeline import Pipeline
    from engine.transforms.apply import Speed
    from engine.warmup import WarmupResult

WRONG_OPTIONS, BAD_WEIGHTS, DEVICE_LOST = 2, 3, 4
"""Exit statuses."""


def serve(options: argparse.Namespace) -> int:
    """Serve until the gateway ends the process; returns the exit status."""
    if options.parent_pid is not None:
        die_with_parent(options.parent_pid)
    with contextlib.ExitStack() as low_priority:
        if options.spare:
            low_priority.enter_context(low_priority_process())
            for name in ("engine.assemble", "engine.worker"):
                run_at_idle_priority(functools.partial(importlib.import_module, name))
        return _serve(options, low_priority)


def _serve(options: argparse.Namespace, low_priority: contextlib.ExitStack) -> int:
    import torch

    from engine.assemble import describe
    from engine.checkpoints.store import StoreError
    from engine.gateway_link import GatewayLink
    from engine.transforms.apply import from_arguments
    from engine.worker import Worker

    torch.set_num_threads(options.threads)
    try:
        device = device_of(options.device)
    except ValueError as error:
        return refuse(error)
    link = GatewayLink(options.socket, options.parent_pid)
    link.start()
    # A second warm engine would not fit into a GPU's memory: there a standby has imported everything, and no more.
    warm_standby = options.spare and device.type == "cpu"
    if options.spare and not warm_standby and not wait_for_serve(link, low_priority, warm=False):
        return 0
    try:
        speed = from_arguments(options, device, PRESETS[options.model].dit)
    except ValueError as error:
        link.finish()
        return refuse(error)
    load = functools.partial(_load, options, device, speed)
    try:
        pipeline, warmup = run_at_idle_priority(load) if warm_standby else load()
    except StoreError as error:
        link.send(wire.Fault("weights", str(error)))
        link.finish()
        print(f"engine: {error}", file=sys.stderr, flush=True)
        return BAD_WEIGHTS
    if warm_standby and not wait_for_serve(link, low_priority, warm=True):
        return 0
    link.progressed()  # the time until now went into loading and warming up
    link.send(wire.Ready(wire.PROTOCOL, os.getpid(), [describe(pipeline, warmup)]))
    status = 0
    try:
        Worker(pipeline, link, options.frames_fd, options.loras, batch=warmup.batch).run()
    except torch.AcceleratorError as error:
        print(f"engine: the device is lost: {error}", file=sys.stderr, flush=True)
        status = DEVICE_LOST
    link.finish()
    return status


def refuse(error: ValueError) -> int:
    """Print what is wrong with the options; returns the exit status."""
    print(f"engine: {error}", file=sys.stderr, flush=True)
    return WRONG_OPTIONS


def device_of(name: str | None) -> "torch.device":
    """The device of this name, or the best one for None. Raises ValueError. No GPU is touched."""
    import torch

    from engine.assemble import best_device

    if name is None:
        return best_device()
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name} is unknown: use cpu, cuda, or cuda:N for one of several GPUs") from None
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise ValueError(f"--device {name} is not there: torch finds {count} GPUs")
    return device


def _load(options: argparse.Namespace, device: "torch.device", speed: "Speed") -> "tuple[Pipeline, WarmupResult]":
    import torch

    from engine.assemble import assemble
    from engine.checkpoints.store import StoreError
    from engine.warmup import warm

    try:
        pipeline = assemble(
            options.model,
            weights=options.weights,
            device=device,
            dtype=getattr(torch, options.dtype) if options.dtype else None,
            decoder=options.decoder,
            text_encoder=options.text_encoder,
            text_weights=options.text_encoder_weights,
            speed=speed,
            loras=options.loras is not None,
        )
    except OSError as error:
        raise StoreError(f"{error.filename or 'a file of the weights'} cannot be read: {error.strerror}") from error
    return pipeline, warm(pipeline, batch=options.batch)


def wait_for_serve(link: "GatewayLink", low_priority: contextlib.ExitStack, *, warm: bool) -> bool:
    """Wait as a standby for the gateway's `Serve`, then return to normal priority.

    False where the gateway sent `Shutdown` instead; `link` is finished then.
    """
    link.send(wire.Waiting(warm))
    while not isinstance(message := link.inbox.get(), wire.Serve | wire.Shutdown):
        pass
    low_priority.close()
    if isinstance(message, wire.Shutdown):
        link.finish()
    return isinstance(message, wire.Serve)


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent dies, even while it hangs or is stopped.

    Linux only. Elsewhere the link's thread notices within a second, unless it is stopped too.
    """
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)  # it died before that
