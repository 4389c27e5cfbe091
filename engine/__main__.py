"""python -m engine MODEL --socket ADDRESS: the engine process. Or a command: models, check, convert, download."""

import os
import signal
import sys

# OpenMP threads that wait for each other give their core up early: with few cores, gateway and encoder need it too, and
# spinning through a time slice makes a chunk take up to ten times as long. libgomp reads this when torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

from engine import cli, options
from engine.serve import serve


def main() -> int:
    """Run a command, or serve until the gateway ends the process; returns the exit status."""
    arguments = sys.argv[1:]
    if arguments and arguments[0] in cli.NAMES:
        return cli.run(arguments)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the gateway decides when the engine leaves
    return serve(options.parse(arguments))


if __name__ == "__main__":
    sys.exit(main())
