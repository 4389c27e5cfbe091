"""What the gateway needs to know, validated once at the edge; nothing below reads arguments or the environment."""

import argparse
import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self


@dataclass(frozen=True, kw_only=True)
class Config:
    """The gateway's settings. Raises `ValueError` with a message for the operator when one of them is unusable."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes any free port."""
    model: str = "mini"
    backend: Literal["local", "fake"] = "local"
    """`local` runs the engine as a child process; `fake` plays a test picture, for work on clients and for tests."""
    engine_threads: int | None = None
    """CPU threads of the engine; None leaves the choice to it."""
    engine_arguments: tuple[str, ...] = ()
    """Further arguments of the engine: what follows `--` on the command line."""
    loras: Path | None = None
    """Folder of LoRA files that clients may have applied."""
    idle_timeout_s: float = 60.0
    """A stream that nobody has watched for this long ends; 0 lets it run on."""
    queue_limit: int = 8
    """Streams that may wait for a place in the engine."""
    engine_timeout_s: float = 20.0
    """An engine that has work and has not moved for this long hangs, and is replaced."""
    engine_start_timeout_s: float = 900.0
    """The same while it loads and warms up: big weights, cold compilation."""
    drain_timeout_s: float = 10.0
    """How long streams may play on after SIGTERM."""
    insecure: bool = False
    """Serve a network without authentication."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port {self.port} is not between 0 and 65535")
        if self.engine_threads is not None and self.engine_threads < 1:
            raise ValueError(f"engine-threads {self.engine_threads} is below 1")
        if self.loras is not None and not self.loras.is_dir():
            raise ValueError(f"loras {self.loras} is not a folder")
        if not 0 <= self.idle_timeout_s < float("inf"):
            raise ValueError(f"idle-timeout {self.idle_timeout_s} is not a number of seconds from 0 upwards")
        for name in ("engine-timeout", "engine-start-timeout"):
            if not 0 < (seconds := getattr(self, name.replace("-", "_") + "_s")) < float("inf"):
                raise ValueError(f"{name} {seconds} is not a number of seconds above 0")
        if not 0 <= self.drain_timeout_s < float("inf"):
            raise ValueError(f"drain-timeout {self.drain_timeout_s} is not a number of seconds from 0 upwards")
        if self.queue_limit < 0:
            raise ValueError(f"queue-limit {self.queue_limit} is below 0")
        if not (self.insecure or is_loopback(self.host)):
            raise ValueError(
                f"host {self.host} can be reached from the network, and this version has no authentication yet: "
                "anyone there could start and watch streams. Use 127.0.0.1, or add --insecure on a trusted network"
            )

    @classmethod
    def from_arguments(cls, arguments: Sequence[str], environment: Mapping[str, str]) -> Self:
        """Read the command line; a flag that is absent comes from `LIVEREEL_<FLAG>`, then from the default."""

        def default(flag: str, fallback: object) -> object:
            # argparse converts a string default as it would the same text on the command line.
            return environment.get("LIVEREEL_" + flag.upper().replace("-", "_"), fallback)

        parser = argparse.ArgumentParser(
            "python -m server",
            description="The Livereel gateway.",
            epilog="What follows -- goes to the engine: python -m server --model krea-14b -- --weights DIR "
            "(python -m engine MODEL --help)",
            allow_abbrev=False,
        )
        add = parser.add_argument
        add("--host", default=default("host", cls.host), help="address to listen on (%(default)s)")
        add("--port", type=int, default=default("port", cls.port), help="0 takes any free port (%(default)s)")
        add("--model", default=default("model", cls.model), help="engine preset to serve (%(default)s)")
        add(
            "--backend",
            choices=("local", "fake"),
            default=default("backend", cls.backend),
            help="local: run the engine; fake: play a test picture instead (%(default)s)",
        )
        add(
            "--engine-threads",
            type=int,
            metavar="N",
            default=default("engine-threads", None),
            help="CPU threads of the engine (the engine's choice)",
        )
        add(
            "--loras",
            type=Path,
            metavar="DIR",
            default=default("loras", None),
            help="folder of LoRA files that clients may have applied (none)",
        )
        add(
            "--idle-timeout",
            type=float,
            metavar="S",
            default=default("idle-timeout", cls.idle_timeout_s),
            help="end a stream that nobody has watched for this many seconds; 0 never does (%(default)s)",
        )
        add(
            "--queue-limit",
            type=int,
            metavar="N",
            default=default("queue-limit", cls.queue_limit),
            help="streams that may wait for a place in the engine (%(default)s)",
        )
        add(
            "--engine-timeout",
            type=float,
            metavar="S",
            default=default("engine-timeout", cls.engine_timeout_s),
            help="replace an engine that has work and has not moved for this many seconds (%(default)s)",
        )
        add(
            "--engine-start-timeout",
            type=float,
            metavar="S",
            default=default("engine-start-timeout", cls.engine_start_timeout_s),
            help="replace an engine that is not ready after this many seconds (%(default)s)",
        )
        add(
            "--drain-timeout",
            type=float,
            metavar="S",
            default=default("drain-timeout", cls.drain_timeout_s),
            help="how long streams may play on after SIGTERM; a second signal ends them (%(default)s)",
        )
        add("--insecure", action="store_true", help="allow a host that the network can reach, without authentication")
        ours, theirs = list(arguments), []
        if "--" in ours:
            at = ours.index("--")
            ours, theirs = ours[:at], ours[at + 1 :]
        options = parser.parse_args(ours)
        try:
            return cls(
                host=options.host,
                port=options.port,
                model=options.model,
                backend=options.backend,
                engine_threads=options.engine_threads,
                loras=options.loras,
                engine_arguments=tuple(theirs),
                idle_timeout_s=options.idle_timeout,
                queue_limit=options.queue_limit,
                engine_timeout_s=options.engine_timeout,
                engine_start_timeout_s=options.engine_start_timeout,
                drain_timeout_s=options.drain_timeout,
                insecure=options.insecure,
            )
        except ValueError as error:
            parser.error(str(error))


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
