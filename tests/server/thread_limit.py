"""Runs code in a process of its own that may start no thread, as where the number of processes is limited."""

import subprocess
import sys

LIMIT = """
import os, resource, threading
if os.geteuid() == 0:  # root is exempt from the limit
    os.setuid(65534)
resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
try:
    threading.Thread(target=print).start()
except RuntimeError:
    pass
else:
    raise SystemExit("the limit has no effect")
"""


def run_without_new_threads(first: str, then: str) -> None:
    """Run `first`, forbid new threads, and run `then`. Fails if either raises, as `then` does if it needs a thread."""
    code = "\n".join((first, LIMIT, then))
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
