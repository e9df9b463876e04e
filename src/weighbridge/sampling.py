"""Whether sampling parameters, repeats, streams and tools are treated as asked: a fixed list of cheap requests.

Every request changes one thing about one short answer, so that the text alone tells what became of it; where logprobs are
returned, the tokens that were drawn are held against them as well.
"""

from collections.abc import Mapping

from weighbridge.records import Message, PlannedRequest, Probe
from weighbridge.reference.bundle import Bundle

TEXT_TOKENS = 8
LONGER_TOKENS = 16
HOT_TOKENS = 48
NARROW_TOKENS = 32
COLD, WARM, HOT = 0.0, 1.0, 2.0
TINY_NUCLEUS = 0.01
STOP = "e"  # no sentence goes on for long without it
BIAS = 100
PENALTY = 2.0
# The request of the pool `prompt-structure` whose tokens are counted without tools.
_UNTOOLED = "Name a fruit."

_STORY = "Write the first sentence of a story about a lighthouse keeper who finds a letter."
_NIGHT = "Explain in one sentence why the sky is dark at night."
_DRAWER = "List a few things that people keep in a kitchen drawer."
_RED = "Repeat the word red, separated by spaces, and write nothing else: red red red red red red red red"
_TOOL = {
    "type": "function",
    "function": {
        "name": "weather_at",
        "description": "The weather at a place.",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
    },
}
_BIASED_TO = (b" blue", b"blue", b"A")

# Those that are asked only of an endpoint that has shown, or counted, tokens of reasoning.
EFFORTS = ("effort-low", "effort-high")
# Each of these repeats the context of another one, or changes what is drawn from it: no new draw from the reported logprobs.
DISTINCT_COLD = ("cold", "cold-nonce", "cold-night", "cold-drawer", "red")


def sampling_requests(bundle: Bundle | None, nonce: str) -> list[PlannedRequest]:
    """All requests, in order.

    Parameters
    ----------
    bundle : Bundle or None
        Whose vocabulary names a token that can be asked for by its number.
    nonce : str
        Of this run: a text that no cache can have seen.
    """
    # Servers cut off what is unlikely by settings of their own; those that know these names are told not to.
    whole: dict[str, object] = {"top_p": 1, "top_k": -1, "min_p": 0}
    cold: dict[str, object] = {"temperature": COLD}
    requests = [
        _request("cold", "temperature 0", _STORY, cold),
        _request("cold-again", "the same again, with another seed", _STORY, cold | {"seed": 2}),
        _request("cold-nonce", "temperature 0 after a text that nobody has seen", f"{_STORY} ({nonce})", cold),
        _request("stream", "the same in a stream", _STORY, cold | {"stream": True, "stream_options": {"include_usage": True}}),
        _request("cold-night", "temperature 0, another text", _NIGHT, cold, LONGER_TOKENS),
        _request("cold-drawer", "temperature 0, a third text", _DRAWER, cold, LONGER_TOKENS),
        _request("warm", "temperature 1", _STORY, {"temperature": WARM, "seed": 1}),
        _request("warm-again", "the same again, with the same seed", _STORY, {"temperature": WARM, "seed": 1}),
        _request("warm-new", "the same with another seed", _STORY, {"temperature": WARM, "seed": 11}),
        _request("warm-other", "the same with a third seed, and nothing cut off", _STORY, whole | {"temperature": WARM, "seed": 3}, LONGER_TOKENS),
        _request("hot", "temperature 2", _STORY, whole | {"temperature": HOT, "seed": 4}, HOT_TOKENS),
        _request("hot-drawer", "the same of another text", _DRAWER, whole | {"temperature": HOT, "seed": 10}, HOT_TOKENS),
        _request("top-p", "only the likeliest tokens, by top_p", _STORY, whole | {"temperature": WARM, "top_p": TINY_NUCLEUS, "seed": 5}, NARROW_TOKENS),
        _request("top-k", "only the likeliest token, by top_k", _STORY, {"temperature": WARM, "top_k": 1, "seed": 6}),
        _request("min-p", "only the likeliest token, by min_p", _STORY, {"temperature": WARM, "min_p": 1.0, "seed": 7}),
        _request("red", "a text that repeats itself", _RED, cold, LONGER_TOKENS),
        _request("frequency", "the same with a frequency penalty", _RED, cold | {"frequency_penalty": PENALTY}, LONGER_TOKENS),
        _request("presence", "the same with a presence penalty", _RED, cold | {"presence_penalty": PENALTY}, LONGER_TOKENS),
        _request("stop", "a stop sequence", _STORY, cold | {"stop": [STOP]}),
        _request("two", "two choices", _STORY, {"temperature": WARM, "n": 2, "seed": 8}, 1),
        _request("tools", "a tool", _UNTOOLED, cold, 1, tools=True),
    ]  # fmt: skip
    token = _token_to_bias(bundle)
    if token is not None:
        settings = {"temperature": WARM, "logit_bias": {str(token): BIAS}, "seed": 9}
        requests.append(_request("bias", "one token made certain", _STORY, settings, 1))
    for name in EFFORTS:
        effort = name.removeprefix("effort-")
        requests.append(_request(name, f"{effort} effort of reasoning", _NIGHT, {"reasoning_effort": effort}, 64))
    return requests


def _token_to_bias(bundle: Bundle | None) -> int | None:
    if bundle is None:
        return None
    ids = {token: i for i, token in enumerate(bundle.vocabulary)}
    return next((ids[wanted] for wanted in _BIASED_TO if wanted in ids), None)


def _request(
    name: str, purpose: str, text: str, settings: Mapping[str, object], max_tokens: int = TEXT_TOKENS, *, tools: bool = False
) -> PlannedRequest:  # fmt: skip
    probe = Probe(
        id=f"sampling-{name}",
        purpose=purpose,
        messages=[Message(role="user", content=text)],
        tools=[_TOOL] if tools else None,
    )
    return PlannedRequest(request_id=f"sampling-{name}", probe=probe, max_tokens=max_tokens, settings=dict(settings))
