"""The questions that this version asks only in part: route, share, sampling, service."""

import numpy as np

from weighbridge.judge.case import Case
from weighbridge.judge.weights import differs_after, is_consistent, is_mixed
from weighbridge.records import Effect, Finding
from weighbridge.stats.residuals import share_upper_limit

CONFIDENCE = 0.95


def check_route(case: Case) -> Finding:
    """Who answered: the model that the answers name against the one that was asked for."""
    named = sorted(
        {o.model_named for o in case.answers if o.model_named}
        | ({case.capability.model_named} if case.capability.model_named else set())
    )
    known = {case.plan.endpoint.model.casefold()}
    if case.library is not None:
        known |= {name.casefold() for name in case.library.bundle.manifest.model_names}
    if not case.capability.reachable:
        return Finding(
            check="model_named",
            axis="route",
            outcome="error",
            summary="The endpoint did not answer" if case.capability.refused else "Nothing was asked",
        )
    if not named:
        return Finding(
            check="model_named",
            axis="route",
            outcome="inconclusive",
            summary="The answers name no model",
            to_resolve="Ask the host to name the model that answers",
        )
    if all(name.casefold() in known for name in named):
        return Finding(
            check="model_named",
            axis="route",
            outcome="consistent",
            summary=f"Every answer names {named[0]!r}; a name is the host's own word",
        )
    return Finding(
        check="model_named", axis="route", outcome="inconclusive", details={"named": named},
        summary=f"The answers name {', '.join(repr(n) for n in named[:3])}, the request named {case.plan.endpoint.model!r}; a name alone proves nothing",
        to_resolve="Ask the host what these names stand for",
    )  # fmt: skip


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
        if is_mixed(evidence):
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


def check_sampling(case: Case) -> Finding:
    """Is the sampling ours: this version only notes what the logprobs mean."""
    regime = case.capability.temperature_regime
    text = {
        "before_temperature": "Logprobs are taken before the temperature, or the temperature is ignored",
        "after_temperature": "Logprobs are taken after the temperature",
        "other": "Logprobs at two temperatures are related in no known way",
        "unknown": "It is not known whether logprobs are taken before or after the temperature",
    }[regime]
    return Finding(
        check="logprob_semantics", axis="sampling", outcome="inconclusive",
        summary=f"{text}; whether sampling parameters are honoured was not asked",
        to_resolve="This version does not test sampling",
    )  # fmt: skip


def check_usage(case: Case) -> Finding:
    """Does it serve well: this version only holds the reported token counts against proven ones."""
    evidence, policy = case.evidence, case.plan.policy
    library = case.library
    if library is not None and evidence is not None and is_consistent(evidence, policy):
        index = library.bundle.probe_index
        counted = [
            (
                o.prompt_tokens,
                int(library.bundle.prompt_tokens[0, index[o.probe_id]])
                - (library.bundle.answer_tokens(o.probe_id) if library.level == "L2" else 0),
            )
            for o in case.answers
            if o.prompt_tokens is not None and o.probe_id in index
        ]
        wrong = sum(reported != true for reported, true in counted)
        if wrong:
            return Finding(
                check="usage", axis="service", outcome="inconclusive", answers_used=len(counted), to_resolve="Ask the host how it counts",
                summary=f"{wrong} of {len(counted)} reported prompt token counts are not those of the prompt that was served",
            )  # fmt: skip
        if counted:
            return Finding(
                check="usage",
                axis="service",
                outcome="inconclusive",
                answers_used=len(counted),
                summary="Reported prompt token counts are right; speed and tools were not judged",
                to_resolve="This version does not judge the service",
            )
    return Finding(
        check="usage",
        axis="service",
        outcome="inconclusive",
        summary="Speed, tools and context length were not judged",
        to_resolve="This version does not judge the service",
    )
