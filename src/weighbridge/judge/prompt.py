"""Is the prompt ours? Token counts against the reference's own rendering under each hypothesis."""

from typing import Any

import numpy as np

from weighbridge.judge.case import Case
from weighbridge.judge.weights import differs_after, explaining_rendering, is_consistent, nearest
from weighbridge.records import Cause, Finding
from weighbridge.reference.bundle import Bundle

MATCHING_SHARE = 0.95


def check_prompt(case: Case) -> Finding:
    """Compare the endpoint's prompt token counts with the bundle's.

    A count alone accuses nobody: hosts count differently. A rendering is called wrong only where the logprobs
    depart from the reference as well, and right where they do not.
    """
    bundle = case.library.bundle if case.library is not None else None
    if bundle is None:
        return _finding(
            "not_supported", "There is no reference to count against", to_resolve="Name or build a reference bundle"
        )
    official_by_logprobs = case.evidence is not None and is_consistent(case.evidence, case.plan.policy)
    departs = case.evidence is not None and differs_after(case.evidence, case.plan.policy) is not None
    # A recorded variant that leaves nothing over does so under the official prompt alone.
    explained = rendering = None
    if departs and case.evidence is not None and case.library is not None:
        explained = nearest(case.evidence, case.library, case.plan.policy)[1]
        rendering = explaining_rendering(case.evidence, case.library, case.plan.policy)
    if rendering is not None:
        return _finding(
            "inconsistent", f"The logprobs are those of {rendering.description}, whatever the token counts say", cause=rendering.departure
        )  # fmt: skip
    counted = [o for o in case.answers if o.prompt_tokens is not None and o.probe_id in bundle.probe_index]
    if len(counted) < case.plan.policy.min_counted:
        if official_by_logprobs:
            return _finding("consistent", "Too few token counts, but the logprobs are those of the official prompt")
        return _finding(
            "inconclusive", f"The endpoint reported {len(counted)} token counts; {case.plan.policy.min_counted} are needed",
            to_resolve="Ask the host to report usage, or raise --max-requests",
        )  # fmt: skip
    counts = np.array([o.prompt_tokens for o in counted], np.int64)
    rows = np.array([bundle.probe_index[o.probe_id] for o in counted], np.int64)
    expected = bundle.prompt_tokens[:, rows]
    if case.plan.level == "L2":  # the answer is generated, not sent
        expected = expected - np.array([bundle.answer_tokens(o.probe_id) for o in counted], np.int64)
    offsets = counts - expected
    matches = (offsets == 0).mean(axis=1)
    details: dict[str, Any] = {
        "counted": len(counted),
        "hypotheses": [
            {"id": h.id, "description": h.description, "match_share": float(m)}
            for h, m in zip(bundle.manifest.hypotheses, matches, strict=True)
        ],
        "offset_from_official": {
            "median": float(np.median(offsets[0])),
            "smallest": int(offsets[0].min()),
            "largest": int(offsets[0].max()),
        },
    }
    if matches[0] >= MATCHING_SHARE:
        return _finding("consistent", f"All token counts are those of the official template ({len(counted)} prompts)" if matches[0] == 1
                        else f"{matches[0]:.0%} of {len(counted)} token counts are those of the official template", details=details)  # fmt: skip
    if official_by_logprobs:
        return _finding(
            "consistent",
            "The logprobs are those of the official prompt, although the reported token counts are not",
            details=details,
        )
    if explained:
        return _finding(
            "consistent",
            "A recorded variant under the official prompt explains the logprobs, although the reported token counts are not that prompt's",
            details=details,
        )
    cause, what = _explain(bundle, [o.probe_id for o in counted], offsets, case)
    if not departs:
        return _finding(
            "inconclusive", what, details=details,
            to_resolve="Logprobs that depart from the reference, or agree with it, would tell a wrong count from a wrong prompt",
        )  # fmt: skip
    return _finding("inconsistent", what, cause=cause, details=details)


def _explain(bundle: Bundle, probe_ids: list[str], offsets: Any, case: Case) -> tuple[Cause, str]:
    matches = (offsets == 0).mean(axis=1)
    best = int(np.argmax(matches))
    hypothesis = bundle.manifest.hypotheses[best]
    n = len(probe_ids)
    if best > 0 and matches[best] >= MATCHING_SHARE:
        return (
            hypothesis.cause or "template",
            f"The token counts of {n} prompts are those of another rendering: {hypothesis.description}",
        )
    with_system = {r.probe.id: r.probe.messages[0].role == "system" for r in case.plan.probe_requests}
    groups = [offsets[0][[with_system.get(p, False) == kind for p in probe_ids]] for kind in (False, True)]
    groups = [g for g in groups if g.size]
    modes = []
    for group in groups:
        found, times = np.unique(group, return_counts=True)
        modes.append(int(found[times.argmax()]))
    if all((g == mode).mean() >= MATCHING_SHARE for g, mode in zip(groups, modes, strict=True)):
        extra = modes[0]
        if min(modes) > 0:
            longer = f"{extra}" if len(set(modes)) == 1 else " or ".join(map(str, modes))
            return (
                "hidden_prompt",
                f"Every prompt is counted {longer} tokens longer than the official rendering ({n} prompts), and the logprobs depart from the reference: a prompt of about that length has been added, if the host counts truly",
            )
        return (
            "template",
            f"The prompts differ from the official rendering by constants ({', '.join(f'{m:+d}' for m in modes)} tokens over {n} prompts), as no recorded rendering does",
        )
    if case.residuals is not None and case.residuals.listed_share.size and case.residuals.listed_share.mean() < 0.5:
        return (
            "other_model",
            f"The token counts of {n} prompts follow no rendering, and most returned tokens are unknown to the reference: another tokenizer",
        )
    return (
        "none_of_these",
        f"The token counts of {n} prompts follow no recorded rendering: another tokenizer, another prompt, or counts that are estimated",
    )


def _finding(outcome: Any, summary: str, **more: Any) -> Finding:
    return Finding(check="prompt_tokens", axis="prompt", outcome=outcome, summary=summary, **more)
