"""Collecting: send requests, keep what comes back, judge nothing.

Every attempt is written down before it is sent and again when it has come back. Retries are attempts like any
other and count against the budget.
"""

import asyncio
import base64
import random
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from weighbridge.canonical import sha256_hex
from weighbridge.keys import Key
from weighbridge.records import Exchange, Limits, Price, Received, Sent
from weighbridge.store import ExchangeLog
from weighbridge.transport import Reply, Transport

MAX_ATTEMPTS = 4
FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 90.0
_TRANSIENT_STATUS = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529})
_TRANSIENT_FAILURE = frozenset({"refused", "timeout", "connection_lost", "interrupted"})


@dataclass
class Budget:
    """Requests and money that may still be spent.

    The worst case is reserved before a request is sent and, once an answer says how much it used, replaced by
    that: the total never exceeds the limit unless the endpoint bills more than its own prices and counts.
    """

    limits: Limits
    price: Price | None
    requests: int = 0
    spent_usd: float = 0.0

    def refuses(self, prompt_tokens: int, completion_tokens: int = 1) -> str | None:
        """Why one more request would break the budget, or None."""
        if self.requests >= self.limits.max_requests:
            return "budget_requests"
        most = self.limits.max_cost_usd
        if most is not None and self.spent_usd + self._cost_usd(prompt_tokens, completion_tokens) > most:
            return "budget_cost"
        return None

    def reserve(self, prompt_tokens: int, completion_tokens: int = 1) -> None:
        """Take one request's worst case off the budget."""
        self.requests += 1
        self.spent_usd += self._cost_usd(prompt_tokens, completion_tokens)

    def settle(self, reserved: tuple[int, int], prompt_tokens: int, completion_tokens: int) -> None:
        """Replace one reserved worst case, of prompt and completion tokens, by what was really used."""
        self.spent_usd += self._cost_usd(prompt_tokens, completion_tokens) - self._cost_usd(*reserved)

    def _cost_usd(self, prompt_tokens: int, completion_tokens: int) -> float:
        return self.price.cost_usd(prompt_tokens, completion_tokens) if self.price is not None else 0.0


class WaitTooLongError(Exception):
    """The endpoint asks for a longer wait than an audit will sit through."""

    def __init__(self, wait_s: float) -> None:
        super().__init__(f"the endpoint asks to wait {wait_s:.0f} s")


class Collector:
    """Sends the requests of one run.

    Parameters
    ----------
    transport : Transport
        The way to the endpoint.
    log : ExchangeLog
        Where attempts are written.
    budget : Budget
        What may be spent.
    key : Key or None
        For removing the key from whatever the endpoint echoes.
    """

    def __init__(self, transport: Transport, log: ExchangeLog, budget: Budget, key: Key | None) -> None:
        self._transport = transport
        self._log = log
        self._budget = budget
        self._key = key
        self._next_slot = 0.0

    async def send(
        self,
        request_id: str,
        path: str,
        body: dict[str, Any] | None,
        worst_case_tokens: tuple[int, int],
        earlier: list[Exchange],
        *,
        tries: int = MAX_ATTEMPTS,
        missing_wait_s: float | None = None,
    ) -> tuple[list[Exchange], str | None]:
        """Send one request until it is answered or refused, or attempts or budget run out.

        Parameters
        ----------
        request_id, path, body
            What is sent where; without a body it is a GET.
        worst_case_tokens : tuple of int
            Prompt and completion tokens, for the budget.
        earlier : list of Exchange
            Attempts of this request before a crash.
        tries : int
            Attempts that are made at most.
        missing_wait_s : float, optional
            How long to wait before another attempt at what is not there yet; by default a 404 is an answer.

        Returns
        -------
        tuple
            All attempts, and why the budget forbade one, or None.

        Raises
        ------
        WaitTooLongError
            If the endpoint asks for a very long wait.
        """
        attempts = list(earlier)
        while True:
            refusal = self._budget.refuses(*worst_case_tokens)
            if refusal is not None:
                return attempts, refusal
            self._budget.reserve(*worst_case_tokens)
            await self._pace()
            sent = Sent(
                request_id=request_id,
                attempt=len(attempts) + 1,
                sent_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
                method="POST" if body is not None else "GET",
                path=path,
                body=body or {},
            )
            self._log.append(sent)
            reply = await (self._transport.get(path) if body is None else self._transport.post(path, body))
            received = _received(sent, reply, self._key)
            self._log.append(received)
            attempts.append(Exchange(sent=sent, received=received))
            tried = sum(a.received.failure != "interrupted" for a in attempts)
            missing_s = missing_wait_s if received.status == 404 else None
            if (missing_s is None and not is_transient(received)) or tried >= tries:
                return attempts, None
            wait_s = missing_s if missing_s is not None else _wait_s(received, tried)
            if wait_s > LONGEST_WAIT_S:
                raise WaitTooLongError(wait_s)
            await asyncio.sleep(wait_s)

    async def _pace(self) -> None:
        per_minute = self._budget.limits.requests_per_minute
        if per_minute is None:
            return
        now = time.monotonic()
        slot = max(now, self._next_slot)
        self._next_slot = slot + 60 / per_minute
        await asyncio.sleep(slot - now)


def is_transient(received: Received) -> bool:
    """Whether the same request may fare better a little later."""
    return received.failure in _TRANSIENT_FAILURE or (received.failure is None and received.status in _TRANSIENT_STATUS)


def asked_to_wait_s(received: Received, came_back: datetime) -> float | None:
    """The wait that Retry-After asks for, in seconds from the moment at which the answer came back; None where there is none."""
    asked = received.headers.get("retry-after", "").strip()
    if asked.isdecimal() and asked.isascii():
        return float(asked)
    try:
        return max(0.0, (parsedate_to_datetime(asked) - came_back).total_seconds()) if asked else None
    except (ValueError, TypeError, OverflowError):
        return None


def _wait_s(received: Received, tried: int) -> float:
    """Retry-After where the endpoint gives one, else a doubling wait with jitter."""
    asked_s = asked_to_wait_s(received, datetime.now(UTC))
    if asked_s is not None:
        return asked_s
    return FIRST_WAIT_S * 2.0 ** (tried - 1) * random.uniform(1, 1.5)  # noqa: S311 - jitter


def _received(sent: Sent, reply: Reply, key: Key | None) -> Received:
    body_text: str | None = None
    body_base64: str | None = None
    redacted = False
    if reply.body is not None:
        raw = reply.body.decode("latin-1")
        kept = reply.body
        if key is not None and key.stands_in(raw):
            redacted = True
            kept = key.redact(raw).encode("latin-1")
        try:
            body_text = kept.decode("utf-8")
        except UnicodeDecodeError:
            body_base64 = base64.b64encode(kept).decode()
    headers = reply.headers
    if key is not None:
        headers = {name: key.redact(value) for name, value in headers.items()}
    return Received(
        request_id=sent.request_id,
        attempt=sent.attempt,
        status=reply.status,
        headers=headers,
        body_text=body_text,
        body_base64=body_base64,
        body_sha256=sha256_hex(reply.body) if reply.body is not None else None,
        redacted=redacted,
        failure=reply.failure,
        failure_detail=reply.failure_detail,
        first_byte_s=reply.first_byte_s,
        latency_s=reply.latency_s,
    )
