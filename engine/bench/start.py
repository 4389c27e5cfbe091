"""How long does an engine take to be ready: the first time on a machine, and again, with what was compiled on disk?

    python -m engine.bench.start self-forcing-1.3b

Random weights made on the device, so that reading a checkpoint is not in it. Each start is a process of its own; the
two share a cache folder of Triton's and one of the compiler's that are empty before.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time

from engine.assemble import best_device, best_dtype
from engine.bench.rollout import add_preset, chosen
from engine.bench.streams import build
from engine.warmup import warm


def main() -> None:
    started = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_preset(parser)
    parser.add_argument("--once", action="store_true", help="start in this process and with the caches there are")
    options = parser.parse_args()
    if options.once:
        device = best_device()
        preset, speed = chosen(parser, options, device)
        pipeline = build(preset, speed, device, best_dtype(device))
        built = time.perf_counter()
        warm(pipeline)
        print(f"model {built - started:.1f} s, warming up {time.perf_counter() - built:.1f} s", flush=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        caches = {name: os.path.join(folder, name) for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")}
        for name in ("cold", "warm"):
            started = time.perf_counter()
            command = [sys.executable, "-m", "engine.bench.start", *sys.argv[1:], "--once"]
            done = subprocess.run(command, env=os.environ | caches, check=True, capture_output=True, text=True)
            print(f"{name} start: {time.perf_counter() - started:.1f} s in all, {done.stdout.strip()}", flush=True)


if __name__ == "__main__":
    main()
