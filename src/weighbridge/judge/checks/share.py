"""For all requests, or for some: answers that stand out."""

from typing import Any

import numpy as np

from weighbridge.judge.case import Case
from weighbridge.judge.checks.texts import is_left_open, text_differs_after
from weighbridge.judge.checks.weights import differs_after
from weighbridge.judge.texts import TextEvidence
from weighbridge.judge.whole import HONEST_CHANCE, WholeEvidence, coarse
from weighbridge.records import Effect, Finding
from weighbridge.reference.bundle import StackRecord
from weighbridge.stats.mixtures import Rates, anytime_share_interval, share_interval
from weighbridge.stats.residuals import share_upper_limit

CONFIDENCE = 0.95


def check_share(case: Case) -> Finding:
    """For all requests, or for some: how many answers stand out."""
    evidence, policy = case.evidence, case.plan.policy
    if case.texts is not None:
        return _share_of_texts(case, case.texts)
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
            # How often what answers them would itself look honest is not known, so there is no upper limit but by that of what stands out.
            rates = Rates(false_positive=policy.outlier_share, true_positive=1.0)
            low, high = share_interval(evidence.features.log_scales > most_honest, rates, confidence=CONFIDENCE)
            effect = Effect(name="share of requests that something else answered", value=out / n, low=low, high=high, unit="1", confidence=CONFIDENCE)  # fmt: skip
            probes = [p for p, far in zip(case.residuals.probe_ids, evidence.features.log_scales > most_honest, strict=True) if far] if case.residuals is not None else []  # fmt: skip
            return Finding(
                check="share", axis="share", outcome="inconsistent", cause="partial_routing", answers_used=n, effects=[effect], details={"stand_out": probes},
                summary=f"Some of {n} answers are the reference's, {out} are further than {np.exp(most_honest):.2g} nats from it: something else answered some requests (between {low:.0%} and {high:.0%} of those that stand out so, 95 %)",
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


def _share_of_texts(case: Case, texts: TextEvidence) -> Finding:
    """Without logprobs an answer stands out where it is not the reference's; one token says little of one request."""
    n = texts.cold.count
    common: dict[str, Any] = {"check": "share", "axis": "share", "answers_used": n}
    if is_left_open(case, texts):
        return Finding(**common, outcome="not_applicable", summary="The answers differ as a whole, or are copies; by one token as text it is not told which of them something else gave")  # fmt: skip
    if text_differs_after(texts, case.plan.policy) is not None:
        return Finding(**common, outcome="not_applicable", summary="The answers differ as a whole; by one token as text it is not told which of them something else gave")  # fmt: skip
    whole = case.whole
    if whole is not None and case.diverted:
        return _share_of_whole(case, whole)
    fourbit = [i for i, d in enumerate(texts.library.departures) if _is_coarse(texts, d)]
    if n < case.plan.policy.min_answers or not texts.is_cold or not fourbit:
        return Finding(
            **common, outcome="not_supported", summary="Too few texts at temperature 0 to tell one from another"
        )
    # Each request goes its own way: what one answers and another does not stands out as well, and so may what does not come back.
    out = np.concatenate([texts.differing, np.ones(texts.cold.asked - n, np.bool_)])
    # Of the contexts that were asked, how often the 4-bit weights that do so least often answer otherwise.
    distributions = [texts.library.departures[i] for i in fourbit]
    known = texts.library.contexts.recorded[distributions][:, texts.cold.places]
    others = np.where(known, 1 - np.exp(texts.library.stays_nats[distributions][:, texts.cold.places]), 0.0)
    told = float(others.sum(axis=1)[known.any(axis=1)].min() / n) if known.any() else 0.0
    # Of first tokens and whole answers those speak that tell more; which, follows from what was asked and not from what came.
    if whole is not None and whole.count * _least_told(whole) > n * told:
        return _share_of_whole(case, whole)
    if told == 0:
        return Finding(
            **common,
            outcome="not_supported",
            summary="No recorded 4-bit weights are told by the contexts that were asked",
        )
    _, high = share_interval(out, Rates(false_positive=0.0, true_positive=told), confidence=CONFIDENCE, tails="upper")
    return Finding(
        **common, outcome="inconclusive", details={"stand_out": [texts.library.contexts.probe_ids[p] for p in texts.cold.places[texts.differing].tolist()]},
        effects=[Effect(name="upper limit of the share that recorded 4-bit weights answered", value=high, unit="1", confidence=CONFIDENCE)],
        summary=f"{int(out.sum())} of {out.size} first tokens are not the reference's or did not come, where recorded 4-bit weights give {told:.0%} others at least: such weights answered at most {high:.0%} of requests (95 % upper limit); a fainter departure, or a rarer one, would not stand out",
        to_resolve="Logprobs, or more requests: 299 of which none stands out bring the limit to 1 % of what is always told",
    )  # fmt: skip


def _share_of_whole(case: Case, whole: WholeEvidence) -> Finding:
    """A whole answer says something of its own request: how many stand out, and how many of those that 4-bit weights give would."""
    n, out = whole.count, int(whole.stand_out.sum())
    least = _least_told(whole)
    rates = Rates(false_positive=HONEST_CHANCE, true_positive=least)
    common: dict[str, Any] = {
        "check": "share", "axis": "share", "answers_used": n,
        "details": {"stand_out": [whole.library.paths.probe_ids[p] for p, far in zip(whole.places, whole.stand_out, strict=True) if far]},
    }  # fmt: skip
    if case.diverted:
        low, high = anytime_share_interval(whole.stand_out, rates, confidence=CONFIDENCE)
        effect = Effect(name="share of requests that something else answered", value=out / n, low=low, high=high, unit="1", confidence=CONFIDENCE)  # fmt: skip
        return Finding(
            **common, outcome="inconsistent", cause="partial_routing", effects=[effect],
            summary=f"{out} of {n} whole answers are none that an honest stack gives, and when these were asked for again, {sum(whole.returned)} of {len(whole.returned)} times they were such: some requests are answered otherwise, by other weights or by the same ones with other sampling (between {low:.1%} and {high:.0%} if it is at most as fine as the recorded 4-bit weights, 95 %)",
        )  # fmt: skip
    # An answer that did not come, was cut short, or is none of a model's, may have been given by anything.
    flags = np.concatenate([whole.stand_out | whole.silent, np.ones(whole.asked - n, np.bool_)])
    _, high = share_interval(flags, rates, confidence=CONFIDENCE, tails="upper")
    unclear = int(flags.sum()) - out
    return Finding(
        **common, outcome="inconclusive",
        effects=[Effect(name="upper limit of the share that recorded 4-bit weights answered", value=high, unit="1", confidence=CONFIDENCE)],
        summary=f"{out} of {n} whole answers are none that an honest stack gives" + (f", {unclear} more did not come whole or are no model's" if unclear else "")
        + f", where recorded 4-bit weights give {least:.0%} such at least: such weights answered at most {high:.0%} of requests (95 % upper limit); a fainter departure, or a rarer one, would not stand out",
        to_resolve="Logprobs, or more requests: 299 of which none stands out bring the limit to 1 % of what is always told",
    )  # fmt: skip


def _least_told(whole: WholeEvidence) -> float:
    """Of the whole answers that came, the share that stands out where the 4-bit weights give them that do so least often."""
    known = coarse(whole.library)
    return float(whole.library.told[known][:, whole.places].mean(axis=1).min()) if known else 0.0


def _is_coarse(texts: TextEvidence, index: int) -> bool:
    record = texts.library.departure(index)
    return isinstance(record, StackRecord) and record.departure_class == "int4"
