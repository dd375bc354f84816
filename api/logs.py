"""How log lines look: logfmt for people and grep, JSON for collectors; one line a record, fields by name.

Owns the format, and what is logged at all. Modules log `event=NAME name=value ...` as plain text: both formats know
the fields in it. Never is a key, a text to speak or a query string logged: who logs sees to that, and libraries, whose
debug lines could hold them, are never asked for those.
"""

from __future__ import annotations

import ast
import json
import logging
import re
import time
from typing import Literal

LogFormat = Literal["logfmt", "json"]

_QUOTED = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""
_FIELD = re.compile(rf"(\w+)=({_QUOTED}|[^\s'\"]\S*|)(?: |$)")
_BARE_EVENT = re.compile(r"(\w+)(?: (?=\w+=)|$)")
_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?")  # as JSON writes it
_PLAIN = re.compile(r"[^\s\"'=]+")


def fields_of(message: str) -> dict[str, str]:
    """The fields of a message: {"event": "ready", "model": "lark"}; of prose, {"message": it}."""
    fields: dict[str, str] = {}
    at = 0
    if (bare := _BARE_EVENT.match(message)) is not None:
        fields["event"], at = bare[1], bare.end()
    while at < len(message):
        if (match := _FIELD.match(message, at)) is None:
            return {"message": message}
        fields[match[1]], at = _unquoted(match[2]), match.end()
    return fields


def _unquoted(value: str) -> str:
    if value[:1] not in ("'", '"'):
        return value
    try:
        return str(ast.literal_eval(value))
    except (ValueError, SyntaxError):  # what a client sent, in quotes of its own
        return value


class LogfmtFormatter(logging.Formatter):
    """time=... level=... logger=... and the message's fields; a traceback follows on lines of its own."""

    def format(self, record: logging.LogRecord) -> str:
        """One record."""
        fields = {**_stamp(record), **fields_of(record.getMessage())}
        line = " ".join(f"{name}={_quoted(value)}" for name, value in fields.items())
        return line if record.exc_info is None else f"{line}\n{self.formatException(record.exc_info)}"


class JsonFormatter(logging.Formatter):
    """One JSON object a record, its numbers as numbers; a traceback is the field `traceback`."""

    def format(self, record: logging.LogRecord) -> str:
        """One record."""
        fields: dict[str, object] = dict(_stamp(record))
        for name, value in fields_of(record.getMessage()).items():
            # An id may be all digits, and is text all the same.
            is_number = not name.endswith("id") and _NUMBER.fullmatch(value) is not None
            fields[name] = json.loads(value) if is_number else value
        if record.exc_info is not None:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False)


def _stamp(record: logging.LogRecord) -> dict[str, str]:
    """Time in UTC, as RFC 3339 writes it."""
    seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    stamp = f"{seconds}.{int(record.msecs):03d}Z"
    return {"time": stamp, "level": record.levelname.lower(), "logger": record.name}


def _quoted(value: str) -> str:
    return value if _PLAIN.fullmatch(value) else json.dumps(value, ensure_ascii=False)


def set_up_logs(level: int, log_format: LogFormat) -> None:
    """Log to stderr from `level` on; of libraries nothing below INFO, since what clients sent may be in that."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if log_format == "json" else LogfmtFormatter())
    logging.basicConfig(level=max(level, logging.INFO), handlers=[handler])
    logging.getLogger("declaim").setLevel(level)
