"""What schemathesis has to be told to speak to the gateway."""

from typing import Any

import schemathesis


@schemathesis.serializer("application/sdp", "application/trickle-ice-sdpfrag")
def text(context: Any, value: Any) -> bytes:
    """Session descriptions are text."""
    return str(value).encode("utf-8", "replace")
