"""Are answers given twice? Repeats of one request, with and without a text that nobody has seen."""

from typing import Any

from weighbridge.judge.case import Case
from weighbridge.judge.checks.parameters import is_cold_text
from weighbridge.records import Finding, Observation, Outcome

FASTER = 4.0  # a repeat that takes less than a quarter of the time was hardly computed again


def check_caching(case: Case) -> Finding:
    """Look for stored answers: different seeds at temperature 1 with one text, cached tokens, repeats that take no time."""
    cold, again, fresh = (case.sampling.get(name) for name in ("cold", "cold-again", "cold-nonce"))
    if cold is None or again is None or not cold.answered or not again.answered:
        return _finding("inconclusive", "Repeats were not asked, or not answered", to_resolve="Raise --max-requests")
    cached = max((o.cached_tokens or 0 for o in case.sampling.values()), default=0)
    unseen = _seconds(fresh)
    quick = unseen is not None and again.latency_s * FASTER < unseen
    warm, other = case.sampling.get("warm"), case.sampling.get("warm-other")
    stored = bool(
        warm is not None
        and other is not None
        and warm.text
        and (other.text or "").startswith(warm.text)
        and warm.text == cold.text
    )
    repeated = case.residuals.repeated if case.residuals is not None else 0
    details = {
        "cached_tokens": cached, "repeat_s": again.latency_s, "unseen_s": unseen, "same_text_again": is_cold_text(case, "cold-again"),
        "answers_repeated_digit_by_digit": repeated,
    }  # fmt: skip
    if stored and (quick or cached):
        return _finding(
            "inconsistent", "Requests at other temperatures and seeds get one stored answer" + (f", {unseen / again.latency_s:.0f} times as fast as an unseen one" if unseen and quick else ""),
            details=details, to_resolve="Key stored answers by the whole request, sampling parameters included",
        )  # fmt: skip
    notes = []
    if repeated:
        notes.append(f"{repeated} answers repeat, digit by digit, what was answered to another prompt, and count once")
    if cached:
        notes.append(f"up to {cached} prompt tokens are said to come from a cache")
    if is_cold_text(case, "cold-again") is False:
        notes.append("the same request at temperature 0 gives another text each time")
    text = "; ".join(notes) if notes else "no sign of stored answers"
    return _finding(
        "consistent",
        f"Each request is answered anew: {text}" if not repeated else f"{text[0].upper()}{text[1:]}",
        details=details,
    )


def _seconds(observation: Observation | None) -> float | None:
    return observation.latency_s if observation is not None and observation.answered else None


def _finding(outcome: Outcome, summary: str, **more: Any) -> Finding:
    return Finding(check="caching", axis="service", outcome=outcome, summary=summary, **more)
