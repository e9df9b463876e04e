"""Are the weights the weights? Levels L1, L2 and L3: top-k logprobs."""

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weighbridge.judge.case import Case
from weighbridge.judge.causes import weigh_causes
from weighbridge.judge.checks.texts import check_texts
from weighbridge.judge.library import MIN_TOP_LOGPROBS, Library, travels
from weighbridge.judge.sizes import WeightEvidence
from weighbridge.records import Cause, Effect, Finding, Policy
from weighbridge.reference.bundle import StackRecord
from weighbridge.stats.evidence import first_crossing
from weighbridge.stats.grid import grid_step
from weighbridge.stats.ladder import effective_bits
from weighbridge.stats.residuals import mean_interval, scale_interval

CONFIDENCE = 0.95
SLOPE_TOLERANCE = 0.1
ANSWERED_SHARE = 0.9  # of the probes asked: what an endpoint leaves out may be what would tell
HONEST_LOOKING_SHARE = 0.25
KNOWN_SHARE = 0.75  # of the answers must be comparable with a departure before it is said to explain them
LOG10 = float(np.log(10))


def name_of(stack: StackRecord) -> str:
    """The departure that a stack records."""
    return stack.variant or stack.id


def looks_like_temperature(evidence: WeightEvidence, policy: Policy) -> bool:
    """Whether the residuals are those of a temperature that was applied and not asked for, and nothing more.

    That is a matter of sampling, and says nothing about the weights.
    """
    rejected = evidence.log_size.max() >= np.log(policy.differs_e_value)
    explained = evidence.log_after_slope.max() < np.log(policy.differs_e_value)
    return bool(rejected and explained and abs(evidence.slope - 1) > SLOPE_TOLERANCE)


def differs_after(evidence: WeightEvidence, policy: Policy) -> int | None:
    """After how many answers the honest library is rejected, or None."""
    if evidence.answers < policy.min_answers or looks_like_temperature(evidence, policy):
        return None
    reached = first_crossing(evidence.log_total, policy.differs_e_value)
    return None if reached is None else max(reached, policy.min_answers)


def excluded_variants(evidence: WeightEvidence, policy: Policy) -> list[bool]:
    """For each variant, whether it is excluded: by size or by direction, and only where one of them can speak of it."""
    return [
        bool(can) and first_crossing(process, policy.consistent_e_value) is not None
        for can, process in zip(evidence.excludable, evidence.log_exclusion, strict=True)
    ]


def answers_for_consistent(evidence: WeightEvidence, policy: Policy) -> int:
    """How many answers `consistent` takes at least: what the policy says, or the whole pool where it is smaller."""
    return min(policy.min_answers_consistent, evidence.pool)


def is_consistent(evidence: WeightEvidence, policy: Policy) -> bool:
    """Whether every departure that this level can speak of is excluded, and the library is not rejected.

    Every stack of the library has answered every probe, so an endpoint that leaves many out is not consistent.
    """
    if evidence.answers < ANSWERED_SHARE * evidence.asked or looks_like_temperature(evidence, policy):
        return False
    if evidence.answers < answers_for_consistent(evidence, policy) or not evidence.excludable.any():
        return False
    excluded = excluded_variants(evidence, policy)
    return (
        all(e for e, can in zip(excluded, evidence.excludable, strict=True) if can)
        and differs_after(evidence, policy) is None
    )


def mean_cosines(evidence: WeightEvidence) -> NDArray[np.float64]:
    """Mean cosine with each variant, by the Fisher transform; 0 where no answer has one."""
    fisher = evidence.features.fisher
    known = np.isfinite(fisher)
    return np.asarray(np.tanh(np.where(known, fisher, 0.0).sum(axis=1) / np.maximum(known.sum(axis=1), 1)))


def nearest(evidence: WeightEvidence, library: Library, policy: Policy) -> tuple[int, bool, bool]:
    """The variant with the largest mean cosine; whether it is exactly named; whether its family is.

    Exactly: the mean cosine is large enough and nothing that an honest stack would not have is left once the
    variant's residual is subtracted; or the cosine is so large that it leaves room for nothing else (what is far from the
    reference amplifies an engine's own noise). Its family: the whole interval of the mean is, since few answers point anywhere.
    """
    best = int(np.argmax(mean_cosines(evidence)))
    # It is the best of many: the interval is widened for all of them (Bonferroni).
    family = _cosine_interval(evidence, best, 1 - (1 - CONFIDENCE) / len(library.variants))[1] >= policy.family_cosine
    return best, _explains(evidence, best, policy), bool(family)


def _explains(evidence: WeightEvidence, index: int, policy: Policy) -> bool:
    known = int(np.isfinite(evidence.features.fisher[index]).sum())
    if known < max(policy.min_answers, KNOWN_SHARE * evidence.answers):
        return False
    cosine = mean_cosines(evidence)[index]
    least = policy.exact_name_cosine if _leaves_nothing(evidence, index, policy) else policy.exact_name_cosine_alone
    return bool(cosine >= least)


def _leaves_nothing(evidence: WeightEvidence, index: int, policy: Policy) -> bool:
    """Whether what is left once a residual is subtracted is within honest noise."""
    return bool(evidence.log_remainder[index].max() < np.log(policy.differs_e_value))


def is_mixed(evidence: WeightEvidence, among: NDArray[np.bool_] | None = None) -> bool:
    """Whether some answers (`among` these) are well inside the honest limit and some well outside it, at least two of each."""
    inside, outside = _sides(evidence, among)
    answers = evidence.answers if among is None else int(among.sum())
    return inside >= max(2, HONEST_LOOKING_SHARE * answers) and outside >= 2


def may_be_mixed(evidence: WeightEvidence, policy: Policy) -> bool:
    """Whether some answer is well inside the honest limit although others are well outside it: more of them would tell."""
    inside, outside = _sides(evidence)
    return inside > 0 and outside > 0 and evidence.answers < answers_for_consistent(evidence, policy)


def _sides(evidence: WeightEvidence, among: NDArray[np.bool_] | None = None) -> tuple[int, int]:
    limit, x = evidence.null.mean, evidence.features.log_scales
    x = x if among is None else x[among]
    return int((x < limit - np.log(1.5)).sum()), int((x > limit + np.log(2)).sum())


def check_weights(case: Case) -> Finding:
    """Judge the weights by the size and the direction of the residuals.

    The finding says what the logprobs say. Whether the weights are to blame for it depends on the prompt and is
    decided with the prompt's finding, in `weighbridge.judge.verdict`.
    """
    reference = case.plan.endpoint.reference
    if case.library is None and case.plan.reference is None:
        return Finding(
            check="weights", axis="weights", outcome="not_supported",
            summary=f"There is no reference bundle for {case.plan.endpoint.model}" if reference is None else "The reference bundle is not at hand",
            to_resolve="Name a bundle with --reference, or build one from the original weights: weighbridge reference build SPEC.toml --out DIR",
        )  # fmt: skip
    if not case.capability.reachable:
        return Finding(
            check="weights",
            axis="weights",
            outcome="error",
            summary="The endpoint did not answer" if case.capability.refused else "Nothing was asked",
            to_resolve="Run the audit again when it does",
        )
    if case.capability.top_logprobs < MIN_TOP_LOGPROBS:
        returned = case.capability.top_logprobs
        unusable = next((o.fault_detail for o in case.answers if o.fault == "bad_logprobs"), None)
        if unusable is not None:
            return Finding(
                check="weights", axis="weights", outcome="not_supported",
                summary=f"The endpoint returns logprobs that cannot be used: {unusable}",
                to_resolve="Ask the host for logprobs that are those of a distribution",
            )  # fmt: skip
        if case.texts is not None:
            return check_texts(case)
        return Finding(
            check="weights", axis="weights", outcome="not_supported",
            summary=f"The endpoint returns {'no' if returned == 0 else f'only {returned}'} logprobs, fewer than {MIN_TOP_LOGPROBS}, and no text was compared",
            to_resolve="Ask the host for logprobs, or raise --max-requests so that texts can be compared",
        )  # fmt: skip
    if case.capability.temperature_regime == "other":
        return Finding(
            check="weights", axis="weights", outcome="not_supported",
            summary=f"The logprobs are neither before nor after temperature (slope {case.capability.temperature_slope:.2f}), so their meaning is not known",
            to_resolve="Ask the host what its logprobs mean",
        )  # fmt: skip
    evidence, library, policy = case.evidence, case.library, case.plan.policy
    if library is not None and evidence is None and case.residuals is not None and case.residuals.answers:
        return Finding(
            check="weights", axis="weights", outcome="inconclusive", answers_used=case.residuals.answers,
            summary=f"The logprobs lie on a grid of {grid_step(case.residuals.endpoint_nats):g} nats, as those of no recorded honest stack do",
            to_resolve="Record an honest stack that keeps its logits in that type, or ask the host for logprobs in full precision",
        )  # fmt: skip
    if evidence is None or library is None or evidence.answers < policy.min_answers:
        used = 0 if evidence is None else evidence.answers
        repeated = 0 if case.residuals is None else case.residuals.repeated
        return Finding(
            check="weights", axis="weights", outcome="inconclusive", answers_used=used,
            summary=f"Only {used} answers with logprobs; at least {policy.min_answers} are needed"
            + (f"; {repeated} more repeat, digit by digit, what was answered to another prompt, and count once" if repeated else ""),
            to_resolve="Ask the host why different prompts get the same answer" if repeated else "Run the audit again with a larger --max-requests",
        )  # fmt: skip
    return _judged(case, evidence)


def _judged(case: Case, evidence: WeightEvidence) -> Finding:
    library, policy = case.library, case.plan.policy
    assert library is not None
    n = evidence.answers
    noise, low, high = scale_interval(evidence.features.log_scales, CONFIDENCE)
    effects = [Effect(name="effective noise", value=noise, low=low, high=high, unit="nats", confidence=CONFIDENCE)]
    bits = effective_precision(library, evidence, CONFIDENCE)
    if bits is not None:
        effects.append(bits)
    excluded = excluded_variants(evidence, policy)
    # One departure may be recorded on several engines; it is excluded where each of its recordings is.
    names = list(dict.fromkeys(name_of(v) for v in library.variants))
    left = {name_of(v) for v, out in zip(library.variants, excluded, strict=True) if not out}
    common: dict[str, Any] = {
        "check": "weights",
        "axis": "weights",
        "answers_used": n,
        "log10_e_value": float(evidence.log_total.max() / LOG10),
        "excluded": [name for name in names if name not in left],
        "not_excluded": [name for name in names if name in left],
        "details": _details(case, evidence, noise, low, high),
    }
    if differs_after(evidence, policy) is not None:
        best, exact, family = nearest(evidence, library, policy)
        # What is served is known to be something else, so there is nothing left to exclude.
        common |= {"excluded": [], "not_excluded": []}
        variant = library.variants[best]
        cosine, cosine_low, cosine_high = _cosine_interval(evidence, best)
        effects.append(
            Effect(
                name=f"cosine with {variant.id}",
                value=cosine,
                low=cosine_low,
                high=cosine_high,
                unit="1",
                confidence=CONFIDENCE,
            )
        )
        nearby = f"the residual points at {variant.id} (cosine {cosine:.2f})"
        cause: Cause | None
        if case.mixed:
            cause, text = "partial_routing", "some answers are the reference's and some are not; " + nearby
        elif exact:
            rest = "nothing else is left" if _leaves_nothing(evidence, best, policy) else "little else is left"
            cause, text = variant.departure, f"{nearby} and {rest}: {variant.description}"
        elif family:
            cause, text = variant.departure, f"{nearby}, but not only at it: of the family {variant.departure_class}"
        else:
            cause, text = (
                "none_of_these",
                f"it points at none of the {len(library.variants)} recorded variants (largest cosine {cosine:.2f}, {variant.id})",
            )
        like = (
            f", as a rounding to about {bits.value:.1f} bits a weight makes on this model" if bits is not None else ""
        )
        named = exact and cause != "partial_routing"
        return Finding(
            **common, effects=effects, outcome="inconsistent", cause=cause, exact_variant=name_of(variant) if named else None,
            family=variant.departure_class if cause == variant.departure else None,
            summary=f"The logprobs differ from every honest stack by {noise:.3g} nats (95 % interval {low:.3g} to {high:.3g}{like}); {text}",
        )  # fmt: skip
    if is_consistent(evidence, policy):
        return Finding(
            **common, effects=effects, outcome="consistent",
            summary=f"The logprobs are the reference's within {noise:.2g} nats (95 % interval {low:.2g} to {high:.2g}); honest stacks are allowed {evidence.null.limit_nats:.2g}",
        )  # fmt: skip
    if looks_like_temperature(evidence, policy):
        return Finding(
            **common, effects=effects, outcome="inconclusive",
            summary=f"The logprobs are the reference's at a temperature of about {1 / evidence.slope:.2g}, although 1 was asked for; that says nothing about the weights",
            to_resolve="Ask the host why the temperature is not honoured",
        )  # fmt: skip
    if n < ANSWERED_SHARE * evidence.asked:
        return Finding(
            **common, effects=effects, outcome="inconclusive",
            summary=f"Only {n} of {evidence.asked} probes came back with usable logprobs that do not repeat another answer; what is left out may be what would tell",
            to_resolve="Ask the host why some answers carry no logprobs, or are the same for different prompts",
        )  # fmt: skip
    return Finding(
        **common, effects=effects, outcome="inconclusive",
        summary=f"Effective noise {noise:.2g} nats after {n} answers: neither the honest library nor every departure is excluded",
        to_resolve=_more_needed(evidence, policy, n),
    )  # fmt: skip


def effective_precision(library: Library, evidence: WeightEvidence, confidence: float) -> Effect | None:
    """To how many bits a weight the size of the residual corresponds, on the ladder of this model's measured roundings.

    None where it is outside the ladder: an honest stack's noise is.
    """
    rungs = [
        (v.bits_held, float(np.nanmean(scales)))
        for v, scales in zip(library.variants, library.variant_log_scales, strict=False)
        if v.departure == "precision" and v.bits_held is not None and travels(v)
    ]
    if len(rungs) < 2:
        return None
    bits, ladder = np.array(rungs).T
    limits = np.array(scale_interval(evidence.features.log_scales, confidence))
    # The arithmetic's own noise comes on top of a rounding's: what is typical of this grid is taken off.
    own = np.exp(evidence.null.centre)
    value, high, low = effective_bits(np.log(np.sqrt(np.maximum(limits**2 - own**2, 1e-8))), bits, ladder)
    if not np.isfinite(value):
        return None
    return Effect(
        name="effective precision", value=float(value), unit="bits a weight on average", confidence=confidence,
        low=float(low) if np.isfinite(low) else None, high=float(high) if np.isfinite(high) else None,
    )  # fmt: skip


def _cosine_interval(
    evidence: WeightEvidence, index: int, confidence: float = CONFIDENCE
) -> tuple[float, float, float]:
    fisher = evidence.features.fisher[index]
    known = fisher[np.isfinite(fisher)]
    value, low, high = np.tanh(mean_interval(known, confidence)) if known.size else (0.0, 0.0, 0.0)
    return float(value), float(low), float(high)


def _more_needed(evidence: WeightEvidence, policy: Policy, n: int) -> str:
    """How many more answers would decide if the evidence went on as it came."""
    needed = []
    if evidence.log_total[-1] > 0:
        needed.append(n * (np.log(policy.differs_e_value) / evidence.log_total[-1] - 1))
    weakest = min(
        (p[-1] for p, can in zip(evidence.log_exclusion, evidence.excludable, strict=True) if can), default=0.0
    )
    if weakest > 0:
        needed.append(
            max(n * (np.log(policy.consistent_e_value) / weakest - 1), answers_for_consistent(evidence, policy) - n)
        )
    if not needed:
        return "More one-token answers of this kind would not decide it; this level cannot resolve it"
    return f"About {max(1, int(np.ceil(min(needed))))} more one-token requests, if the evidence goes on as it came"


@lru_cache(maxsize=4)
def _ladder(library: Library) -> list[dict[str, Any]]:
    """One row for each family of honest stacks, its noisiest, and one for each departure, however often it was recorded."""
    honest = sorted(
        zip(library.honest, library.honest_log_scales, strict=True), key=lambda pair: float(np.nanmean(pair[1]))
    )
    rows = {f"honest {stack.family}": (stack.id, stack, scales) for stack, scales in honest}
    for stack, scales in zip(library.variants, library.variant_log_scales, strict=False):
        rows.setdefault(name_of(stack), (name_of(stack), stack, scales))
    ladder = []
    for name, stack, scales in rows.values():
        values = scales[np.isfinite(scales)]
        low, high = np.exp(np.quantile(values, (0.05, 0.95)))
        ladder.append({
            "stack": name, "honest": stack in library.honest, "departure": stack.departure, "bits_held": stack.bits_held,
            "noise_nats": float(np.exp(values.mean())), "p05_nats": float(low), "p95_nats": float(high),
        })  # fmt: skip
    return sorted(ladder, key=lambda row: float(row["noise_nats"]))


def _details(case: Case, evidence: WeightEvidence, noise: float, low: float, high: float) -> dict[str, Any]:
    """What the report draws: the ladder of recorded stacks, the directions, and the course of the evidence."""
    library, residuals, null, policy = case.library, case.residuals, evidence.null, case.plan.policy
    assert library is not None
    assert residuals is not None
    directions = []
    for index, stack in enumerate(library.variants):
        mean, below, above = _cosine_interval(evidence, index)
        directions.append({
            "variant": stack.id, "cosine": mean, "low": below, "high": above, "honest_at_most": float(np.tanh(null.fisher_mean[index])),
        })  # fmt: skip
    return {
        "endpoint_noise_nats": {"value": noise, "low": low, "high": high},
        "null_scale_nats": null.limit_nats,
        "ladder": _ladder(library),
        "directions": directions,
        "course": [
            {
                "log10_e_size": float(s / LOG10),
                "log10_e_direction": float(d / LOG10),
                "log10_e": float(t / LOG10),
                "noise_nats": float(np.exp(x)),
            }
            for s, d, t, x in zip(
                evidence.log_size, evidence.log_direction, evidence.log_total, evidence.features.log_scales, strict=True
            )
        ],
        "same_first_token_share": float(residuals.agrees.mean()),
        "top_logprobs_used": library.top_k,
        "honest_families": library.families,
        "logprobs_mean": {
            "temperature": case.capability.temperature_regime,
            "slope_on_reference": evidence.slope,
            "grid_nats": evidence.grid_nats,
            "truncated_to": library.top_k,
            "honest_stacks_on_that_grid": [library.honest[i].id for i in null.stacks],
        },
        "causes": [row.model_dump(mode="json") for row in weigh_causes(library, evidence, policy)],
    }
