"""The judge on the embedded bundle's own recordings: every stack in turn is served, and what it was recorded as is left out.

The answers are recorded rows, so no endpoint is involved. Whatever stands for a family, a variant or a rendering is read from the
bundle; where one is named here, the bundle has to hold it.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
from numpy.typing import NDArray

from weighbridge.judge.case import Case
from weighbridge.judge.causes import CauseEvidence, weigh_causes
from weighbridge.judge.checks.weights import differs_after
from weighbridge.judge.library import COARSEST_GRID_NATS, Library, build_library, build_rendered
from weighbridge.judge.opening import open_case
from weighbridge.judge.policy import load_policy
from weighbridge.judge.power import Resolution, resolutions
from weighbridge.judge.sizes import WeightEvidence
from weighbridge.judge.verdict import judge
from weighbridge.plan import make_plan
from weighbridge.probes import draw
from weighbridge.records import (
    Capability,
    Endpoint,
    Finding,
    Observation,
    Plan,
    PlannedRequest,
    Probe,
    TopToken,
    Verdict,
)
from weighbridge.reference.bundle import JUDGED, OFFICIAL, Bundle, StackRecord, load_bundle, rendered_id
from weighbridge.stats.grid import round_to_bfloat16

Floats = NDArray[np.float64]
TOP = 20
ASKED = 100  # what an audit sends by default
POLICY = load_policy("strict")
SEEDS = ("first", "second")


@cache
def bundle() -> Bundle:
    return load_bundle("smollm2-135m-instruct")


def stacks_where(choose: Callable[[StackRecord], bool]) -> list[str]:
    return [stack.id for stack in bundle().manifest.stacks if choose(stack)]


def stack_of(stack_id: str) -> StackRecord:
    return bundle().manifest.stacks[bundle().stack_index[stack_id]]


def is_float32_or_honest(stack: StackRecord) -> bool:
    return stack.departure is None or not stack.family.endswith("/bfloat16")


def bundle_of(stack_ids: frozenset[str]) -> Bundle:
    """The bundle as if only these stacks had been recorded."""
    keep = [i for i, stack in enumerate(bundle().manifest.stacks) if stack.id in stack_ids]
    manifest = bundle().manifest.model_copy(update={"stacks": [bundle().manifest.stacks[i] for i in keep]})
    return dataclasses.replace(bundle(), manifest=manifest, logprobs_nats=bundle().logprobs_nats[keep])


@cache
def library_of(stack_ids: frozenset[str], *, bfloat16_logprobs: bool = False) -> Library:
    return build_library(bundle_of(stack_ids), POLICY, TOP, bfloat16_logprobs=bfloat16_logprobs)


def library_where(choose: Callable[[StackRecord], bool]) -> Library:
    return library_of(frozenset(stacks_where(choose)))


def whole_library(*, bfloat16_logprobs: bool = False) -> Library:
    return library_of(frozenset(stacks_where(lambda _: True)), bfloat16_logprobs=bfloat16_logprobs)


@cache
def recorded(stack_id: str, rendering: str = OFFICIAL, counted_as: str = OFFICIAL) -> tuple[Observation, ...]:
    """What an endpoint with this stack would have answered to the one-token probes under a rendering; and how it counts prompts."""
    pool = bundle().pool_at("L3", rendering)
    assert pool is not None
    return tuple(
        answer_of(stack_id, probe_id.split("@")[0], rendering, counted_as) for probe_id in bundle().usable_probes(pool)
    )


def answer_of(stack_id: str, probe_id: str, rendering: str, counted_as: str) -> Observation:
    row = bundle().row_index[rendered_id(probe_id, rendering)]
    values = bundle().logprobs_nats[bundle().stack_index[stack_id], row].astype(np.float64)
    columns = np.argsort(-np.nan_to_num(values, nan=-np.inf), kind="stable")[:TOP]
    top = [
        TopToken(
            bytes_hex=bundle().vocabulary[bundle().token_ids[row, column]].hex(),
            logprob_nats=min(0.0, float(values[column])),
        )
        for column in columns
        if np.isfinite(values[column])
    ]
    hypothesis = [h.id for h in bundle().manifest.hypotheses].index(counted_as)
    return Observation(
        request_id=probe_id, probe_id=probe_id, answered=True, status=200, attempts=1, latency_s=0.1, completion_tokens=1,
        prompt_tokens=int(bundle().prompt_tokens[hypothesis, bundle().probe_index[probe_id]]), top=top,
    )  # fmt: skip


def drawn(
    stack_id: str, seed: str, asked: int = ASKED, *, rendering: str = OFFICIAL, counted_as: str = OFFICIAL
) -> list[Observation]:
    """The first answers in the order that a seed gives."""
    answers = {observation.probe_id: observation for observation in recorded(stack_id, rendering, counted_as)}
    return [answers[probe_id] for probe_id in draw(sorted(answers), seed)][:asked]


def with_logprobs(answers: list[Observation], change: Callable[[Floats], Floats]) -> list[Observation]:
    """The same answers with every list of logprobs changed."""
    out = []
    for answer in answers:
        assert answer.top is not None
        values = np.minimum(change(np.array([token.logprob_nats for token in answer.top])), 0.0)
        top = [
            token.model_copy(update={"logprob_nats": float(value)})
            for token, value in zip(answer.top, values, strict=True)
        ]
        out.append(answer.model_copy(update={"top": top}))
    return out


def rounded_to(step_nats: float) -> Callable[[Floats], Floats]:
    return lambda values: np.round(values / step_nats) * step_nats


@dataclass(frozen=True)
class Judged:
    """What an audit of some answers came to."""

    case: Case
    verdict: Verdict
    findings: dict[str, Finding]

    @property
    def evidence(self) -> WeightEvidence:
        assert self.case.evidence is not None
        return self.case.evidence

    @property
    def causes(self) -> dict[str, CauseEvidence]:
        assert self.case.library is not None
        return {row.key: row for row in weigh_causes(self.case.library, self.evidence, POLICY)}


@cache
def plan() -> Plan:
    endpoint = Endpoint(name="recorded", base_url="http://127.0.0.1:1/v1", model="recorded")
    return make_plan(endpoint, POLICY, bundle(), seed="x")


@cache
def probes() -> dict[str, Probe]:
    return {request.probe.id: request.probe for request in (*plan().prompt_requests, *plan().probe_requests)}


def judged(
    answers: list[Observation], library: Library, *, top_logprobs: int = TOP, prompt_answers: tuple[Observation, ...] = ()
) -> Judged:  # fmt: skip
    """An audit that asked for these answers in this order, after those to the probes of the prompt's structure."""
    capability = Capability(
        reachable=True, top_logprobs=top_logprobs, temperature_regime="before_temperature", usage_reported=True
    )
    prompt_requests, numbered_first = _asked("prompt", prompt_answers)
    probe_requests, numbered = _asked("probe", answers)
    asked = plan().model_copy(update={"prompt_requests": prompt_requests, "probe_requests": probe_requests})
    case = open_case(asked, capability, [*numbered_first, *numbered], library)
    findings, verdict = judge(
        case,
        requests_sent=len(answers),
        stopped_because="probes_used_up",
        all_observations=answers,
        observations_sha256="0" * 64,
    )
    return Judged(case, verdict, {finding.check: finding for finding in findings.findings})


def _asked(stage: str, answers: Sequence[Observation]) -> tuple[list[PlannedRequest], list[Observation]]:
    names = [f"{stage}-{n:04d}" for n in range(len(answers))]
    return (
        [PlannedRequest(request_id=n, probe=probes()[o.probe_id]) for n, o in zip(names, answers, strict=True)],
        [o.model_copy(update={"request_id": n}) for n, o in zip(names, answers, strict=True)],
    )


def judged_at_the_stop(answers: list[Observation], library: Library) -> Judged:
    """The same as soon as the honest library is rejected, which is when an audit stops."""
    whole = judged(answers, library)
    reached = differs_after(whole.evidence, POLICY)
    assert reached is not None
    return judged(answers[: max(reached, POLICY.min_counted)], library)


HONEST = stacks_where(lambda s: s.departure is None and s.id != bundle().manifest.reference_stack)
REFERENCE_FAMILY = stack_of(bundle().manifest.reference_stack).family
UNRECORDED = [stack_id for stack_id in HONEST if stack_of(stack_id).family != REFERENCE_FAMILY]
# The noisiest of each family and type of logits.
FEW_HONEST = list({
    (stack.family, stack.precision.logits): stack.id
    for stack in sorted(map(stack_of, UNRECORDED), key=lambda stack: stack.noise_nats or 0.0)
}.values())  # fmt: skip


# -- honest stacks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("stack_id", UNRECORDED)
def test_an_honest_stack_whose_family_nobody_recorded_is_consistent(stack_id: str, seed: str) -> None:
    family = stack_of(stack_id).family
    library = library_where(lambda s: s.departure is not None or s.family != family)
    assert stack_id not in {stack.id for stack in library.honest}
    found = judged(drawn(stack_id, seed), library)
    assert found.verdict.verdict == "consistent"
    assert (found.verdict.axes["weights"], found.verdict.axes["prompt"]) == ("consistent", "consistent")
    strongest = max(found.causes.values(), key=lambda row: row.log10_e_value)
    assert strongest.log10_e_value < 1
    for row in found.causes.values():
        assert row.log10_bayes_factor is None or row.log10_bayes_factor < 1


@pytest.mark.parametrize("asked", [POLICY.min_answers, 10])
@pytest.mark.parametrize("stack_id", FEW_HONEST)
def test_an_honest_stack_is_not_accused_early(stack_id: str, asked: int) -> None:
    family = stack_of(stack_id).family
    library = library_where(lambda s: s.departure is not None or s.family != family)
    for seed in range(4):
        assert judged(drawn(stack_id, f"early-{seed}", asked), library).verdict.verdict == "inconclusive"


@pytest.mark.parametrize("stack_id", FEW_HONEST)
def test_logprobs_written_in_bfloat16_are_no_difference(stack_id: str) -> None:
    answers = with_logprobs(drawn(stack_id, "bfloat16"), round_to_bfloat16)
    for library in (whole_library(), whole_library(bfloat16_logprobs=True)):
        found = judged(answers, library)
        assert found.verdict.verdict != "differs"
        assert found.evidence.log_total.max() < np.log(10)


@pytest.mark.parametrize("stack_id", ["int8", "fp8-e4m3-bfloat16"])
def test_a_departure_is_found_in_logprobs_written_in_bfloat16(stack_id: str) -> None:
    answers = with_logprobs(drawn(stack_id, "bfloat16"), round_to_bfloat16)
    assert judged(answers, whole_library(bfloat16_logprobs=True)).verdict.verdict == "differs"


def test_writing_logprobs_in_bfloat16_hardly_widens_what_is_honest() -> None:
    plain, written = whole_library(), whole_library(bfloat16_logprobs=True)
    most = max(null.limit_nats for null in plain.nulls)
    assert max(null.limit_nats for null in written.nulls) < 1.5 * most


# -- departures ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("variant", ["int8", "fp8-e4m3"])
def test_a_departure_recorded_in_float32_is_named_when_it_is_served_in_bfloat16(variant: str, seed: str) -> None:
    library = library_where(is_float32_or_honest)
    assert f"{variant}-bfloat16" not in {stack.id for stack in library.variants}
    answers = drawn(f"{variant}-bfloat16", seed)
    for found in (judged(answers, library), judged_at_the_stop(answers, library)):
        assert (found.verdict.verdict, found.verdict.cause) == ("differs", "precision")
        assert (found.verdict.exact_variant, found.verdict.family) == (variant, variant.split("-")[0])
    assert found.verdict.answers_used <= 10


UNNAMED = [
    "int8", "fp8-e4m3", "w8a8-fp8", "int4-g64", "nf4-g64", "mxfp4", "int3-g64", "kv-int4", "depth-24", "q8_0",
]  # fmt: skip


@pytest.mark.parametrize("variant", UNNAMED)
def test_a_departure_that_nobody_recorded_is_given_no_others_name(variant: str) -> None:
    library = library_where(lambda s: s.variant != variant)
    served = stacks_where(lambda s: s.variant == variant)
    assert served
    for stack_id in served:
        answers = drawn(stack_id, "unnamed", 60)
        for found in (judged(answers, library), judged_at_the_stop(answers, library)):
            assert found.verdict.verdict == "differs"
            assert found.verdict.exact_variant is None


@pytest.mark.parametrize("seed", SEEDS)
def test_the_answers_speak_most_for_the_cause_that_is_served(seed: str) -> None:
    found = judged(drawn("int8-bfloat16", seed), library_where(is_float32_or_honest))
    rows = found.causes
    assert max(rows.values(), key=lambda row: row.log10_bayes_factor or -np.inf).key == "int8"
    assert rows["int8"].log10_e_value >= 3
    assert rows["int8"].nearest == "int8"
    # Something recorded is served: nothing says that none of it is, and its own row says it better.
    none, named = rows["none_of_these"].log10_bayes_factor, rows["int8"].log10_bayes_factor
    assert none is not None
    assert named is not None
    assert rows["none_of_these"].log10_e_value < 0
    assert none < named - 3


def test_a_departure_that_nobody_recorded_is_none_of_these() -> None:
    rows = judged(drawn("int3-g64", "none"), library_where(lambda s: s.variant != "int3-g64")).causes
    assert rows["none_of_these"].log10_e_value >= 3
    assert list(rows)[-1] == "none_of_these"


# -- renderings ------------------------------------------------------------------------------------------------

RENDERINGS = [h.id for h in bundle().manifest.hypotheses if h.id != OFFICIAL]
# No probe of the weights has a system message of its own, so this one shows in the probes of the prompt's structure alone.
UNSEEN = "system-dropped"
SEEN = [rendering for rendering in RENDERINGS if rendering != UNSEEN]


def assert_named(found: Judged, rendering: str) -> None:
    record = next(h for h in bundle().manifest.hypotheses if h.id == rendering)
    prompt = found.findings["prompt"]
    assert (found.verdict.verdict, found.verdict.cause) == ("differs", record.cause)
    assert (prompt.outcome, prompt.cause) == ("inconsistent", record.cause)
    assert prompt.details["served"] == found.case.served == rendering
    assert record.description in prompt.summary


@pytest.mark.parametrize("rendering", RENDERINGS)
def test_another_rendering_is_named_by_the_answers_although_its_tokens_are_counted_as_the_official_ones(
    rendering: str,
) -> None:
    pool = bundle().pool_at("prompt")
    assert pool is not None
    structure = tuple(
        answer_of("hf-float32", probe_id, rendering, OFFICIAL) for probe_id in bundle().usable_probes(pool)
    )
    answers = drawn("hf-float32", "prompt", rendering=rendering)
    found = judged(answers, whole_library(), prompt_answers=structure)
    assert_named(found, rendering)
    # What was asked is known, so the weights are judged by it, and they are the reference's.
    assert found.findings["weights"].outcome == "consistent"
    assert found.findings["weights"].summary.startswith("Under the prompt that was served: the logprobs")
    # The counts are then those of another prompt than the one that was proven to be served.
    assert found.findings["counting"].outcome == "inconsistent"


@pytest.mark.parametrize("rendering", SEEN)
@pytest.mark.parametrize("stack_id", ["hf-bfloat16", "emulated-outputs"])
def test_honest_weights_are_cleared_under_another_rendering(stack_id: str, rendering: str) -> None:
    found = judged(drawn(stack_id, "cleared", rendering=rendering, counted_as=rendering), whole_library())
    assert_named(found, rendering)
    assert (found.verdict.axes["weights"], found.verdict.exact_variant) == ("consistent", None)
    assert found.findings["counting"].outcome == "consistent"


@pytest.mark.parametrize("rendering", SEEN)
@pytest.mark.parametrize("stack_id", ["int8", "fp8-e4m3", "int4-g64", "nf4-g64", "llamacpp-q4_0"])
def test_altered_weights_are_named_under_another_rendering(stack_id: str, rendering: str) -> None:
    found = judged(drawn(stack_id, "altered", rendering=rendering, counted_as=rendering), whole_library())
    weights = found.findings["weights"]
    assert (weights.outcome, weights.cause) == ("inconsistent", "precision")
    assert weights.exact_variant == found.verdict.exact_variant == stack_of(stack_id).variant
    if rendering == "double-bos" and found.case.served == OFFICIAL:
        # A second such token moves the answers less than 4-bit weights do; the counts then contradict the official prompt.
        assert stack_id in ("int4-g64", "nf4-g64")
        assert "although the reported token counts are not that prompt's" in found.findings["prompt"].summary
    else:
        assert_named(found, rendering)


@pytest.mark.parametrize("rendering", ["generic-system", "no-default-system", "hidden-system"])
@pytest.mark.parametrize("stack_id", ["int4-g64", "llamacpp-q4_0"])
def test_another_text_of_the_same_length_is_not_taken_for_a_recorded_rendering(stack_id: str, rendering: str) -> None:
    """Coarse weights point at their family under any prompt, so counts alone must not say which prompt it is."""
    found = judged(drawn(stack_id, "n-1", 24, rendering=rendering, counted_as="dated-system"), whole_library())
    assert found.case.served in (None, rendering)
    assert found.findings["prompt"].outcome == "inconsistent"


@pytest.mark.parametrize("rendering", RENDERINGS)
def test_the_library_under_another_rendering_allows_an_honest_stack_no_less(rendering: str) -> None:
    official = whole_library()
    rendered = build_rendered(official, rendering)
    assert rendered is not None
    assert (rendered.rendering, len(rendered.probe_ids)) == (rendering, 64)
    assert set(rendered.probe_ids) <= set(official.probe_ids)
    assert {stack.departure for stack in rendered.variants} <= set(JUDGED)
    for null in rendered.nulls:
        same = official.null_for(null.grid_nats)
        assert same is not None
        assert null.limit_nats >= same.limit_nats


def test_every_rendering_but_one_changes_the_prompts_of_the_weights() -> None:
    for rendering in RENDERINGS:
        pool = bundle().pool_at("L3", rendering)
        assert pool is not None
        names = bundle().usable_probes(pool)
        changed = [bundle().prompt_of(name) != bundle().prompt_of(name.split("@")[0]) for name in names]
        assert all(changed) if rendering != UNSEEN else not any(changed)


@pytest.mark.parametrize("counted_as", [OFFICIAL, "gemma-template"])
def test_a_residual_that_nothing_recorded_explains_is_not_blamed_on_the_weights(counted_as: str) -> None:
    """An unknown prompt may be why: 3-bit weights and depth 24 are far from everything once they are not recorded."""
    for variant in ("int3-g64", "depth-24"):
        library = library_where(lambda s, v=variant: s.variant != v)  # type: ignore[misc]
        found = judged(drawn(variant, "unknown", counted_as=counted_as), library)
        weights, prompt = found.findings["weights"], found.findings["prompt"]
        assert found.case.served is None
        assert found.verdict.verdict == "differs"
        assert (weights.outcome, weights.cause, weights.exact_variant) == ("inconclusive", None, None)
        assert "whether the prompt or the weights are why is not known" in weights.summary
        assert found.verdict.family is None
        if counted_as == OFFICIAL:
            assert found.verdict.cause == "none_of_these"
            assert prompt.outcome == "inconclusive"
            assert "another prompt, or other weights" in prompt.summary
        else:
            assert prompt.outcome == "inconsistent"


def test_wrong_prompts_are_no_departures_of_the_weights() -> None:
    assert {stack.departure for stack in whole_library().variants} <= set(JUDGED)
    assert {stack.departure for stack in bundle().manifest.stacks} == {None, *JUDGED}
    assert {h.cause for h in bundle().manifest.hypotheses} == {None, "template", "hidden_prompt"}


# -- every answer once -----------------------------------------------------------------------------------------


def test_a_second_answer_to_a_probe_counts_for_nothing() -> None:
    answers = drawn("int8", "again", 10)
    once = judged(answers, whole_library())
    again = [*answers, *with_logprobs(answers, lambda values: 3 * values)]
    twice = judged(again, whole_library())
    assert twice.evidence.answers == once.evidence.answers == 10
    np.testing.assert_array_equal(twice.evidence.log_total, once.evidence.log_total)


def test_an_answer_that_is_repeated_to_other_probes_counts_once() -> None:
    answers = drawn("hf-bfloat16", "cached", 40)
    cached = [*answers[:20], *(a.model_copy(update={"top": answers[3].top}) for a in answers[20:])]
    found = judged(cached, whole_library())
    assert (found.evidence.answers, found.evidence.asked, found.evidence.repeated) == (20, 40, 20)
    np.testing.assert_array_equal(found.evidence.log_total, judged(answers[:20], whole_library()).evidence.log_total)
    assert found.verdict.verdict == "inconclusive"


@pytest.mark.parametrize("stack_id", ["hf-bfloat16", "int4-g64"])
def test_one_answer_to_every_probe_is_no_verdict(stack_id: str) -> None:
    answers = drawn(stack_id, "same", 40)
    found = judged([a.model_copy(update={"top": answers[0].top}) for a in answers], whole_library())
    weights = found.findings["weights"]
    assert (found.verdict.verdict, weights.outcome, weights.answers_used) == ("inconclusive", "inconclusive", 1)
    assert "39 more repeat" in weights.summary
    assert weights.to_resolve == "Ask the host why different prompts get the same answer"


# -- what cannot be judged -------------------------------------------------------------------------------------


def assert_not_judged(found: Judged, *reasons: str) -> None:
    weights = found.findings["weights"]
    assert found.verdict.verdict == "inconclusive"
    assert weights.outcome in ("inconclusive", "not_supported")
    assert weights.to_resolve
    assert any(reason in weights.summary for reason in reasons), weights.summary
    assert found.findings["prompt"].outcome != "inconsistent"


@pytest.mark.parametrize("asked", [0, 1, POLICY.min_answers - 1])
def test_too_few_answers_are_no_verdict(asked: int) -> None:
    found = judged(drawn("int2-asym-g64", "few", asked), whole_library())
    assert_not_judged(found, f"Only {asked} answers")


@pytest.mark.parametrize("listed", [0, 1, 4])
def test_short_lists_of_logprobs_are_no_verdict(listed: int) -> None:
    answers = [
        a.model_copy(update={"top": None if a.top is None or listed == 0 else a.top[:listed]})
        for a in drawn("int4-g64", "short")
    ]
    assert_not_judged(judged(answers, whole_library(), top_logprobs=listed), "logprobs")
    # Even if longer lists came while the endpoint was tried.
    assert_not_judged(judged(answers, whole_library()), "Only 0 answers")


@pytest.mark.parametrize("misspelt", [True, False])
def test_tokens_that_the_reference_does_not_know_are_no_verdict(misspelt: bool) -> None:
    known = set(bundle().vocabulary)
    answers = []
    for n, answer in enumerate(drawn("hf-bfloat16", "unknown")):
        assert answer.top is not None
        top = [
            token.model_copy(
                update={
                    "bytes_hex": f"ff{n:04x}{place:04x}ff",
                    # Where its name is certain, only an unlikely token may be missing from the reference's list.
                    "logprob_nats": token.logprob_nats - (0 if misspelt else 40),
                }
            )
            for place, token in enumerate(answer.top)
        ]
        assert not {bytes.fromhex(token.bytes_hex) for token in top} & known
        answers.append(answer.model_copy(update={"top": top, "quirks": ["bytes_absent"] if misspelt else []}))
    assert_not_judged(judged(answers, whole_library()), "Only 0 answers")


@pytest.mark.parametrize("step_nats", [1.0, 0.5, 0.25, 0.2])
@pytest.mark.parametrize("stack_id", FEW_HONEST)
def test_a_grid_coarser_than_any_honest_stacks_is_no_difference(stack_id: str, step_nats: float) -> None:
    coarsest = max(null.grid_nats for null in whole_library().nulls)
    assert step_nats > coarsest
    answers = with_logprobs(drawn(stack_id, "grid", len(recorded(stack_id))), rounded_to(step_nats))
    found = judged(answers, whole_library())
    assert found.verdict.verdict != "differs"
    if step_nats > COARSEST_GRID_NATS:
        assert found.case.evidence is None
        assert_not_judged(found, f"The logprobs lie on a grid of {step_nats:g} nats")


def test_a_coarse_grid_hides_a_departure_and_says_so() -> None:
    found = judged(with_logprobs(drawn("int4-g64", "grid"), rounded_to(1.0)), whole_library())
    assert_not_judged(found, "as those of no recorded honest stack do")


@pytest.mark.parametrize("decimals", [1, 2])
@pytest.mark.parametrize("stack_id", FEW_HONEST)
def test_logprobs_of_few_decimals_are_no_difference(stack_id: str, decimals: int) -> None:
    answers = with_logprobs(drawn(stack_id, "decimals"), lambda values: np.round(values, decimals))
    assert judged(answers, whole_library()).verdict.verdict != "differs"


# -- how many requests it takes --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_library() -> Library:
    kept = {"hf-float32", "llamacpp-f16", "hf-bfloat16", "emulated-outputs", "emulated-both", "int8", "kv-int8"}
    assert kept <= set(stacks_where(lambda _: True))
    return library_of(frozenset(kept))


@pytest.fixture(scope="module")
def resolved(small_library: Library) -> dict[str, Resolution]:
    return {found.variant: found for found in resolutions(small_library, POLICY, draws=40, seed=5)}


def test_what_is_resolvable_is_told_from_what_is_not(resolved: dict[str, Resolution]) -> None:
    assert not resolved["kv-int8"].resolvable
    assert resolved["kv-int8"].requests_median is None
    int8 = resolved["int8"]
    assert int8.resolvable
    assert int8.reached_share == 1.0
    assert int8.requests_median is not None
    assert int8.requests_p90 is not None
    assert POLICY.min_answers <= int8.requests_median <= int8.requests_p90 <= 20
    assert list(resolved) == ["kv-int8", "int8"]  # smallest first


def test_resolutions_are_the_same_for_the_same_seed(small_library: Library, resolved: dict[str, Resolution]) -> None:
    again = resolutions(small_library, POLICY, draws=40, seed=5)
    assert {found.variant: found for found in again} == resolved


def test_an_audit_needs_about_as_many_answers_as_was_worked_out(
    small_library: Library, resolved: dict[str, Resolution]
) -> None:
    needed = [differs_after(judged(drawn("int8-bfloat16", f"n-{n}"), small_library).evidence, POLICY) for n in range(5)]
    median = resolved["int8"].requests_median
    assert median is not None
    assert np.median([np.inf if answers is None else answers for answers in needed]) <= 3 * median
