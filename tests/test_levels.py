"""Levels L1 and L2, power, plans and fleets: what is sent, what counts, and what is said before anything is sent."""

import json
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

from weighbridge.capability import sampling_of
from weighbridge.cli import cli
from weighbridge.collect import Budget
from weighbridge.judge.answers import line_up
from weighbridge.judge.checks.weights import differs_after, excluded_variants, name_of
from weighbridge.judge.library import Library, build_library
from weighbridge.judge.opening import open_case
from weighbridge.judge.policy import load_policy
from weighbridge.judge.power import answers_to_differ, drawn, put_on
from weighbridge.judge.sizes import features_of, honest_processes, weigh
from weighbridge.judge.verdict import judge
from weighbridge.plan import make_plan, worst_case_tokens
from weighbridge.records import Capability, Endpoint, Limits, LogprobLevel, Observation, Plan, Position, Price, TopToken
from weighbridge.reference.bundle import Bundle, load_bundle

CAPABILITY = Capability(reachable=True, top_logprobs=20, temperature_regime="before_temperature", usage_reported=True)
STRICT = load_policy("strict")


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return load_bundle("smollm2-135m-instruct")


@pytest.fixture(scope="module")
def libraries(bundle: Bundle) -> dict[LogprobLevel, Library]:
    return {"L1": build_library(bundle, STRICT, 20, "L1"), "L2": build_library(bundle, STRICT, 20, "L2")}


def planned(bundle: Bundle, level: LogprobLevel = "L3", **more: Any) -> Plan:
    endpoint = Endpoint(name="e", base_url="https://a.example/v1", model="SmolLM2-135M-Instruct")
    return make_plan(endpoint, STRICT, bundle, level=level, seed="levels", **more)


def listed(bundle: Bundle, values: NDArray[np.float64], row: int) -> list[TopToken]:
    columns = np.argsort(-np.nan_to_num(values[row], nan=-np.inf), kind="stable")[:20]
    return [
        TopToken(bytes_hex=bundle.vocabulary[bundle.token_ids[row, c]].hex(), logprob_nats=min(0.0, float(values[row, c])))
        for c in columns
    ]  # fmt: skip


def answers(bundle: Bundle, level: LogprobLevel, stack: str, *, leaves_after: int | None = None) -> list[Observation]:
    """What an endpoint with a recorded stack would have answered; it may leave the reference's path after some tokens."""
    values = bundle.logprobs_nats[bundle.stack_index[stack]].astype(np.float64)
    out = []
    for request in planned(bundle, level).probe_requests:
        probe = bundle.probe_index[request.probe.id]
        tokens = bundle.prompt_ids[bundle.prompt_offsets[probe] : bundle.prompt_offsets[probe + 1]]
        row_at = {int(bundle.row_position[r]): int(r) for r in np.flatnonzero(bundle.row_probe == probe)}
        first = min(row_at)
        places = range(-1, len(tokens) - 1) if level == "L1" else range(first, first + request.max_tokens)
        positions = []
        for place in places:
            there = bundle.vocabulary[tokens[place + 1]].hex() if place + 1 < len(tokens) else None
            if leaves_after is not None and place - first >= leaves_after:
                there = b"elsewhere".hex()
            positions.append(
                Position(bytes_hex=there, top=listed(bundle, values, row_at[place]) if place in row_at else [])
            )
        out.append(Observation(
            request_id=request.request_id, probe_id=request.probe.id, answered=True, status=200, attempts=1, latency_s=0.1,
            prompt_tokens=len(tokens) - (bundle.answer_tokens(request.probe.id) if level == "L2" else 0),
            completion_tokens=request.max_tokens, top=positions[0].top or None, positions=positions,
        ))  # fmt: skip
    return out


# -- what is sent ----------------------------------------------------------------------------------------------


def test_a_short_answer_is_generated_and_not_sent(bundle: Bundle) -> None:
    for request in planned(bundle, "L2").probe_requests:
        assert request.probe.messages[-1].role == "user"
        assert request.max_tokens == bundle.scored_tokens(request.probe.id) > 1
        assert not request.forced
        assert sampling_of(request, CAPABILITY) == (0.0, 20)


def test_a_forced_text_is_sent_whole(bundle: Bundle) -> None:
    for request in planned(bundle, "L1").probe_requests:
        assert request.probe.messages[-1].role == "assistant"
        assert (request.forced, request.max_tokens) == (True, 1)
        assert sampling_of(request, CAPABILITY) == (1.0, 20)


def test_what_an_answer_may_cost_is_reserved_before_it_is_asked_for(bundle: Bundle) -> None:
    request = planned(bundle, "L2").probe_requests[0]
    price = Price(prompt_usd_per_million_tokens=0, completion_usd_per_million_tokens=1e6)
    budget = Budget(Limits(max_cost_usd=request.max_tokens - 0.5), price)
    assert budget.refuses(*worst_case_tokens(request)) == "budget_cost"
    assert budget.refuses(worst_case_tokens(request)[0], 1) is None


@pytest.mark.parametrize("level", ["L1", "L2", "L3"])
def test_a_plan_counts_what_its_level_generates(level: LogprobLevel, bundle: Bundle) -> None:
    plan = planned(bundle, level)
    generated = sum(r.max_tokens for r in plan.probe_requests)
    assert plan.level == level
    assert plan.estimate.completion_tokens >= min(generated, plan.estimate.requests)


# -- what counts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["L1", "L2"])
def test_an_answer_of_many_positions_counts_once(
    level: LogprobLevel, bundle: Bundle, libraries: dict[LogprobLevel, Library]
) -> None:
    seen = answers(bundle, level, "int8-bfloat16")
    found = line_up(libraries[level], seen)
    assert found.answers == len(seen) == len(libraries[level].probe_ids)
    assert found.answer_of_row.size > 2 * found.answers
    assert features_of(found).log_scales.shape == (len(seen),)


def test_an_answer_counts_as_far_as_its_tokens_are_the_references(
    bundle: Bundle, libraries: dict[LogprobLevel, Library]
) -> None:
    whole = line_up(libraries["L2"], answers(bundle, "L2", "int8-bfloat16"))
    left = line_up(libraries["L2"], answers(bundle, "L2", "int8-bfloat16", leaves_after=7))
    # Rows stand at every third token: 0, 3 and 6 were said in the reference's context, 9 was not.
    assert left.answer_of_row.size == 3 * left.answers < whole.answer_of_row.size
    at_once = line_up(libraries["L2"], answers(bundle, "L2", "int8-bfloat16", leaves_after=0))
    assert at_once.answer_of_row.size == at_once.answers


def test_a_prompt_of_another_length_has_no_comparable_logprobs(
    bundle: Bundle, libraries: dict[LogprobLevel, Library]
) -> None:
    seen = [
        o.model_copy(update={"positions": [*(o.positions or []), Position(bytes_hex=None, top=[])]})
        for o in answers(bundle, "L1", "int8-bfloat16")
    ]
    assert line_up(libraries["L1"], seen).answers == 0


@pytest.mark.parametrize("level", ["L1", "L2"])
@pytest.mark.parametrize(("stack", "verdict"), [("hf-bfloat16", "consistent"), ("int8-bfloat16", "differs")])
def test_a_level_tells_honest_from_altered(
    level: LogprobLevel, stack: str, verdict: str, bundle: Bundle, libraries: dict[LogprobLevel, Library]
) -> None:
    seen = answers(bundle, level, stack)
    case = open_case(planned(bundle, level), CAPABILITY, seen, libraries[level])
    _, found = judge(
        case,
        requests_sent=len(seen),
        stopped_because="probes_used_up",
        all_observations=seen,
        observations_sha256="0" * 64,
    )
    assert found.axes["prompt"] == "consistent"
    assert found.verdict == verdict


def test_a_departure_that_cannot_be_told_is_never_excluded(
    bundle: Bundle, libraries: dict[LogprobLevel, Library]
) -> None:
    library = libraries["L1"]
    evidence = weigh(library, line_up(library, answers(bundle, "L1", "hf-bfloat16")), STRICT)
    assert evidence is not None
    excluded = {name_of(v) for v, out in zip(library.variants, excluded_variants(evidence, STRICT), strict=True) if out}
    assert "int8" in excluded
    assert "kv-int8" not in excluded


# -- fleets ----------------------------------------------------------------------------------------------------


def test_a_larger_fleet_asks_for_more_evidence_and_never_for_less(bundle: Bundle) -> None:
    levels = [planned(bundle, fleet_size=k).policy.differs_e_value for k in (1, 10, 11, 200)]
    assert levels == [1000.0, 1000.0, 1100.0, 20_000.0]
    assert planned(bundle, fleet_size=200).fleet_size == 200


def test_the_evidence_that_names_one_of_a_fleet_takes_longer(bundle: Bundle) -> None:
    library = build_library(bundle, STRICT, 20)
    v = next(i for i, s in enumerate(library.variants) if s.id == "kv-fp8")
    null = library.null_for(0.125)
    assert null is not None
    features = drawn(put_on(library, v, 0), 60, np.random.default_rng(3))
    alone = answers_to_differ(library, null, features, planned(bundle).policy)
    among = answers_to_differ(library, null, features, planned(bundle, fleet_size=100_000).policy)
    assert (among >= alone).all()
    assert among.mean() > alone.mean()


def test_no_single_answer_decides(bundle: Bundle) -> None:
    library = build_library(bundle, STRICT, 20)
    v = next(i for i, s in enumerate(library.variants) if s.id == "int2-asym-g64")
    for null in library.nulls:
        features = drawn(put_on(library, v, int(null.stacks[0])), 40, np.random.default_rng(4))
        log_size, by_variant, _ = honest_processes(library, null, features, STRICT)
        # A capped score over the least that a null may be held to: one in the share of outliers.
        for process in (log_size, *by_variant):
            assert np.diff(process, axis=1, prepend=0.0).max() <= np.log(1 / STRICT.outlier_share) + 1e-9
        assert max(log_size[:, 0].max(), by_variant[:, :, 0].max()) < np.log(STRICT.differs_e_value)


# -- what a policy accepts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("policy", "loudest"), [("kv8", "kv-fp8"), ("int8-ok", "int8-tensor"), ("fp8-ok", None)])
def test_what_a_policy_accepts_widens_the_limit_by_its_own_noise_and_the_margin(
    policy: str, loudest: str | None, bundle: Bundle
) -> None:
    strict = build_library(bundle, STRICT, 20)
    lax = build_library(bundle, load_policy(policy), 20)
    limits = [library.nulls[-1].limit_nats for library in (strict, lax)]
    assert limits[1] > limits[0]
    accepted = [i for i, s in enumerate(lax.honest) if s.departure is not None]
    assert accepted
    largest = float(np.exp(np.nanmean(lax.honest_log_scales[accepted], axis=1)).max())
    assert max(null.limit_nats for null in lax.nulls) == pytest.approx(STRICT.stack_margin * largest)
    if loudest is not None:
        assert lax.honest[accepted[int(np.nanmean(lax.honest_log_scales[accepted], axis=1).argmax())]].id == loudest


# -- what is said before anything is sent ----------------------------------------------------------------------


def test_power_says_what_each_level_can_tell() -> None:
    result = CliRunner().invoke(
        cli, ["power", "--reference", "smollm2-135m-instruct", "--draws", "20", "--price", "1", "2", "--json"], standalone_mode=False
    )  # fmt: skip
    assert result.exception is None, result.output
    document = json.loads(result.stdout)
    assert document["levels"] == ["L1", "L2", "L3", "L4"]
    rows = {(r["level"], r["variant"]): r for r in document["departures"]}
    one = rows["L3", "int8"]
    assert one["resolvable"]
    assert one["requests_median"] <= one["requests_p90"] <= 12
    assert one["cost_usd"] == pytest.approx((one["prompt_tokens"] + 2 * one["completion_tokens"]) / 1e6)
    assert not rows["L3", "kv-int8"]["resolvable"]
    assert rows["L3", "kv-int8"]["requests_p90"] is None
    assert rows["L2", "int8"]["completion_tokens"] > rows["L3", "int8"]["completion_tokens"]
    assert rows["L4", "int4-g64"]["requests_p90"] <= 15
    assert rows["L4", "int8"]["requests_median"] > rows["L3", "int8"]["requests_median"]
    assert not rows["L4", "kv-int8"]["resolvable"]


def test_power_refuses_a_negative_price() -> None:
    result = CliRunner().invoke(cli, ["power", "--reference", "smollm2-135m-instruct", "--price", "-1", "2"])
    assert result.exit_code != 0


def test_a_plan_says_what_an_audit_cannot_tell() -> None:
    result = CliRunner().invoke(
        cli, ["plan", "--base-url", "https://a.example/v1", "--model", "m", "--reference", "smollm2-135m-instruct"], standalone_mode=False
    )  # fmt: skip
    assert result.exception is None, result.output
    assert "cannot be told from honest at this level: kv-int8" in result.stdout
    assert "e ≥ 1000" in result.stdout


def test_differs_needs_the_least_number_of_answers(bundle: Bundle, libraries: dict[LogprobLevel, Library]) -> None:
    library = libraries["L2"]
    seen = answers(bundle, "L2", "int4-g64-bfloat16")
    for n in (1, 2):
        evidence = weigh(library, line_up(library, seen[:n]), STRICT)
        assert evidence is None or differs_after(evidence, STRICT) is None
    evidence = weigh(library, line_up(library, seen[:6]), STRICT)
    assert evidence is not None
    assert differs_after(evidence, STRICT) is not None
