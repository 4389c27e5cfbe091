"""The command `livereel`.

Exit codes: 0 done; 1 refused or failed; 2 wrong usage; 3 the server cannot be reached; 4 the API key is missing or may
not do this; 5 the server is busy: try again later; 130 interrupted.
"""

import dataclasses
import importlib.machinery
import json
import os
import shutil
import sys
import time
import webbrowser
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

import livereel
from livereel import doctor as examination
from livereel import terminal
from livereel.client import Client, Stream
from livereel.errors import (
    ApiError,
    AuthenticationFailed,
    ConnectionFailed,
    LivereelError,
    PermissionDenied,
    StreamFailed,
)
from livereel.models import FilmFormat, Recording, Transition, Video
from livereel.transport import KEY_VARIABLE, URL_VARIABLE

FAILED, USAGE, UNREACHABLE, NOT_ALLOWED, BUSY = 1, 2, 3, 4, 5

app = typer.Typer(
    name="livereel",
    help="Open, watch, steer and record live text-to-video streams of a Livereel server.",
    epilog="Exit codes: 0 done, 1 refused or failed, 2 wrong usage, 3 server not reached, 4 key missing or not "
    "allowed, 5 busy (try again later), 130 interrupted.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
messages = Console(stderr=True, highlight=False)
"""For people. Results go to standard output."""

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
StreamId = Annotated[
    str | None, typer.Option("--stream", "-s", help="Id of the stream; the newest live one when absent.")
]
Model = Annotated[str | None, typer.Option(help="Name of a model; see `livereel models`.")]
Seed = Annotated[int | None, typer.Option(min=0, help="The same seed and prompt give the same frames.")]
Image = Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="Picture or clip to continue from.")]


def version(wanted: bool) -> None:
    if wanted:
        print(livereel.__version__)
        raise typer.Exit


@app.callback()
def connect(
    context: typer.Context,
    url: Annotated[str | None, typer.Option(envvar=URL_VARIABLE, help="Of the server.")] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar=KEY_VARIABLE, help="An API key, if the server has keys.")
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    context.obj = context.with_resource(Client(url, api_key=api_key))


def client_of(context: typer.Context) -> Client:
    client = context.find_root().obj
    assert isinstance(client, Client)
    return client


def find_stream(client: Client, id: str | None) -> Stream:
    """The stream with this id, or the newest that is not over. Raises `LivereelError` if there is none."""
    if id is None:
        current = [each for each in client.streams() if not each.over]
        if not current:
            raise LivereelError('No stream is live: open one with `livereel watch "a red ball on grass"`.')
        id = max(current, key=lambda each: each.created_at).id
    return client.attach(id)


def print_json(result: Any) -> None:
    """Print a result of the client as one line of JSON."""
    print(json.dumps(to_json(result), ensure_ascii=False), flush=True)


def to_json(result: Any) -> Any:
    if dataclasses.is_dataclass(result) and not isinstance(result, type):
        return dataclasses.asdict(result)
    return [to_json(each) for each in result] if isinstance(result, list) else result


def print_table(columns: tuple[str, ...], rows: list[tuple[Any, ...]], empty: str) -> None:
    """Print rows for people; `empty` says what to do if there are none."""
    if not rows:
        messages.print(empty)
        return
    table = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*(str(each) for each in row))
    Console(highlight=False, width=None if terminal.is_terminal() else 500).print(table)


def progress_bar(*, shown: bool) -> Progress:
    """A bar with the time left, on standard error."""
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn()
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=messages, disable=not shown)


def check_folder(path: Path) -> None:
    """Find out that a file cannot be written before it takes minutes to make. Raises `LivereelError`."""
    if path.is_dir():
        raise LivereelError(f"{path} is a folder: name a file.")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise LivereelError(f"Cannot write to the folder {path.parent}: make it, or name another file with -o.")


@app.command()
def generate(
    context: typer.Context,
    prompt: Annotated[str, typer.Argument(help="What to show.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The MP4 file to write.")] = Path("out.mp4"),
    seconds: Annotated[float, typer.Option(min=0.001, max=600, help="Length of the film.")] = 4,
    seed: Seed = None,
    model: Model = None,
    image: Image = None,
    json: Json = False,
) -> None:
    """Make a film of a prompt."""
    check_folder(output)
    client = client_of(context)
    video = client.videos.create(prompt, seconds=seconds, seed=seed, model=model, image=image)
    try:
        video = follow_video(client, video, shown=not json)
    except KeyboardInterrupt:
        client.videos.delete(video.id)
        raise
    client.videos.download(video.id, output)
    if json:
        print_json({**dataclasses.asdict(video), "file": str(output)})
        return
    if video.extra.ignored_words:
        messages.print(f"The model does not know: {', '.join(video.extra.ignored_words)}", markup=False)
    print(output)


def follow_video(client: Client, video: Video, *, shown: bool) -> Video:
    """Show the progress of a clip until it is completed. Raises `VideoFailed`."""
    with progress_bar(shown=shown) as bar:
        task = bar.add_task(describe(video), total=100)
        for now in client.videos.progress(video.id):
            video = now
            bar.update(task, completed=video.progress, description=describe(video))
    return video


def describe(video: Video) -> str:
    """The state of a clip in a word or two."""
    if video.status == "queued" and video.extra.queue_position:
        return f"queued, number {video.extra.queue_position}"
    return {"in_progress": "generating"}.get(video.status, video.status)


@app.command()
def watch(
    context: typer.Context,
    prompt: Annotated[str | None, typer.Argument(help="Opens a new stream; without, the newest one is shown.")] = None,
    stream: StreamId = None,
    in_terminal: Annotated[bool, typer.Option("--terminal", "-t", help="Draw in the terminal.")] = False,
    browser: Annotated[bool, typer.Option(help="Open the page, or only print its address.")] = True,
    seed: Seed = None,
    model: Model = None,
    image: Image = None,
    json: Json = False,
) -> None:
    """Watch a stream: in the browser, in the terminal, or its events as lines of JSON."""
    client = client_of(context)
    if prompt is not None and stream is not None:
        raise typer.BadParameter("give either a prompt, which opens a new stream, or --stream")
    if prompt is None:
        watched = find_stream(client, stream)
    else:
        watched = client.stream(prompt, seed=seed, model=model, image=image)
    if json or in_terminal:
        try:
            if json:
                for event in watched.events():
                    print_json(event.fields)
            else:
                terminal.play(watched.watch("rgb24"), shutil.get_terminal_size, watched.prompt, sys.stdout)
        finally:
            if prompt is not None:
                watched.end()
        return
    address = page_of(watched, client)
    print(address, flush=True)
    if browser and not webbrowser.open(address):
        messages.print("No browser was found: open the address above, or use --terminal.")


def page_of(stream: Stream, client: Client) -> str:
    """Address of the page that shows a stream, with a token where the server needs one."""
    token = stream.token("view", expires_in_s=3600).token
    return f"{client.url}/overlay/{stream.id}{f'?token={token}' if token else ''}"


@app.command()
def steer(
    context: typer.Context,
    prompt: Annotated[str, typer.Argument(help="What to show from the next chunk on.")],
    stream: StreamId = None,
    transition: Annotated[
        Transition, typer.Option(help="recache turns the scene into the new one, soft blends, cut starts a new scene.")
    ] = "recache",
    json: Json = False,
) -> None:
    """Change the prompt of a stream while it plays."""
    found = find_stream(client_of(context), stream)
    info = found.steer(prompt, transition=transition)
    if json:
        print_json(info)
        return
    print(f"{info.id}: from chunk {info.chunk_index} on")
    if info.ignored_words:
        messages.print(f"The model does not know: {', '.join(info.ignored_words)}", markup=False)


@app.command("list")
def list_all(
    context: typer.Context,
    what: Annotated[Literal["streams", "recordings", "videos"], typer.Argument(help="What to list.")] = "streams",
    json: Json = False,
) -> None:
    """List streams, recordings or clips."""
    client = client_of(context)
    found: list[Any]
    rows: list[tuple[Any, ...]]
    match what:
        case "streams":
            columns = ("ID", "STATE", "MODEL", "VIEWERS", "PROMPT")
            found, maker = client.streams(), "watch PROMPT"
            rows = [(each.id, each.state, each.model, each.viewers, shorten(each.prompt)) for each in found]
        case "recordings":
            columns = ("ID", "STATUS", "FORMAT", "SECONDS", "STREAM")
            found, maker = client.recordings.list(), "record"
            rows = [(each.id, each.status, each.format, f"{each.duration_s:.1f}", each.stream_id) for each in found]
        case "videos":
            columns = ("ID", "STATUS", "PER CENT", "SECONDS", "PROMPT")
            found, maker = client.videos.list(limit=100).data, "generate PROMPT"
            rows = [(each.id, each.status, each.progress, each.seconds, shorten(each.prompt)) for each in found]
    if json:
        print_json(found)
    else:
        print_table(columns, rows, f"No {what}: `livereel {maker}` makes one.")


def shorten(text: str, length: int = 60) -> str:
    text = terminal.printable(text)
    return text if len(text) <= length else f"{text[: length - 1]}\N{HORIZONTAL ELLIPSIS}"


@app.command()
def stop(
    context: typer.Context,
    streams: Annotated[
        list[str] | None, typer.Argument(help="Ids of streams; the newest live one when absent.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Every stream that this key sees.")] = False,
    json: Json = False,
) -> None:
    """End streams."""
    client = client_of(context)
    if every:
        ids: list[str | None] = [each.id for each in client.streams() if not each.over]
    else:
        ids = [*streams] if streams else [None]
    ended = []
    for id in ids:
        (found := find_stream(client, id)).end()
        ended.append(found.id)
    print_json(ended) if json else print("\n".join(ended) or "No stream was live.")


@app.command()
def push(
    context: typer.Context,
    url: Annotated[str, typer.Argument(help="rtmp:// or rtmps:// with the stream key, or https:// for WHIP.")],
    stream: StreamId = None,
    token: Annotated[str | None, typer.Option(envvar="LIVEREEL_OUTPUT_TOKEN", help="WHIP's bearer token.")] = None,
    audio: Annotated[bool, typer.Option(help="Send a silent audio track by RTMP: some services need one.")] = True,
    wait: Annotated[float, typer.Option(min=0, help="Seconds to wait until it is live.")] = 20,
    json: Json = False,
) -> None:
    """Push a stream to a service such as YouTube or Twitch. It is tried again until the stream ends."""
    found = find_stream(client_of(context), stream)
    output = found.push(url, token=token, audio="silent" if audio else "none")
    until = time.monotonic() + wait
    while output.state != "live" and time.monotonic() < until:
        time.sleep(0.25)
        output = found.output(output.id)
    if json:
        print_json(output)
    else:
        print(f"{output.id}: {output.state} at {output.url}")
    if output.state != "live":
        reason = f": {output.error.message}" if output.error else ""
        raise LivereelError(f"It is not live after {wait:g} s{reason}. The server goes on trying.")


@app.command()
def record(
    context: typer.Context,
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write, .mp4 or .webm.")] = Path(
        "take.mp4"
    ),
    stream: StreamId = None,
    seconds: Annotated[float | None, typer.Option(min=0.1, help="How long; until Ctrl-C when absent.")] = None,
    alpha: Annotated[bool, typer.Option(help="With .webm: transparency from the stream's matte.")] = False,
    json: Json = False,
) -> None:
    """Record a live stream to a file."""
    formats: dict[str, FilmFormat] = {".mp4": "mp4", ".webm": "webm"}
    if (format := formats.get(output.suffix.lower())) is None:
        raise typer.BadParameter("the file must end in .mp4 or .webm", param_hint="--output")
    check_folder(output)
    client = client_of(context)
    recording = find_stream(client, stream).record(format=format, alpha=alpha)
    try:
        recording = follow_recording(client, recording, seconds, shown=not json)
    except KeyboardInterrupt:
        messages.print("Stopping")
    recording = client.recordings.stop(recording.id)
    client.recordings.download(recording.id, output)
    if json:
        print_json({**dataclasses.asdict(recording), "file": str(output)})
        return
    if recording.ended_reason != "stopped":
        messages.print(f"The recording ended early: {recording.ended_reason}")
    print(output)


def follow_recording(client: Client, recording: Recording, seconds: float | None, *, shown: bool) -> Recording:
    """Show the progress of a recording until it is as long as asked for, or ends."""
    with progress_bar(shown=shown) as bar:
        task = bar.add_task("recording" if seconds else "recording, Ctrl-C stops", total=seconds)
        while recording.status == "recording" and (seconds is None or recording.duration_s < seconds):
            time.sleep(0.2)
            recording = client.recordings.get(recording.id)
            bar.update(task, completed=recording.duration_s)
    return recording


@app.command()
def models(context: typer.Context, json: Json = False) -> None:
    """List what the server draws with."""
    found = client_of(context).models.list()
    if json:
        print_json(found)
        return
    rows = [
        (
            each.id + " (default)" * each.default,
            f"{each.width}x{each.height}",
            each.fps,
            each.capacity,
            each.description,
        )
        for each in found
    ]
    empty = "No models: the server's engine has not started yet. `livereel doctor` says more."
    print_table(("MODEL", "SIZE", "FPS", "STREAMS", "DESCRIPTION"), rows, empty)


PASS_ON: dict[str, Any] = {
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True},
    "add_help_option": False,
}
"""Of commands whose arguments are another program's."""


@app.command(**PASS_ON)
def serve(context: typer.Context) -> None:
    """Run a server, where it is installed. Its options are the server's: `livereel serve --help` lists them."""
    run_installed("server", context.args)


@app.command(**PASS_ON)
def download(context: typer.Context) -> None:
    """Fetch a model's published weights, where the engine is installed: `livereel download longlive-1.3b`."""
    run_installed("engine", ["download", *context.args])


def run_installed(package: str, arguments: list[str]) -> None:
    """Become `python -m PACKAGE`. Raises `LivereelError` if Livereel itself is not installed here."""
    for needed in ("server", "engine"):
        if importlib.machinery.PathFinder.find_spec(needed, [os.getcwd(), *sys.path]) is None:
            advice = "run this in a checkout of Livereel after `make setup`, or use its container"
            raise LivereelError(f"The {needed} is not here: {advice}.")
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", package, *arguments])


@app.command()
def doctor(context: typer.Context, json: Json = False) -> None:
    """Check the installation, the connection and the server."""
    checks = []
    for check in examination.examine(client_of(context)):
        checks.append(check)
        if not json:
            sign = {True: "ok", False: "FAILED", None: "-"}[check.ok]
            print(f"{sign:7}{check.name}: {check.detail}")
            if check.advice:
                print(f"       {check.advice}")
    if json:
        print_json(checks)
    if any(check.ok is False for check in checks):
        raise typer.Exit(FAILED)


def exit_code(error: Exception) -> int:
    """The exit code for an error."""
    match error:
        case ConnectionFailed():
            return UNREACHABLE
        case AuthenticationFailed() | PermissionDenied():
            return NOT_ALLOWED
        case ApiError(status=429 | 503):
            return BUSY
    return FAILED


def report(error: Exception, *, as_json: bool) -> None:
    """Say on standard error what went wrong, and what to do."""
    if as_json:
        fields = {"code": "", "message": str(error), "param": None, "request_id": None, "retry_after": None}
        fields |= {name: getattr(error, name) for name in fields if hasattr(error, name)}
        print(json.dumps({"error": fields}), file=sys.stderr)
        return
    messages.print(f"Error: {error}", markup=False, style="red")
    if isinstance(error, AuthenticationFailed):
        messages.print(f"Give an API key with --api-key or {KEY_VARIABLE}.")
    if isinstance(error, ApiError) and error.retry_after is not None:
        messages.print(f"Try again in {error.retry_after:g} s.")
    if isinstance(error, ApiError | StreamFailed):
        request = getattr(error, "request_id", None)
        messages.print(f"({error.code}{f', request {request}' if request else ''})", style="dim")


def main() -> None:
    """Run the command line and exit."""
    try:
        app()
    except (LivereelError, OSError) as error:
        report(error, as_json="--json" in sys.argv[1:])
        sys.exit(exit_code(error))
