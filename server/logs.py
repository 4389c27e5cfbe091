"""Logging as text or as JSON: each line has the id of its request, and keys and tokens are redacted.

Prompts must not be logged either; that is up to the caller.
"""

import datetime
import json
import logging
import re
import sys
import time
from typing import Any, Literal

from server.auth.keys import PREFIX
from server.auth.tokens import TOKEN_PREFIX
from server.errors import request_id

SECRETS = re.compile(rf"\b({re.escape(TOKEN_PREFIX)}|{re.escape(PREFIX)})[A-Za-z0-9_.-]+")

STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
"""Attributes of every log record; any other attribute was passed as `extra`."""
THROTTLE_SECONDS = 60.0
"""The least time between two reports of missing file descriptors."""


def redact(text: str) -> str:
    """The text with its keys and tokens replaced by `[redacted]`."""
    return SECRETS.sub(r"\1[redacted]", text)


class TextFormatter(logging.Formatter):
    """A line of text that ends with the request's id."""

    def __init__(self, format: str = "%(asctime)s %(levelname)s %(name)s: %(message)s") -> None:
        super().__init__(format)

    def formatMessage(self, record: logging.LogRecord) -> str:
        line, id = super().formatMessage(record), request_id.get()
        # A message may quote a peer, whose text must not be able to start a line of its own.
        line = line.replace("\r", "\\r").replace("\n", "\\n")
        return f"{line} [{id}]" if id else line

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


class JsonFormatter(logging.Formatter):
    """A JSON object per line: time (RFC 3339), level, logger, message, request_id, exception, and any `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line: dict[str, Any] = {
            "time": at.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if id := request_id.get():
            line["request_id"] = id
        line |= {name: value for name, value in vars(record).items() if name not in STANDARD}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return redact(json.dumps(line, default=str))


class ThrottleFilter(logging.Filter):
    """Lets asyncio report that file descriptors ran out once a minute, instead of some hundred times a second."""

    _again_at = 0.0

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name != "asyncio" or "out of system resource" not in record.getMessage():
            return True
        record.exc_info = record.exc_text = None
        record.msg, record.args = "out of file descriptors: raise the limit (ulimit -n); connections wait", ()
        now = time.monotonic()
        if now < self._again_at:
            return False
        self._again_at = now + THROTTLE_SECONDS
        return True


FORMATTERS: dict[str, type[TextFormatter] | type[JsonFormatter]] = {"text": TextFormatter, "json": JsonFormatter}


def set_up(style: Literal["text", "json"]) -> logging.Handler:
    """Log everything from INFO up to standard error; returns the log handler."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(FORMATTERS[style]())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    return handler
