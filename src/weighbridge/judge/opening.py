"""Opening a case: the answers lined up with the library, and the rendering under which they are judged."""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from weighbridge.capability import DRAWN, TEXT, WHOLE
from weighbridge.judge.answers import Residuals, line_up
from weighbridge.judge.case import Case
from weighbridge.judge.checks.prompt import explain_counts
from weighbridge.judge.checks.sampling import gives_copies
from weighbridge.judge.checks.texts import exact_variant, text_differs_after, text_explanation, whole_differs
from weighbridge.judge.checks.weights import differs_after, is_mixed, mean_cosines, nearest
from weighbridge.judge.library import MIN_TOP_LOGPROBS, Library, build_rendered
from weighbridge.judge.renderings import PromptReading, has_system, read_prompt
from weighbridge.judge.sizes import WeightEvidence, weigh
from weighbridge.judge.texts import TextEvidence, build_text_library, weigh_texts
from weighbridge.judge.whole import build_whole_library, weigh_whole
from weighbridge.records import Capability, Observation, Plan, Policy, raw_twin
from weighbridge.reference.bundle import OFFICIAL, HypothesisRecord

NEAREST_TRIED = 4  # renderings under which two faults at once are looked for
Weighed = tuple[Residuals | None, WeightEvidence | None]


def open_case(plan: Plan, capability: Capability, observations: Iterable[Observation], library: Library | None) -> Case:
    """Sort the observations by what was asked, and find the rendering under which the weights can be judged."""
    by_id = {o.request_id: o for o in observations}

    def of(ids: Iterable[str]) -> list[Observation]:
        return [by_id[name] for name in ids if name in by_id]

    answers = of(r.request_id for r in plan.probe_requests)
    prompt_answers = of(r.request_id for r in plan.prompt_requests)
    raw_answers = of(raw_twin(r).request_id for r in (*plan.probe_requests, *plan.text_requests))
    sampling = {o.probe_id.removeprefix("sampling-"): o for o in of(r.request_id for r in plan.sampling_requests)}
    # Logprobs whose meaning is not known are evidence of nothing.
    usable = capability.top_logprobs >= MIN_TOP_LOGPROBS and capability.temperature_regime != "other"
    reading = None
    if library is not None:
        probes = {r.probe.id: r.probe for r in (*plan.prompt_requests, *plan.probe_requests, *plan.text_requests)}
        # A bundle without prompts of every structure has token counts all the same, of whatever was asked.
        shown = [*prompt_answers, *answers] or of(r.request_id for r in plan.text_requests)
        if not usable:
            shown = [o.model_copy(update={"top": None}) for o in shown]
        reading = read_prompt(
            library.bundle, shown, probes, plan.level, library.top_k, bfloat16_logprobs=library.bfloat16_logprobs
        )
    case = Case(
        plan=plan, capability=capability, answers=answers, library=library, residuals=None, evidence=None, prompt_answers=prompt_answers,
        raw_answers=raw_answers, sampling=sampling, reading=reading, served=OFFICIAL, official_differs=False,
        route=of(plan.route_requests), capability_answers=of(r.request_id for r in plan.capability_requests),
        text_answers=[o for name, o in by_id.items() if name.startswith((TEXT, DRAWN, WHOLE))],
    )  # fmt: skip
    if library is None:
        return case
    if not usable:
        return _by_texts(case, library, by_id)
    residuals, evidence = _weighed(library, answers, plan.policy)
    log_e = float(evidence.log_total[-1]) if evidence is not None else None
    case = replace(case, residuals=residuals, evidence=evidence, log_e_official=log_e)
    raw_residuals, raw_evidence = _weighed(library, _as_sent(library, raw_answers), plan.policy)
    case = replace(case, raw_residuals=raw_residuals, raw_evidence=raw_evidence)
    if evidence is None or differs_after(evidence, plan.policy) is None:
        return _by_structure(case, library)
    return _under_served(replace(case, official_differs=True), library, evidence)


def _by_texts(case: Case, library: Library, by_id: dict[str, Observation]) -> Case:
    """The case where only texts are compared: what is served is the official prompt, another recorded one, or it is not known."""
    policy = case.plan.policy
    known = build_text_library(library.bundle, policy)
    texts = weigh_texts(known, case.plan, by_id) if known is not None and case.text_answers else None
    if texts is None:
        return case
    # Those that no chat template touches; a host that does not serve temperature 0 does so for neither.
    raw = case.plan.model_copy(
        update={"text_requests": [raw_twin(r) for r in case.plan.text_requests], "probe_requests": []}
    )
    raw_texts = weigh_texts(texts.library, raw, by_id) if _as_sent(library, case.raw_answers) else None
    case = replace(case, texts=texts, raw_texts=raw_texts)
    copies = gives_copies(case)
    gains = texts.gain_nats[texts.library.departures]
    # Of copies all that counts is by how much a departure explains them better than any temperature.
    of_copies = min(float(texts.log_total[-1]), float(gains.max() - np.log(gains.size)))
    log_e = of_copies if copies else float(texts.log_total[-1])
    case = replace(case, log_e_official=log_e)
    if text_differs_after(texts, policy) is None:
        return _by_whole_answers(case, library, texts, by_id)
    best = text_explanation(texts, policy)
    if best is None or log_e < np.log(policy.differs_e_value):
        # What nothing explains may be copies, unless each request was seen to be answered anew.
        anew = copies is False
        return replace(case, served=None, official_differs=anew, log_e_official=log_e if anew else of_copies)
    case = replace(case, official_differs=True)
    record = texts.library.departure(best)
    if isinstance(record, HypothesisRecord):
        return replace(case, served=record.id)
    # Counts that tell of another prompt leave room for what is nearly a departure: then only an exact one is blamed on the weights.
    doubtful = case.reading is not None and _contradicted(case.reading, policy)
    return (
        replace(case, served=None)
        if doubtful and exact_variant(texts, best, policy) is None
        else replace(case, settled=True)
    )


def _by_whole_answers(case: Case, library: Library, texts: TextEvidence, by_id: dict[str, Observation]) -> Case:
    """The case with whole answers, where first tokens are not other than the reference's.

    What stands out once and is the reference's own the second time was answered otherwise; unless the prompt is another one, which may change
    from request to request.
    """
    known = build_whole_library(library.bundle, case.plan.policy)
    whole = weigh_whole(known, case.plan, by_id) if known is not None else None
    if whole is None:
        return case
    shown = whole_differs(texts, whole, case.plan.policy) and whole.is_some
    doubtful = case.reading is not None and _contradicted(case.reading, case.plan.policy)
    log_e = float(texts.log_total[-1] + whole.log_total[-1])
    return replace(case, whole=whole, diverted=shown and not doubtful, log_e_official=log_e)


def _as_sent(library: Library, raw_answers: list[Observation]) -> list[Observation]:
    """Answers to the reference's own tokens; none where the host counts others, so that it has made another prompt of them."""
    counted = [
        (o.prompt_tokens, len(library.bundle.prompt_of(o.probe_id))) for o in raw_answers if o.prompt_tokens is not None
    ]
    return raw_answers if all(count == sent for count, sent in counted) else []


def _weighed(library: Library, answers: list[Observation], policy: Policy) -> Weighed:
    if not answers:
        return None, None
    residuals = line_up(library, answers)
    return residuals, weigh(library, residuals, policy) if residuals.answers else None


def _by_structure(case: Case, library: Library) -> Case:
    """The case where the probes of the weights do not speak against the official prompt, or none is there yet.

    Another rendering is served where the answers are near to it alone: it may change only what has a system message of its own.
    """
    reading = case.reading
    near = reading.nearest() if reading is not None else None
    limit = max(null.limit_nats for null in library.nulls)
    if reading is None or near is None or near == 0:
        return case
    if not reading.is_honest(near, limit):
        # Under the official prompt there is nothing to compare, so what is nearest is not held against it in numbers.
        foreign = reading.is_foreign(0) and not reading.is_foreign(near) and reading.is_nearer(near, 0)
        other = replace(case, official_differs=True)
        return (_under(other, library, near, certain=True) or replace(other, served=None)) if foreign else case
    if not reading.is_nearer(near, 0) and not reading.explains(near, 0, limit):
        return case
    return _under(replace(case, official_differs=True), library, near, certain=True) or case


def _under_served(case: Case, library: Library, evidence: WeightEvidence) -> Case:
    """The case under the rendering that is served, where the answers are none of the reference's under the official one."""
    reading, policy = case.reading, case.plan.policy
    assert reading is not None
    if mixed_within(case):
        return replace(case, mixed=True, settled=True)
    by_counts = reading.by_counts(policy.min_counted)
    order = reading.by_distance()
    counted = [h for h in order if h in by_counts]
    if counted and 0 not in counted:
        found = _under(case, library, counted[0], certain=True)
        if found is not None:
            return found
    best = _exactly(case, library, evidence, order)
    if best is not None:
        return best
    if order and order[0] > 0 and reading.margin(order[0], 0)[0] > 0:
        found = _under(case, library, order[0], certain=order[0] in by_counts)
        if found is not None:
            return found
    # A family is recognised under a prompt that is nearly the official one as well, so the counts must not speak against it.
    if nearest(evidence, library, policy)[2] and (0 in by_counts or reading.counted < policy.min_counted):
        return case
    return replace(case, served=None)


def _exactly(case: Case, library: Library, evidence: WeightEvidence, order: list[int]) -> Case | None:
    """The case under the rendering, the official one included, with which a recorded departure of the weights explains the most.

    Two faults at once are told apart so: under any other rendering than the one that is served, more is left over.
    """
    policy, reading = case.plan.policy, case.reading
    assert reading is not None
    found: list[tuple[float, Case]] = []
    if nearest(evidence, library, policy)[1]:
        found.append((float(mean_cosines(evidence).max()), case))
    compared = 0
    for hypothesis in [h for h in order if h > 0 and reading.margin(h, 0)[2] >= policy.min_answers][:NEAREST_TRIED]:
        under = _weighed_under(case, library, hypothesis)
        if (
            under is None
            or under.evidence is None
            or under.library is None
            or under.evidence.answers < policy.min_answers
        ):
            continue
        compared += 1
        if differs_after(under.evidence, policy) is not None and nearest(under.evidence, under.library, policy)[1]:
            found.append((float(mean_cosines(under.evidence).max()), under))
    if _contradicted(reading, policy):
        found = [one for one in found if one[0] >= policy.exact_name_cosine_alone and one[1].served == OFFICIAL]
    if not found:
        return None
    best = max(found, key=lambda one: one[0])[1]
    return replace(best, settled=compared > 0 or not order)


def _weighed_under(case: Case, library: Library, hypothesis: int) -> Case | None:
    """The case with the answers that were recorded under a rendering weighed under it; None where none was."""
    assert case.reading is not None
    rendering = case.reading.hypotheses[hypothesis].id
    rendered = build_rendered(library, rendering)
    if rendered is None:
        return None
    recorded = set(rendered.probe_ids)
    residuals, evidence = _weighed(rendered, [o for o in case.answers if o.probe_id in recorded], case.plan.policy)
    return replace(case, served=rendering, library=rendered, residuals=residuals, evidence=evidence)


def _under(case: Case, library: Library, hypothesis: int, *, certain: bool) -> Case | None:
    """The case under one rendering, or None where that is not the one that is served."""
    reading, policy = case.reading, case.plan.policy
    assert reading is not None
    if not certain and not reading.is_nearer(hypothesis, 0):
        return None
    under = _weighed_under(case, library, hypothesis)
    if under is None:
        return replace(case, served=reading.hypotheses[hypothesis].id, residuals=None, evidence=None)
    if under.evidence is None or under.library is None or differs_after(under.evidence, policy) is None:
        return under
    _, exact, family = nearest(under.evidence, under.library, policy)
    # Token counts alone are no proof: another text may be as long, so a family is named only where the answers are nearer too. And
    # where counts tell of another prompt, one that is nearly a recorded one will not do: what is left could be the rest of that prompt.
    explained = exact or (family and reading.is_nearer(hypothesis, 0))
    named = explained and not _contradicted(reading, policy)
    return replace(under, settled=exact) if named else None


def _contradicted(reading: PromptReading, policy: Policy) -> bool:
    """Whether the token counts are no recorded rendering's, and are explained by another prompt."""
    enough = reading.counted >= policy.min_counted and not reading.by_counts(policy.min_counted)
    return enough and explain_counts(reading)[0] != "none_of_these"


def mixed_within(case: Case) -> bool:
    """Whether some answers are the reference's and some are not, among prompts of the same structure.

    Where only prompts without a system message of their own differ, a default one has been changed, and nothing was diverted.
    """
    evidence, residuals = case.evidence, case.residuals
    if evidence is None or residuals is None:
        return False
    probes = {r.probe.id: r.probe for r in case.plan.probe_requests}
    system = np.array([has_system(probes[probe_id]) for probe_id in residuals.probe_ids], np.bool_)
    return any(is_mixed(evidence, system == kind) for kind in (True, False))
