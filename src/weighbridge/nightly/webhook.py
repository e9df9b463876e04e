"""One message where a verdict has changed, in the shape that Slack and those like it take."""

import os
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field

from weighbridge.canonical import canonical_bytes, write_atomically
from weighbridge.errors import ConfigurationError
from weighbridge.nightly.judgement import FleetNight, FleetRow
from weighbridge.records import LOOPBACK_HOSTS, Record, VerdictWord, read_json
from weighbridge.transport import post_once

TIMEOUT_S = 15.0
MOST_NAMED = 20
TOLD = "told.json"
_SIGNS = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


class Told(Record):
    """What those behind the webhook believe of every endpoint whose verdict has changed."""

    schema_: Literal["weighbridge/told/1"] = Field(default="weighbridge/told/1", alias="schema")
    verdicts: dict[str, VerdictWord]

    model_config = Record.model_config | {"populate_by_name": True}


def address_of(name: str | None) -> str | None:
    """Read a webhook's address from the environment; it is a secret and stands in no message of ours.

    Raises
    ------
    ConfigurationError
        If the variable is not set, or does not hold an address that a message may be sent to.
    """
    if name is None:
        return None
    value = os.environ.get(name, "").strip()
    if not value:
        raise ConfigurationError(f"the environment variable {name} is not set", "Set it, or remove webhook_url_env")
    try:
        parts = urlsplit(value)
        safe = parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in LOOPBACK_HOSTS)
        host = (parts.hostname or "").encode("idna")
        usable = safe and bool(host) and parts.port != 0 and parts.username is None and value.isprintable()
    except ValueError:
        usable = False
    if not usable:
        raise ConfigurationError(f"{name} holds no https address", "Set it to the webhook's URL")
    return value


def message(night: FleetNight, rows: list[FleetRow]) -> dict[str, str]:
    """The message about changed verdicts: evidence in words, and nothing secret."""
    lines = [
        f"• {row.endpoint}: {str(row.before).replace('_', ' ')} → {str(row.verdict).replace('_', ' ')}. {row.sentence}"
        for row in rows[:MOST_NAMED]
    ]
    if len(rows) > MOST_NAMED:
        lines.append(f"… and {len(rows) - MOST_NAMED} more")
    count = "1 verdict" if len(rows) == 1 else f"{len(rows)} verdicts"
    text = f"Weighbridge, {night.fleet}, night of {night.night}: {count} changed\n" + "\n".join(lines)
    return {"text": "".join(_SIGNS.get(sign, sign) for sign in text)}


def tell(url: str, root: Path, night: FleetNight) -> str | None:
    """Send what has changed and was not told yet; returns what went wrong, without the address, or None.

    What was told is written down, so that it is told once, and again, on a later night too, where it could not be.
    """
    path = root / TOLD
    try:
        known = read_json(Told, path).verdicts if path.exists() else {}
    except ConfigurationError as error:
        return f"nothing was told to the webhook: {error.what}"
    believed = known | {row.endpoint: row.before for row in night.endpoints if row.before and row.endpoint not in known}
    changed = [
        row.model_copy(update={"before": believed[row.endpoint]}) for row in night.endpoints
        if row.verdict is not None and row.verdict != believed.get(row.endpoint, row.verdict)
    ]  # fmt: skip
    if not changed:
        return None
    problem = _send(url, message(night, changed))
    now = {row.endpoint: row.verdict if problem is None else row.before for row in changed}
    told = Told(verdicts=known | {name: verdict for name, verdict in now.items() if verdict is not None})
    write_atomically(path, canonical_bytes(told.model_dump(mode="json", by_alias=True)) + b"\n")
    return problem


def _send(url: str, document: dict[str, str]) -> str | None:
    """Send it once; returns what went wrong, without the address, or None."""
    status = post_once(url, document, TIMEOUT_S)
    if status is None:
        return "the webhook did not answer"
    return None if 200 <= status < 300 else f"the webhook answered {status}"
