"""The lies that the front can tell, and what each does to a request, an answer or a stream; nothing here is sent."""

import codecs
import functools
import math
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from weighbridge.errors import ConfigurationError
from weighbridge.paths import data_path
from weighbridge.probes import load_pool

HONEST_TOP_LOGPROBS = 20
REASONING_TOKENS = 8
# What a host that passes over the asked length stops at; without any limit the engine fills its whole context.
OWN_MAX_TOKENS = 64
CHARACTERS_PER_TOKEN = 4

# The request fields that can be passed over or refused, each with the values that ask for nothing special.
NEUTRAL_VALUES: Mapping[str, tuple[object, ...]] = {
    "temperature": (1,),
    "top_p": (1,),
    "top_k": (0, -1),
    "min_p": (0,),
    "seed": (),
    "stop": (),
    "stop_sequences": (),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "repeat_penalty": (1,),
    "logit_bias": (),
    "n": (1,),
    "max_tokens": (),
    "max_completion_tokens": (),
    "response_format": ({"type": "text"},),
    "tools": (),
    "tool_choice": ("auto", "none"),
    "logprobs": (),
    "top_logprobs": (0,),
    "prompt_logprobs": (),
    "stream": (),
    "stream_options": (),
}
_LENGTHS = ("max_tokens", "max_completion_tokens")


@dataclass(frozen=True)
class Lies:
    """Switches of the front; the default is an honest host.

    Those about usage (but for its absence and the offset), the cache and reasoning are told in chat only.

    Attributes
    ----------
    ignored : tuple of str
        Request fields that are dropped before they reach the engine, which then does as if they were not there.
        Without its temperature an answer is drawn at 1, without its seed at random; without its length it has at
        most `OWN_MAX_TOKENS` tokens. What is left out of the other fields is up to the engine's own defaults.
    refused : tuple of str
        Request fields that are answered by status 400, with their name, when they ask for something special.
    max_temperature : float or None
        Larger temperatures are lowered to it.
    cool : float
        What an asked temperature is multiplied by; below 1 it hides the entropy that coarser weights add.
    logprobs_after_temperature : bool
        Logprobs are those of the distribution divided by the temperature.
    max_top_logprobs : int
        How many logprobs are returned at most; 0 for none.
    sentinels : bool
        The second half of each ``top_logprobs`` says -9999.
    divert_share : float
        The share of requests that the second variant answers.
    divert_each : bool
        Whether each request is sent elsewhere by a throw of its own; else the same prompt always goes the same way.
    true_for_public : bool
        The original weights under the official template answer every conversation whose user texts all stand in public
        pools of this package; the other lies are told of those answers too. Raw completions are not recognised.
    true_first : int
        They answer the first so many requests of each key too, and the first so many of those that carry none.
    usage : {"true", "none", "official", "characters"}
        What counts tokens: the engine; nobody, so that ``usage`` is absent; for the prompt, the model's official
        template, whatever is served; a quarter of the characters of the messages and of the text.
    usage_offset : int
        Added to ``usage.prompt_tokens``, and to ``usage.input_tokens`` of /v1/messages.
    stream_usage_offset : int
        Added to ``usage.prompt_tokens`` in streams, besides.
    cached : bool
        The same messages again get the stored answer, whatever else is asked; ``cached_tokens`` says so.
    remember : bool
        The same request again, whatever its seed, gets the bytes of the first answer, and nothing says so.
    reasoning : {"none", "visible", "hidden"}
        Whether the first 8 tokens of what the engine writes are called reasoning: given as ``reasoning_content``
        or kept back. Both ways they count as completion tokens, and ``max_tokens`` covers them.
    model_named : str or None
        What the answer calls the model, in place of its name.
    provider_named : str or None
        Whom the answer names as its provider, as routers do.

    Raises
    ------
    ConfigurationError
        If a number is out of its range, or a request field is not one of `NEUTRAL_VALUES`.
    """

    ignored: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    max_temperature: float | None = None
    cool: float = 1.0
    logprobs_after_temperature: bool = False
    max_top_logprobs: int = HONEST_TOP_LOGPROBS
    sentinels: bool = False
    divert_share: float = 0.0
    divert_each: bool = False
    true_for_public: bool = False
    true_first: int = 0
    usage: Literal["true", "none", "official", "characters"] = "true"
    usage_offset: int = 0
    stream_usage_offset: int = 0
    cached: bool = False
    remember: bool = False
    reasoning: Literal["none", "visible", "hidden"] = "none"
    model_named: str | None = None
    provider_named: str | None = None

    def __post_init__(self) -> None:
        for field in (*self.ignored, *self.refused):
            # A field that nobody sends would make an honest host of a lying one.
            if field not in NEUTRAL_VALUES:
                known = ", ".join(NEUTRAL_VALUES)
                raise ConfigurationError(f"the lab knows no request field {field!r}", f"Name one of {known}")
        if not 0 <= self.max_top_logprobs <= HONEST_TOP_LOGPROBS:
            raise ConfigurationError(
                f"max_top_logprobs is {self.max_top_logprobs}", f"Give a number from 0 to {HONEST_TOP_LOGPROBS}"
            )
        if not 0 <= self.divert_share <= 1:
            raise ConfigurationError(f"divert_share is {self.divert_share}", "Give a number from 0 to 1")
        if not 0 <= self.cool < math.inf:
            raise ConfigurationError(f"cool is {self.cool}", "Give a number from 0")
        if self.true_first < 0:
            raise ConfigurationError(f"true_first is {self.true_first}", "Give a number from 0")

    @property
    def sometimes_true(self) -> bool:
        """Whether the true model has to stand by."""
        return self.true_for_public or self.true_first > 0


def refused_field(lies: Lies, request: Mapping[str, Any]) -> str | None:
    """The first field of a request that this host refuses."""
    for field in lies.refused:
        value = request.get(field)
        if value is None or value is False or value in ("", [], {}):
            continue
        if value not in NEUTRAL_VALUES[field]:
            return field
    return None


def passed_on(lies: Lies, request: Mapping[str, Any]) -> dict[str, Any]:
    """The request as this host reads it."""
    read = {field: value for field, value in request.items() if field not in lies.ignored}
    if "logprobs" in lies.ignored:
        read.pop("top_logprobs", None)  # engines refuse it alone
    if "temperature" in lies.ignored:
        read["temperature"] = 1
    if "seed" in lies.ignored:
        read["seed"] = secrets.randbits(31)
    if any(field in request for field in _LENGTHS) and not any(field in read for field in _LENGTHS):
        read["max_tokens"] = OWN_MAX_TOKENS
    temperature = read.get("temperature")
    if lies.max_temperature is not None and isinstance(temperature, int | float):
        read["temperature"] = temperature = min(temperature, lies.max_temperature)
    if lies.cool != 1 and isinstance(temperature, int | float):
        read["temperature"] = temperature * lies.cool
    return read


@functools.cache
def _published_texts() -> frozenset[str]:
    """The user's texts of all public pools that the package carries."""
    folders = [folder for folder in data_path("probes").iterdir() if (folder / "pool.toml").is_file()]
    pools = [load_pool(str(folder)) for folder in folders]
    public = [probe for pool in pools if pool.description.visibility == "public" for probe in pool.probes]
    return frozenset(turn.content for probe in public for turn in probe.messages if turn.role == "user")


def is_published(request: Mapping[str, Any]) -> bool:
    """Whether a request is a conversation of which the user's texts all stand in public pools."""
    messages = request.get("messages")
    turns = [turn for turn in messages if isinstance(turn, dict)] if isinstance(messages, list) else []
    asked = [message_text(turn) for turn in turns if turn.get("role") == "user"]
    return bool(asked) and _published_texts().issuperset(asked)


def divide_by_temperature(position: dict[str, Any], temperature: float) -> None:
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


def message_text(message: Mapping[str, Any]) -> str:
    """The text of a message, whose content may come in parts; llama.cpp puts a line break between them."""
    content = message.get("content")
    if isinstance(content, list):
        return "\n".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def estimate_usage(usage: dict[str, Any], request: Mapping[str, Any], answer: Mapping[str, Any]) -> None:
    """Count tokens by the characters of the texts, without a tokenizer."""
    asked = sum(len(message_text(message)) for message in request["messages"])
    written = sum(len(message_text(choice["message"])) for choice in answer["choices"])
    usage["prompt_tokens"] = asked // CHARACTERS_PER_TOKEN
    usage["completion_tokens"] = written // CHARACTERS_PER_TOKEN


def set_reasoning_apart(choice: dict[str, Any], *, visible: bool) -> int:
    """Take the first tokens of a choice as reasoning; the number of them. Its logprobs must be there."""
    logprobs = choice.get("logprobs") or {}
    positions = logprobs.get("content") or []
    first, rest = positions[:REASONING_TOKENS], positions[REASONING_TOKENS:]
    reasoning = _text(first, "ignore")
    message = choice["message"]
    text = message["content"] or ""
    # The engine trims some texts; then the tokens are the better witness.
    message["content"] = text.removeprefix(reasoning) if text.startswith(reasoning) else _text(rest, "replace")
    if visible:
        message["reasoning_content"] = reasoning
    if positions:
        logprobs["content"] = rest
    return len(first)


def _text(positions: list[dict[str, Any]], errors: str) -> str:
    return b"".join(bytes(position["bytes"]) for position in positions).decode(errors=errors)


def chat_chunks(answer: Mapping[str, Any], *, include_usage: bool, usage_offset: int) -> Iterator[dict[str, Any]]:
    """A chat's answer as the chunks of a stream: one for each token where logprobs tell them apart."""
    named = {field: answer[field] for field in ("id", "created", "model", "provider") if field in answer}
    head = {"object": "chat.completion.chunk", **named}
    for choice in answer["choices"]:
        for delta in _deltas(choice):
            yield {**head, "choices": [{"index": choice["index"], "logprobs": None, "finish_reason": None, **delta}]}
    if include_usage and "usage" in answer:
        usage = dict(answer["usage"])
        for field in ("prompt_tokens", "total_tokens"):
            usage[field] += usage_offset
        yield {**head, "choices": [], "usage": usage}


def _deltas(choice: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What of a choice is new in each of its chunks."""
    message = choice["message"]
    yield {"delta": {"role": "assistant", "content": ""}}
    if message.get("reasoning_content"):
        yield {"delta": {"reasoning_content": message["reasoning_content"]}}
    positions = (choice.get("logprobs") or {}).get("content") or []
    for text, told in _pieces(message["content"] or "", positions):
        yield {"delta": {"content": text}, "logprobs": {"content": told} if told else None}
    yield {"delta": {}, "finish_reason": choice["finish_reason"]}


def _pieces(text: str, positions: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """A text cut where its tokens begin, as far as they are known."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    pieces = [(decoder.decode(bytes(position["bytes"])), [position]) for position in positions]
    known = "".join(piece for piece, _ in pieces)
    if not text.startswith(known):
        return [(text, positions)]
    rest = text.removeprefix(known)
    return [*pieces, (rest, [])] if rest else pieces


def message_events(answer: Mapping[str, Any], *, usage_offset: int) -> Iterator[dict[str, Any]]:
    """A message of /v1/messages as the events of a stream, each text in one piece."""
    begun = {**answer, "content": [], "stop_reason": None, "stop_sequence": None}
    if "usage" in answer:
        usage = answer["usage"]
        begun["usage"] = {**usage, "input_tokens": usage["input_tokens"] + usage_offset, "output_tokens": 0}
    yield {"type": "message_start", "message": begun}
    for index, block in enumerate(answer["content"]):
        text = block.get("text")
        yield {"type": "content_block_start", "index": index, "content_block": {**block, "text": ""} if text else block}
        if text:
            yield {"type": "content_block_delta", "index": index, "delta": {"type": "text_delta", "text": text}}
        yield {"type": "content_block_stop", "index": index}
    ended: dict[str, Any] = {"delta": {field: answer[field] for field in ("stop_reason", "stop_sequence")}}
    if "usage" in answer:
        ended["usage"] = {"output_tokens": answer["usage"]["output_tokens"]}
    yield {"type": "message_delta", **ended}
    yield {"type": "message_stop"}
