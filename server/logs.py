"""Log lines, as text or as JSON objects: each says which request it belongs to, and none holds a key or a token.

What is logged never holds a prompt either; that is up to who logs.
"""

import datetime
import json
import logging
import re
import sys
from typing import Any, Literal

from server.auth.keys import PREFIX
from server.auth.tokens import TOKEN_PREFIX
from server.errors import request_id

SECRETS = re.compile(rf"\b({re.escape(TOKEN_PREFIX)}|{re.escape(PREFIX)})[A-Za-z0-9_.-]+")

STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
"""What every record has; whatever else one has came as `extra`."""


def redact(text: str) -> str:
    """The text without keys and tokens, whoever logs it and at whatever level."""
    return SECRETS.sub(r"\1[redacted]", text)


class TextFormatter(logging.Formatter):
    """A line for people, with the request's id at its end."""

    def __init__(self, format: str = "%(asctime)s %(levelname)s %(name)s: %(message)s") -> None:
        super().__init__(format)

    def formatMessage(self, record: logging.LogRecord) -> str:
        line, id = super().formatMessage(record), request_id.get()
        # A peer's words may be part of a message: they must not look like a line of their own.
        line = line.replace("\r", "\\r").replace("\n", "\\n")
        return f"{line} [{id}]" if id else line

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


class JsonFormatter(logging.Formatter):
    """A JSON object a line: time (RFC 3339), level, logger, message, request_id, what came as `extra`, exception."""

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


FORMATTERS: dict[str, type[TextFormatter] | type[JsonFormatter]] = {"text": TextFormatter, "json": JsonFormatter}


def set_up(style: Literal["text", "json"]) -> logging.Handler:
    """Log everything from INFO upwards to standard error; returns what writes it."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(FORMATTERS[style]())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    return handler
