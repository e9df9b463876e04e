"""What an endpoint exposes and what its logprobs mean: a few cheap calls before any statistic.

The calls are fixed. Each one is asked only where the ones before it leave the question open:

==========================  =====================================================================
``capability-top-20``       20 logprobs at temperature 1
``capability-top-5``        5 logprobs, if 20 were refused or not returned
``capability-plain``        no logprobs, if neither gave any
``capability-temperature``  temperature 2 on the first prompt, if there are logprobs
==========================  =====================================================================
"""

import numpy as np

from weighbridge.records import RAW, Capability, Message, Observation, PlannedRequest, Probe
from weighbridge.stats.grid import written_in_bfloat16

_QUESTION = (
    "A ferry leaves the harbour at nine and returns at noon. Describe in one sentence what the crew does meanwhile."
)
_SLOPE_TOLERANCE = 0.1

TOP_20, TOP_5, PLAIN, TEMPERATURE = (
    "capability-top-20",
    "capability-top-5",
    "capability-plain",
    "capability-temperature",
)
# How requests begin that are asked for their text alone, at temperature 0 and at 1.
TEXT, DRAWN, WHOLE = "text-", "drawn-", "whole-"
PURPOSES = {
    TOP_20: "does it return 20 logprobs",
    TOP_5: "does it return 5 logprobs",
    PLAIN: "does it answer at all",
    TEMPERATURE: "are logprobs taken before or after the temperature",
}


def capability_requests() -> list[PlannedRequest]:
    """All capability calls, in order."""
    message = [Message(role="user", content=_QUESTION)]
    return [
        PlannedRequest(request_id=name, probe=Probe(id=name, purpose=purpose, messages=message))
        for name, purpose in PURPOSES.items()
    ]


def asks_for_text(request_id: str) -> bool:
    """Whether a request is one of those at temperature 0 for endpoints without logprobs, by chat or by raw completions."""
    return request_id.removeprefix(RAW).startswith(TEXT)


def sampling_of(request: PlannedRequest, capability: Capability) -> tuple[float, int]:
    """The temperature and the number of logprobs that a request asks for."""
    request_id = request.request_id
    if asks_for_text(request_id) or request_id.startswith(WHOLE):
        return 0.0, 0
    if request_id.startswith(DRAWN):
        return 1.0, 0
    if request.max_tokens > 1:
        return 0.0, capability.top_logprobs
    if request_id == TOP_20:
        return 1.0, 20
    if request_id == TOP_5:
        return 1.0, 5
    if request_id == PLAIN:
        return 1.0, 0
    return (2.0 if request_id == TEMPERATURE else 1.0), capability.top_logprobs


def next_capability_request(observations: dict[str, Observation], *, logprobs: bool = True) -> str | None:
    """The next call that is needed, or None when the question is answered; `logprobs` says whether the kind of API has any."""
    if not logprobs:
        return None if PLAIN in observations else PLAIN
    if TOP_20 not in observations:
        return TOP_20
    first = observations[TOP_20]
    # An endpoint that refuses everybody is not asked three times; one that refuses the parameter is.
    if first.top is None and first.fault != "end_of_turn":
        if not first.answered and first.fault not in ("http_400", "http_422", "error_object"):
            return None
        if TOP_5 not in observations:
            return TOP_5
        if observations[TOP_5].top is None:
            return PLAIN if PLAIN not in observations else None
    return None if TEMPERATURE in observations else TEMPERATURE


def read_capability(observations: dict[str, Observation]) -> Capability:
    """Conclude from the calls that were made."""
    observations = {name: o for name, o in observations.items() if name in PURPOSES}
    calls = [observations[name] for name in (TOP_20, TOP_5, PLAIN) if name in observations]
    answered = [call for call in calls if call.answered]
    refused = None
    if calls and not answered:
        refused = f"{calls[-1].fault}: {calls[-1].fault_detail or 'no explanation'}"
    # One entry more than was asked for is the drawn token, put at the end of the list.
    lists = [
        min(len(call.top) + call.nameless, 5 if call.request_id == TOP_5 else 20) for call in calls if call.top is not None
    ]  # fmt: skip
    # A first answer that is only the end of a turn carries no list, yet says nothing against logprobs.
    top = (
        lists[0] if lists else (20 if calls and calls[0].fault == "end_of_turn" and calls[0].request_id != PLAIN else 0)
    )
    slope = _temperature_slope(observations)
    regime: str = "unknown"
    if slope is not None:
        regime = "other"
        if abs(slope - 1) <= _SLOPE_TOLERANCE:
            regime = "before_temperature"
        elif abs(slope - 0.5) <= _SLOPE_TOLERANCE:
            regime = "after_temperature"
    return Capability.model_validate(
        {
            "reachable": bool(answered),
            "refused": refused,
            "top_logprobs": top,
            "temperature_regime": regime,
            "temperature_slope": slope,
            "logprobs_in_bfloat16": written_in_bfloat16(
                np.array([t.logprob_nats for call in observations.values() for t in call.top or []])
            ),
            "usage_reported": any(call.prompt_tokens is not None for call in answered),
            "model_named": answered[0].model_named if answered else None,
            "fingerprint": answered[0].fingerprint if answered else None,
            "quirks": sorted({quirk for call in calls for quirk in call.quirks}),
        }
    )


def _temperature_slope(observations: dict[str, Observation]) -> float | None:
    """Least-squares slope of the centred logprobs at temperature 2 on those at temperature 1."""
    cold = observations.get(TOP_20)
    cold = cold if cold is not None and cold.top is not None else observations.get(TOP_5)
    hot = observations.get(TEMPERATURE)
    if cold is None or cold.top is None or hot is None or hot.top is None:
        return None
    hot_of = {token.bytes_hex: token.logprob_nats for token in hot.top}
    pairs = np.array([(t.logprob_nats, hot_of[t.bytes_hex]) for t in cold.top if t.bytes_hex in hot_of])
    if len(pairs) < 3:
        return None
    x, y = (pairs - pairs.mean(axis=0)).T
    return float(x @ y / (x @ x)) if x @ x > 1e-9 else None
