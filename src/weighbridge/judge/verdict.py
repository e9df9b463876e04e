"""From findings to a verdict, under a policy."""

from weighbridge import __version__
from weighbridge.judge.answers import line_up
from weighbridge.judge.case import Case, Check
from weighbridge.judge.faults import explain
from weighbridge.judge.library import MIN_TOP_LOGPROBS, Library
from weighbridge.judge.other_axes import check_route, check_sampling, check_share, check_usage
from weighbridge.judge.prompt import check_prompt
from weighbridge.judge.sizes import weigh
from weighbridge.judge.weights import (
    answers_for_consistent,
    check_weights,
    differs_after,
    is_consistent,
    looks_like_temperature,
    may_be_mixed,
)
from weighbridge.records import (
    AXES,
    Axis,
    Capability,
    Cause,
    Finding,
    Findings,
    Observation,
    Outcome,
    Plan,
    Verdict,
    VerdictWord,
)

CHECKS: tuple[Check, ...] = (check_route, check_prompt, check_sampling, check_weights, check_share, check_usage)


def open_case(plan: Plan, capability: Capability, answers: list[Observation], library: Library | None) -> Case:
    """Line the answers up with the library."""
    # Logprobs whose meaning is not known are evidence of nothing.
    if library is None or capability.top_logprobs < MIN_TOP_LOGPROBS or capability.temperature_regime == "other":
        return Case(plan, capability, answers, library, None, None)
    lined_up = line_up(library, answers)
    if lined_up.answers == 0:
        return Case(plan, capability, answers, library, lined_up, None)
    return Case(plan, capability, answers, library, lined_up, weigh(library, lined_up, plan.policy))


def is_decided(case: Case) -> bool:
    """Whether further answers of this level would change nothing that the policy requires."""
    if case.evidence is None:
        return False
    counted = sum(o.prompt_tokens is not None for o in case.answers)
    policy = case.plan.policy
    if is_consistent(case.evidence, policy):
        return True
    if looks_like_temperature(case.evidence, policy):
        return case.evidence.answers >= answers_for_consistent(case.evidence, policy)
    if differs_after(case.evidence, policy) is None or may_be_mixed(case.evidence, policy):
        return False
    # A wrong prompt is told from wrong weights by token counts, where the endpoint reports any.
    return counted >= policy.min_counted or counted == 0 or len(case.answers) > counted + policy.min_counted


def judge(
    case: Case,
    *,
    requests_sent: int,
    stopped_because: str,
    all_observations: list[Observation],
    observations_sha256: str,
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
    """
    findings = [check(case) for check in CHECKS]
    by_axis = {finding.axis: finding for finding in findings}
    by_axis["weights"] = _weights_under_prompt(by_axis["weights"], by_axis["prompt"])
    if by_axis["share"].outcome == "inconsistent" and by_axis["weights"].outcome != "inconsistent":
        by_axis["share"] = by_axis["share"].model_copy(update={"outcome": "inconclusive", "cause": None})
    findings = [by_axis[finding.axis] for finding in findings]
    axes: dict[Axis, Outcome] = {axis: by_axis[axis].outcome for axis in AXES}

    word, cause = _word_and_cause(case.plan, by_axis)
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
        not_excluded=weights.not_excluded,
        excluded=weights.excluded,
        sentence=_sentence(case, word, cause, by_axis) + _interruption(word, stopped_because, all_observations),
        error_rate=_error_rate(case, word),
        effective_noise_nats=next((e for e in weights.effects if e.name == "effective noise"), None),
        answers_used=weights.answers_used,
        requests_sent=requests_sent,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        cost_usd=price.cost_usd(prompt_tokens, completion_tokens) if price is not None else None,
        stopped_because=stopped_because,
        endpoint_refused=case.capability.refused is not None,
        observations_sha256=observations_sha256,
    )
    return Findings(weighbridge_version=__version__, capability=case.capability, findings=findings), verdict


def _weights_under_prompt(weights: Finding, prompt: Finding) -> Finding:
    """Weights are blamed only under a prompt that is known.

    It is known where the token counts are the official template's, or where a recorded variant explains the whole
    residual: under another prompt something would be left over.
    """
    if weights.outcome != "inconsistent" or prompt.outcome == "consistent" or weights.exact_variant is not None:
        return weights
    return weights.model_copy(
        update={
            "outcome": "inconclusive",
            "cause": None,
            "family": None,
            "summary": f"{weights.summary}; but the prompt that was served is not known, so the weights are not judged",
            "to_resolve": "An endpoint that serves the official prompt, or the rendering that it serves in a bundle",
        }
    )


def _word_and_cause(plan: Plan, by_axis: dict[Axis, Finding]) -> tuple[VerdictWord, Cause | None]:
    wrong = [by_axis[axis] for axis in AXES if axis in plan.policy.requires and by_axis[axis].outcome == "inconsistent"]
    if wrong:
        return "differs", next((finding.cause for finding in wrong if finding.cause is not None), "none_of_these")
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
        finding = next(f for axis, f in by_axis.items() if f.outcome == "inconsistent" and axis in policy.requires)
        named = {
            "precision": "at another precision", "kv_cache": "with another KV cache", "template": "under another chat template",
            "hidden_prompt": "with a prompt added to it", "other_model": "as another model", "partial_routing": "by something else for some requests",
        }.get(str(cause), "in a way that no recorded variant explains")  # fmt: skip
        return f"Differs from the reference under the policy {policy.id}: served {named}. {finding.summary}."
    if not case.capability.reachable:
        return f"Not verified: {'the endpoint did not answer' if case.capability.refused else 'nothing was asked'}."
    open_question = weights if weights.outcome != "consistent" else by_axis["prompt"]
    return f"Not verified: {open_question.summary[0].lower()}{open_question.summary[1:]}."


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


def _error_rate(case: Case, word: VerdictWord) -> str:
    policy = case.plan.policy
    if word == "differs":
        families = case.library.families if case.library is not None else []
        limit = case.evidence.null.limit_nats if case.evidence is not None else policy.null_scale_floor_nats
        return (
            f"If the endpoint were one of the honest stacks that the policy describes, evidence of this size would be reached at any time in at most 1 of {policy.differs_e_value:g} draws. "
            f"That bounds the error of the draw, not that of a kind of honest stack which the library lacks: it holds {len(families)} families ({', '.join(families)}), "
            f"and allows an endpoint like this one {limit:.2g} nats. A single night is not a replication."
        )
    if word == "consistent":
        return f"If one of the excluded departures were served, it would be excluded in at most 1 of {policy.consistent_e_value:g} draws."
    return "No statement is made, so none can be wrong."
