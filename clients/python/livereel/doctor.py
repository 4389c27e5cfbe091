"""Checks of `livereel doctor`: what works, and what to do about what does not."""

import importlib.util
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass

from livereel.client import Client
from livereel.errors import ApiError, LivereelError


@dataclass(frozen=True, slots=True)
class Check:
    """One finding. `ok` is None for what is only worth knowing."""

    name: str
    ok: bool | None
    detail: str
    advice: str = ""


def examine(client: Client) -> Iterator[Check]:
    """Look at this installation, then at the server; what depends on a failed check is left out."""
    yield Check("python", True, platform.python_version())
    for module, extra, use in (("numpy", "numpy", "Frame.numpy()"), ("PIL", "pillow", "Frame.image()")):
        found = importlib.util.find_spec(module) is not None
        advice = "" if found else f"for {use}: pip install 'livereel[{extra}]'"
        yield Check(extra, True if found else None, "installed" if found else "not installed", advice)
    begun = time.monotonic()
    try:
        readiness = client.readiness()
    except LivereelError as error:
        advice = "start one with `livereel serve`, or name it with --url or LIVEREEL_URL"
        yield Check("server", False, str(error), advice)
        return
    yield Check("server", True, f"{client.url} answers in {(time.monotonic() - begun) * 1e3:.0f} ms")
    advice = "wait until the engine is up, and look at the server's log if it does not come up"
    yield Check("engine", readiness.ready, readiness.reason, "" if readiness.ready else advice)
    try:
        models = client.models.list()
    except ApiError as error:
        yield Check("key", False, error.message, "give an API key with --api-key or LIVEREEL_API_KEY")
        return
    yield Check("key", True, "accepted, or not needed")
    for model in models:
        fast = model.capacity > 0
        detail = f"{model.width}x{model.height} at {model.fps} frames/s, {model.capacity} streams at once"
        slow = "the server is too slow for one stream of this model: use a smaller one or a GPU"
        yield Check(f"model {model.id}", fast, detail, "" if fast else slow)
