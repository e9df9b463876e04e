"""Is the prompt ours? Token counts and answers against the reference's own rendering, and against every other recorded one."""

from functools import lru_cache
from typing import Any

import numpy as np

from weighbridge.judge.case import Case
from weighbridge.judge.checks.texts import is_consistent_text
from weighbridge.judge.checks.weights import is_consistent, mean_cosines, nearest
from weighbridge.judge.renderings import MATCHING_SHARE, PromptReading, has_system, stands_ahead
from weighbridge.records import Cause, Effect, Finding
from weighbridge.reference.bundle import OFFICIAL, Bundle, rendered_id

# A slope of the counts on the official ones beyond which, with nothing else to explain it, another tokenizer is at work.
OTHER_TOKENIZER_SLOPE = 0.05
# A token more or less, where the end of one text and the start of another merge.
SLIP = 1
LEAST_OF_A_SHAPE = 4  # counts more than there are shapes of conversations: any one number fits one count
FAR_OFF = 2.0  # times further than that: beyond any noise, so that one prompt suffices
STRUCTURES_OFF = (
    2  # prompts of a structure of their own whose answers are far off, where all others are the reference's
)
# Whether a conversation has a system message of its own, and how many messages.
Shape = tuple[bool, int]
MOST_FOREIGN = 0.1  # of the returned tokens may be misspelt; the rest stands in the reference's vocabulary


def check_prompt(case: Case) -> Finding:
    """Name the rendering that was served.

    A count alone accuses nobody: hosts count differently. A prompt is called wrong only where the answers depart from the
    reference as well, and right where they do not.
    """
    reading = case.reading
    if reading is None:
        return _finding(
            "not_supported", "There is no reference to count against", to_resolve="Name or build a reference bundle"
        )
    policy = case.plan.policy
    details = _details(case, reading)
    shift = _shift(case)
    by_counts = reading.by_counts(policy.min_counted)
    if case.served is not None and case.served != OFFICIAL:
        return _other_rendering(case, reading, by_counts, details, shift)
    limit = max(null.limit_nats for null in case.library.nulls) if case.library is not None else 0.0
    off = _structures_off(case, reading, limit)
    if off:
        kinds = ", ".join(r.probe.purpose for r in case.plan.prompt_requests if r.probe.id in off)
        return _finding(
            "inconsistent", f"Prompts of some structures are not served as the official template renders them: {kinds}",
            cause="template", details=details, to_resolve="Serve the chat template that comes with the model",
        )  # fmt: skip
    if case.evidence is not None and is_consistent(case.evidence, policy):
        matching = 0 in by_counts
        text = (
            f"All token counts are those of the official template ({reading.counted} prompts), and the logprobs are those of the official prompt"
            if matching
            else "The logprobs are those of the official prompt"
            + (
                ", although the reported token counts are not"
                if reading.counted >= policy.min_counted
                else "; too few token counts"
            )
        )
        return _finding("consistent", text, details=details)
    if case.evidence is None and reading.nearest() == 0 and reading.is_honest(0, limit):
        return _finding(
            "consistent",
            "The answers are those of the official prompt, over prompts of every structure",
            details=details,
        )
    explained = _explained_by_weights(case)
    if 0 in by_counts:
        if case.served is not None:
            share = reading.matches[0]
            text = "All token counts are" if share == 1 else f"{share:.0%} of {reading.counted} token counts are"
            return _finding(
                "consistent", f"{text} those of the official template ({reading.counted} prompts)", details=details
            )
    elif explained:
        return _finding(
            "consistent",
            "A recorded variant under the official prompt explains the logprobs"
            + (", although the reported token counts are not that prompt's" if reading.counted else ""),
            details=details,
        )
    if case.served is None:
        return _unknown(case, reading, by_counts, details, shift)
    if reading.counted < policy.min_counted:
        return _finding(
            "inconclusive", f"The endpoint reported {reading.counted} token counts; {policy.min_counted} are needed", details=details,
            to_resolve="Ask the host to report usage, or raise --max-requests",
        )  # fmt: skip
    _, what, _ = explain_counts(reading)
    return _finding(
        "inconclusive", what, details=details,
        to_resolve="Logprobs that depart from the reference, or agree with it, would tell a wrong count from a wrong prompt",
    )  # fmt: skip


def _structures_off(case: Case, reading: PromptReading, limit_nats: float) -> list[str]:
    """The structures of which prompts are not served officially, where those of most are."""
    own = {r.probe.id for r in case.plan.prompt_requests}
    off = [probe_id for probe_id in reading.off(0, limit_nats) if probe_id in own]
    compared = len(own & set(reading.structures))
    if case.official_differs or 2 * len(off) > compared:
        return []
    far = set(reading.off(0, FAR_OFF * limit_nats))
    counts = zip(reading.counted_structures, reading.offsets[0], strict=True)
    miscounted = {probe_id for probe_id, offset in counts if offset != 0}
    return off if len(off) >= STRUCTURES_OFF or (miscounted | far) & set(off) else []


def _other_rendering(
    case: Case, reading: PromptReading, by_counts: list[int], details: dict[str, Any], shift: list[Effect]
) -> Finding:
    hypothesis = next(i for i, h in enumerate(reading.hypotheses) if h.id == case.served)
    record = reading.hypotheses[hypothesis]
    gain, low, n = reading.margin(hypothesis, 0)
    basis = [
        f"{n} answers are nearer to it than to the official one, by a factor of {float(f'{np.exp(gain):.2g}'):,g}"
        if np.isfinite(low)
        else ""
    ]
    if case.texts is not None:
        renderings = [h.id for h in case.texts.library.contexts.renderings]
        matches = case.texts.matches[len(case.texts.library.contexts.stacks) + renderings.index(record.id)]
        basis.append(f"{matches:.0%} of the first tokens that are recorded under it are its own")
    if hypothesis in by_counts:
        basis.append(f"the token counts of {reading.counted} prompts are its")
    elif reading.counted >= case.plan.policy.min_counted:
        basis.append("the reported token counts are not its, so they are not those of the prompt that was served")
    return _finding(
        "inconsistent", f"The prompt is rendered otherwise: {record.description} ({'; '.join(b for b in basis if b)})",
        cause=record.cause or "template", details=details, effects=shift,
        to_resolve="Serve the chat template that comes with the model",
    )  # fmt: skip


def _unknown(
    case: Case, reading: PromptReading, by_counts: list[int], details: dict[str, Any], shift: list[Effect]
) -> Finding:
    """The answers are not the reference's, and no recorded rendering or variant makes them so."""
    remedy = "Ask the host what it puts before or around the messages; raw completions, where they are offered, judge the weights without it"
    common: dict[str, Any] = {"details": details, "to_resolve": remedy}
    if by_counts and 0 not in by_counts:
        record = reading.hypotheses[by_counts[0]]
        # Any text of that length is counted so.
        cause, _, length = explain_counts(reading)
        return _finding(
            "inconsistent", f"The token counts of {reading.counted} prompts are those of another rendering, and the answers are not the reference's under it either: {record.description}, or another text of that length",
            cause=cause if cause != "none_of_these" else record.cause or "template", effects=[*shift, *_added(length)], **common,
        )  # fmt: skip
    if reading.counted >= case.plan.policy.min_counted and 0 not in by_counts:
        cause, what, length = explain_counts(reading)
        shift = [*shift, *_added(length)]
        foreign = _foreign_share(case)
        if cause == "none_of_these" and foreign > MOST_FOREIGN:
            cause = "other_model"
            what += f"; {foreign:.0%} of the returned tokens are none of the reference's vocabulary: another tokenizer"
        # Counts that follow nothing may be estimates, and say nothing of the prompt.
        if cause != "none_of_these":
            return _finding("inconsistent", what, cause=cause, effects=shift, **common)
    if _default_changed(case, reading):
        text = "Prompts with a system message of their own are answered as the reference does, and others are not: another default system prompt"
        return _finding("inconsistent", text, cause="hidden_prompt", effects=shift, **common)
    leaning = reading.leans()
    if leaning is not None and leaning[1] > _nearest_cosine(case):
        record = reading.hypotheses[leaning[0]]
        return _finding(
            "inconsistent", f"The answers lean as they do under another prompt (cosine {leaning[1]:.2f} with {record.description}), and are not its: an unknown text stands before the conversation",
            cause="hidden_prompt" if record.cause == "hidden_prompt" or _stands_ahead(case, record.id) else "template", effects=shift, **common,
        )  # fmt: skip
    if _raw_is_consistent(case):
        text = "Sent as the reference's own tokens, by raw completions, the probes are answered as the reference does, and through chat they are not: chat puts another text around the messages, of no recorded kind, or something else answers there"
        return _finding("inconsistent", text, cause="none_of_these", effects=shift, **common)
    copies = "" if case.official_differs else ", or copies of what was drawn at another temperature"
    return _finding(
        "inconclusive",
        f"The answers are not the reference's, and no recorded rendering or departure explains them: another prompt, or other weights{copies}"
        + (
            "; the reported token counts are the official ones, which are the host's own word" if 0 in by_counts else ""
        ),
        effects=shift,
        **common,
    )


def _raw_is_consistent(case: Case) -> bool:
    """Whether the weights are the reference's where no chat template stands in between."""
    if case.raw_texts is not None:
        return is_consistent_text(case.raw_texts, case.plan)
    return case.raw_evidence is not None and is_consistent(case.raw_evidence, case.plan.policy)


def _added(length_tokens: float | None) -> list[Effect]:
    return (
        [] if length_tokens is None else [Effect(name="length of what was added", value=length_tokens, unit="tokens")]
    )


def _foreign_share(case: Case) -> float:
    """The share of returned tokens that the reference's tokenizer does not have."""
    if case.library is None:
        return 0.0
    known = vocabulary_names(case.library.bundle)
    names = [t.bytes_hex for o in (*case.prompt_answers, *case.answers) for t in o.top or [] if t.bytes_hex]
    return sum(name not in known for name in names) / len(names) if names else 0.0


@lru_cache(maxsize=2)
def vocabulary_names(bundle: Bundle) -> frozenset[str]:
    """Every token of a tokenizer, as its bytes in hexadecimal digits."""
    return frozenset(token.hex() for token in bundle.vocabulary)


def _stands_ahead(case: Case, rendering: str) -> bool:
    """Whether a rendering differs only in what stands before the user's words."""
    if case.library is None:
        return False
    bundle = case.library.bundle
    asked = [o.probe_id for o in (*case.prompt_answers, *case.answers)]
    recorded = [p for p in asked if rendered_id(p, rendering) in bundle.probe_index]
    return bool(recorded) and all(stands_ahead(bundle, rendering, p) for p in recorded)


def _nearest_cosine(case: Case) -> float:
    """The largest mean cosine with a recorded variant of the weights."""
    return float(mean_cosines(case.evidence).max()) if case.evidence is not None else 0.0


def explain_counts(reading: PromptReading) -> tuple[Cause, str, float | None]:
    """What the difference between reported and official counts looks like, and the length of what was added, where it is one."""
    offsets, n = reading.offsets[0], reading.counted
    by_shape = _by_shape(reading)
    if by_shape is not None:
        return _explain_shapes(by_shape, n)
    slope = _slope(reading)
    if slope is not None and abs(slope) > OTHER_TOKENIZER_SLOPE:
        return (
            "none_of_these", f"The token counts of {n} prompts are {1 + slope:.2f} times the official ones: another tokenizer, or an estimate", None,
        )  # fmt: skip
    if (offsets > 0).all():
        return (
            "hidden_prompt", f"Every prompt is counted longer than the official rendering, by {offsets.min()} to {offsets.max()} tokens that vary from prompt to prompt ({n} prompts): something is added that goes with the text",
            float(np.median(offsets)),
        )  # fmt: skip
    return (
        "none_of_these", f"The token counts of {n} prompts follow no recorded rendering: another tokenizer, another prompt, or counts that are estimated", None,
    )  # fmt: skip


def _explain_shapes(by_shape: dict[Shape, int], n: int) -> tuple[Cause, str, float | None]:
    """What offsets that go with the shape of a conversation, whatever its text says, look like."""
    modes: list[int] = []
    for kind in (False, True):
        of_kind = [offset for (own, _), offset in by_shape.items() if own == kind]
        if of_kind and max(of_kind) - min(of_kind) > SLIP:
            listed = ", ".join(
                f"{offset:+d} for {turns} message{'s' * (turns > 1)}{' with a system message' * own}"
                for (own, turns), offset in sorted(by_shape.items())
            )
            return (
                "template", f"The prompts are counted otherwise than the official rendering by what goes with the number of messages, whatever they say (tokens: {listed}; {n} prompts): another template",
                None,
            )  # fmt: skip
        modes += of_kind[:1]
    if len(modes) == 2 and modes[1] == 0:
        return (
            "hidden_prompt", f"Prompts without a system message are counted {modes[0]:+d} tokens against the official rendering and others as they should be ({n} prompts): another default system prompt",
            float(modes[0]),
        )  # fmt: skip
    if min(modes) >= 0 < max(modes):
        longer = f"{modes[0]}" if len(set(modes)) == 1 else " or ".join(map(str, modes))
        where = "" if len(set(modes)) == 1 else " (without, and with, a system message of their own)"
        return (
            "hidden_prompt", f"Every prompt is counted {longer} tokens longer than the official rendering{where}, over {n} prompts of every structure: text of that length is added, whatever the user writes, if the host counts truly",
            float(max(modes)),
        )  # fmt: skip
    return (
        "template", f"The prompts differ from the official rendering by constants ({', '.join(f'{m:+d}' for m in modes)} tokens over {n} prompts), as no recorded rendering does",
        None,
    )  # fmt: skip


def _by_shape(reading: PromptReading) -> dict[Shape, int] | None:
    """By how much conversations of each shape are counted otherwise, the most frequent shapes first; None where that varies with their text."""
    shapes: dict[Shape, list[int]] = {}
    for own, turns, offset in zip(reading.has_system, reading.turns, reading.offsets[0], strict=True):
        shapes.setdefault((bool(own), int(turns)), []).append(int(offset))
    if reading.counted - len(shapes) < LEAST_OF_A_SHAPE:
        return None
    modes = {
        shape: _mode(offsets) for shape, offsets in sorted(shapes.items(), key=lambda item: len(item[1]), reverse=True)
    }
    apart = [abs(offset - modes[shape]) for shape, offsets in shapes.items() for offset in offsets]
    largest = next(iter(modes))
    of_largest = (reading.has_system == largest[0]) & (reading.turns == largest[1])
    # Counts in proportion to the text would have shown, had they been off by as much as counts that merge a token.
    slips_tell = OTHER_TOKENIZER_SLOPE * float(np.ptp(reading.official_tokens[of_largest])) > 2 * SLIP
    slip = SLIP if slips_tell else 0
    return modes if any(modes.values()) and np.mean([a <= slip for a in apart]) >= MATCHING_SHARE else None


def _mode(values: Any) -> int:
    found, times = np.unique(values, return_counts=True)
    return int(found[times.argmax()])


def _slope(reading: PromptReading) -> float | None:
    """How the offsets grow with the prompt, where they do so nearly in proportion."""
    official, offsets = reading.official_tokens.astype(float), reading.offsets[0].astype(float)
    if offsets.std() == 0 or official.std() == 0:
        return None
    correlation = float(np.corrcoef(official, offsets)[0, 1])
    return float(np.polyfit(official, offsets, 1)[0]) if correlation**2 > 0.8 else None


def _explained_by_weights(case: Case) -> bool:
    """Whether a recorded variant under the official prompt leaves nothing over."""
    if not case.official_differs or case.served != OFFICIAL or case.evidence is None or case.library is None:
        return False
    exact = nearest(case.evidence, case.library, case.plan.policy)[1]
    return exact or case.mixed


def _default_changed(case: Case, reading: PromptReading) -> bool:
    """Whether only prompts without a system message of their own depart from the reference."""
    if case.library is None:
        return False
    probes = {r.probe.id: r.probe for r in (*case.plan.prompt_requests, *case.plan.probe_requests)}
    own = np.array([has_system(probes[p]) for p in reading.structures], np.bool_)
    x = reading.log_scales[0]
    limit = max(float(np.log(null.limit_nats)) for null in case.library.nulls)
    return bool(own.sum() >= 2 and (~own).sum() >= 2 and (x[own] < limit).all() and (x[~own] > limit).mean() > 0.9)


def _shift(case: Case) -> list[Effect]:
    """How far from the official prompt's answers the answers are, as served."""
    evidence = case.evidence
    if evidence is None or not case.official_differs or case.served is not None:
        return []
    return [Effect(name="shift of the answers", value=float(np.exp(evidence.features.log_scales.mean())), unit="nats")]


def _details(case: Case, reading: PromptReading) -> dict[str, Any]:
    """What the report tabulates: every hypothesis, and what counts and answers say of it."""
    scales = reading.log_scales
    everywhere = np.isfinite(scales).all(axis=0) if scales.size else np.zeros(0, np.bool_)
    rows = []
    for i, hypothesis in enumerate(reading.hypotheses):
        row: dict[str, Any] = {
            "id": hypothesis.id, "description": hypothesis.description, "match_share": float(reading.matches[i]),
            "noise_nats": float(np.exp(scales[i, everywhere].mean())) if everywhere.any() else None,
        }  # fmt: skip
        rows.append(row)
    nearest_first = sorted(range(len(rows)), key=lambda i: (rows[i]["noise_nats"] or 0.0, -rows[i]["match_share"], i))
    for order, i in enumerate(nearest_first):
        rows[i]["order"] = order
    offsets = reading.offsets[0] if reading.counted else None
    return {
        "counted": reading.counted,
        "answers_compared": int(everywhere.sum()),
        "served": case.served,
        "hypotheses": rows,
        "offset_from_official": None if offsets is None else {
            "median": float(np.median(offsets)), "smallest": int(offsets.min()), "largest": int(offsets.max()),
        },
    }  # fmt: skip


def _finding(outcome: Any, summary: str, **more: Any) -> Finding:
    return Finding(check="prompt", axis="prompt", outcome=outcome, summary=summary, **more)
