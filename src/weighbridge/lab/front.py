"""The HTTP host in front of a model server: what a customer of the lab talks to.

It caps ``top_logprobs`` at 20, as real hosts do, and tells the lies that its switches name. It is a provider,
not a part of the auditor, so it speaks HTTP with the standard library alone.
"""

import copy
import hashlib
import http.client
import itertools
import json
import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import ThreadingHTTPServer
from types import TracebackType
from typing import Any, ClassVar, Self

from jinja2.sandbox import ImmutableSandboxedEnvironment

from weighbridge.errors import ConfigurationError
from weighbridge.lab.json_http import JsonHandler, post_json
from weighbridge.lab.lies import (
    HONEST_TOP_LOGPROBS,
    chat_chunks,
    divide_by_temperature,
    estimate_usage,
    is_published,
    message_events,
    message_text,
    passed_on,
    refused_field,
    set_reasoning_apart,
)
from weighbridge.lab.lies import Lies as Lies  # most callers need both
from weighbridge.lab.variants import OFFICIAL_TEMPLATE

MODEL_NAME = "SmolLM2-135M-Instruct"
VOCABULARY = 49152
SENTINEL = -9999.0
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
MESSAGES = "/v1/messages"
# Added to a token's logit it leaves no chance to any other; llama.cpp's logprobs are those without it.
_CERTAIN = 1000

_official_template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(OFFICIAL_TEMPLATE)


class Front:
    """The running front; a context manager.

    Besides the chat it passes on POST /v1/messages, Anthropic's way to ask, which of the lab's engines llama.cpp serves.

    Parameters
    ----------
    backend_port : int
        Where the model server is.
    lies : Lies
        What is misreported.
    diverted_port : int, optional
        Where the share ``lies.divert_share`` of requests goes instead.
    forged_port : int, optional
        Whose logprobs a chat gives out as its own: those of a llama.cpp server with the same vocabulary, which is
        asked for each place of the text that the first server wrote, under its own chat template.
    true_port : int, optional
        Where goes what ``lies.true_for_public`` and ``lies.true_first`` have the true model answer.
    port : int
        The front's own; 0 for any free one.
    completions : bool
        Whether /v1/completions is offered besides the chat; its logprobs have the shape that the engine gives them.

    Raises
    ------
    ConfigurationError
        If the true model is to answer some requests and is not there.
    """

    def __init__(
        self,
        backend_port: int,
        lies: Lies,
        *,
        diverted_port: int | None = None,
        forged_port: int | None = None,
        true_port: int | None = None,
        port: int = 0,
        completions: bool = False,
    ) -> None:
        if lies.sometimes_true and true_port is None:
            raise ConfigurationError("the true model is to answer some requests, and is not there", "Give its port")
        settings = {
            "backend_port": backend_port,
            "lies": lies,
            "diverted_port": diverted_port,
            "forged_port": forged_port,
            "true_port": true_port,
            "paths": (CHAT, MESSAGES, COMPLETIONS) if completions else (CHAT, MESSAGES),
            "stored": {},
            "turns": {},
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


class _RefusedError(Exception):
    """A request is not served; says why."""


@dataclass(frozen=True)
class _Wanted:
    """What is to become of the engine's logprobs.

    Attributes
    ----------
    shown : bool
        Whether a chat's answer gives any; the engine may be asked for them all the same.
    kept : int
        How many are listed at each position.
    listed : int
        How many the engine is asked for.
    temperature : float or None
        What they are divided by.
    """

    shown: bool
    kept: int
    listed: int
    temperature: float | None


class _Handler(JsonHandler):
    backend_port: ClassVar[int]
    diverted_port: ClassVar[int | None]
    forged_port: ClassVar[int | None]
    true_port: ClassVar[int | None]
    lies: ClassVar[Lies]
    stored: ClassVar[dict[str, dict[str, Any]]]
    turns: ClassVar[dict[str, Iterator[int]]]
    model_name = MODEL_NAME
    streams = True

    def answer(self, path: str, body: dict[str, Any]) -> None:
        """POST /v1/chat/completions, /v1/messages, and /v1/completions where it is offered."""
        if body.get("model") != MODEL_NAME:
            self.send_problem(404, f"the model {str(body.get('model'))[:80]!r} does not exist")
            return
        asked = passed_on(self.lies, body)
        # The engine is always asked for the whole: what a stream tells of tokens is then up to this host.
        streamed, options = asked.pop("stream", False), asked.pop("stream_options", None)
        try:
            field = refused_field(self.lies, body)
            if field is not None:
                raise _RefusedError(f"{field} is not supported")
            if streamed and path == COMPLETIONS:
                raise _RefusedError("the lab streams chats only")
            status, document = self._from_memory(path, body, asked)
        except _RefusedError as refused:
            self.send_problem(400, str(refused))
            return
        except (OSError, http.client.HTTPException, ValueError):
            self.send_problem(502, "the engine did not answer")
            return
        offset = self.lies.stream_usage_offset
        if not streamed or status != 200:
            self.send_document(status, document)
        elif path == MESSAGES:
            self.send_events(message_events(document, usage_offset=offset), typed=True)
        else:
            include_usage = isinstance(options, dict) and bool(options.get("include_usage"))
            self.send_events(chat_chunks(document, include_usage=include_usage, usage_offset=offset))

    def _from_memory(self, path: str, body: dict[str, Any], asked: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """What the same body got before, whatever its seed; else what is asked of the engine."""
        if not self.lies.remember:
            return self._from_cache_or_engine(path, asked)
        key = json.dumps([path, {field: value for field, value in body.items() if field != "seed"}], sort_keys=True)
        if key not in self.stored:
            status, document = self._from_cache_or_engine(path, asked)
            if status != 200:
                return status, document
            self.stored.setdefault(key, document)  # of two that ask at once, both get the answer that was first
        return 200, self.stored[key]

    def _from_cache_or_engine(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if not self.lies.cached or path != CHAT:
            return self._complete(path, body)
        key = json.dumps(body.get("messages"), sort_keys=True)
        if key in self.stored:
            document = copy.deepcopy(self.stored[key])
            if "usage" in document:
                document["usage"]["prompt_tokens_details"] = {"cached_tokens": document["usage"]["prompt_tokens"]}
            return 200, document
        status, document = self._complete(path, body)
        if status == 200:
            self.stored[key] = document
        return status, document

    def _complete(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Ask the engine, and make of its answer what this host says."""
        wanted = self._ask_for_logprobs(path, body)
        status, answer = post_json(self._port(body), path, body)
        if status != 200:
            return status, answer
        if path == CHAT and self.forged_port is not None and wanted.shown:
            for choice in answer["choices"]:
                _forge(self.forged_port, body, choice, wanted.listed)
        for choice in answer.get("choices", []):
            self._alter_logprobs(choice, wanted)
        if path == CHAT:
            self._count(body, answer)
            self._set_reasoning_apart(answer)
            for choice in answer["choices"]:
                if not wanted.shown:
                    choice.pop("logprobs", None)
        if self.lies.usage == "none":
            answer.pop("usage", None)
        if "usage" in answer:
            usage = answer["usage"]
            usage["input_tokens" if path == MESSAGES else "prompt_tokens"] += self.lies.usage_offset
            if path != MESSAGES:
                usage["total_tokens"] = usage["prompt_tokens"] + usage["completion_tokens"]
        answer["model"] = MODEL_NAME if self.lies.model_named is None else self.lies.model_named
        if self.lies.provider_named is not None:
            answer["provider"] = self.lies.provider_named
        answer.pop("timings", None)
        return status, answer

    def _ask_for_logprobs(self, path: str, body: dict[str, Any]) -> _Wanted:
        """Check what the request says of logprobs, and make of it what the engine is asked for."""
        lies = self.lies
        if path == MESSAGES:  # which has none, and passes over what it does not know
            return _Wanted(shown=False, kept=0, listed=0, temperature=None)
        # Chat says with one field whether logprobs are wanted and with another how many; completions need one for both.
        name = "top_logprobs" if path == CHAT else "logprobs"
        asked = {name: body.get(name), "prompt_logprobs": body.get("prompt_logprobs")}
        if path == CHAT and not body.get("logprobs"):
            asked[name] = None
        for field, count in asked.items():
            if isinstance(count, bool) or not isinstance(count or 0, int):
                raise _RefusedError(f"{field} is not a number")
            if (count or 0) > HONEST_TOP_LOGPROBS:
                raise _RefusedError(f"{field} must be at most {HONEST_TOP_LOGPROBS}")
        if lies.max_top_logprobs == 0:
            for field in ("logprobs", "top_logprobs", "prompt_logprobs"):
                body.pop(field, None)
        else:
            body |= {field: min(count, lies.max_top_logprobs) for field, count in asked.items() if count}
        shown = path == CHAT and bool(body.get("logprobs"))
        listed = kept = min(asked[name] or 0, lies.max_top_logprobs)
        temperature = body.get("temperature", 1)
        divided = lies.logprobs_after_temperature and kept and isinstance(temperature, int | float) and temperature > 0
        if divided and path == COMPLETIONS:
            raise _RefusedError("with logprobs after temperature, the lab lists them in chat only")
        if divided:
            listed = body["top_logprobs"] = VOCABULARY
        elif path == CHAT and (lies.reasoning != "none" or (self.forged_port is not None and shown)):
            # llama.cpp says which tokens it drew only where it lists at least one.
            listed = max(kept, 1)
            body |= {"logprobs": True, "top_logprobs": listed}
        return _Wanted(shown, kept, listed, float(temperature) if divided else None)

    def _alter_logprobs(self, choice: dict[str, Any], wanted: _Wanted) -> None:
        logprobs = choice.get("logprobs") or {}
        for position in logprobs.get("content") or []:
            if wanted.temperature is not None:
                divide_by_temperature(position, wanted.temperature)
            if wanted.listed > wanted.kept:
                position["top_logprobs"] = position["top_logprobs"][: wanted.kept]
            if self.lies.sentinels:
                for entry in position["top_logprobs"][wanted.kept // 2 :]:
                    entry["logprob"] = SENTINEL
        for listed in logprobs.get("top_logprobs") or []:  # of a completion
            if self.lies.sentinels and listed:
                listed |= dict.fromkeys([*listed][wanted.kept // 2 :], SENTINEL)

    def _count(self, body: dict[str, Any], answer: dict[str, Any]) -> None:
        if self.lies.usage == "official":
            answer["usage"]["prompt_tokens"] = _official_prompt_tokens(self.backend_port, body["messages"])
        elif self.lies.usage == "characters":
            estimate_usage(answer["usage"], body, answer)

    def _set_reasoning_apart(self, answer: dict[str, Any]) -> None:
        if self.lies.reasoning != "none":
            visible = self.lies.reasoning == "visible"
            count = sum(set_reasoning_apart(choice, visible=visible) for choice in answer["choices"])
            answer["usage"]["completion_tokens_details"] = {"reasoning_tokens": count}

    def _port(self, body: dict[str, Any]) -> int:
        if self.true_port is not None and (self._is_early() or (self.lies.true_for_public and is_published(body))):
            return self.true_port
        if self.diverted_port is not None:
            # What is asked decides, so that asking again is no way round; or each request by itself.
            asked = json.dumps(
                body if self.lies.divert_each else body.get("messages", body.get("prompt")), sort_keys=True
            )
            chance = random.Random(hashlib.sha256(asked.encode()).digest()).random()  # noqa: S311 - not a secret
            if chance < self.lies.divert_share:
                return self.diverted_port
        return self.backend_port

    def _is_early(self) -> bool:
        """Count a request of whoever asks; whether it is one of the first."""
        key = self.headers.get("authorization") or self.headers.get("x-api-key") or ""
        # Many threads ask; each of these two calls is one step of the interpreter's.
        return next(self.turns.setdefault(key, itertools.count())) < self.lies.true_first


def _official_prompt_tokens(port: int, messages: list[dict[str, Any]]) -> int:
    """What a prompt would have counted under the model's own template."""
    turns = [{"role": message["role"], "content": message_text(message)} for message in messages]
    for turn in turns:
        if turn["role"] == "developer":  # as llama.cpp reads it
            turn["role"] = "system"
    # A last message of the assistant's is one that it goes on with, as engines take it.
    begun = turns.pop()["content"] if turns and turns[-1]["role"] == "assistant" else ""
    text = _official_template.render(messages=turns, add_generation_prompt=True) + begun
    return len(_tokens(port, text, add_special=False))


def _forge(port: int, request: dict[str, Any], choice: dict[str, Any], listed: int) -> None:
    """Put another server's logprobs in place of a text's own, each as if that server had written what stands before."""
    positions = (choice.get("logprobs") or {}).get("content") or []
    prompt = _asked(
        port, "/apply-template", {field: request[field] for field in ("messages", "tools") if field in request}
    )
    # llama.cpp leaves out of the rendered text the special token that its tokenizer adds.
    context = _tokens(port, prompt["prompt"], add_special=True)
    for position in positions:
        drawn = _drawn_tokens(port, position)
        context += drawn[:-1]
        question = {"prompt": context, "n_predict": 1, "n_probs": listed, "temperature": 0}
        answer = _asked(port, "/completion", {**question, "logit_bias": {str(drawn[-1]): _CERTAIN}})
        # Of a token that ends within a character llama.cpp tells nothing: that position stays as it was.
        for told in answer.get("completion_probabilities", [])[:1]:
            position |= {field: told[field] for field in ("logprob", "top_logprobs")}
        context += drawn[-1:]


def _drawn_tokens(port: int, position: dict[str, Any]) -> list[int]:
    """The ids behind a position; of a character in several tokens, llama.cpp names only the last."""
    last = int(position["id"])
    if position["token"].isascii():
        return [last]
    tokens = _tokens(port, position["token"], add_special=False)
    return tokens if tokens[-1:] == [last] else [last]


def _tokens(port: int, text: str, *, add_special: bool) -> list[int]:
    body = {"content": text, "add_special": add_special, "parse_special": True}
    return [int(token) for token in _asked(port, "/tokenize", body)["tokens"]]


def _asked(port: int, path: str, body: dict[str, Any]) -> dict[str, Any]:
    status, answer = post_json(port, path, body)
    if status != 200:
        raise ValueError(f"the engine answered {path} with status {status}")
    return answer
