"""What the gateway needs to know, validated once at the edge; nothing below reads arguments or the environment."""

import argparse
import ipaddress
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Self

from server.auth.keys import read_keys
from server.egress.destination import ENTRY
from server.library.store import check_folder

ICE_SERVER = re.compile(r"(stun|turns?):[A-Za-z0-9.-]{1,253}(:\d{1,5})?(\?transport=(udp|tcp))?")


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
    engine_spare: Literal["on", "off"] = "on"
    """Whether a second engine process waits to take over when the first is lost. On a CPU it is a whole one, with the
    memory of one; on a GPU it waits before it touches the device."""
    loras: Path | None = None
    """Folder of LoRA files that clients may have applied."""
    idle_timeout_s: float = 60.0
    """A stream that nobody has watched for this long ends; 0 lets it run on."""
    unwatched_pause_s: float = 15.0
    """A stream that nobody has watched for this long is paused until somebody does; 0 lets it generate on."""
    queue_limit: int = 8
    """Streams that may wait for a place in the engine."""
    engine_timeout_s: float = 20.0
    """An engine that has work and has not moved for this long hangs, and is replaced."""
    engine_start_timeout_s: float = 900.0
    """The same while it loads and warms up: big weights, cold compilation."""
    drain_timeout_s: float = 10.0
    """How long streams may play on after SIGTERM."""
    bitrate_kbps: int = 2500
    """Ceiling of an encoded stream, in kbit/s."""
    public_address: str | None = None
    """IP address at which viewers reach this machine's UDP ports, where it is not one of its own: behind NAT, in a
    container."""
    ice_servers: tuple[str, ...] = ()
    """STUN and TURN servers for viewers behind NAT: `stun:HOST[:PORT]`, `turn:HOST[:PORT][?transport=udp|tcp]`."""
    turn_secret: str = field(default="", repr=False)
    """Shared with the TURN servers (coturn's `static-auth-secret`): credentials for an hour are made from it."""
    data: Path | None = None
    """Folder for clips and recordings, of the server's own; None is one that goes with the server."""
    data_limit_gb: float = 10.0
    """What may be kept there, in 10^9 bytes."""
    keep_hours: float = 24.0
    """How long a finished clip or recording is kept."""
    keys: Path | None = None
    """File of API keys (see `server.auth.keys`); without one only this machine is served."""
    log: Literal["text", "json"] = "text"
    """How lines of the log are written: for people, or a JSON object each."""
    outputs: tuple[str, ...] = ()
    """Hosts that streams may be pushed to, `HOST` for the schemes' own ports or `HOST:PORT`; none turns that off."""
    origins: tuple[str, ...] = ()
    """Web pages elsewhere that may use the API, such as `https://studio.example`."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port {self.port} is not between 0 and 65535")
        if self.engine_threads is not None and self.engine_threads < 1:
            raise ValueError(f"engine-threads {self.engine_threads} is below 1")
        if self.loras is not None and not self.loras.is_dir():
            raise ValueError(f"loras {self.loras} is not a folder")
        for name in ("idle-timeout", "unwatched-pause", "drain-timeout"):
            seconds = getattr(self, name.replace("-", "_") + "_s")
            if not 0 <= seconds < float("inf"):
                raise ValueError(f"{name} {seconds} is not a number of seconds from 0 upwards")
        for name in ("engine-timeout", "engine-start-timeout"):
            if not 0 < (seconds := getattr(self, name.replace("-", "_") + "_s")) < float("inf"):
                raise ValueError(f"{name} {seconds} is not a number of seconds above 0")
        if self.queue_limit < 0:
            raise ValueError(f"queue-limit {self.queue_limit} is below 0")
        if not 50 <= self.bitrate_kbps <= 100_000:
            raise ValueError(f"bitrate {self.bitrate_kbps} is not between 50 and 100000 kbit/s")
        if self.public_address is not None and not is_address(self.public_address):
            raise ValueError(f"public-address {self.public_address} is not an IP address such as 203.0.113.7")
        for url in self.ice_servers:
            if not ICE_SERVER.fullmatch(url):
                raise ValueError(f"ice-servers {url} is not stun:HOST, turn:HOST or turns:HOST, with :PORT if need be")
        if not self.turn_secret and any(url.startswith("turn") for url in self.ice_servers):
            raise ValueError(
                "ice-servers has a TURN server, whose shared secret is missing: set LIVEREEL_TURN_SECRET to it"
            )
        if self.data is not None:
            check_folder(self.data)
        for name, unit in (("data-limit", "gb"), ("keep", "hours")):
            if not 0 < (value := getattr(self, f"{name.replace('-', '_')}_{unit}")) < float("inf"):
                raise ValueError(f"{name} {value} is not a number above 0")
        for origin in self.origins:
            if not re.fullmatch(r"https?://[a-z0-9.-]+(:\d{1,5})?|https?://\[[0-9a-f:]+\](:\d{1,5})?", origin):
                raise ValueError(f"origins {origin} is not a scheme and a host in lower case: https://studio.example")
        for host in self.outputs:
            if not ENTRY.fullmatch(host):
                raise ValueError(
                    f"outputs {host} is not a host in lower case, with :PORT if need be: live.example:1936"
                )
        if self.keys is not None:
            if not read_keys(self.keys):
                raise ValueError(f"keys {self.keys} holds no key: python -m server keys add NAME --keys {self.keys}")
        elif not is_loopback(self.host):
            raise ValueError(
                f"host {self.host} can be reached from the network, where anyone could start and watch streams: make "
                "a key with `python -m server keys add NAME --keys FILE` and add --keys FILE, or use 127.0.0.1"
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
            "--engine-spare",
            choices=("on", "off"),
            default=default("engine-spare", cls.engine_spare),
            help="keep a second engine process ready to take over: costs its memory, not its time (%(default)s)",
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
            "--unwatched-pause",
            type=float,
            metavar="S",
            default=default("unwatched-pause", cls.unwatched_pause_s),
            help="pause a stream that nobody has watched for this many seconds; 0 never does (%(default)s)",
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
        add(
            "--bitrate",
            type=int,
            metavar="KBPS",
            default=default("bitrate", cls.bitrate_kbps),
            help="ceiling of an encoded stream in kbit/s (%(default)s)",
        )
        add(
            "--public-address",
            metavar="IP",
            default=default("public-address", None),
            help="where viewers reach this machine's UDP ports, behind NAT or in a container (its own addresses)",
        )
        add(
            "--ice-servers",
            metavar="URLS",
            default=default("ice-servers", ""),
            help="STUN and TURN servers for WebRTC, with commas between; LIVEREEL_TURN_SECRET holds the latter's "
            "shared secret (none)",
        )
        add(
            "--outputs",
            metavar="HOSTS",
            default=default("outputs", ""),
            help="hosts that streams may be pushed to by RTMP and WHIP, with commas between: "
            "live.example,10.0.0.5:1936 (none)",
        )
        add(
            "--data",
            type=Path,
            metavar="FOLDER",
            default=default("data", None),
            help="where clips and recordings are kept, closed to other users (a folder that goes with the server)",
        )
        add(
            "--data-limit",
            type=float,
            metavar="GB",
            default=default("data-limit", cls.data_limit_gb),
            help="how much of them: past it nothing new is taken (%(default)s)",
        )
        add(
            "--keep",
            type=float,
            metavar="HOURS",
            default=default("keep", cls.keep_hours),
            help="how long each is kept once it is finished (%(default)s)",
        )
        add(
            "--keys",
            type=Path,
            metavar="FILE",
            default=default("keys", None),
            help="file of API keys: needed for a host that the network can reach (python -m server keys add NAME)",
        )
        add(
            "--origins",
            metavar="URLS",
            default=default("origins", ""),
            help="web pages elsewhere that may use the API, with commas between: https://studio.example (none)",
        )
        add(
            "--log",
            choices=("text", "json"),
            default=default("log", cls.log),
            help="how lines of the log are written: for people, or a JSON object each (%(default)s)",
        )
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
                engine_spare=options.engine_spare,
                loras=options.loras,
                engine_arguments=tuple(theirs),
                idle_timeout_s=options.idle_timeout,
                unwatched_pause_s=options.unwatched_pause,
                queue_limit=options.queue_limit,
                bitrate_kbps=options.bitrate,
                public_address=options.public_address,
                ice_servers=tuple(url for each in options.ice_servers.split(",") if (url := each.strip())),
                turn_secret=environment.get("LIVEREEL_TURN_SECRET", ""),
                outputs=tuple(host for each in options.outputs.split(",") if (host := each.strip())),
                data=options.data,
                data_limit_gb=options.data_limit,
                keep_hours=options.keep,
                keys=options.keys,
                log=options.log,
                origins=tuple(url for each in options.origins.split(",") if (url := each.strip())),
                engine_timeout_s=options.engine_timeout,
                engine_start_timeout_s=options.engine_start_timeout,
                drain_timeout_s=options.drain_timeout,
            )
        except ValueError as error:
            parser.error(str(error))


def is_address(text: str) -> bool:
    """Whether `text` is an IP address."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
