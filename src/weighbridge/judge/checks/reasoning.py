"""Reasoning before the answer, in sight or out of it, and what can still be judged."""

from typing import Any

from weighbridge.judge.case import Case
from weighbridge.records import Finding, Observation, Outcome


def hides_reasoning(observations: list[Observation]) -> bool:
    """Whether tokens that nobody is shown come before the answer: then the context of the first visible one is not known."""
    return any((o.reasoning_tokens or 0) > 0 and not o.shows_reasoning for o in observations)


def reasons(observations: list[Observation]) -> bool:
    """Whether any answer shows or counts reasoning."""
    return any((o.reasoning_tokens or 0) > 0 or o.shows_reasoning for o in observations)


def check_reasoning(case: Case) -> Finding:
    """Say whether reasoning is there, whether it is shown, and whether its effort follows what is asked."""
    answered = [o for o in case.observed if o.answered]
    if not answered:
        return _finding("inconclusive", "Nothing was answered")
    if not reasons(answered):
        return _finding("not_applicable", "No answer shows or counts reasoning")
    only = sum(o.shows_reasoning and not o.text for o in answered)
    low, high = (case.sampling.get(f"effort-{name}") for name in ("low", "high"))
    efforts = None if low is None or high is None else (low.reasoning_tokens, high.reasoning_tokens)
    details: dict[str, Any] = {"reasoning_only": only, "tokens_at_low_and_high_effort": efforts}
    effort = ""
    if efforts is not None and None not in efforts:
        effort = f"; {efforts[0]} tokens at low effort and {efforts[1]} at high"
    if hides_reasoning(answered):
        return _finding(
            "inconclusive", f"Tokens of reasoning are counted and not shown{effort}: what stands before the first visible token is not known, so logprobs cannot be compared with the reference",
            details=details, to_resolve="Ask without reasoning where the model can (a thinking switch in extra_body), or ask the host to return it",
        )  # fmt: skip
    return _finding(
        "inconclusive", f"Reasoning is shown{effort}; {only} answers hold nothing else", details=details,
        to_resolve="Logprobs of the first token are those of the reasoning's first token only where the host says so; ask without reasoning where the model can",
    )  # fmt: skip


def _finding(outcome: Outcome, summary: str, **more: Any) -> Finding:
    return Finding(check="reasoning", axis="service", outcome=outcome, summary=summary, **more)
