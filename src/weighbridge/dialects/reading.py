"""Reading whatever a host sent: nothing here raises, and nothing that is kept is longer than its bound."""

import base64
import json
import re
from typing import Any

from weighbridge.records import ANSWER_ID, Received

MAX_TEXT = 200
_MAX_GENERATED = 2000  # characters of what a model wrote that are kept
_ANSWER_ID = re.compile(ANSWER_ID)


def body_text(received: Received) -> str:
    """The body of an answer as text."""
    if received.body_text is not None:
        return received.body_text
    return base64.b64decode(received.body_base64 or "").decode("utf-8", "replace")


def parsed(raw: str) -> tuple[Any, str | None]:
    """A JSON value; else why it is none, in one word."""
    try:
        return json.loads(raw), None
    except (ValueError, RecursionError):
        text = raw.lstrip()
        if text.startswith("<"):
            return None, "html"
        return None, "truncated_json" if text.startswith(("{", "[")) else "not_json"


def bounded(value: Any) -> str | None:
    """A string as it may be shown: bounded, and without control characters that would steer a terminal."""
    if not isinstance(value, str):
        return None
    return "".join(c if c.isprintable() else "\ufffd" for c in value[:MAX_TEXT])


def generated(text: str) -> str:
    """The beginning of what a model wrote, as UTF-8 can hold it."""
    return text[:_MAX_GENERATED].encode("utf-8", "replace").decode()


def answer_id(value: Any) -> str | None:
    """What an answer is called, where that can stand in a URL."""
    return value if isinstance(value, str) and _ANSWER_ID.fullmatch(value) else None


def count(value: Any) -> int | None:
    """A count that is one, else None."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**9 else None


def read_object(received: Received) -> tuple[dict[str, Any], str | None, str | None]:
    """The JSON object that an answer is; else an empty one and why, in one word and in one line."""
    if received.failure is not None:
        return {}, received.failure, bounded(received.failure_detail)
    raw = body_text(received)
    if received.status is not None and 300 <= received.status < 400:
        where = bounded(received.headers.get("location", "nowhere"))
        return {}, "redirect", f"redirects to {where}; redirects are never followed"
    document, fault = parsed(raw)
    if received.status != 200:
        return {}, f"http_{received.status}", _error_message(document) or bounded(raw.strip()) or "no explanation"
    if fault is not None:
        return {}, fault, f"the answer begins {raw.strip()[:60]!r}"
    return without_error(document)


def without_error(document: Any) -> tuple[dict[str, Any], str | None, str | None]:
    """A document that is an object and carries no error; else an empty one and why."""
    if not isinstance(document, dict):
        return {}, "not_an_object", "the answer is not a JSON object"
    if document.get("error"):
        return {}, "error_object", _error_message(document) or "an error object"
    return document, None, None


def _error_message(document: Any) -> str | None:
    error = document.get("error") if isinstance(document, dict) else None
    if isinstance(error, dict):
        error = error.get("message") or error.get("code")
    return bounded(str(error)) if error else None
