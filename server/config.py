"""The gateway's settings: each option is one field, validated once at the edge.

Nothing below this module reads arguments or the environment. `server.options` makes the command line and the
environment variables from the fields, and `docs/options.md` lists them.
"""

import argparse
import ipaddress
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from server.auth.keys import read_keys
from server.egress.destination import LISTED, is_listable
from server.library.store import check_folder
from server.options import A_FOLDER, Bounds, above, at_least, between, check_options, option, parse_options

ICE_SERVER = re.compile(r"(stun|turns?):[A-Za-z0-9.-]{1,253}(:\d{1,5})?(\?transport=(udp|tcp))?")
ORIGIN = re.compile(r"https?://[a-z0-9.-]+(:\d{1,5})?|https?://\[[0-9a-f:]+\](:\d{1,5})?")


def is_address(text: str) -> bool:
    """Whether `text` is an IP address."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def is_network(text: str) -> bool:
    """Whether `text` is an IP address, or a network in CIDR notation."""
    try:
        ipaddress.ip_network(text, strict=False)
    except ValueError:
        return False
    return True


def is_root_path(text: str) -> bool:
    """Whether `text` is a path prefix, such as `/live`."""
    return len(text) <= 200 and re.fullmatch(r"(/(?!\.{1,2}(/|$))[A-Za-z0-9._~-]+)+", text) is not None


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that can be set on the gateway. Raises `ValueError` with a message for the operator.

    Each field is a flag (`--idle-timeout`) and an environment variable (`LIVEREEL_IDLE_TIMEOUT`).
    """

    host: str = option("127.0.0.1", "address to listen on")
    port: int = option(8000, "port to listen on; 0 takes any free port", bounds=between(0, 65535))
    model: str = option("mini", "engine preset to serve")
    backend: Literal["local", "fake"] = option(
        "local",
        "local: run the engine as a child process; fake: play a test picture instead, for client development and tests",
    )
    engine_threads: int | None = option(
        None, "CPU threads of the engine", metavar="N", bounds=between(1, 1024), unset="the engine's choice"
    )
    engine_spare: Literal["on", "off"] = option(
        "on",
        "keep a second engine process ready to take over from one that fails; on a CPU it has the memory of a whole "
        "engine, on a GPU it waits before it touches the device",
    )
    loras: Path | None = option(
        None, "folder of LoRA files that clients may apply", metavar="DIR", bounds=A_FOLDER, unset="none"
    )
    idle_timeout_s: float = option(
        60.0,
        "end a stream that nobody has watched for this many seconds; 0 never does",
        flag="idle-timeout",
        metavar="S",
        bounds=at_least(0, "seconds"),
    )
    unwatched_pause_s: float = option(
        15.0,
        "pause a stream that nobody has watched for this many seconds, until somebody does; 0 never does",
        flag="unwatched-pause",
        metavar="S",
        bounds=at_least(0, "seconds"),
    )
    queue_limit: int = option(8, "streams that may wait for a place in the engine", metavar="N", bounds=at_least(0))
    engine_timeout_s: float = option(
        20.0,
        "replace an engine that has work and has made no progress for this many seconds",
        flag="engine-timeout",
        metavar="S",
        bounds=above(0, "seconds"),
    )
    engine_start_timeout_s: float = option(
        900.0,
        "replace an engine that is not ready after this many seconds; large weights and a first compilation take long",
        flag="engine-start-timeout",
        metavar="S",
        bounds=above(0, "seconds"),
    )
    drain_timeout_s: float = option(
        10.0,
        "how many seconds streams may continue to play after SIGTERM; a second signal ends them",
        flag="drain-timeout",
        metavar="S",
        bounds=at_least(0, "seconds"),
    )
    bitrate_kbps: int = option(
        2500,
        "maximum bit rate of an encoded stream, in kbit/s",
        flag="bitrate",
        metavar="KBPS",
        bounds=between(50, 100_000, "kbit/s"),
    )
    public_address: str | None = option(
        None,
        "IP address at which viewers reach this machine's UDP ports, behind NAT or in a container",
        metavar="IP",
        bounds=Bounds("an IP address such as 203.0.113.7", is_address),
        unset="its own addresses",
    )
    ice_servers: tuple[str, ...] = option(
        (),
        "STUN and TURN servers for WebRTC, separated by commas; LIVEREEL_TURN_SECRET holds the TURN servers' shared "
        "secret",
        metavar="URLS",
        bounds=Bounds(
            "stun:HOST[:PORT] or turn[s]:HOST[:PORT][?transport=udp|tcp]",
            lambda url: ICE_SERVER.fullmatch(url) is not None,
        ),
        unset="none",
    )
    turn_secret: str = option(
        "",
        "secret shared with the TURN servers (coturn's `static-auth-secret`); credentials for an hour are made from it",
        unset="none",
        secret=True,
    )
    outputs: tuple[str, ...] = option(
        (),
        "hosts that streams may be pushed to by RTMP and WHIP, separated by commas: live.example,10.0.0.5:1936",
        metavar="HOSTS",
        bounds=Bounds(LISTED, is_listable),
        unset="none",
    )
    data: Path | None = option(
        None,
        "folder for clips and recordings, which other users must not be able to read",
        metavar="FOLDER",
        unset="a temporary folder, removed when the server ends",
    )
    data_limit_gb: float = option(
        10.0,
        "how much clips and recordings may take, in 10^9 bytes: past it nothing new is recorded",
        flag="data-limit",
        metavar="GB",
        bounds=above(0, "GB"),
    )
    keep_hours: float = option(
        24.0,
        "how many hours a finished clip or recording is kept",
        flag="keep",
        metavar="HOURS",
        bounds=above(0, "hours"),
    )
    root_path: str = option(
        "",
        "path prefix under which a proxy serves this server: it is taken off requests that have it, and put on URLs",
        metavar="PATH",
        bounds=Bounds("a path such as /live, without a slash at its end", lambda text: not text or is_root_path(text)),
        unset="none",
    )
    trusted_proxies: tuple[str, ...] = option(
        (),
        "addresses and networks of proxies, separated by commas, whose Forwarded and X-Forwarded-For, -Host, -Proto "
        "and -Prefix headers are believed, besides this machine: 10.0.0.5,192.168.0.0/16",
        metavar="NETWORKS",
        bounds=Bounds("an IP address or network such as 10.0.0.0/8", is_network),
        unset="none",
    )
    keys: Path | None = option(
        None,
        "file of API keys (python -m server keys add NAME): required for a host that the network can reach; without "
        "it only this machine is served",
        metavar="FILE",
    )
    origins: tuple[str, ...] = option(
        (),
        "web pages elsewhere that may use the API, separated by commas: https://studio.example",
        metavar="URLS",
        bounds=Bounds("a scheme and a host in lower case: https://studio.example", lambda x: bool(ORIGIN.fullmatch(x))),
        unset="none",
    )
    log: Literal["text", "json"] = option("text", "format of the log: lines for people, or a JSON object each")
    engine_arguments: tuple[str, ...] = ()
    """Arguments of the engine: what follows `--` on the command line."""

    def __post_init__(self) -> None:
        check_options(self)
        if not self.turn_secret and any(url.startswith("turn") for url in self.ice_servers):
            raise ValueError("ice-servers has a TURN server without its shared secret: set LIVEREEL_TURN_SECRET to it")
        if self.data is not None:
            check_folder(self.data)
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
        """Read the command line; a flag that is absent comes from its variable, then from the default."""
        parser = argparse.ArgumentParser(
            "python -m server",
            description="The Livereel gateway.",
            epilog="An option that is not given is read from the environment: --idle-timeout from "
            "LIVEREEL_IDLE_TIMEOUT. What follows -- goes to the engine: python -m server --model krea-14b -- "
            "--weights DIR (python -m engine MODEL --help)",
            allow_abbrev=False,
        )
        end = arguments.index("--") if "--" in arguments else len(arguments)
        values = parse_options(cls, parser, arguments[:end], environment)
        try:
            return cls(**values, engine_arguments=tuple(arguments[end + 1 :]))
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
