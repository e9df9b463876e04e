"""From findings to a verdict, under a policy."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from weighbridge import __version__
from weighbridge.judge.case import Case, Check
from weighbridge.judge.checks.caching import check_caching
from weighbridge.judge.checks.counting import check_counting
from weighbridge.judge.checks.parameters import check_parameters
from weighbridge.judge.checks.prompt import check_prompt
from weighbridge.judge.checks.reasoning import check_reasoning, hides_reasoning
from weighbridge.judge.checks.route import check_route
from weighbridge.judge.checks.sampling import check_sampling
from weighbridge.judge.checks.share import check_share
from weighbridge.judge.checks.texts import (
    ALIKE_SHARE,
    ENOUGH_ALIKE,
    MAY_BE_COPIES,
    is_consistent_text,
    is_suspected,
    text_differs_after,
    text_explanation,
)
from weighbridge.judge.checks.weights import (
    answers_for_consistent,
    check_weights,
    differs_after,
    is_consistent,
    looks_like_temperature,
    may_be_mixed,
)
from weighbridge.judge.faults import explain
from weighbridge.judge.texts import TextEvidence
from weighbridge.judge.whole import HONEST_CHANCE
from weighbridge.records import (
    AXES,
    Axis,
    Cause,
    Control,
    ControlKind,
    EvidenceLevel,
    Finding,
    Findings,
    Observation,
    Outcome,
    Policy,
    Verdict,
    VerdictWord,
)
from weighbridge.reference.bundle import OFFICIAL, StackRecord

# Of the checks of one axis the first one speaks for it, unless another one finds something inconsistent.
CHECKS: tuple[Check, ...] = (
    check_route, check_prompt, check_sampling, check_weights, check_share,
    check_counting, check_parameters, check_caching, check_reasoning,
)  # fmt: skip
# Answers after which every recorded rendering has had its chance.
ENOUGH_FOR_A_PROMPT = 16


def is_decided(case: Case) -> bool:
    """Whether further answers of this kind would change nothing that the policy requires."""
    evidence, policy = case.evidence, case.plan.policy
    if case.texts is not None:
        return _is_decided_by_texts(case, case.texts)
    if evidence is not None and case.served is not None and is_consistent(evidence, policy):
        return True
    if case.official_differs and not case.settled:
        rendered = rendered_probes(case)
        known = case.served not in (None, OFFICIAL)
        if known and rendered and (evidence is None or differs_after(evidence, policy) is None):
            return False  # the weights can still be cleared under the prompt that is served
        return sum(o.probe_id in rendered for o in case.answers) >= min(ENOUGH_FOR_A_PROMPT, len(rendered))
    if evidence is None:
        return False
    if looks_like_temperature(evidence, policy):
        return evidence.answers >= answers_for_consistent(evidence, policy)
    if differs_after(evidence, policy) is None or (case.served == OFFICIAL and may_be_mixed(evidence, policy)):
        return False
    # A wrong prompt is told from wrong weights by token counts, where the endpoint reports any.
    counted = case.reading.counted if case.reading is not None else 0
    return counted >= policy.min_counted or counted == 0 or len(case.answers) > counted + policy.min_counted


def _is_decided_by_texts(case: Case, texts: TextEvidence) -> bool:
    """Whether more texts would change nothing; where they differ, some more are asked, so that a cause can be named."""
    policy = case.plan.policy
    if texts.alike >= ALIKE_SHARE and texts.answers >= ENOUGH_ALIKE:
        return True
    reached = text_differs_after(texts, policy)
    if reached is None:
        return is_consistent_text(texts, case.plan)
    if text_explanation(texts, policy) is None:
        return texts.answers >= reached + ENOUGH_FOR_A_PROMPT
    # Where repeats may be copies, that a departure explains the answers has to be evidence enough.
    return case.official_differs or texts is not case.texts


def is_decided_raw(case: Case) -> bool:
    """Whether further answers to the reference's own tokens would change nothing."""
    evidence, policy = case.raw_evidence, case.plan.policy
    if case.raw_texts is not None:
        return not case.raw_texts.is_cold or _is_decided_by_texts(case, case.raw_texts)
    return evidence is not None and (is_consistent(evidence, policy) or differs_after(evidence, policy) is not None)


def may_be_diverted(case: Case) -> bool:
    """Whether whole answers may tell more: first tokens at temperature 0 are not other than the reference's."""
    texts, policy = case.texts, case.plan.policy
    if texts is None or not texts.is_cold or texts.answers < policy.min_answers or texts.alike >= ALIKE_SHARE:
        return False
    return not case.official_differs and case.served == OFFICIAL


def is_diversion_owed(case: Case) -> bool:
    """Whether whole answers reject every honest stack at temperature 0, and repeats that tell whether 0 is served have not been asked."""
    texts, whole = case.texts, case.whole
    if texts is None or whole is None or case.diverted:
        return False
    return is_suspected(texts, whole, case.plan.policy) and not whole.is_asked_again


def is_diversion_decided(case: Case) -> bool:
    """Whether it is shown that some requests are answered otherwise."""
    return case.diverted


def useful_probes(case: Case) -> set[str] | None:
    """The probes that can still tell something; None for all."""
    if not case.official_differs or case.settled or case.library is None or not rendered_probes(case):
        return None
    return rendered_probes(case)


def rendered_probes(case: Case) -> set[str]:
    """The probes that are recorded under another rendering than the official one."""
    if case.library is None:
        return set()
    bundle, level = case.library.bundle, case.plan.level
    pools = [pool for pool in bundle.manifest.pools if pool.level == level and pool.rendering != OFFICIAL]
    return {probe_id.split("@")[0] for pool in pools for probe_id in bundle.usable_probes(pool)}


def judge(
    case: Case,
    *,
    requests_sent: int,
    stopped_because: str,
    all_observations: list[Observation],
    observations_sha256: str,
    controls: Sequence[Control] = (),
) -> tuple[Findings, Verdict]:
    """Run every check and put the findings together.

    Parameters
    ----------
    case : Case
        The audit.
    requests_sent : int
        Attempts, including capability calls and retries.
    stopped_because : str
        Why no more requests were sent.
    all_observations : list of Observation
        What was paid for.
    observations_sha256 : str
        Of observations.jsonl: what the verdict is bound to.
    controls : sequence of Control
        What came out for endpoints whose truth is known; where one is not as expected, nothing is said of this one.
    """
    found = {finding.check: finding for finding in (check(case) for check in CHECKS)}
    found["weights"] = _weights_that_can_be_judged(found["weights"], case, found["sampling"])
    if found["share"].outcome == "inconsistent" and found["weights"].outcome != "inconsistent" and not case.diverted:
        found["share"] = found["share"].model_copy(update={"outcome": "inconclusive", "cause": None})
    findings = list(found.values())
    by_axis = {axis: _speaker([f for f in findings if f.axis == axis]) for axis in AXES}
    axes: dict[Axis, Outcome] = {axis: by_axis[axis].outcome for axis in AXES}

    word, cause = _word_and_cause(case, by_axis)
    sentence = (
        _sentence(case, word, cause, by_axis) + _whose(case) + _interruption(word, stopped_because, all_observations)
    )
    wrong = [control for control in controls if not control.as_expected]
    if wrong:
        word, cause, sentence = "inconclusive", None, void_sentence(wrong)
        axes = {axis: "inconclusive" if o in ("consistent", "inconsistent") else o for axis, o in axes.items()}
    weights = by_axis["weights"]
    prompt_tokens = sum(o.prompt_tokens or 0 for o in all_observations)
    completion_tokens = sum(o.completion_tokens or 0 for o in all_observations)
    price = case.plan.endpoint.price
    verdict = Verdict(
        weighbridge_version=__version__,
        verdict=word,
        cause=cause,
        exact_variant=weights.exact_variant if word == "differs" else None,
        family=weights.family if word == "differs" else None,
        policy=case.plan.policy.id,
        axes=axes,
        level=_level(case),
        not_excluded=weights.not_excluded,
        excluded=weights.excluded,
        sentence=sentence,
        error_rate=_error_rate(case, word, cause),
        log10_e_value=_log10_e_value(case, found["sampling"]),
        effective_noise_nats=next((e for e in weights.effects if e.name == "effective noise"), None),
        answers_used=weights.answers_used,
        requests_sent=requests_sent,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        cost_usd=price.cost_usd(prompt_tokens, completion_tokens) if price is not None else None,
        stopped_because=stopped_because,
        endpoint_refused=case.capability.refused is not None,
        observations_sha256=observations_sha256,
        controls=list(controls),
    )
    return Findings(weighbridge_version=__version__, capability=case.capability, findings=findings), verdict


def _level(case: Case) -> EvidenceLevel | None:
    """What the evidence on the weights rests on."""
    if case.texts is not None:
        return "L4" if case.texts.is_cold else "L5"
    return case.plan.level if case.evidence is not None or case.raw_evidence is not None else None


def control_of(kind: ControlKind, endpoint: str, verdict: Verdict) -> Control:
    """What came out for an endpoint whose truth is known: an honest one is consistent, an altered one differs."""
    expected = "consistent" if kind == "honest" else "differs"
    return Control(
        kind=kind, endpoint=endpoint, verdict=verdict.verdict, cause=verdict.cause, as_expected=verdict.verdict == expected,
        sentence=verdict.sentence,
    )  # fmt: skip


def void_sentence(wrong: list[Control]) -> str:
    """Why nothing is said."""
    which = "; ".join(f"the {c.kind} control {c.endpoint} came out as {c.verdict.replace('_', ' ')}" for c in wrong)
    return f"Void: {which}, so nothing that was found this night is relied on. Find out why before auditing again."


def _speaker(findings: list[Finding]) -> Finding:
    return next((f for f in findings if f.outcome == "inconsistent"), findings[0])


def _weights_that_can_be_judged(weights: Finding, case: Case, sampling: Finding) -> Finding:
    """Weights are blamed, and cleared, only where it is known what they were asked, and that they wrote the answer."""
    if weights.outcome not in ("consistent", "inconsistent"):
        return _raw(case) or weights
    if sampling.outcome == "inconsistent" and sampling.cause == "route":
        return _open(
            weights,
            "the text is not written by what the logprobs come from",
            "An endpoint whose logprobs are those of its text",
        )
    if hides_reasoning([*case.answers, *case.text_answers]):
        return _open(weights, "tokens that are not shown stand before the answer", "An answer without reasoning")
    if case.texts is not None and case.served is None and not case.official_differs:
        return _raw(case) or _open(
            weights.model_copy(update={"log10_e_value": None}), f"{MAY_BE_COPIES}, and an honest stack at another temperature may be why", "A host that answers each request anew",
        )  # fmt: skip
    if case.served is None:
        summary = weights.summary
        if case.evidence is not None:
            summary = f"The answers are {float(np.exp(case.evidence.features.log_scales.mean())):.2g} nats from the reference's"
        return _raw(case) or _open(
            weights.model_copy(update={"summary": summary}),
            "whether the prompt or the weights are why is not known, so the weights are not judged", "Raw completions, or an endpoint that serves the official prompt, or the rendering that it serves in a bundle",
        )  # fmt: skip
    if case.served != OFFICIAL and case.texts is not None:
        return _open(
            weights, "the prompt is another one, and texts tell one fault at a time", "Serve the official prompt, or ask the host for logprobs"
        )  # fmt: skip
    if case.served != OFFICIAL:
        return weights.model_copy(
            update={"summary": f"Under the prompt that was served: {weights.summary[0].lower()}{weights.summary[1:]}"}
        )
    return weights


def _open(weights: Finding, why: str, to_resolve: str) -> Finding:
    update: dict[str, object] = {
        "outcome": "inconclusive", "cause": None, "family": None, "exact_variant": None, "excluded": [], "not_excluded": [],
        "summary": f"{weights.summary}; but {why}", "to_resolve": to_resolve,
    }  # fmt: skip
    return weights.model_copy(update=update)


def _raw(case: Case) -> Finding | None:
    """The weights by the reference's own tokens, where they were asked so and the chat's prompt is not known."""
    if case.served is not None or (case.raw_evidence is None and case.raw_texts is None):
        return None
    raw = replace(case, residuals=case.raw_residuals, evidence=case.raw_evidence, texts=case.raw_texts, mixed=False)
    finding = check_weights(raw)
    # A host may do something of its own with the tokens too, so they accuse only where they are a recorded departure's.
    if finding.outcome not in ("consistent", "inconsistent") or finding.cause == "none_of_these":
        return None
    # And they clear nothing where chat gives what a recorded departure would.
    if finding.outcome == "consistent" and case.texts is not None and _points_at_weights(case.texts, case.plan.policy):
        return None
    return finding.model_copy(update={
        "summary": f"Asked by raw completions, with no chat template in between: {finding.summary[0].lower()}{finding.summary[1:]}",
    })  # fmt: skip


def _points_at_weights(texts: TextEvidence, policy: Policy) -> bool:
    best = text_explanation(texts, policy)
    return best is not None and isinstance(texts.library.departure(best), StackRecord)


def _word_and_cause(case: Case, by_axis: dict[Axis, Finding]) -> tuple[VerdictWord, Cause | None]:
    required = case.plan.policy.requires
    wrong = [by_axis[axis] for axis in AXES if axis in required and by_axis[axis].outcome == "inconsistent"]
    if wrong:
        return "differs", next((finding.cause for finding in wrong if finding.cause is not None), "none_of_these")
    if case.diverted and "weights" in required:
        return "differs", "partial_routing"
    if case.official_differs and case.served is None and {"prompt", "weights"} <= set(required):
        # It is one of the two, and either alone would do.
        return "differs", "none_of_these"
    if by_axis["weights"].outcome == "consistent" and by_axis["prompt"].outcome == "consistent":
        return "consistent", None
    return "inconclusive", None


def _sentence(case: Case, word: VerdictWord, cause: Cause | None, by_axis: dict[Axis, Finding]) -> str:
    policy, weights = case.plan.policy, by_axis["weights"]
    if word == "consistent":
        left = weights.not_excluded
        rest = f"; not excluded: {', '.join(left)}" if left else ""
        return f"Consistent with the reference under the policy {policy.id} ({policy.title}){rest}."
    if word == "differs":
        finding = next(
            (f for axis, f in by_axis.items() if f.outcome == "inconsistent" and axis in policy.requires),
            by_axis["share" if case.diverted else "prompt"],
        )
        named = {
            "precision": "at another precision", "kv_cache": "with another KV cache", "template": "under another chat template",
            "hidden_prompt": "with a prompt added to it", "sampling": "with other sampling", "route": "by something else", "other_model": "as another model", "partial_routing": "by something else for some requests",
        }.get(str(cause), "in a way that no recorded variant explains")  # fmt: skip
        return f"Differs from the reference under the policy {policy.id}: served {named}. {finding.summary}."
    if not case.capability.reachable:
        return f"Not verified: {'the endpoint did not answer' if case.capability.refused else 'nothing was asked'}."
    open_question = weights if weights.outcome != "consistent" else by_axis["prompt"]
    return f"Not verified: {open_question.summary[0].lower()}{open_question.summary[1:]}."


def _whose(case: Case) -> str:
    """Where a router chose who answers, that nothing is said of any one of them."""
    if not case.plan.endpoint.unpinned or not case.capability.reachable:
        return ""
    return " The route was not pinned, so this is about what the router passed on and about no one provider."


def _interruption(word: VerdictWord, stopped_because: str, observations: list[Observation]) -> str:
    """What went wrong on the way, and the next step, where the collection did not end by itself."""
    unanswered = [o for o in observations if not o.answered and o.fault != "interrupted"]
    if stopped_because in ("refused", "unreachable", "rate_limited") and unanswered:
        return f" {explain(unanswered[-1])}."
    if word != "inconclusive":
        return ""
    if stopped_because == "interrupted":
        return " The audit was interrupted: go on with `weighbridge resume`."
    if stopped_because in ("budget_requests", "budget_cost"):
        limit = "max_requests" if stopped_because == "budget_requests" else "max_cost_usd"
        return f" The budget ({limit}) was spent: raise it and go on with `weighbridge resume`."
    return ""


def _log10_e_value(case: Case, sampling: Finding) -> float | None:
    """One e-value of the audit, as it stood when it stopped: a mean of those of its kinds of evidence, which is again one.

    What has been the largest on the way is none, so that is not taken (Choe and Ramdas 2024).
    """
    log10_e = [] if case.log_e_official is None else [case.log_e_official / float(np.log(10))]
    drawn = [sampling.details[name] for name in ("log10_e_at_0", "log10_e_at_1") if name in sampling.details]
    if drawn:
        log10_e.append(_log10_mean(drawn))
    return _log10_mean(log10_e) if log10_e else None


def _log10_mean(log10_values: list[float]) -> float:
    largest = max(log10_values)
    return largest + float(np.log10(np.mean([10 ** (value - largest) for value in log10_values])))


def _error_rate(case: Case, word: VerdictWord, cause: Cause | None) -> str:
    policy = case.plan.policy
    if word == "differs":
        if cause in ("sampling", "route"):
            return (
                f"This rests on the endpoint's own words: tokens against the logprobs that came with them, names against names. An e-value of {policy.differs_e_value:g} is reached "
                "by honest draws at most once in as many audits; limits of a temperature are where its likelihood has fallen by 4 nats. A single night is not a replication."
            )
        families = case.library.families if case.library is not None else []
        if case.texts is not None:
            texts = case.texts.library
            return (
                f"If the endpoint were an honest stack, at whatever temperature, evidence of this size would be reached at any time in at most 1 of {policy.differs_e_value:g} draws. "
                f"That bounds the error of the draw, not that of a kind of honest stack which the library lacks: it holds {len(families)} families ({', '.join(families)}), allows noise of "
                f"{texts.limit_nats:.2g} nats, and another answer in {texts.flips_allowed:.1%} of the contexts whatever the reason. "
                + (
                    f"Of whole answers it is allowed one of {1 / HONEST_CHANCE:,.0f}, which is extrapolated from how far leads moved that were recorded. "
                    if case.diverted
                    else ""
                )
                + "A single night is not a replication."
            )
        limit = case.evidence.null.limit_nats if case.evidence is not None else policy.null_scale_floor_nats
        return (
            f"If the endpoint were one of the honest stacks that the policy describes, evidence of this size would be reached at any time in at most 1 of {policy.differs_e_value:g} draws. "
            f"That bounds the error of the draw, not that of a kind of honest stack which the library lacks: it holds {len(families)} families ({', '.join(families)}), "
            f"and allows an endpoint like this one {limit:.2g} nats. A single night is not a replication."
        )
    if word == "consistent":
        return f"If one of the excluded departures were served, it would be excluded in at most 1 of {policy.consistent_e_value:g} draws."
    return "No statement is made, so none can be wrong."
