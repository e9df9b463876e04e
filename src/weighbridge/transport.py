"""The one module that speaks HTTP.

A request in OpenAI's dialect goes through `openai`'s client, so that it looks like any customer's; one in another
dialect is plain HTTP. Both go over a transport of ours that bounds what comes back in decoded bytes and in time,
follows no redirect, decides which headers leave, and keeps the raw answer. Nothing here judges: whatever happens is
returned as a `Reply`.
"""

import asyncio
import json
import socket
import ssl
import time
import zlib
from collections.abc import Awaitable
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache
from types import TracebackType
from typing import Any, Self

import httpx2
import openai

from weighbridge.dialects import DIALECTS, Dialect
from weighbridge.keys import Key
from weighbridge.records import Endpoint, FailureCode

MAX_BODY_BYTES = 8 * 1024 * 1024
KEPT_OF_OVERSIZED_BYTES = 4096
_KEPT_HEADERS = (
    "content-type", "content-encoding", "content-length", "date", "server", "location", "retry-after", "x-request-id", "request-id", "via",
    "cf-ray", "openai-version", "openai-processing-ms", "openai-model", "x-ratelimit-limit-requests",
    "x-ratelimit-remaining-requests", "x-ratelimit-reset-requests",
)  # fmt: skip
_MAX_HEADER_CHARS = 500
_ACCEPT = {"accept": "application/json"}


@dataclass
class Reply:
    """What came back from one attempt.

    ``status`` is ``None`` where no HTTP answer arrived. ``body`` holds decoded bytes, at most
    `MAX_BODY_BYTES`; ``first_byte_s`` and ``latency_s`` count from the moment of sending.
    """

    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None
    failure: FailureCode | None = None
    failure_detail: str | None = None
    first_byte_s: float | None = None
    latency_s: float = 0.0


_current: ContextVar[Reply] = ContextVar("current reply")


@lru_cache(maxsize=1)
def _trusted() -> ssl.SSLContext:
    """The authorities that are believed: read once, for a process that may hold hundreds of connections."""
    return httpx2.create_ssl_context(trust_env=False)


class _BodyError(Exception):
    def __init__(self, code: FailureCode, detail: str) -> None:
        super().__init__(detail)
        self.code = code


class _BoundedTransport(httpx2.AsyncBaseTransport):
    """Reads at most `MAX_BODY_BYTES` decoded bytes and notes what came back in the current `Reply`."""

    def __init__(self, key: Key | None, connections: int, dialect: Dialect) -> None:
        limits = httpx2.Limits(max_connections=connections, max_keepalive_connections=connections)
        self._inner = httpx2.AsyncHTTPTransport(verify=_trusted(), limits=limits, trust_env=False)
        self._key = key
        self._dialect = dialect
        self.identity = {"user-agent": "python"}

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        reply = _current.get()
        started = time.perf_counter()
        request.headers = self._outgoing_headers(request.headers)
        response = await self._inner.handle_async_request(request)
        try:
            reply.status = response.status_code
            reply.headers = {
                name: self._redacted(response.headers[name])[:_MAX_HEADER_CHARS]
                for name in _KEPT_HEADERS
                if name in response.headers
            }
            try:
                reply.body = await _read_bounded(response, reply, started)
            except _BodyError as error:
                if error.code == "too_large" and reply.body is not None:
                    kept = self._redacted(reply.body.decode("latin-1")).encode("latin-1")
                    reply.body = kept[:KEPT_OF_OVERSIZED_BYTES]
                raise
        finally:
            await response.aclose()
        return httpx2.Response(response.status_code, headers={"content-type": "application/json"}, content=reply.body)

    def _outgoing_headers(self, headers: httpx2.Headers) -> httpx2.Headers:
        """Only headers that are meant: what `openai` may have taken from the environment never leaves."""
        names = ["host", "content-type", "content-length", "transfer-encoding", "accept", "connection"]
        kept = {name: headers[name] for name in names if name in headers}
        kept |= {"accept-encoding": "gzip, deflate", **self.identity, **self._dialect.headers}
        if self._key is not None:
            header = "authorization" if self._key.bearer else self._dialect.key_header
            kept[header] = f"Bearer {self._key.value}" if header == "authorization" else self._key.value
        return httpx2.Headers(kept)

    def _redacted(self, text: str) -> str:
        return text if self._key is None else self._key.redact(text)

    async def aclose(self) -> None:
        await self._inner.aclose()


async def _read_bounded(response: httpx2.Response, reply: Reply, started: float) -> bytes:
    encoding = response.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity", "gzip", "deflate"):
        raise _BodyError("bad_encoding", f"the answer is encoded as {encoding[:40]!r}, which was not asked for")
    # 32 + 15: zlib finds out by itself whether it is gzip or zlib.
    decoder = None if encoding in ("", "identity") else zlib.decompressobj(47)
    body = bytearray()
    if not isinstance(response.stream, httpx2.AsyncByteStream):
        raise _BodyError("connection_lost", "the answer has no body stream")
    async for chunk in response.stream:
        if reply.first_byte_s is None:
            reply.first_byte_s = time.perf_counter() - started
        try:
            body += decoder.decompress(chunk, MAX_BODY_BYTES + 1 - len(body)) if decoder else chunk
        except zlib.error as error:
            raise _BodyError("bad_encoding", f"the answer cannot be decompressed ({error})") from None
        if len(body) > MAX_BODY_BYTES:
            reply.body = bytes(body[: 2 * KEPT_OF_OVERSIZED_BYTES])
            raise _BodyError(
                "too_large", f"the answer is larger than {MAX_BODY_BYTES // 2**20} MiB; its beginning is kept"
            )
    return bytes(body)


class Transport:
    """Sends requests to one endpoint; an async context manager.

    Parameters
    ----------
    endpoint : Endpoint
        Where to send.
    key : Key or None
        Put into the header of the endpoint's dialect by the transport itself; `openai` never sees it.
    """

    def __init__(self, endpoint: Endpoint, key: Key | None) -> None:
        self._timeout_s = endpoint.limits.timeout_s
        self._key = key
        bounded = _BoundedTransport(key, endpoint.limits.concurrency, DIALECTS[endpoint.dialect])
        self._http = httpx2.AsyncClient(
            transport=bounded,
            trust_env=False,
            follow_redirects=False,
            timeout=None,
        )
        self._base_url = endpoint.base_url
        self._client: openai.AsyncOpenAI | None = None
        if endpoint.dialect == "openai-chat":
            self._client = openai.AsyncOpenAI(
                api_key="none", base_url=endpoint.base_url, http_client=self._http, max_retries=0
            )
        if self._client is not None and endpoint.identify_client:
            # Taken from the library itself: the headers of a request may hold what the environment told it to add.
            headers = {"user-agent": self._client.user_agent, **self._client.platform_headers()}
            bounded.identity = {name.lower(): value for name, value in headers.items()}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def post(self, path: str, body: dict[str, Any]) -> Reply:
        """POST a JSON body once, without retries, and return what happened."""
        if self._client is None:
            return await self._once(self._http.post(self._base_url + path, json=body, headers=_ACCEPT))
        return await self._once(self._client.post(path, cast_to=httpx2.Response, body=body))

    async def get(self, path: str) -> Reply:
        """GET a path, with its query as it is to be sent, once, without retries, and return what happened."""
        if self._client is None:
            return await self._once(self._http.get(self._base_url + path, headers=_ACCEPT))
        return await self._once(self._client.get(path, cast_to=httpx2.Response))

    async def _once(self, exchange: Awaitable[httpx2.Response]) -> Reply:
        reply = Reply()
        _current.set(reply)
        started = time.perf_counter()
        try:
            async with asyncio.timeout(self._timeout_s):
                await exchange
        except TimeoutError:
            reply.failure, reply.failure_detail = "timeout", f"no complete answer within {self._timeout_s:g} s"
        except (openai.APIStatusError, openai.APIResponseValidationError, json.JSONDecodeError):
            pass  # an HTTP answer of whatever kind: it stands in the reply
        except (openai.APIConnectionError, httpx2.HTTPError, _BodyError) as error:
            reply.failure, reply.failure_detail = _classify(error)
        reply.latency_s = time.perf_counter() - started
        if self._key is not None and reply.failure_detail:
            reply.failure_detail = self._key.redact(reply.failure_detail)
        return reply


def post_once(url: str, document: dict[str, Any], timeout_s: float) -> int | None:
    """POST JSON to a place that is no endpoint, and return the status; None where there was no answer, which is not read."""
    try:
        with (
            httpx2.Client(verify=_trusted(), trust_env=False, follow_redirects=False, timeout=timeout_s) as client,
            client.stream("POST", url, json=document) as response,
        ):
            return response.status_code
    except (httpx2.HTTPError, httpx2.InvalidURL):
        return None


def _classify(error: BaseException) -> tuple[FailureCode, str]:
    """Find the innermost cause that has a name of its own."""
    chain: list[BaseException] = []
    seen: BaseException | None = error
    while seen is not None and seen not in chain:
        chain.append(seen)
        seen = seen.__cause__ or seen.__context__
    for cause in chain:
        if isinstance(cause, _BodyError):
            return cause.code, str(cause)
        if isinstance(cause, socket.gaierror):
            return "unknown_host", "the host name is not known"
        if isinstance(cause, ssl.SSLError):
            return "tls", f"the TLS connection failed ({cause.reason or 'no reason given'})"
        if isinstance(cause, ConnectionRefusedError):
            return "refused", "the connection was refused"
    if any(isinstance(cause, httpx2.ConnectError) for cause in chain):
        return "refused", f"no connection ({str(chain[-1])[:200]})"
    return "connection_lost", f"the connection broke ({type(chain[-1]).__name__})"
