"""Are tokens counted truly? Reported counts against those that the answers prove, streamed and not."""

import math
from typing import Any

from weighbridge.judge.case import Case
from weighbridge.judge.checks.weights import is_consistent
from weighbridge.records import Finding, Observation, Outcome
from weighbridge.reference.bundle import OFFICIAL


def check_counting(case: Case) -> Finding:
    """Compare prompt counts with those of the prompt that was proven to be served, and completion counts with the tokens listed."""
    wrong: list[str] = []
    checked: list[str] = []
    proven = case.evidence is not None and is_consistent(case.evidence, case.plan.policy)
    reading = case.reading
    if reading is not None and reading.counted and case.served is not None and (proven or case.served != OFFICIAL):
        served = next(i for i, h in enumerate(reading.hypotheses) if h.id == case.served)
        off = int((reading.offsets[served] != 0).sum())
        checked.append(f"{reading.counted} prompt token counts")
        if off:
            wrong.append(
                f"{off} of {reading.counted} reported prompt token counts are not those of the prompt that was served"
            )
    spent = [
        (o, _listed(o)) for o in case.sampling.values()
        # Some hosts list a character of several tokens once.
        if o.completion_tokens is not None and _listed(o) is not None and (o.text or "").isascii()
    ]  # fmt: skip
    if spent:
        checked.append(f"{len(spent)} completion token counts")
        # The end of a turn is counted by some hosts, and listed by others.
        off = sum(
            abs((o.completion_tokens or 0) - (o.reasoning_tokens or 0) - (listed or 0)) > 1 for o, listed in spent
        )
        if off:
            wrong.append(f"{off} of {len(spent)} completion token counts are not the numbers of tokens that came")
    plain, stream = case.sampling.get("cold"), case.sampling.get("stream")
    if plain is not None and stream is not None and plain.answered and stream.answered:
        if not stream.streamed:
            wrong.append("a stream was asked for and not given")
        elif stream.prompt_tokens is not None and plain.prompt_tokens is not None:
            checked.append("a stream")
            if stream.prompt_tokens != plain.prompt_tokens:
                wrong.append(
                    f"a stream counts {stream.prompt_tokens} prompt tokens where the same request without one counts {plain.prompt_tokens}"
                )
    details = {"checked": checked, "latency_s": latency(case.observed)}
    if wrong:
        return _finding(
            "inconsistent",
            f"{wrong[0][0].upper()}{'; '.join(wrong)[1:]}",
            details=details,
            to_resolve="Ask the host how it counts",
        )
    if checked:
        return _finding(
            "consistent", f"Token counts are right where it can be told: {', '.join(checked)}", details=details
        )
    return _finding(
        "inconclusive", "Whether tokens are counted truly cannot be told", details=details,
        to_resolve="Token counts, and answers that prove which prompt was served",
    )  # fmt: skip


def latency(observations: list[Observation]) -> float | None:
    """The median seconds to a complete answer; as observed, not judged."""
    found = sorted(o.latency_s for o in observations if o.answered)
    return found[math.floor(len(found) / 2)] if found else None


def _listed(observation: Observation) -> int | None:
    return len(observation.positions) if observation.positions else None


def _finding(outcome: Outcome, summary: str, **more: Any) -> Finding:
    return Finding(check="counting", axis="service", outcome=outcome, summary=summary, **more)
