"""For all requests, or for some: answers that stand out."""

import numpy as np

from weighbridge.judge.case import Case
from weighbridge.judge.checks.weights import differs_after
from weighbridge.records import Effect, Finding
from weighbridge.stats.residuals import share_upper_limit

CONFIDENCE = 0.95


def check_share(case: Case) -> Finding:
    """For all requests, or for some: how many answers stand out."""
    evidence, policy = case.evidence, case.plan.policy
    if evidence is None or case.library is None or evidence.answers < policy.min_answers:
        return Finding(
            check="share",
            axis="share",
            outcome="not_supported",
            summary="Too few answers with logprobs to tell one from another",
        )
    n = evidence.answers
    # Above everything that an honest stack is allowed on any probe of the pool.
    most_honest = float(evidence.null.log_scales.max())
    out = int((evidence.features.log_scales > most_honest).sum())
    # A probe that came back without logprobs may have been answered by anything.
    silent = evidence.asked - n
    limit = share_upper_limit(out + silent, evidence.asked, CONFIDENCE)
    if differs_after(evidence, policy) is not None:
        if case.mixed:
            return Finding(
                check="share", axis="share", outcome="inconsistent", cause="partial_routing", answers_used=n,
                summary=f"Some of {n} answers are the reference's, {out} are further than {np.exp(most_honest):.2g} nats from it: something else answered some requests",
            )  # fmt: skip
        return Finding(
            check="share",
            axis="share",
            outcome="not_applicable",
            answers_used=n,
            summary="The answers differ as a whole",
        )
    effect = Effect(name="upper limit of the share that stands out", value=limit, unit="1", confidence=CONFIDENCE)
    return Finding(
        check="share", axis="share", outcome="inconclusive", answers_used=n, effects=[effect],
        summary=f"{out} of {evidence.asked} answers are further than {np.exp(most_honest):.2g} nats from the reference"
        + (f" and {silent} carry no logprobs" if silent else "")
        + f", so at most {limit:.0%} of requests were answered by something that is (95 % upper limit); a fainter departure of some requests would not stand out",
        to_resolve="299 answers of which none stands out bring the limit to 1 %",
    )  # fmt: skip
