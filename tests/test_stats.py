"""The mathematics: exact small cases, properties, and the error rates that the e-processes promise."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from weighbridge.judge.library import build_library
from weighbridge.judge.opening import open_case
from weighbridge.judge.policy import load_policy
from weighbridge.judge.verdict import judge
from weighbridge.plan import make_plan
from weighbridge.records import (
    Capability,
    Cause,
    Endpoint,
    Findings,
    Message,
    Observation,
    PlannedRequest,
    Probe,
    TopToken,
    Verdict,
)
from weighbridge.reference.bundle import (
    Bundle,
    HypothesisRecord,
    Manifest,
    PoolRecord,
    Precision,
    StackRecord,
    WeightsSource,
)
from weighbridge.stats.evidence import bounded_score_process, exceptions_process, first_crossing, mixture, tilted_score
from weighbridge.stats.residuals import (
    SMALLEST_SCALE_NATS,
    centred_difference,
    direction_cosine,
    log_scale,
    mean_interval,
    own_top,
    reference_at,
    scale_interval,
    share_upper_limit,
)

Floats = NDArray[np.float64]
few = settings(derandomize=True, deadline=None, max_examples=60)
NAN = float("nan")
CAP, OUTLIER_SHARE, POOL, DRAWS = 20.0, 0.01, 200, 2000


def floats(*values: float) -> Floats:
    return np.array(values, np.float64)


def reals(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False)


# -- residuals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("used_up", [False, True])
@pytest.mark.parametrize("exceptions", [(), (0,), (2,), (4,), (0, 2), (0, 3), (1, 2), (3, 4)])
def test_exceptions_that_are_allowed_are_no_evidence_wherever_they_are(
    exceptions: tuple[int, ...], used_up: bool
) -> None:
    """The wealth's mean over all orders of a small pool is at most 1 after each draw, for every set of exceptions that is allowed."""
    usual = np.array([0.2, 0.9, 0.5, 1.0, 0.7, np.nan])
    other = np.array([3.0, 2.0, 4.0, 3.5, 1.5, 9.0])
    at_most = np.pad(np.sort((other - usual)[:5])[::-1].cumsum(), (1, 0))
    orders = np.array(list(itertools.permutations(range(6))))
    flips = np.isin(orders, exceptions)
    left = 2 - (flips.cumsum(axis=1) - flips) if used_up else np.full(orders.shape, 2)
    process = exceptions_process(
        np.where(flips, other[orders], usual[orders]),
        usual[orders],
        usual_total=float(np.nansum(usual)),
        pool=5,
        exceptions=at_most[left],
    )
    assert (np.exp(process).mean(axis=0) <= 1 + 1e-12).all()


def test_more_exceptions_than_are_allowed_are_evidence() -> None:
    usual = np.full(200, 0.4)
    flips = np.arange(200) % 2 == 0
    scores = np.where(flips, 30.0, usual)
    throughout = exceptions_process(scores, usual, usual_total=80.0, pool=200, exceptions=3 * 29.6)
    assert throughout[40] > np.log(1000)
    # Each that was seen is one fewer that is left.
    left = np.maximum(3 - (flips.cumsum() - flips), 1)
    used_up = exceptions_process(scores, usual, usual_total=80.0, pool=200, exceptions=29.6 * left)
    assert used_up[2] > throughout[2] + np.log(1.4)
    assert used_up[6] > throughout[6] + np.log(8)


def test_the_centred_difference_is_endpoint_minus_reference_without_its_mean() -> None:
    found = centred_difference(floats(-1, -2, -4), floats(-1, -3, -3))
    np.testing.assert_allclose(found, [0, 1, -1])


def test_the_centred_difference_leaves_out_what_is_unknown() -> None:
    found = centred_difference(floats(-1, NAN, -2, -4, -5), floats(-1, -2, -3, -3, NAN))
    np.testing.assert_allclose(found, [0, NAN, 1, -1, NAN])


@pytest.mark.parametrize("known", [0, 1, 2])
def test_a_centred_difference_needs_three_known_tokens(known: int) -> None:
    reference = np.full(5, NAN)
    reference[:known] = -1.0
    assert np.isnan(centred_difference(np.full(5, -1.0), reference)).all()


@given(st.lists(st.tuples(reals(-30, 0), reals(-30, 0)), min_size=3, max_size=20), reals(-20, 20))
@few
def test_the_centred_difference_does_not_feel_a_common_offset(pairs: list[tuple[float, float]], offset: float) -> None:
    endpoint, reference = np.array(pairs).T
    moved = centred_difference(endpoint + offset, reference)
    np.testing.assert_allclose(moved, centred_difference(endpoint, reference), atol=1e-9)
    assert abs(moved.mean()) < 1e-9


def test_the_log_scale_is_the_log_of_the_root_mean_square() -> None:
    assert log_scale(floats(3, -4, NAN, 0)) == pytest.approx(np.log(np.sqrt(25 / 3)))


def test_the_log_scale_has_a_smallest_value() -> None:
    assert log_scale(np.zeros(5)) == pytest.approx(np.log(SMALLEST_SCALE_NATS))


@pytest.mark.parametrize("nothing", [np.zeros(0), np.full(4, NAN)])
def test_the_log_scale_of_nothing_is_not_a_number(nothing: Floats) -> None:
    assert np.isnan(log_scale(nothing))


@pytest.mark.parametrize(
    ("column", "endpoint_nats", "expected"),
    [
        pytest.param(1, -9.0, -2.0, id="listed"),
        pytest.param(2, -1.0, NAN, id="listed-but-not-recorded"),
        pytest.param(-1, -3.0, -5.0, id="unlisted-above-the-floor"),
        pytest.param(-1, -6.0, NAN, id="unlisted-below-the-floor"),
        pytest.param(-1, -5.0, NAN, id="unlisted-at-the-floor"),
    ],
)
def test_reference_at(column: int, endpoint_nats: float, expected: float) -> None:
    found = reference_at(np.array([column]), floats(endpoint_nats), floats(-1, -2, NAN, -5), -5.0)
    np.testing.assert_equal(found, [expected])


def test_the_stand_in_of_an_unlisted_token_understates_the_difference() -> None:
    row = floats(-1, -2, -5)
    true_reference = -7.0  # what the list is too short to say
    stand_in = reference_at(np.array([-1]), floats(-4), row, -5.0)[0]
    assert 0 < -4 - stand_in < -4 - true_reference


def test_the_own_top_is_most_likely_first_and_unknown_values_are_last() -> None:
    columns, values = own_top(np.array([[-3.0, NAN, -1.0, -2.0], [-1.0, -1.0, NAN, NAN]]), 3)
    np.testing.assert_array_equal(columns, [[2, 3, 0], [0, 1, 2]])
    np.testing.assert_array_equal(values, [[-1.0, -2.0, -3.0], [-1.0, -1.0, NAN]])


def test_a_residual_points_along_itself_and_against_its_opposite() -> None:
    rng = np.random.default_rng(11)
    residual, reference = rng.normal(size=20), rng.normal(size=20)
    assert direction_cosine(residual, residual, reference) == pytest.approx(1)
    assert direction_cosine(residual, -residual, reference) == pytest.approx(-1)


@given(st.integers(0, 10_000), reals(-5, 5), reals(-5, 5), reals(0.01, 100), reals(0.01, 100))
@few
def test_the_cosine_feels_neither_flattening_nor_offset_nor_scale(
    seed: int, flattening: float, offset: float, scale: float, other_scale: float
) -> None:
    rng = np.random.default_rng(seed)
    residual, variant, reference = rng.normal(size=(3, 20))
    shape = reference - reference.mean()
    plain = direction_cosine(residual, variant, reference)
    moved = direction_cosine(
        scale * residual + flattening * shape + offset, other_scale * variant - flattening * shape - offset, reference
    )
    assert moved == pytest.approx(plain, abs=1e-8)
    assert -1 - 1e-12 <= plain <= 1 + 1e-12


def test_the_cosine_of_flattening_with_anything_is_zero() -> None:
    rng = np.random.default_rng(3)
    variant, reference = rng.normal(size=(2, 12))
    assert direction_cosine(0.3 * (reference - reference.mean()), variant, reference) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("array", [0, 1, 2])
def test_a_cosine_needs_four_known_tokens(array: int) -> None:
    values = list(np.random.default_rng(1).normal(size=(3, 6)))
    values[array][:2] = NAN
    assert np.isfinite(direction_cosine(*values))
    values[array][:3] = NAN
    assert np.isnan(direction_cosine(*values))


def test_many_positions_at_once_are_each_position_alone() -> None:
    rng = np.random.default_rng(12)
    endpoint, variant, reference = rng.normal(size=(3, 7, 3, 6))
    endpoint[rng.random(endpoint.shape) < 0.4] = NAN
    residual = centred_difference(endpoint, reference)
    scales, cosines = log_scale(residual), direction_cosine(residual, variant, reference)
    assert scales.shape == cosines.shape == (7, 3)
    assert 0 < np.isnan(cosines).sum() < cosines.size
    for place in np.ndindex(7, 3):
        alone = centred_difference(endpoint[place], reference[place])
        np.testing.assert_allclose(residual[place], alone)
        np.testing.assert_allclose(scales[place], log_scale(alone))
        np.testing.assert_allclose(cosines[place], direction_cosine(alone, variant[place], reference[place]))


def test_the_scale_interval_is_students_on_the_log_scale() -> None:
    log_scales = floats(-3.1, -2.9, -3.4, -2.6, -3.0)
    estimate, low, high = scale_interval(log_scales, 0.95)
    expected = stats.t.interval(0.95, 4, loc=log_scales.mean(), scale=stats.sem(log_scales))
    assert (estimate, low, high) == pytest.approx((np.exp(log_scales.mean()), *np.exp(expected)))


def test_the_scale_interval_of_one_prompt_is_a_point() -> None:
    assert scale_interval(floats(np.log(0.2)), 0.95) == pytest.approx((0.2, 0.2, 0.2))


def test_the_mean_interval_is_students() -> None:
    values = floats(0.1, 0.4, -0.2, 0.3)
    expected = stats.t.interval(0.9, 3, loc=values.mean(), scale=stats.sem(values))
    assert mean_interval(values, 0.9) == pytest.approx((values.mean(), *expected))


def test_299_clean_answers_bring_the_limit_below_one_percent() -> None:
    assert share_upper_limit(0, 299, 0.95) == pytest.approx(0.00997, abs=5e-6)
    assert share_upper_limit(0, 298, 0.95) > 0.01


@pytest.mark.parametrize(("found", "asked"), [(0, 1), (0, 20), (1, 20), (7, 20), (19, 20), (3, 500)])
def test_the_upper_limit_is_clopper_and_pearsons(found: int, asked: int) -> None:
    # One-sided at 95 % is the upper end of the two-sided interval at 90 %.
    expected = stats.binomtest(found, asked).proportion_ci(0.9, "exact").high
    limit = share_upper_limit(found, asked, 0.95)
    assert limit == pytest.approx(float(expected), rel=1e-6)
    assert stats.binom.cdf(found, asked, limit) == pytest.approx(0.05, rel=1e-6)


@pytest.mark.parametrize("asked", [0, 1, 20])
def test_the_upper_limit_of_everything_is_one(asked: int) -> None:
    assert share_upper_limit(asked, asked, 0.95) == 1.0


# -- scores ----------------------------------------------------------------------------------------------------


@given(st.lists(reals(-12, 4), min_size=2, max_size=20), reals(-5, 0), reals(0.05, 3), reals(0.05, 2), st.booleans())
@few
def test_the_tilted_score_is_monotone_towards_the_alternative(
    log_scales: list[float], null_mean: float, gap: float, sd: float, larger: bool
) -> None:
    ordered = np.sort(np.array(log_scales))
    alternative = null_mean + gap if larger else null_mean - gap
    steps = np.diff(tilted_score(ordered, null_mean, alternative, sd, CAP))
    assert (steps >= 0).all() if larger else (steps <= 0).all()


@given(st.lists(reals(-50, 50), min_size=1, max_size=20), reals(-5, 0), reals(-3, 3), reals(0.05, 2), reals(1.1, 100))
@few
def test_the_tilted_score_lies_between_zero_and_the_cap(
    log_scales: list[float], null_mean: float, gap: float, sd: float, cap: float
) -> None:
    scores = tilted_score(np.array(log_scales), null_mean, null_mean + gap, sd, cap)
    assert (scores >= 0).all()
    assert (scores <= cap * (1 + 1e-12)).all()


def test_the_tilted_score_is_the_normal_likelihood_ratio_below_the_cap() -> None:
    x = floats(-3, -2.5, -2.2)
    expected = stats.norm.pdf(x, -2, 0.4) / stats.norm.pdf(x, -2.6, 0.4)
    np.testing.assert_allclose(tilted_score(x, -2.6, -2.0, 0.4, 1e6), expected)


# -- e-processes: size -----------------------------------------------------------------------------------------


def assert_at_most(hits: int, draws: int, alpha: float) -> None:
    """Fail only where so many hits have a chance below one in a million at a rate of alpha."""
    assert hits <= stats.binom.ppf(1 - 1e-6, draws, alpha), f"{hits} of {draws} at a promised rate of {alpha}"


def null_stacks(kind: str) -> Floats:
    """Scores of three honest stacks on the pool."""
    rng = np.random.default_rng(20)
    if kind == "normal":
        return tilted_score(rng.normal(0, 0.35, (3, POOL)), 0.0, float(np.log(1.8)), 0.35, CAP)
    if kind == "heavy":
        return np.minimum(rng.pareto(0.8, (3, POOL)), CAP)
    return np.where(rng.random((3, POOL)) < 0.3, CAP, 0.0)  # two-valued


def peaks_of_score_processes(null: Floats, served: Floats, stake: float, asked: int, draws: int = DRAWS) -> Floats:
    rng = np.random.default_rng(21)
    out = np.empty(draws)
    for i in range(draws):
        drawn = rng.permutation(POOL)[:asked]
        process = bounded_score_process(served[drawn], null, cap=CAP, outlier_share=OUTLIER_SHARE, stake=stake)
        out[i] = process.max()
    return out


@pytest.mark.parametrize("stack", [0, 2])
@pytest.mark.parametrize("stake", [1.0, 0.25])
@pytest.mark.parametrize("kind", ["normal", "heavy", "two-valued"])
def test_an_honest_stack_is_rejected_as_rarely_as_promised(kind: str, stake: float, stack: int) -> None:
    null = null_stacks(kind)
    peaks = peaks_of_score_processes(null, null[stack], stake, POOL)
    for alpha in (0.2, 0.05, 0.01):
        assert_at_most(int((peaks >= np.log(1 / alpha)).sum()), DRAWS, alpha)


@pytest.mark.parametrize("stake", [1.0, 0.25])
def test_a_few_outliers_on_an_honest_stack_are_forgiven(stake: float) -> None:
    null = null_stacks("normal")
    served = null[0].copy()
    served[: int(OUTLIER_SHARE * POOL)] = CAP
    peaks = peaks_of_score_processes(null, served, stake, POOL // 2)
    assert_at_most(int((peaks >= np.log(20)).sum()), DRAWS, 0.05)


@pytest.mark.parametrize("stake", [1.0, 0.25])
@pytest.mark.parametrize("asked", [50, 100, 200])
def test_a_stack_of_no_larger_mean_is_rejected_as_rarely_as_promised(stake: float, asked: int) -> None:
    """The null as the module states it: the mean over the pool is a recorded stack's, not every single score."""
    null = np.full((1, POOL), 0.01)
    null[0, : POOL // 2] = CAP
    peaks = peaks_of_score_processes(null, null[0, ::-1].copy(), stake, asked)
    assert_at_most(int((peaks >= np.log(20)).sum()), DRAWS, 0.05)


# -- e-processes: direction ------------------------------------------------------------------------------------

LARGEST_FISHER = float(np.arctanh(0.995))


def null_fishers(kind: str) -> Floats:
    """Fisher transforms of the cosines of three honest stacks with one departure, on the pool."""
    rng = np.random.default_rng(30)
    if kind == "normal":
        return rng.normal(0.2, 0.3, (3, POOL))
    if kind == "skewed":
        return np.minimum(rng.exponential(0.4, (3, POOL)) - 0.2, LARGEST_FISHER)
    return np.where(rng.random((3, POOL)) < 0.4, LARGEST_FISHER, -LARGEST_FISHER)  # two-valued


def scores_of_direction(fisher: Floats, cosine: float, null: Floats) -> Floats:
    """Scores of a bet that the cosines are about so large."""
    mean, sd = float(null.mean(axis=1).max()), float(null.std(axis=1).max())
    return tilted_score(fisher, mean, max(float(np.arctanh(cosine)), mean + sd), sd, CAP)


@pytest.mark.parametrize("cosine", [0.5, 0.85])
@pytest.mark.parametrize("kind", ["normal", "skewed", "two-valued"])
def test_the_cosines_of_an_honest_stack_are_rejected_as_rarely_as_promised(kind: str, cosine: float) -> None:
    fishers = null_fishers(kind)
    null = scores_of_direction(fishers, cosine, fishers)
    served = null[int(null.mean(axis=1).argmax())]
    peaks = peaks_of_score_processes(null, served, 1.0, POOL)
    for alpha in (0.2, 0.05, 0.01):
        assert_at_most(int((peaks >= np.log(1 / alpha)).sum()), DRAWS, alpha)


@pytest.mark.parametrize("weights", [None, floats(1, 5)])
def test_a_mixture_keeps_the_promise_of_its_parts(weights: Floats | None) -> None:
    null, fishers = null_stacks("heavy"), null_fishers("normal")
    pointing = scores_of_direction(fishers, 0.5, fishers)
    rng = np.random.default_rng(41)
    hits = 0
    for _ in range(DRAWS):
        drawn = rng.permutation(POOL)
        by_size = bounded_score_process(null[1, drawn], null, cap=CAP, outlier_share=OUTLIER_SHARE, stake=1.0)
        by_direction = bounded_score_process(
            pointing[1, drawn], pointing, cap=CAP, outlier_share=OUTLIER_SHARE, stake=1.0
        )
        hits += first_crossing(mixture(np.array([by_size, by_direction]), weights), 20) is not None
    assert_at_most(hits, DRAWS, 0.05)


# -- e-processes: power and bookkeeping ------------------------------------------------------------------------


@pytest.mark.parametrize("stake", [1.0, 0.25])
def test_a_clear_departure_in_size_is_found_within_twenty_answers(stake: float) -> None:
    rng = np.random.default_rng(50)
    alternative = float(np.log(3))
    null = tilted_score(rng.normal(0, 0.35, (3, POOL)), 0.0, alternative, 0.35, CAP)
    served = tilted_score(rng.normal(alternative, 0.35, POOL), 0.0, alternative, 0.35, CAP)
    drawn = rng.permutation(POOL)
    process = bounded_score_process(served[drawn], null, cap=CAP, outlier_share=OUTLIER_SHARE, stake=stake)
    reached = first_crossing(process, 1000)
    assert reached is not None
    assert reached <= 20


def test_a_clear_departure_in_direction_is_found_within_thirty_answers() -> None:
    fishers = null_fishers("normal")
    null = scores_of_direction(fishers, 0.5, fishers)
    served = np.random.default_rng(51).normal(np.arctanh(0.7), 0.3, 100)
    scores = scores_of_direction(served, 0.5, fishers)
    process = bounded_score_process(scores, null, cap=CAP, outlier_share=OUTLIER_SHARE, stake=1.0)
    reached = first_crossing(process, 1000)
    assert reached is not None
    assert reached <= 30


def test_an_unanswered_probe_moves_no_bet_on_size() -> None:
    null = null_stacks("normal")
    scores = np.array([2.0, NAN, 3.0, NAN])
    process = bounded_score_process(scores, null, cap=CAP, outlier_share=OUTLIER_SHARE, stake=1.0)
    assert process[1] == process[0]
    assert process[3] == process[2]
    assert np.isfinite(process).all()


def test_an_unknown_cosine_moves_no_bet_on_direction() -> None:
    fishers = null_fishers("normal")
    null = scores_of_direction(fishers, 0.85, fishers)
    scores = scores_of_direction(floats(NAN, 0.5, NAN, 0.9, NAN), 0.85, fishers)
    assert np.isnan(scores).sum() == 3
    process = bounded_score_process(scores, null, cap=CAP, outlier_share=OUTLIER_SHARE, stake=1.0)
    np.testing.assert_array_equal(process, [0.0, process[1], process[1], process[3], process[3]])
    assert len({0.0, process[1], process[3]}) == 3


def test_a_bet_on_size_is_held_against_what_the_null_still_allows() -> None:
    null = np.array([[1.0, 1.0, 4.0, 2.0], [0.0, 1.0, 1.0, 1.0]])
    process = bounded_score_process(floats(6, 1), null, cap=10.0, outlier_share=0.1, stake=0.5)
    limit = 0.9 * 2 + 0.1 * 10
    first = 0.5 + 0.5 * 6 / limit
    # Of the 4 * limit that the pool may hold, 6 have been seen; three probes are left.
    second = 0.5 + 0.5 * 1 / ((4 * limit - 6) / 3)
    np.testing.assert_allclose(process, np.cumsum(np.log([first, second])))


@given(st.lists(reals(0, 20), min_size=1, max_size=60), st.sampled_from([1.0, 0.5, 0.25]))
@few
def test_wealth_never_loses_more_than_the_stake(scores: list[float], stake: float) -> None:
    null = null_stacks("normal")
    process = bounded_score_process(np.array(scores), null, cap=CAP, outlier_share=OUTLIER_SHARE, stake=stake)
    assert np.isfinite(process).all()
    if stake < 1:
        assert (np.diff(process, prepend=0.0) >= np.log(1 - stake) - 1e-9).all()


@given(st.lists(reals(-LARGEST_FISHER, LARGEST_FISHER), min_size=1, max_size=60), reals(0.1, 0.95), reals(0.1, 0.9))
@few
def test_the_bet_on_direction_stays_finite(values: list[float], cosine: float, stake: float) -> None:
    fishers = null_fishers("two-valued")
    null, scores = scores_of_direction(fishers, cosine, fishers), scores_of_direction(np.array(values), cosine, fishers)
    process = bounded_score_process(scores, null, cap=CAP, outlier_share=OUTLIER_SHARE, stake=stake)
    assert np.isfinite(process).all()
    assert (np.diff(process, prepend=0.0) >= np.log1p(-stake) - 1e-9).all()


@given(st.lists(reals(-800, 800), min_size=1, max_size=20), st.integers(1, 6))
@few
def test_the_mixture_of_equal_processes_is_the_process(values: list[float], count: int) -> None:
    process = np.array(values)
    np.testing.assert_allclose(mixture(np.tile(process, (count, 1))), process, atol=1e-9)


@given(st.lists(st.tuples(reals(-800, 800), reals(-800, 800)), min_size=1, max_size=20), reals(0.01, 0.99))
@few
def test_a_mixture_lies_between_its_parts(values: list[tuple[float, float]], share: float) -> None:
    parts = np.array(values).T
    mixed = mixture(parts, floats(share, 1 - share))
    assert (mixed <= parts.max(axis=0) + 1e-9).all()
    assert (mixed >= parts.min(axis=0) - 1e-9).all()


def test_the_weights_of_a_mixture_are_normalised() -> None:
    mixed = mixture(np.log([[4.0], [8.0]]), floats(6, 2))
    assert np.exp(mixed[0]) == pytest.approx(0.75 * 4 + 0.25 * 8)


@pytest.mark.parametrize(
    ("wealth", "expected"), [([1, 5, 10, 2], 3), ([10], 1), ([1, 20, 1], 2), ([1, 9.99, 9], None), ([], None)]
)
def test_the_first_crossing_counts_answers(wealth: list[float], expected: int | None) -> None:
    assert first_crossing(np.log(np.array(wealth, np.float64)), 10) == expected


# -- the road from answers to evidence -------------------------------------------------------------------------

PROBES, LISTED, TOP = 40, 40, 20


def stack_record(name: str, departure: Cause | None = None, departure_class: str | None = None) -> StackRecord:
    return StackRecord(
        id=name, description=name, departure=departure, departure_class=departure_class, family="none/float32", pools=["small"],
        precision=Precision(weights="bfloat16", activations="float32", kv_cache="float32", logits="float32"), engine={},
    )  # fmt: skip


def small_bundle() -> Bundle:
    """One honest stack and one coarse variant over a pool of forty probes and forty tokens."""
    rng = np.random.default_rng(60)
    reference = -np.sort(rng.exponential(3, (PROBES, LISTED)), axis=1) - 1
    honest = reference + rng.normal(0, 0.03, reference.shape)
    coarse = reference + rng.normal(0, 0.5, reference.shape)
    manifest = Manifest(
        id="small", version=1, model="small", model_names=["small"], keeper="nobody", built_with="a test",
        weights=WeightsSource(source="none", precision="bf16", files={}), licence=None, vocabulary_sha256="0", template_sha256="0",
        pools=[PoolRecord(id="small", version=1, sha256="0", level="L3", probes=list(range(PROBES)))],
        probe_ids=[f"p-{n}" for n in range(PROBES)], top_k=LISTED, shard=PROBES, reference_stack="reference",
        stacks=[stack_record("reference"), stack_record("honest"), stack_record("coarse", "precision", "int4")],
        hypotheses=[HypothesisRecord(id="official", description="official", cause=None, template_sha256="0")], arrays_sha256="0",
    )  # fmt: skip
    return Bundle(
        manifest,
        Path("nowhere"),
        prompt_ids=np.zeros(PROBES * 50, np.int32),
        prompt_offsets=np.arange(PROBES + 1, dtype=np.int64) * 50,
        row_probe=np.arange(PROBES, dtype=np.int32),
        row_position=np.full(PROBES, 49, np.int32),
        token_ids=np.tile(np.arange(LISTED, dtype=np.int32), (PROBES, 1)),
        logprobs_nats=np.stack([reference, honest, coarse]).astype(np.float32),
        prompt_tokens=np.full((1, PROBES), 50, np.int32),
        vocabulary=tuple(bytes([65 + n]) for n in range(LISTED)),
    )


def served(bundle: Bundle, stack: int, odd_probes: frozenset[int], odd: str) -> list[Observation]:
    """Answers of a stack; those on odd probes carry two tokens only, or tokens that the reference does not know."""
    out = []
    for row, probe_id in enumerate(bundle.manifest.probe_ids[:30]):
        values = bundle.logprobs_nats[stack, row].astype(np.float64)
        columns = np.argsort(-values)[:TOP]
        top = [TopToken(bytes_hex=bytes([65 + int(c)]).hex(), logprob_nats=min(0.0, float(values[c]))) for c in columns]
        if row in odd_probes:
            alien = [TopToken(bytes_hex=f"ffff{n:02x}", logprob_nats=-40.0 - n) for n in range(TOP)]
            top = top[:2] if odd == "short" else alien
        out.append(
            Observation(
                request_id=f"probe-{row:04d}", probe_id=probe_id, answered=True, status=200, attempts=1, latency_s=0.1,
                prompt_tokens=50, completion_tokens=1, top=top,
            )
        )  # fmt: skip
    return out


def judged(stack: int, odd_probes: frozenset[int] = frozenset(), odd: str = "short") -> tuple[Findings, Verdict]:
    bundle, policy = small_bundle(), load_policy("strict")
    endpoint = Endpoint(name="e", base_url="http://127.0.0.1:9/v1", model="small", reference="small")
    message = [Message(role="user", content="Say a word.")]
    plan = make_plan(endpoint, policy, None, seed="s").model_copy(
        update={
            "reference": bundle.identity,
            "probe_requests": [
                PlannedRequest(request_id=f"probe-{n:04d}", probe=Probe(id=p, purpose="test", messages=message))
                for n, p in enumerate(bundle.manifest.probe_ids)
            ],
        }
    )
    capability = Capability(
        reachable=True, top_logprobs=TOP, temperature_regime="before_temperature", usage_reported=True
    )
    answers = served(bundle, stack, odd_probes, odd)
    case = open_case(plan, capability, answers, build_library(bundle, policy, TOP))
    return judge(
        case, requests_sent=30, stopped_because="decided", all_observations=answers, observations_sha256="0" * 64
    )


@pytest.mark.parametrize(("stack", "word"), [(1, "consistent"), (2, "differs")])
def test_a_recorded_stack_is_recognised(stack: int, word: str) -> None:
    _, verdict = judged(stack)
    assert verdict.verdict == word


@pytest.mark.parametrize(("stack", "word"), [(1, "consistent"), (2, "differs")])
@pytest.mark.parametrize("odd", ["short", "alien"])
def test_one_odd_answer_does_not_keep_the_rest_from_being_judged(stack: int, word: str, odd: str) -> None:
    _, verdict = judged(stack, frozenset({3}), odd)
    assert verdict.verdict == word


@pytest.mark.parametrize("odd", ["short", "alien"])
def test_odd_answers_alone_are_no_verdict_on_the_weights(odd: str) -> None:
    findings, _ = judged(2, frozenset(range(30)), odd)
    weights = next(finding for finding in findings.findings if finding.axis == "weights")
    assert weights.outcome in ("inconclusive", "not_supported")
