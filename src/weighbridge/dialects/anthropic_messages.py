"""Anthropic-style messages: what is asked, and how an answer or its stream of events is read.

This API knows neither logprobs nor seeds nor penalties nor several answers at once. Nothing that rests on logprobs can
be asked through it; who answers, what becomes of a prompt, and what becomes of the sampling parameters that it has can.
"""

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from weighbridge.dialects.openai_chat import pinned
from weighbridge.dialects.reading import (
    answer_id,
    body_text,
    bounded,
    count,
    generated,
    parsed,
    read_object,
    without_error,
)
from weighbridge.records import Endpoint, Exchange, Message, Observation, PlannedRequest

MOST_TEMPERATURE = 1.0  # the API's own range ends here
_MAX_EVENTS = 100_000
_SAYABLE = ("temperature", "top_p", "top_k", "stop", "stream")
# Settings that a request may state without being about them: what this API leaves unsaid, or always does.
_IN_PASSING = ("seed", "stream_options")
# Settings by which nothing is cut off, in the words of other APIs: neither min_p nor a top_k below 0 can be said here.
_NOTHING_CUT_OFF = {"top_k": -1, "min_p": 0}
# These repeat another request under the same seed and under another one: they are about nothing else.
ABOUT_SEEDS = ("sampling-warm-again", "sampling-warm-new")
_REASONING = ("thinking", "redacted_thinking")


class AnthropicMessages:
    """POST /messages."""

    gives_logprobs: bool = False
    key_header: str = "x-api-key"
    headers: Mapping[str, str] = MappingProxyType({"anthropic-version": "2023-06-01"})

    def path(self, request: PlannedRequest) -> str:  # noqa: ARG002 - everything is sent to one place
        """Where a request is sent."""
        return "/messages"

    def asks(self, request: PlannedRequest) -> bool:
        """Whether a request is about something that this API has: no token ids, forced text, seeds or temperature 2."""
        if request.raw or request.forced or request.request_id in ABOUT_SEEDS:
            return False
        settings = _meant(request.settings)
        hot = settings.get("temperature", 0)
        return all(name in _SAYABLE for name in settings) and isinstance(hot, int | float) and hot <= MOST_TEMPERATURE

    def body(
        self,
        endpoint: Endpoint,
        request: PlannedRequest,
        *,
        temperature: float,
        top_logprobs: int,  # noqa: ARG002 - no such thing here
        seed: int,  # noqa: ARG002
        prompt_ids: list[int],  # noqa: ARG002
    ) -> dict[str, Any]:
        """The body of a request, with nothing in it that the API lacks.

        Nothing is bent into its range either: temperature 2 is sent as 2, and what the host makes of it is an answer.
        """
        system, messages = _apart(request.probe.messages)
        body: dict[str, Any] = {
            "model": endpoint.model,
            "max_tokens": request.max_tokens,
            "temperature": temperature,
            "stream": False,
            "messages": [message.model_dump() for message in messages],
        }
        if system:
            # One text as it is: what is put between two of them would be the host's own.
            blocks = [{"type": "text", "text": text} for text in system]
            body["system"] = system[0] if len(system) == 1 else blocks
        if request.probe.tools is not None:
            body["tools"] = [_tool(tool) for tool in request.probe.tools]
        settings = {name: value for name, value in _meant(request.settings).items() if name in _SAYABLE}
        if "stop" in settings:
            stop = settings.pop("stop")
            settings["stop_sequences"] = [stop] if isinstance(stop, str) else stop
        return body | endpoint.extra_body | settings | pinned(endpoint)

    def observe(self, probe_id: str, attempts: list[Exchange]) -> Observation:
        """Read the last attempt. Whatever the endpoint sent, this returns an observation and never raises."""
        last = attempts[-1].received
        facts: dict[str, Any] = {
            "request_id": last.request_id,
            "probe_id": probe_id,
            "attempts": len(attempts),
            "latency_s": last.latency_s,
            "first_byte_s": last.first_byte_s,
            "status": last.status,
        }
        document, fault, detail = read_object(last)
        # A stream may begin with a comment.
        if fault == "not_json" and body_text(last).lstrip().startswith(("event:", "data:", ": ")):
            document, fault, detail = without_error(_from_stream(body_text(last)))
            facts["streamed"] = True
        if fault is not None:
            return Observation(**facts, answered=False, fault=fault, fault_detail=detail)
        return _answer(facts, document)


def _meant(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that a request is about, without what is stated in passing or cuts nothing off."""
    return {
        name: value
        for name, value in settings.items()
        if name not in _IN_PASSING and not (name in _NOTHING_CUT_OFF and value == _NOTHING_CUT_OFF[name])
    }


def _apart(messages: list[Message]) -> tuple[list[str], list[Message]]:
    """What is said to the system before anything else, which has a field of its own, and the rest as it is."""
    first = next((i for i, message in enumerate(messages) if message.role != "system"), len(messages))
    return [message.content for message in messages[:first]], messages[first:]


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    """A function in this API's shape; anything else is sent as it is."""
    function = tool.get("function")
    if not isinstance(function, dict):
        return tool
    told = {name: function[name] for name in ("name", "description") if name in function}
    return told | {"input_schema": function.get("parameters", {"type": "object"})}


def _from_stream(raw: str) -> dict[str, Any]:
    """The events of a stream put together into one answer, as far as they can be read.

    Each piece becomes a block of its own: read one after the other they are the same text.
    """
    document: dict[str, Any] = {}
    content: list[Any] = []
    usage: dict[str, Any] = {}
    found = False
    for line in re.split(r"[\r\n]+", raw)[:_MAX_EVENTS]:
        if not line.startswith("data:"):
            continue
        event, _ = parsed(line.removeprefix("data:"))
        if not isinstance(event, dict):
            continue
        if event.get("error"):
            return {"error": event["error"]}
        kind = event.get("type")
        message, delta, block = (event.get(name) for name in ("message", "delta", "content_block"))
        if kind == "message_start" and isinstance(message, dict):
            document |= {name: value for name, value in message.items() if name != "content"}
            usage |= _told(message.get("usage"))
            found = True
        elif kind == "content_block_start" and isinstance(block, dict):
            content.append(block)
            found = True
        elif kind == "content_block_delta" and isinstance(delta, dict):
            content.append(_piece(delta))
            found = True
        elif kind == "message_delta" and isinstance(delta, dict):
            document |= _told(delta)
            # Counts are those so far: the last ones hold.
            usage |= _told(event.get("usage"))
    return document | {"usage": usage, "content": content} if found else {}


def _piece(delta: dict[str, Any]) -> dict[str, Any]:
    """A part of a text or of reasoning as a block; of a tool's input or a signature nothing is read."""
    pieces = {"text_delta": "text", "thinking_delta": "thinking"}
    kind = delta.get("type")
    name = pieces.get(kind) if isinstance(kind, str) else None
    return {} if name is None else {"type": name, name: delta.get(name)}


def _told(fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None} if isinstance(fields, dict) else {}


def _answer(facts: dict[str, Any], document: dict[str, Any]) -> Observation:
    usage = document.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    cached, stored = (count(usage.get(f"cache_{name}_input_tokens")) for name in ("read", "creation"))
    fresh = count(usage.get("input_tokens"))
    quirks: set[str] = set()
    if cached or stored:
        quirks.add("prompt_tokens_summed")
    facts |= {
        "answer_id": answer_id(document.get("id")),
        "model_named": bounded(document.get("model")),
        "provider_named": bounded(document.get("provider")),
        # `input_tokens` are only those that were neither read from a cache nor written to one; the prompt is all three.
        "prompt_tokens": None if fresh is None else count(fresh + (cached or 0) + (stored or 0)),
        "completion_tokens": count(usage.get("output_tokens")),
        "cached_tokens": cached,
    }
    content = document.get("content")
    if not isinstance(content, list):
        return Observation(**facts, answered=False, fault="no_content", fault_detail="the answer has no content")
    blocks = [block for block in content if isinstance(block, dict)]
    texts = [block["text"] for block in blocks if block.get("type") == "text" and isinstance(block.get("text"), str)]
    text = "".join(texts)
    reasoning = [block for block in blocks if block.get("type") in _REASONING]
    shown = any(isinstance(block.get("thinking"), str) and block["thinking"] != "" for block in reasoning)
    if reasoning and not shown:
        quirks.add("hidden_thinking")
    reason, sequence = document.get("stop_reason"), document.get("stop_sequence")
    stopped = isinstance(sequence, str) and sequence != ""
    if stopped and reason == "end_turn":
        quirks.add("stop_sequence_as_end_turn")  # llama.cpp
    facts |= {
        "finish_reason": bounded(reason),
        "text": generated(text) if texts else None,
        "shows_reasoning": shown,
    }
    ended = reason == "end_turn" and not stopped and not text and not reasoning
    return Observation(
        **facts, answered=True, fault="end_of_turn" if ended else "no_logprobs",
        fault_detail="the answer carries no logprobs: this kind of API has none", quirks=sorted(quirks),
    )  # fmt: skip
