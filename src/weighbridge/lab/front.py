"""The HTTP host in front of llama.cpp's server: what a customer of the lab talks to.

It caps ``top_logprobs`` at 20, as real hosts do, and tells the lies that its switches name. It is a provider,
not a part of the auditor, so it speaks HTTP with the standard library alone.
"""

import hashlib
import http.client
import json
import math
import random
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, ClassVar, Self

MODEL_NAME = "SmolLM2-135M-Instruct"
HONEST_TOP_LOGPROBS = 20
VOCABULARY = 49152
SENTINEL = -9999.0
MAX_REQUEST_BYTES = 1 << 20


@dataclass(frozen=True)
class Lies:
    """Switches of the front; the default is an honest host.

    Attributes
    ----------
    ignore_temperature : bool
        Whatever temperature is asked for, 1 is used.
    logprobs_after_temperature : bool
        Logprobs are those of the distribution divided by the temperature.
    max_top_logprobs : int
        How many logprobs are returned at most; 0 for none.
    sentinels : bool
        The second half of each list says -9999.
    divert_share : float
        The share of requests that the second variant answers.
    usage_offset : int
        Added to ``usage.prompt_tokens``.
    """

    ignore_temperature: bool = False
    logprobs_after_temperature: bool = False
    max_top_logprobs: int = HONEST_TOP_LOGPROBS
    sentinels: bool = False
    divert_share: float = 0.0
    usage_offset: int = 0


class Front:
    """The running front; a context manager."""

    def __init__(self, backend_port: int, lies: Lies, *, diverted_port: int | None = None, port: int = 0) -> None:
        handler = type(
            "Handler", (_Handler,), {"backend_port": backend_port, "lies": lies, "diverted_port": diverted_port}
        )
        self._server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self.base_url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    backend_port: ClassVar[int]
    diverted_port: ClassVar[int | None]
    lies: ClassVar[Lies]
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *arguments: Any) -> None:
        """Keep quiet."""

    def do_GET(self) -> None:
        """GET /v1/models."""
        if self.path.rstrip("/") == "/v1/models":
            self._send(200, {"object": "list", "data": [{"id": MODEL_NAME, "object": "model", "owned_by": "lab"}]})
        else:
            self._error(404, f"there is nothing at {self.path[:100]}")

    def do_POST(self) -> None:
        """POST /v1/chat/completions."""
        length = self.headers.get("content-length", "")
        if not length.isdigit() or int(length) > MAX_REQUEST_BYTES:
            self.close_connection = True
            self._error(413, "send a content-length of at most 1 MiB")
            return
        raw = self.rfile.read(int(length))
        if self.path.rstrip("/") != "/v1/chat/completions":
            self._error(404, f"there is nothing at {self.path[:100]}")
            return
        try:
            body = json.loads(raw)
            asked = body.get("model")
        except (ValueError, AttributeError):
            self._error(400, "the body is not a JSON object")
            return
        if asked != MODEL_NAME:
            self._error(404, f"the model {str(asked)[:80]!r} does not exist")
        elif body.get("stream"):
            self._error(400, "the lab does not stream")
        else:
            self._complete(body, raw)

    def _complete(self, body: dict[str, Any], raw: bytes) -> None:
        lies = self.lies
        wanted = body.get("top_logprobs") if body.get("logprobs") else 0
        if isinstance(wanted, bool) or not isinstance(wanted or 0, int):
            self._error(400, "top_logprobs is not a number")
            return
        if (wanted or 0) > HONEST_TOP_LOGPROBS:
            self._error(400, f"top_logprobs must be at most {HONEST_TOP_LOGPROBS}")
            return
        kept = min(wanted or 0, lies.max_top_logprobs)
        if lies.max_top_logprobs == 0:
            body.pop("logprobs", None)
            body.pop("top_logprobs", None)
        elif kept:
            body["top_logprobs"] = kept
        temperature = body.get("temperature", 1)
        if lies.ignore_temperature:
            body["temperature"] = 1
        rescale = lies.logprobs_after_temperature and kept and isinstance(temperature, int | float) and temperature > 0
        if rescale:
            body["top_logprobs"] = VOCABULARY
        try:
            status, answer = self._ask(body, raw)
        except (OSError, http.client.HTTPException, ValueError):
            self._error(502, "the engine did not answer")
            return
        if status == 200:
            answer["model"] = MODEL_NAME
            for choice in answer.get("choices", []):
                for position in (choice.get("logprobs") or {}).get("content") or []:
                    if rescale:
                        _after_temperature(position, float(temperature))
                        position["top_logprobs"] = position["top_logprobs"][:kept]
                    if lies.sentinels:
                        for entry in position["top_logprobs"][kept // 2 :]:
                            entry["logprob"] = SENTINEL
            if "usage" in answer:
                answer["usage"]["prompt_tokens"] += lies.usage_offset
            answer.pop("timings", None)
        self._send(status, answer)

    def _ask(self, body: dict[str, Any], raw: bytes) -> tuple[int, dict[str, Any]]:
        port = self.backend_port
        if self.diverted_port is not None:
            # The request decides, so that asking again is no way round.
            chance = random.Random(hashlib.sha256(raw).digest()).random()  # noqa: S311 - not a secret
            if chance < self.lies.divert_share:
                port = self.diverted_port
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        try:
            connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    def _error(self, status: int, message: str) -> None:
        self._send(status, {"error": {"message": message, "type": "invalid_request_error"}})

    def _send(self, status: int, document: dict[str, Any]) -> None:
        data = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def _after_temperature(position: dict[str, Any], temperature: float) -> None:
    """Divide all logprobs of a position by the temperature and normalise them again."""
    entries = [*position["top_logprobs"]]
    scaled = [entry["logprob"] / temperature for entry in entries]
    top = max(scaled)
    total = top + math.log(sum(math.exp(value - top) for value in scaled))
    for entry, value in zip(entries, scaled, strict=True):
        entry["logprob"] = value - total
    for entry in entries:
        if entry["token"] == position["token"]:
            position["logprob"] = entry["logprob"]
