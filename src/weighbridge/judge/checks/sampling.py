"""Is the sampling ours? The tokens that were drawn, against the endpoint's own logprobs and against the temperature asked for."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special

from weighbridge.judge.case import Case
from weighbridge.judge.checks.parameters import is_cold_text, treatments
from weighbridge.records import Effect, Finding, Observation, TopToken
from weighbridge.sampling import DISTINCT_COLD, HOT
from weighbridge.stats.draws import (
    at_temperature,
    cell_logprobs,
    flip_log_e,
    log_likelihood,
    tells,
    temperature_interval,
    truncated_log_likelihood,
)

Floats = NDArray[np.float64]
# A host that keeps text and logprobs apart may compute them twice, with the noise of two kernels: a lead below this is none.
SMALLEST_LEAD_NATS = 0.25
HONEST_FLIPS = 0.002
FLIP_SHARES = (0.05, 0.15, 0.4)
# The largest share of the likeliest token's probability below which servers leave tokens out by themselves (llama.cpp: 0.05).
MOST_CUT = 0.1
OTHER_TEMPERATURES = (0.05, 0.5, 0.7, 1.4, 2.0)
DROP_NATS = 4.0  # of the log-likelihood: beyond it a temperature is not what was used
MIN_DRAWS = 4
KNOWN_WITHIN = 6.0  # a wider interval of a temperature says nothing
LOG10 = float(np.log(10))


@dataclass(frozen=True)
class Draws:
    """Tokens that were drawn: logprobs of the cells of each list, the cell that was drawn, and by how much the likeliest leads it."""

    cells: Floats
    drawn: NDArray[np.int64]
    leads: Floats

    @property
    def count(self) -> int:
        """How many there are."""
        return int(self.drawn.size)


def check_sampling(case: Case) -> Finding:
    """Hold what was drawn against what was said of it, at temperatures 0, 1 and 2."""
    policy = case.plan.policy
    cold = draws_of(_positions(case, DISTINCT_COLD))
    # What a server cuts off by itself it cuts off from these, but not from those for which it was told not to. Where every request gets
    # the same random numbers, first tokens of many requests are one draw.
    warm = draws_of(
        [*_first_tokens(case.answers), *_positions(case, ("warm", "warm-new"))]
        if _draws_anew(case)
        else _positions(case, ("warm",))
    )
    whole = draws_of(_positions(case, ("warm-other",)))
    hot = draws_of(_positions(case, ("hot", "hot-drawer")))
    details: dict[str, Any] = {
        "drawn_at_temperature_0": cold.count,
        "drawn_at_temperature_1": warm.count + whole.count,
        "regime": case.capability.temperature_regime,
    }
    if not case.sampling:
        return _finding(
            "inconclusive",
            "Whether sampling parameters are honoured was not asked",
            details=details,
            to_resolve="Raise --max-requests",
        )
    if warm.count < MIN_DRAWS and cold.count < MIN_DRAWS:
        return _from_texts(case, details)
    effects: list[Effect] = []
    flips = int((cold.leads > _least_lead(case)).sum())
    log_flips = flip_log_e(flips, cold.count, honest_share=HONEST_FLIPS, shares=FLIP_SHARES) if cold.count else 0.0
    gains = _log_gains(warm) + _log_gains(whole)
    log_other = float(special.logsumexp(gains) - np.log(gains.size))
    details |= {"not_the_likeliest_at_0": flips, "log10_e_at_0": log_flips / LOG10, "log10_e_at_1": log_other / LOG10}
    level = float(np.log(policy.differs_e_value))
    repeats = is_cold_text(case, "cold-again")
    if max(log_flips, log_other) >= level:
        return _not_as_said(case, cold, warm, repeats, details, max(log_flips, log_other))
    if hot.count >= MIN_DRAWS and _leaves_nothing_out(case):
        estimate, low, high = temperature_interval(hot.cells, hot.drawn, drop_nats=DROP_NATS)
        asked = HOT if case.capability.temperature_regime == "before_temperature" else 1.0
        if high < KNOWN_WITHIN * low:
            effects.append(_temperature(HOT, estimate, low, high, HOT / asked))
        if high < asked and case.capability.temperature_regime == "before_temperature":
            what = "as at 1: it is ignored" if low <= 1 <= high else f"as at about {estimate:.2g}: it is clamped"
            return _finding(
                "inconsistent",
                f"At temperature 2 tokens are drawn {what} ({hot.count} tokens)",
                cause="sampling",
                effects=effects,
                details=details,
            )
    nucleus = _nucleus_ignored(case)
    if nucleus is not None:
        return _finding("inconsistent", nucleus, cause="sampling", effects=effects, details=details)
    texts = f"{cold.count} tokens at temperature 0 are the likeliest ones by the endpoint's own logprobs, and {warm.count + whole.count} at temperature 1 are drawn as these say"
    if cold.count < MIN_DRAWS:
        return _finding(
            "inconclusive",
            f"{warm.count} tokens at temperature 1 are drawn as the endpoint's own logprobs say; temperature 0 was not seen",
            effects=effects,
            details=details,
            to_resolve="Raise --max-requests",
        )
    return _finding("consistent", texts, effects=effects, details=details)


def draws_of(positions: Iterable[tuple[TopToken | None, list[TopToken]]]) -> Draws:
    """Put drawn tokens and the lists that they stand in side by side; what is not told counts for nothing."""
    found = [(drawn, top) for drawn, top in positions if drawn is not None and len(top) > 1]
    width = max((len(top) for _, top in found), default=1)
    listed = np.full((len(found), width), np.nan)
    at = np.full(len(found), width, np.int64)
    leads = np.zeros(len(found))
    for i, (drawn, top) in enumerate(found):
        listed[i, : len(top)] = [token.logprob_nats for token in top]
        names = [token.bytes_hex for token in top]
        if drawn.bytes_hex in names:
            at[i] = names.index(drawn.bytes_hex)
        leads[i] = top[0].logprob_nats - (
            top[at[i]].logprob_nats if at[i] < width else min(drawn.logprob_nats, top[-1].logprob_nats)
        )
    return Draws(cell_logprobs(listed), at, leads)


def _positions(case: Case, names: Iterable[str]) -> list[tuple[TopToken | None, list[TopToken]]]:
    """Every position of some texts.

    Left out are a token without a name, which is a part of a character, and a place where the likeliest token has been there
    before: a penalty on repeating, which some servers apply by themselves, may have passed it over. Whether it did must not decide: what is
    left has to be a draw like any other.
    """
    out: list[tuple[TopToken | None, list[TopToken]]] = []
    asked = {r.probe.id.removeprefix("sampling-"): r.probe for r in case.plan.sampling_requests}
    for name in names:
        observation = case.sampling.get(name)
        before = " ".join(message.content for message in asked[name].messages).encode() if name in asked else b""
        for position in (observation.positions or []) if observation is not None else []:
            known = position.bytes_hex is not None and position.logprob_nats is not None
            token = TopToken(bytes_hex=position.bytes_hex or "", logprob_nats=position.logprob_nats or 0.0)
            named = known and position.bytes_hex != ""
            likeliest = bytes.fromhex(position.top[0].bytes_hex) if position.top else b""
            if likeliest not in before:
                out.append((token if named else None, position.top))
            before += bytes.fromhex(token.bytes_hex)
    return out


def _first_tokens(answers: list[Observation]) -> list[tuple[TopToken | None, list[TopToken]]]:
    return [
        (o.drawn if o.drawn is not None and o.drawn.bytes_hex else None, o.top or [])
        for o in answers
        if o.positions is None
    ]


def _draws_anew(case: Case) -> bool:
    """Whether two requests that differ in their seed alone gave two texts."""
    one, other = (case.sampling.get(name) for name in ("warm", "warm-new"))
    return one is not None and other is not None and bool(one.text) and bool(other.text) and one.text != other.text


def _leaves_nothing_out(case: Case) -> bool:
    """Whether a host that was told to leave nothing out knows the names by which it was.

    They are not OpenAI's. A host that does not know them leaves out what it always does, and at temperature 2 that looks as a lower one.
    """
    found = treatments(case)
    return found.get("top_k") == found.get("min_p") == "honoured"


def _least_lead(case: Case) -> float:
    """The lead of another token that counts: beyond ties on the endpoint's grid."""
    grid = case.evidence.grid_nats if case.evidence is not None else 0.0
    return max(SMALLEST_LEAD_NATS, 2 * grid)


def _log_gains(warm: Draws) -> Floats:
    """Log e-values against "these tokens are drawn from the reported distributions", each of them betting on another temperature.

    Servers cut off what is unlikely unless they are told not to, so the null is the likeliest way of doing so.
    """
    out = np.zeros(len(OTHER_TEMPERATURES))
    for i, temperature in enumerate(OTHER_TEMPERATURES if warm.count else ()):
        other = at_temperature(warm.cells, temperature)
        bet = tells(warm.cells, other, most_cut=MOST_CUT)
        own = truncated_log_likelihood(warm.cells[bet], warm.drawn[bet], most_cut=MOST_CUT)
        out[i] = float((log_likelihood(other[bet], warm.drawn[bet]) - own).sum())
    return out


def _not_as_said(
    case: Case, cold: Draws, warm: Draws, repeats: bool | None, details: dict[str, Any], log_e: float
) -> Finding:
    """What is drawn is not what the logprobs say: another temperature, or something else that writes the text."""
    common: dict[str, Any] = {"details": details, "log10_e_value": log_e / LOG10}
    estimate, low, high = (
        temperature_interval(cold.cells, cold.drawn, drop_nats=DROP_NATS) if cold.count else (0.0, 0.0, 0.0)
    )
    flips = int((cold.leads > _least_lead(case)).sum())
    if flips and repeats:
        return _finding(
            "inconsistent", f"At temperature 0 the same text comes twice, and {flips} of {cold.count} of its tokens are not the likeliest by the logprobs that come with it: text and logprobs are not of one model",
            cause="route", to_resolve="Ask the host what computes the logprobs", **common,
        )  # fmt: skip
    if flips:
        what = "as at 1: it is ignored" if low <= 1 <= high else f"as at about {estimate:.2g}"
        return _finding(
            "inconsistent", f"At temperature 0 tokens are drawn {what} ({flips} of {cold.count} are not the likeliest by the endpoint's own logprobs)",
            cause="sampling", effects=[_temperature(0, estimate, low, high)], **common,
        )  # fmt: skip
    estimate, low, high = temperature_interval(warm.cells, warm.drawn, drop_nats=DROP_NATS)
    effect = _temperature(1, estimate, low, high)
    return _finding(
        "inconsistent", f"At temperature 1 tokens are drawn as at about {estimate:.2g} by the endpoint's own logprobs ({warm.count} tokens)",
        cause="sampling", effects=[effect], **common,
    )  # fmt: skip


def _temperature(asked: float, estimate: float, low: float, high: float, factor: float = 1.0) -> Effect:
    name = f"temperature drawn at, where {asked:g} was asked for"
    return Effect(name=name, value=estimate * factor, low=low * factor, high=high * factor, unit="1")


def _nucleus_ignored(case: Case) -> str | None:
    """Whether tokens outside a tiny nucleus were drawn."""
    narrow = draws_of(_positions(case, ("top-p",)))
    outside = int((narrow.leads > _least_lead(case)).sum())
    if narrow.count < MIN_DRAWS or outside < 2:
        return None
    return f"With top_p = 0.01 {outside} of {narrow.count} tokens are not the likeliest: top_p is ignored"


def _from_texts(case: Case, details: dict[str, Any]) -> Finding:
    """Without logprobs: does temperature 0 give the same text again, and temperature 1 another one."""
    again = is_cold_text(case, "cold-again")
    warm, other = case.sampling.get("warm"), case.sampling.get("warm-other")
    varies = (
        None
        if warm is None or other is None or warm.text is None or other.text is None
        else not other.text.startswith(warm.text)
    )
    if again is False and is_cold_text(case, "cold-nonce") is False and is_cold_text(case, "stream") is False:
        return _finding(
            "inconclusive",
            "At temperature 0 the same request does not give the same text again; without logprobs it is not known whether temperature or arithmetic is why",
            details=details,
            to_resolve="Ask the host for logprobs",
        )
    if varies is False and again:
        return _finding(
            "inconclusive",
            "Two seeds at temperature 1 give one text: a cache, or temperature is ignored",
            details=details,
            to_resolve="Ask the host for logprobs",
        )
    seen = [what for what, known in (("repeat at temperature 0", again), ("vary at temperature 1", varies)) if known]
    text = (
        f"Texts {' and '.join(seen)}, as they should"
        if seen
        else "Whether texts repeat at temperature 0 and vary at temperature 1 was not answered"
    )
    return _finding(
        "inconclusive",
        f"{text}; without logprobs that says little",
        details=details,
        to_resolve="Ask the host for logprobs",
    )


def gives_copies(case: Case) -> bool | None:
    """Whether another seed at temperature 1 gave the same text: a cache, or seeds that are ignored; None where that was not answered.

    Then that an answer comes again tells no temperature: an honest stack at any may say twice what it seldom says.
    """
    warm = case.sampling.get("warm")
    others = [case.sampling.get(name) for name in ("warm-new", "warm-other")]
    texts = [o.text for o in others if o is not None and o.text]
    if warm is None or not warm.text or not texts:
        return None
    return any(text.startswith(warm.text) for text in texts)


def _finding(outcome: Any, summary: str, **more: Any) -> Finding:
    return Finding(check="sampling", axis="sampling", outcome=outcome, summary=summary, **more)
