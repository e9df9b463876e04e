"""OpenAI-style chat completions, and completions of token ids."""

import math
import re
import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from weighbridge.dialects.reading import (
    MAX_TEXT,
    answer_id,
    body_text,
    bounded,
    count,
    generated,
    parsed,
    read_object,
    without_error,
)
from weighbridge.records import Endpoint, Exchange, Observation, PlannedRequest, Position, TopToken

NAMELESS = ""  # stands for a special token, which servers list without text and without bytes
_MOST_NAMELESS = 3  # a list with more of them does not name its tokens at all
SMALLEST_LOG_PROBABILITY = -600.0  # a probability of 0 says that nothing is known
SENTINEL_NATS = -9998.0  # servers write -9999 for "outside the list"; no logprob of a listed token is that small
# The replacement character, and how tokenizers write a space, a newline and a tab in their inner alphabets.
_NOT_A_NAME = tuple(mark.encode() for mark in "\ufffdĠĊĉ▁")
_MAX_TOP = 10_000
_MAX_POSITIONS = 4096
_MAX_EVENTS = 100_000
# The precisions that OpenRouter has words for, of those that a provider may say it serves.
_QUANTIZATIONS = ("int4", "int8", "fp4", "mxfp4", "nvfp4", "fp6", "fp8", "mxfp8", "fp16", "bf16", "fp32")


class OpenAIChat:
    """POST /chat/completions, and /completions for what is sent as token ids."""

    gives_logprobs: bool = True
    key_header: str = "authorization"
    headers: Mapping[str, str] = MappingProxyType({})

    def path(self, request: PlannedRequest) -> str:
        """Where a request is sent."""
        return "/completions" if request.raw else "/chat/completions"

    def asks(self, request: PlannedRequest) -> bool:  # noqa: ARG002 - what is planned is planned in this API's words
        """Whether a request is about something that this API has."""
        return True

    def body(
        self,
        endpoint: Endpoint,
        request: PlannedRequest,
        *,
        temperature: float,
        top_logprobs: int,
        seed: int,
        prompt_ids: list[int],
    ) -> dict[str, Any]:
        """The body of a request. What is not stated here, a server fills in as it likes."""
        body: dict[str, Any] = {
            "model": endpoint.model,
            "max_tokens": request.max_tokens,
            "n": 1,
            "temperature": temperature,
            "top_p": 1,
            "presence_penalty": 0,
            "frequency_penalty": 0,
            "seed": seed,
            "stream": False,
        }
        if request.raw:
            body["prompt"] = prompt_ids
            asked = {"logprobs": top_logprobs} if top_logprobs > 0 else {}
            return body | asked | endpoint.extra_body | pinned(endpoint)
        body["messages"] = [message.model_dump() for message in request.probe.messages]
        if request.probe.tools is not None:
            body["tools"] = request.probe.tools
        if top_logprobs > 0:
            body |= {"logprobs": True, "top_logprobs": top_logprobs}
        if request.forced:
            # As vLLM and SGLang name them: the last message is gone on with, and the prompt's own logprobs are returned.
            body |= {"prompt_logprobs": top_logprobs, "continue_final_message": True, "add_generation_prompt": False}
        # What a request is about is asked whatever the user adds to every one.
        return body | endpoint.extra_body | request.settings | pinned(endpoint)

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
            "raw": "messages" not in attempts[-1].sent.body,
        }
        document, fault, detail = read_object(last)
        # A stream may begin with a comment, as OpenRouter's do.
        if fault == "not_json" and body_text(last).lstrip().startswith(("data:", ": ")):
            document, fault, detail = without_error(_from_stream(body_text(last)))
            facts["streamed"] = True
        if fault is not None:
            return Observation(**facts, answered=False, fault=fault, fault_detail=detail)
        return _answer(facts, document, attempts[-1].sent.body)


def pinned(endpoint: Endpoint) -> dict[str, Any]:
    """What tells a router to ask one provider, to ask no other one in its place, and to drop no parameter."""
    if endpoint.provider is None:
        return {}
    provider: dict[str, Any] = {"only": [endpoint.provider], "allow_fallbacks": False, "require_parameters": True}
    if endpoint.claimed_precision in _QUANTIZATIONS:
        provider["quantizations"] = [endpoint.claimed_precision]
    return {"provider": provider}


def _from_stream(raw: str) -> dict[str, Any]:
    """The events of a stream put together into one answer, as far as they can be read."""
    document: dict[str, Any] = {"choices": []}
    texts: list[str] = []
    content: list[Any] = []
    choice: dict[str, Any] = {}
    found = False
    for line in re.split(r"[\r\n]+", raw)[:_MAX_EVENTS]:
        if not line.startswith("data:") or line.removeprefix("data:").strip() == "[DONE]":
            continue
        event, _ = parsed(line.removeprefix("data:"))
        if not isinstance(event, dict):
            continue
        if event.get("error"):
            return {"error": event["error"]}
        document |= {k: v for k, v in event.items() if k != "choices" and v is not None}
        choices = event.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            continue
        if choices[0].get("finish_reason") is not None:
            choice["finish_reason"] = choices[0]["finish_reason"]
        delta, logprobs = choices[0].get("delta"), choices[0].get("logprobs")
        if isinstance(delta, dict) and isinstance(delta.get("content"), str):
            texts.append(delta["content"])
        if isinstance(logprobs, dict) and isinstance(logprobs.get("content"), list):
            content += logprobs["content"]
        found = True
    if found:
        document["choices"] = [choice | {"message": {"content": "".join(texts)}, "logprobs": {"content": content}}]
    return document


def _answer(facts: dict[str, Any], document: dict[str, Any], asked: dict[str, Any]) -> Observation:
    usage = document.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    details, spent = usage.get("prompt_tokens_details"), usage.get("completion_tokens_details")
    facts |= {
        "reasoning_tokens": count(spent.get("reasoning_tokens")) if isinstance(spent, dict) else None,
        "answer_id": answer_id(document.get("id")),
        "model_named": bounded(document.get("model")),
        "provider_named": bounded(document.get("provider")),
        "fingerprint": bounded(document.get("system_fingerprint")),
        "prompt_tokens": count(usage.get("prompt_tokens")),
        "completion_tokens": count(usage.get("completion_tokens")),
        "cached_tokens": count(details.get("cached_tokens")) if isinstance(details, dict) else None,
    }
    choices = document.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        return Observation(**facts, answered=False, fault="no_choices", fault_detail="the answer has no choices")
    choice = choices[0]
    message = choice.get("message")
    message = message if isinstance(message, dict) else {"content": choice.get("text")}
    text = message.get("content")
    facts |= {
        "finish_reason": bounded(choice.get("finish_reason")),
        "choices": len(choices),
        "text": generated(text) if isinstance(text, str) else None,
        "shows_reasoning": any(
            isinstance(message.get(name), str) and message[name] != "" for name in ("reasoning_content", "reasoning")
        ),
    }
    logprobs = choice.get("logprobs")
    content = _legacy_lists(logprobs) if isinstance(logprobs, dict) else None
    if not isinstance(content, list) or not content or not isinstance(content[0], dict):
        empty = not text
        # Where the only token is the end of the turn, llama.cpp leaves the logprobs out.
        fault = "end_of_turn" if empty and facts["finish_reason"] is not None else "no_logprobs"
        return Observation(**facts, answered=True, fault=fault, fault_detail="the answer carries no logprobs")
    top, quirks, fault_detail = _top_tokens(content[0].get("top_logprobs"))
    facts["nameless"] = _nameless(content[0].get("top_logprobs"), top)
    drawn_bytes, drawn_nats = _token_bytes(content[0], set()), _nats(content[0].get("logprob"))
    if drawn_bytes is not None and drawn_nats is not None:
        facts["drawn"] = TopToken(bytes_hex=drawn_bytes, logprob_nats=drawn_nats)
    positions: list[Position] | None = None
    if fault_detail is None and asked.get("prompt_logprobs"):
        positions, quirks, fault_detail = _positions(_prompt_lists(document, choice), quirks)
    elif fault_detail is None and (asked.get("max_tokens") or 1) > 1:
        positions, quirks, fault_detail = _positions(content[: asked["max_tokens"]], quirks)
    if fault_detail is not None:
        return Observation(**facts, answered=True, fault="bad_logprobs", fault_detail=fault_detail, quirks=quirks)
    if not top:
        return Observation(
            **facts,
            answered=True,
            fault="no_logprobs",
            fault_detail="the list of logprobs is empty, or no token of it has a name that can be understood",
            quirks=quirks,
        )
    return Observation(**facts, answered=True, top=top, positions=positions, quirks=quirks)


def _legacy_lists(logprobs: dict[str, Any]) -> Any:
    """The lists of an answer, in the shape that chat gives them; completions name each token once and list texts."""
    tokens, values, tops = (logprobs.get(name) for name in ("tokens", "token_logprobs", "top_logprobs"))
    if logprobs.get("content") is not None or not isinstance(tokens, list) or not isinstance(tops, list):
        return logprobs.get("content")
    values = values if isinstance(values, list) else []
    lists = []
    for i, (token, top) in enumerate(zip(tokens[:_MAX_POSITIONS], tops[:_MAX_POSITIONS], strict=False)):
        entries = top.items() if isinstance(top, dict) else []
        lists.append({
            "token": token, "logprob": values[i] if i < len(values) else None,
            "top_logprobs": [{"token": name, "logprob": value} for name, value in entries],
        })  # fmt: skip
    return lists


def _nats(value: Any) -> float | None:
    """A logprob that is one, else None."""
    usable = isinstance(value, int | float) and not isinstance(value, bool) and SENTINEL_NATS < value <= 1e-4
    return float(value) if usable else None


def _prompt_lists(document: dict[str, Any], choice: dict[str, Any]) -> list[Any]:
    """The prompt's logprobs in vLLM's shape, one entry for each token; some servers put them into the choice."""
    rows = document.get("prompt_logprobs") or choice.get("prompt_logprobs")
    if not isinstance(rows, list):
        return []
    lists: list[Any] = []
    for row in rows[:_MAX_POSITIONS]:
        entries = list(row.values()) if isinstance(row, dict) else []
        named = [
            {"token": entry.get("decoded_token"), "logprob": entry.get("logprob")} if isinstance(entry, dict) else entry
            for entry in entries
        ]
        lists.append({"top_logprobs": named})
    return lists


def _positions(entries: list[Any], quirks: list[str]) -> tuple[list[Position], list[str], str | None]:
    """One list for each position, empty where there is none."""
    found, met = [], set(quirks)
    for entry in entries[:_MAX_POSITIONS]:
        if not isinstance(entry, dict):
            return [], sorted(met), "an entry of the logprobs is not an object"
        top, more, fault = _top_tokens(entry.get("top_logprobs"))
        if fault is not None:
            return [], sorted(met | set(more)), fault
        met |= set(more)
        found.append(Position(bytes_hex=_token_bytes(entry, set()), logprob_nats=_nats(entry.get("logprob")), top=top))
    return found, sorted(met), None


def _top_tokens(entries: Any) -> tuple[list[TopToken], list[str], str | None]:
    """The usable entries, largest first; the quirks met; and why the list cannot be used, if it cannot."""
    if not isinstance(entries, list):
        return [], [], None
    quirks: set[str] = set()
    found: dict[str, float] = {}
    nameless = 0
    if _are_probabilities(entries[:_MAX_TOP]):
        quirks.add("probability_as_logprob")
        entries = [entry | {"logprob": math.log(max(entry["logprob"], 1e-300))} for entry in entries[:_MAX_TOP]]
        entries = [entry for entry in entries if entry["logprob"] > SMALLEST_LOG_PROBABILITY]
    for entry in entries[:_MAX_TOP]:
        if not isinstance(entry, dict):
            return [], sorted(quirks), "an entry of top_logprobs is not an object"
        logprob = entry.get("logprob")
        if isinstance(logprob, bool) or not isinstance(logprob, int | float) or not abs(logprob) <= sys.float_info.max:
            return [], sorted(quirks), "a logprob is not a finite number"
        if logprob > 1e-4:
            return [], sorted(quirks), "a logprob is positive"
        if logprob <= SENTINEL_NATS:
            quirks.add("sentinel")
            continue
        token = _token_bytes(entry, quirks)
        if token is None:
            quirks.add("token_without_bytes")
            continue
        if token == NAMELESS:
            quirks.add("token_without_bytes")
            nameless += 1
            found[token] = max(float(logprob), found.get(token, -math.inf))
            continue
        if token in found:
            quirks.add("duplicate_token")
            continue
        found[token] = float(logprob)
    if nameless > _MOST_NAMELESS:
        found.pop(NAMELESS)
    if sum(math.exp(value) for value in found.values()) > 1.001:
        return [], sorted(quirks), "the listed probabilities sum to more than 1"
    ordered = sorted(found.items(), key=lambda item: (-item[1], item[0]))
    return [TopToken(bytes_hex=token, logprob_nats=value) for token, value in ordered], sorted(quirks), None


def _nameless(entries: Any, top: list[TopToken]) -> int:
    """How many entries stand for special tokens, without text and without bytes, and are not in the list that is used."""
    listed = [e for e in entries[:_MAX_TOP] if isinstance(e, dict)] if isinstance(entries, list) else []
    special = sum(1 for e in listed if e.get("token") == "" and not e.get("bytes"))
    return max(0, special - sum(token.bytes_hex == NAMELESS for token in top))


def _are_probabilities(entries: list[Any]) -> bool:
    """Whether a list gives probabilities where logprobs belong: all between 0 and 1, some above 0, together at most 1."""
    values = [entry.get("logprob") if isinstance(entry, dict) else None for entry in entries]
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    fits = len(numbers) == len(values) > 0 and all(0 <= v <= 1 for v in numbers)
    return fits and max(numbers) > 1e-4 and sum(numbers) <= 1.001


def _token_bytes(entry: dict[str, Any], quirks: set[str]) -> str | None:
    """The token's bytes as hexadecimal digits: from ``bytes``, else from ``token`` where that is unambiguous.

    `NAMELESS` where both are empty. ``None`` where they cannot be understood: a part of a character that was shown
    as a replacement character, a number in place of a name, or the inner alphabet of a tokenizer (``Ġthe``).
    """
    text, listed = entry.get("token"), entry.get("bytes")
    if isinstance(text, str) and text.startswith("token_id:"):
        return None
    if isinstance(listed, list) and listed:
        if len(listed) > MAX_TEXT or not all(
            isinstance(b, int) and not isinstance(b, bool) and 0 <= b <= 255 for b in listed
        ):
            return None
        raw = bytes(listed)
    elif text == "":
        return NAMELESS
    elif isinstance(text, str) and len(text) <= MAX_TEXT:
        try:
            raw = text.encode("utf-8")
        except UnicodeEncodeError:
            return None
    else:
        return None
    if any(mark in raw for mark in _NOT_A_NAME):
        return None
    if not (isinstance(listed, list) and listed):
        quirks.add("bytes_absent")
    return raw.hex()
