"""Are the weights the weights, where no logprobs are returned? Levels L4 and L5: the first token of an answer, as text."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from weighbridge.dialects import DIALECTS
from weighbridge.judge.case import Case
from weighbridge.judge.texts import TextEvidence, excludable
from weighbridge.judge.whole import HONEST_CHANCE, WholeEvidence
from weighbridge.records import Cause, Effect, Finding, Plan, Policy
from weighbridge.reference.bundle import StackRecord
from weighbridge.stats.evidence import first_crossing
from weighbridge.stats.mixtures import MIN_STANDING_OUT
from weighbridge.stats.residuals import share_upper_limit

CONFIDENCE = 0.95
ANSWERED_SHARE = 0.9  # of the contexts asked: what an endpoint leaves out may be what would tell
# Of the answers are one text, whatever was asked: that is a fault of a gateway and no evidence on weights.
ALIKE_SHARE = 0.8
ENOUGH_ALIKE = 10
MATCHING_SHARE = 0.75  # of the answers must be a departure's own before it is said to explain them
LOG10 = float(np.log(10))
MAY_BE_COPIES = "what comes again may be a copy (other seeds at temperature 1 gave the same text, or were not answered)"


def text_differs_after(texts: TextEvidence, policy: Policy) -> int | None:
    """After how many answers the honest stacks are rejected, at temperature 0 and at any other, or None."""
    if texts.answers < policy.min_answers or texts.alike >= ALIKE_SHARE:
        return None
    reached = first_crossing(texts.log_total, policy.differs_e_value)
    return None if reached is None else max(reached, policy.min_answers)


def whole_differs(texts: TextEvidence, whole: WholeEvidence, policy: Policy) -> bool:
    """Whether whole answers and their repeats reject the honest stacks, as it stands; never by one answer alone, nor before enough was asked for again."""
    log_e = texts.log_total[-1] + whole.log_total[-1]
    enough = whole.is_asked_again and int(whole.stand_out.sum()) >= MIN_STANDING_OUT
    return enough and bool(log_e >= np.log(policy.differs_e_value))


def named_in_whole(whole: WholeEvidence, policy: Policy) -> StackRecord | None:
    """The recorded departure that gives what stands out, where it does so better than the reference's second choices by the policy's level."""
    best = int(whole.gain_nats.argmax()) if whole.gain_nats.size else None
    if best is None or whole.gain_nats[best] < np.log(policy.differs_e_value):
        return None
    return whole.library.paths.stacks[whole.library.departures[best]]


def is_suspected(texts: TextEvidence, whole: WholeEvidence, policy: Policy) -> bool:
    """Whether an honest stack at temperature 0 is rejected, so that repeats are worth asking for: they tell another temperature."""
    log_e = texts.log_total[-1] + whole.log_cold[-1]
    return int(whole.stand_out.sum()) >= MIN_STANDING_OUT and bool(log_e >= np.log(policy.differs_e_value))


def _with_repeats(whole: WholeEvidence) -> NDArray[np.bool_]:
    return np.concatenate([whole.stand_out, np.zeros(whole.log_cold.size - whole.count, np.bool_)])


def excluded_by_text(texts: TextEvidence, policy: Policy) -> list[bool]:
    """For each departure, whether it is excluded."""
    return [first_crossing(course, policy.consistent_e_value) is not None for course in texts.log_exclusion]


def is_consistent_text(texts: TextEvidence, plan: Plan) -> bool:
    """Whether every recorded departure of the weights that texts can tell within the plan's requests is excluded."""
    policy = plan.policy
    if texts.answers < min(policy.min_answers_consistent, texts.library.cold.size):
        return False
    if (
        texts.answers < ANSWERED_SHARE * texts.asked
        or texts.alike >= ALIKE_SHARE
        or text_differs_after(texts, policy) is not None
    ):
        return False
    wanted = [
        can and is_stack for can, is_stack in zip(excludable(texts.library, plan), _are_stacks(texts), strict=True)
    ]
    excluded = excluded_by_text(texts, policy)
    return any(wanted) and all(done for done, want in zip(excluded, wanted, strict=True) if want)


def _are_stacks(texts: TextEvidence) -> list[bool]:
    return [isinstance(texts.library.departure(i), StackRecord) for i in texts.library.departures]


def text_explanation(texts: TextEvidence, policy: Policy) -> int | None:
    """The one distribution that explains the answers, or None.

    By a factor of the policy's level better than noise of any size does, and than every departure of another kind; and at temperature 0
    most answers are its own likeliest ones: what resembles it by chance, as an unknown prompt may, does not get so far.
    """
    library, gains = texts.library, texts.gain_nats
    best = max(library.departures, key=lambda i: float(gains[i]), default=None)
    level = float(np.log(policy.differs_e_value))
    if best is None or gains[best] < level or (texts.cold.count and texts.matches[best] < MATCHING_SHARE):
        return None
    others = [float(gains[i]) for i in library.departures if kind_of(texts, i) != kind_of(texts, best)]
    return best if gains[best] - max(others, default=0.0) >= level else None


def kind_of(texts: TextEvidence, index: int) -> str:
    """What a distribution is called by its kind: the class of a departure, or the id of a rendering."""
    record = texts.library.departure(index)
    return str(record.departure_class) if isinstance(record, StackRecord) else record.id


def exact_variant(texts: TextEvidence, index: int, policy: Policy) -> str | None:
    """The name of the departure itself, where it is told from all others of its kind."""
    record = texts.library.departure(index)
    if not isinstance(record, StackRecord):
        return None
    name = record.variant or record.id
    others = [
        float(texts.gain_nats[i])
        for i in texts.library.departures
        if isinstance(other := texts.library.departure(i), StackRecord) and (other.variant or other.id) != name
    ]
    clear = texts.gain_nats[index] - max(others, default=0.0) >= np.log(policy.differs_e_value)
    return name if clear else None


def check_texts(case: Case) -> Finding:
    """Judge the weights by first tokens alone."""
    texts, policy = case.texts, case.plan.policy
    assert texts is not None
    n, library = texts.answers, texts.library
    log_e = float(texts.log_total[-1]) + (float(case.whole.log_total[-1]) if case.whole is not None else 0.0)
    differing = int(texts.flips.sum())
    effects = []
    if texts.cold.count:
        low, high = _share_interval(differing, texts.cold.count)
        effects.append(Effect(name="answers at temperature 0 that are not the reference's", value=differing / texts.cold.count, low=low, high=high, unit="1", confidence=CONFIDENCE))  # fmt: skip
    records = [library.departure(i) for i in library.departures]
    names = [(r.variant or r.id) if isinstance(r, StackRecord) else None for r in records]
    # The same departure may be recorded several times: it is excluded where each of its recordings is.
    left = {name for name, done in zip(names, excluded_by_text(texts, policy), strict=True) if name and not done}
    common: dict[str, Any] = {
        "check": "weights", "axis": "weights", "answers_used": n, "effects": effects, "log10_e_value": log_e / LOG10,
        "excluded": sorted({name for name in names if name} - left), "not_excluded": sorted(left), "details": _details(case, texts) | (_whole_details(texts, case.whole) if case.whole is not None else {}),
    }  # fmt: skip
    level = "L4" if texts.is_cold else "L5"
    unusable = next((o.fault_detail for o in case.capability_answers if o.fault == "bad_logprobs"), None)
    why = "No logprobs are returned" if unusable is None else f"The logprobs cannot be used ({unusable})"
    basis = f"{why}, so first tokens were compared (level {level})"
    if text_differs_after(texts, policy) is not None:
        # Of what differs there is nothing left to exclude.
        return _differs(texts, policy, common | {"excluded": [], "not_excluded": []}, basis, differing)
    # What stands out and could not be asked for again is no clean answer either.
    whole = case.whole
    owed = whole is not None and is_suspected(texts, whole, policy) and not whole.is_asked_again
    if whole is not None and (owed or whole_differs(texts, whole, policy)):
        return _whole_differs(case, whole, common | {"excluded": [], "not_excluded": []})
    if is_consistent_text(texts, case.plan):
        what = (
            f"{texts.cold.count - differing} of {texts.cold.count} are the reference's at temperature 0, where weights of {_finest(texts, case.plan)} would often give another one"
            if texts.is_cold
            else f"{n} answers at an unknown temperature are as the reference's"
        )
        return Finding(**common, outcome="consistent", summary=f"{basis}: {what}")
    if texts.alike >= ALIKE_SHARE:
        return Finding(
            **common, outcome="inconclusive", summary=f"{basis}: {texts.alike:.0%} of {n} answers are one and the same text, whatever was asked",
            to_resolve="Ask the host whether a model answers",
        )  # fmt: skip
    if n < ANSWERED_SHARE * texts.asked:
        return Finding(
            **common, outcome="inconclusive", summary=f"Only {n} of {texts.asked} probes came back with text; what is left out may be what would tell",
            to_resolve="Ask the host why some requests are not answered",
        )  # fmt: skip
    return Finding(
        **common, outcome="inconclusive",
        summary=f"{basis}: after {n} answers neither the honest library nor every departure is excluded" + ("" if texts.is_cold else "; temperature 0 is not served, which hides small departures"),
        to_resolve=_more(case),
    )  # fmt: skip


def _differs(texts: TextEvidence, policy: Policy, common: dict[str, Any], basis: str, differing: int) -> Finding:
    library = texts.library
    what = (
        f"{basis}: {differing} of {texts.cold.count} are not the reference's at temperature 0 and come again, where an honest stack gives another one at {library.flips_allowed:.1%} at most beyond its noise"
        if texts.is_cold
        else f"{basis}: {texts.answers} answers at an unknown temperature are none of an honest stack"
    )
    best = text_explanation(texts, policy)
    record = library.departure(best) if best is not None else None
    if best is None or not isinstance(record, StackRecord):
        return Finding(**common, outcome="inconsistent", cause="none_of_these", summary=f"{what}; no recorded departure of the weights explains them")  # fmt: skip
    cause: Cause | None = record.departure
    name = exact_variant(texts, best, policy)
    matching = f", which gives {texts.matches[best]:.0%} of these answers" if texts.cold.count else ""
    return Finding(
        **common, outcome="inconsistent", cause=cause, exact_variant=name, family=record.departure_class,
        summary=f"{what}; they are those of {record.description if name else 'the family ' + str(record.departure_class)}{matching}",
    )  # fmt: skip


def _whole_differs(case: Case, whole: WholeEvidence, common: dict[str, Any]) -> Finding:
    """First tokens are as the reference's, and some whole answers are none that an honest stack gives."""
    out, asked, again = int(whole.stand_out.sum()), len(whole.returned), len(whole.kept_again)
    what = (
        f"No logprobs are returned, so whole answers were compared (level L4): {out} of {whole.count} leave the reference's own where it is sure of itself, which an honest stack does in fewer than one of {1 / HONEST_CHANCE:,.0f}; "
        f"asked for again {asked} times, they were {sum(whole.returned)} times such as an honest stack gives, and {sum(whole.kept_again)} of {again} that were the reference's own were so again"
    )
    if not case.diverted:
        return Finding(
            **common, outcome="inconclusive",
            summary=f"{what}; whether a departure of all requests is why, another prompt, texts that are changed, or where a prompt is sent, is not told",
            to_resolve="Logprobs, or raw completions",
        )  # fmt: skip
    named = named_in_whole(whole, case.plan.policy)
    if named is None:
        return Finding(
            **common, outcome="inconclusive", summary=f"{what}; other weights answered these, or the same ones with other sampling",
            to_resolve="Logprobs, or more requests",
        )  # fmt: skip
    return Finding(
        **common, outcome="inconsistent", cause="partial_routing", family=named.departure_class,
        summary=f"{what}; they are those of {named.description}, or of what gives the same",
    )  # fmt: skip


def _more(case: Case) -> str:
    """What would tell more: logprobs, where the kind of API has any."""
    if DIALECTS[case.plan.endpoint.dialect].gives_logprobs:
        return "Ask the host for logprobs, which tell in a few answers; or raise --max-requests"
    return (
        "Raise --max-requests; or audit the host's OpenAI-compatible API, where it has one, which may return logprobs"
    )


def _finest(texts: TextEvidence, plan: Plan) -> str:
    """The most bits a weight of what texts can tell, for a sentence."""
    bits = [
        r.bits_held
        for i, can in zip(texts.library.departures, excludable(texts.library, plan), strict=True)
        if can
        and isinstance(r := texts.library.departure(i), StackRecord)
        and r.departure == "precision"
        and r.bits_held
    ]
    return f"at most {max(bits):.2g} bits" if bits else "another precision"


def _share_interval(found: int, of: int) -> tuple[float, float]:
    """Clopper and Pearson's interval of a share."""
    tail = 1 - (1 - CONFIDENCE) / 2
    return 1 - share_upper_limit(of - found, of, tail), share_upper_limit(found, of, tail)


def is_left_open(case: Case, texts: TextEvidence) -> bool:
    """Whether the answers are not the reference's, and may be so because they are copies."""
    return not case.official_differs and text_differs_after(texts, case.plan.policy) is not None


def _details(case: Case, texts: TextEvidence) -> dict[str, Any]:
    """What the report draws: the course of the evidence, where it is any, and how well each recorded departure explains the answers."""
    library = texts.library
    ranked = sorted(library.departures, key=lambda i: -float(texts.gain_nats[i]))
    rows = []
    for i in ranked:
        record = library.departure(i)
        stack = isinstance(record, StackRecord)
        rows.append({
            "departure": (record.variant or record.id) if isinstance(record, StackRecord) else record.id, "recorded_as": record.id,
            "kind": record.departure_class if isinstance(record, StackRecord) else "prompt", "is_weights": stack,
            "log10_gain": float(texts.gain_nats[i]) / LOG10, "matches": float(texts.matches[i]),
        })  # fmt: skip
    course = [
        {"log10_e": float(total) / LOG10, "flips": int(flips)}
        for total, flips in zip(
            texts.log_total,
            np.concatenate([texts.flips.cumsum(), np.full(texts.drawn.count, texts.flips.sum())]),
            strict=True,
        )
    ]
    return ({} if is_left_open(case, texts) else {"text_course": course}) | {
        "text_departures": rows,
        "temperature_0_served": texts.is_cold,
        "wavering": texts.wavering,
        "drawn": texts.drawn.count,
        "flips_allowed": library.flips_allowed,
        "honest_limit_nats": library.limit_nats,
        "contexts": int(library.cold.size),
    }  # fmt: skip


def _whole_details(texts: TextEvidence, whole: WholeEvidence) -> dict[str, Any]:
    """What the report says of whole answers; their evidence goes on from that of the first tokens."""
    course = texts.log_total[-1] + whole.log_total
    return {
        "whole_answers": whole.count, "whole_kept": int(whole.kept.sum()), "whole_stand_out": int(whole.stand_out.sum()), "whole_strange": whole.strange,
        "whole_returned": [int(sum(whole.returned)), len(whole.returned)], "whole_honest_chance": HONEST_CHANCE,
        "whole_course": [{"log10_e": float(e) / LOG10, "flips": int(n)} for e, n in zip(course, _with_repeats(whole).cumsum(), strict=True)],
    }  # fmt: skip
