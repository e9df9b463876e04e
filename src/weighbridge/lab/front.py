"""The HTTP host in front of a model server: what a customer of the lab talks to.

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
from http.server import ThreadingHTTPServer
from types import TracebackType
from typing import Any, ClassVar, Self

from weighbridge.lab.json_http import JsonHandler

MODEL_NAME = "SmolLM2-135M-Instruct"
HONEST_TOP_LOGPROBS = 20
VOCABULARY = 49152
SENTINEL = -9999.0
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


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
        The second half of each ``top_logprobs`` says -9999.
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
    """The running front; a context manager.

    Parameters
    ----------
    backend_port : int
        Where the model server is.
    lies : Lies
        What is misreported.
    diverted_port : int, optional
        Where the share ``lies.divert_share`` of requests goes instead.
    port : int
        The front's own; 0 for any free one.
    completions : bool
        Whether /v1/completions is offered besides the chat, which needs a server with OpenAI's shape for it.
    """

    def __init__(
        self,
        backend_port: int,
        lies: Lies,
        *,
        diverted_port: int | None = None,
        port: int = 0,
        completions: bool = False,
    ) -> None:
        settings = {
            "backend_port": backend_port,
            "lies": lies,
            "diverted_port": diverted_port,
            "paths": (CHAT, COMPLETIONS) if completions else (CHAT,),
        }
        handler = type("Handler", (_Handler,), settings)
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


class _Handler(JsonHandler):
    backend_port: ClassVar[int]
    diverted_port: ClassVar[int | None]
    lies: ClassVar[Lies]
    model_name = MODEL_NAME

    def answer(self, path: str, body: dict[str, Any]) -> None:
        """POST /v1/chat/completions, and /v1/completions where it is offered."""
        if body.get("model") != MODEL_NAME:
            self.send_problem(404, f"the model {str(body.get('model'))[:80]!r} does not exist")
        else:
            self._complete(path, body)

    def _complete(self, path: str, body: dict[str, Any]) -> None:
        lies = self.lies
        # Chat says with one field whether logprobs are wanted and with another how many; completions need one for both.
        name = "top_logprobs" if path == CHAT else "logprobs"
        asked = {name: body.get(name), "prompt_logprobs": body.get("prompt_logprobs")}
        if path == CHAT and not body.get("logprobs"):
            asked[name] = None
        for field, count in asked.items():
            if isinstance(count, bool) or not isinstance(count or 0, int):
                self.send_problem(400, f"{field} is not a number")
                return
            if (count or 0) > HONEST_TOP_LOGPROBS:
                self.send_problem(400, f"{field} must be at most {HONEST_TOP_LOGPROBS}")
                return
        kept = min(asked[name] or 0, lies.max_top_logprobs)
        if lies.max_top_logprobs == 0:
            for field in ("logprobs", "top_logprobs", "prompt_logprobs"):
                body.pop(field, None)
        else:
            body |= {field: min(count, lies.max_top_logprobs) for field, count in asked.items() if count}
        temperature = body.get("temperature", 1)
        if lies.ignore_temperature:
            body["temperature"] = 1
        rescale = lies.logprobs_after_temperature and kept and isinstance(temperature, int | float) and temperature > 0
        if rescale and path == COMPLETIONS:
            self.send_problem(400, "with logprobs after temperature, the lab lists them in chat only")
            return
        if rescale:
            body["top_logprobs"] = VOCABULARY
        try:
            status, answer = self._ask(path, body)
        except (OSError, http.client.HTTPException, ValueError):
            self.send_problem(502, "the engine did not answer")
            return
        if status == 200:
            answer["model"] = MODEL_NAME
            for choice in answer.get("choices", []):
                logprobs = choice.get("logprobs") or {}
                for position in logprobs.get("content") or []:
                    if rescale:
                        _after_temperature(position, float(temperature))
                        position["top_logprobs"] = position["top_logprobs"][:kept]
                    if lies.sentinels:
                        for entry in position["top_logprobs"][kept // 2 :]:
                            entry["logprob"] = SENTINEL
                for listed in logprobs.get("top_logprobs") or []:  # of a completion
                    if lies.sentinels and listed:
                        listed |= dict.fromkeys([*listed][kept // 2 :], SENTINEL)
            if "usage" in answer:
                answer["usage"]["prompt_tokens"] += lies.usage_offset
            answer.pop("timings", None)
        self.send_document(status, answer)

    def _ask(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        port = self.backend_port
        if self.diverted_port is not None:
            # What is asked decides, so that asking again is no way round.
            asked = json.dumps(body.get("messages", body.get("prompt")), sort_keys=True)
            chance = random.Random(hashlib.sha256(asked.encode()).digest()).random()  # noqa: S311 - not a secret
            if chance < self.lies.divert_share:
                port = self.diverted_port
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        try:
            connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()


def _after_temperature(position: dict[str, Any], temperature: float) -> None:
    """Divide all logprobs of a position by the temperature and normalise them again."""
    entries = [*position["top_logprobs"]]
    scaled = [entry["logprob"] / temperature for entry in entries]
    top = max(scaled)
    total = top + math.log(sum(math.exp(value - top) for value in scaled))
    for entry, value in zip(entries, scaled, strict=True):
        entry["logprob"] = value - total
    for entry in entries:
        if (entry["token"], entry.get("id")) == (position["token"], position.get("id")):
            position["logprob"] = entry["logprob"]
