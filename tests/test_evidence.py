"""What the judge's mathematics promises: grids, limits, the ladder, Bayes factors, and error rates on a small library."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import special, stats

from weighbridge.judge.library import Library, Null, build_library
from weighbridge.judge.policy import load_policy
from weighbridge.judge.power import answers_to_differ, drawn, put_on
from weighbridge.judge.sizes import Features, direction_processes, exclusion_processes, sampling_process, size_process
from weighbridge.records import Cause, Policy
from weighbridge.reference.bundle import (
    Bundle,
    HypothesisRecord,
    Manifest,
    PoolRecord,
    Precision,
    StackRecord,
    WeightsSource,
)
from weighbridge.stats.bayes import log_scale_evidence, normal_log_density, tempering
from weighbridge.stats.evidence import bounded_score_process, mixture
from weighbridge.stats.grid import (
    DECIMAL_STEPS_NATS,
    MIN_GAPS,
    NEGLIGIBLE_STEP_NATS,
    STEPS_NATS,
    fits_grid,
    grid_step,
    round_to_bfloat16,
    rounding_noise,
    written_in_bfloat16,
)
from weighbridge.stats.honest import MIN_STACKS, class_limit
from weighbridge.stats.ladder import effective_bits
from weighbridge.stats.residuals import centred_difference, fisher_cosine, mean_by_unit, shape_fisher

Floats = NDArray[np.float64]
few = settings(derandomize=True, deadline=None, max_examples=60)
NAN = float("nan")
LARGEST_FISHER = float(np.arctanh(0.995))
DRAWS = 2000


def floats(*values: float) -> Floats:
    return np.array(values, np.float64)


def reals(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False)


def real_lists(low: float, high: float, least: int, most: int) -> st.SearchStrategy[list[float]]:
    return st.lists(reals(low, high), min_size=least, max_size=most)


# -- grids -----------------------------------------------------------------------------------------------------


def lists_of_logits(seed: int, exponent: int, lists: int = 8) -> Floats:
    """Logits between 2**exponent and twice that: there a 16-bit number has one spacing."""
    rng = np.random.default_rng(seed)
    return -np.sort(-rng.uniform(2.0**exponent, 2.0 ** (exponent + 1), (lists, 20)), axis=1)


def logprobs_of(logits: Floats) -> Floats:
    """As a server writes them: float32, after a softmax over more tokens than it lists."""
    normaliser = special.logsumexp(logits, axis=1, keepdims=True) + 0.321
    return np.asarray((logits - normaliser).astype(np.float32), np.float64)


def to_float16(values: Floats) -> Floats:
    return values.astype(np.float16).astype(np.float64)


@given(st.integers(0, 10_000), st.integers(0, 6))
@few
def test_bfloat16_logits_are_found_out_with_their_spacing(seed: int, exponent: int) -> None:
    assert grid_step(logprobs_of(round_to_bfloat16(lists_of_logits(seed, exponent)))) == 2.0 ** (exponent - 7)


@given(st.integers(0, 10_000), st.integers(1, 6))
@few
def test_float16_logits_are_found_out_with_their_spacing(seed: int, exponent: int) -> None:
    assert grid_step(logprobs_of(to_float16(lists_of_logits(seed, exponent)))) == 2.0 ** (exponent - 10)


@given(st.integers(0, 10_000))
@few
def test_logits_on_both_sides_of_a_power_of_two_lie_on_the_finer_spacing(seed: int) -> None:
    above, below = lists_of_logits(seed, 4, 4)[:, :10], lists_of_logits(seed + 1, 3, 4)[:, :10]
    assert grid_step(logprobs_of(round_to_bfloat16(np.concatenate([above, below], axis=1)))) == 1 / 16


@given(st.integers(0, 10_000), st.integers(0, 6), st.booleans())
@few
def test_float32_logits_lie_on_no_grid(seed: int, exponent: int, one_list: bool) -> None:
    assert grid_step(logprobs_of(lists_of_logits(seed, exponent, 1 if one_list else 8))) == 0.0


@pytest.mark.parametrize(("decimals", "expected"), [(1, 0.1), (2, 0.01), (3, 0.001), (4, 0.0)])
def test_logprobs_of_few_decimals_lie_on_their_grid(decimals: int, expected: float) -> None:
    assert grid_step(np.round(logprobs_of(lists_of_logits(1, 4)), decimals)) == expected


@given(st.integers(0, 10_000), st.sampled_from((*STEPS_NATS, *DECIMAL_STEPS_NATS)), reals(-5, 5))
@few
def test_a_grid_does_not_feel_an_offset_of_each_list(seed: int, step: float, offset: float) -> None:
    rng = np.random.default_rng(seed)
    on_grid: Floats = -np.sort(rng.integers(1, int(20 / step), (8, 20)), axis=1) * np.float64(step)
    assert grid_step(on_grid) == step
    assert grid_step(on_grid + offset) == step
    assert grid_step(on_grid + offset * rng.random((8, 1))) == step


@given(st.integers(0, 10_000), st.sampled_from((0.125, 0.1)), st.booleans(), st.integers(0, 40))
@few
def test_a_grid_does_not_feel_the_order_of_the_tokens_after_the_first(
    seed: int, step: float, on_grid: bool, odd: int
) -> None:
    rng = np.random.default_rng(seed)
    values = rng.uniform(-20, 0, (8, 20))
    if on_grid:
        values = np.round(values / step) * step
    flat = values.reshape(-1)
    flat[rng.choice(flat.size, odd, replace=False)] += 0.3 * step
    shuffled = values.copy()
    shuffled[:, 1:] = rng.permuted(values[:, 1:], axis=1)
    assert grid_step(shuffled[rng.permutation(8)]) == grid_step(values)


def test_a_few_tokens_off_the_grid_are_forgiven_and_many_are_not() -> None:
    values = np.round(np.random.default_rng(2).uniform(-20, 0, (10, 20)) * 8) / 8
    values[:, 1][:8] += 0.0413
    assert grid_step(values) == 0.125
    values[:, 2][:8] += 0.0413
    assert grid_step(values) == 0.0


def test_unknown_tokens_are_left_out_of_the_grid() -> None:
    values = np.round(np.random.default_rng(3).uniform(-20, 0, (10, 20)) * 8) / 8
    values[:, 5:] = NAN
    assert grid_step(values) == 0.125
    values[:8, 0] = NAN  # nothing to take the gaps from
    assert grid_step(values) == 0.0


@pytest.mark.parametrize(("gaps", "expected"), [(MIN_GAPS - 1, 0.0), (MIN_GAPS, 0.125)])
def test_a_grid_is_not_told_from_too_few_gaps(gaps: int, expected: float) -> None:
    assert grid_step(-0.125 * np.cumsum(np.arange(gaps + 1.0))[None]) == expected


@pytest.mark.parametrize("nothing", [np.zeros((0, 20)), np.zeros((3, 0)), np.full((4, 20), NAN), np.zeros((20, 1))])
def test_nothing_lies_on_no_grid(nothing: Floats) -> None:
    assert grid_step(nothing) == 0.0


ALL_STEPS = (0.0, *STEPS_NATS, *DECIMAL_STEPS_NATS)


@pytest.mark.parametrize("one", ALL_STEPS)
def test_every_grid_fits_itself_and_none_that_is_finer(one: float) -> None:
    assert fits_grid(one, one)
    for other in ALL_STEPS:
        if one > max(other, NEGLIGIBLE_STEP_NATS):
            assert not fits_grid(one, other)


@pytest.mark.parametrize(
    ("endpoint", "recorded", "fits"),
    [
        pytest.param(0.0, 2.0**-7, True, id="float16-is-no-grid"),
        pytest.param(0.01, 0.0, True, id="two-decimals-are-no-grid"),
        pytest.param(0.0, 1 / 16, False, id="bfloat16-is-one"),
        pytest.param(2.0**-6, 2.0**-5, False, id="negligible-and-not"),
        pytest.param(1 / 16, 1 / 8, True, id="smaller-logits"),
        pytest.param(1 / 4, 1 / 8, False, id="a-rounding-that-no-stack-had"),
        pytest.param(1 / 32, 1 / 8, False, id="two-steps-apart"),
    ],
)
def test_what_may_be_compared_with_what(endpoint: float, recorded: float, fits: bool) -> None:
    assert fits_grid(endpoint, recorded) is fits


def test_rounding_noise_is_that_of_a_uniform_error() -> None:
    values = np.random.default_rng(5).uniform(-20, 0, 200_000)
    assert np.std(np.round(values / 0.25) * 0.25 - values) == pytest.approx(rounding_noise(0.25), rel=0.01)


@given(real_lists(-3e38, 3e38, 1, 20))
@few
def test_the_nearest_bfloat16_is_at_most_half_a_spacing_away(values: list[float]) -> None:
    array = np.array(values, np.float32).astype(np.float64)
    rounded = round_to_bfloat16(array)
    np.testing.assert_array_equal(round_to_bfloat16(rounded), rounded)
    near = np.abs(array) > 1e-30
    assert (np.abs(rounded / np.where(near, array, 1.0) - 1)[near] <= 2.0**-8).all()


def test_ties_go_to_the_even_bfloat16_and_unknown_values_stay_so() -> None:
    found = round_to_bfloat16(floats(1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, NAN, 0.0))
    np.testing.assert_array_equal(found, [1.0, 1 + 2**-6, -1.0, NAN, 0.0])


@given(st.integers(0, 10_000), st.integers(2, 5))
@few
def test_logprobs_written_in_bfloat16_are_told_from_logits_kept_in_it(seed: int, exponent: int) -> None:
    logits = lists_of_logits(seed, exponent)
    plain = logprobs_of(logits)
    assert written_in_bfloat16(round_to_bfloat16(plain))
    assert not written_in_bfloat16(plain)
    assert not written_in_bfloat16(logprobs_of(round_to_bfloat16(logits)))


def test_nothing_is_written_in_bfloat16() -> None:
    assert not written_in_bfloat16(np.full((3, 20), NAN))
    assert not written_in_bfloat16(np.zeros((3, 20)))
    assert not written_in_bfloat16(-np.arange(1.0, MIN_GAPS)[None])
    assert written_in_bfloat16(-np.arange(1.0, MIN_GAPS + 1)[None])


# -- the limit of a class --------------------------------------------------------------------------------------


@given(real_lists(-8, 0, MIN_STACKS, 12), reals(1, 1.5), reals(0.6, 0.99))
@few
def test_the_limit_of_a_class_is_students_prediction_limit(values: list[float], margin: float, coverage: float) -> None:
    y, n = np.array(values), len(values)
    upper = y.mean() + stats.t.ppf(coverage, n - 1) * y.std(ddof=1) * np.sqrt(1 + 1 / n)
    expected = max(float(np.exp(upper)), margin * float(np.exp(y.max())))
    assert class_limit(y, margin=margin, coverage=coverage) == pytest.approx(expected, rel=1e-9)


@given(real_lists(-8, 0, 1, 12), reals(1, 1.5), reals(1, 1.5), reals(0.6, 0.99), reals(0.6, 0.99))
@few
def test_the_limit_grows_with_margin_and_coverage_and_is_never_below_the_noisiest_with_its_margin(
    values: list[float], margin: float, other_margin: float, coverage: float, other_coverage: float
) -> None:
    y = np.array(values)
    low = class_limit(y, margin=min(margin, other_margin), coverage=min(coverage, other_coverage))
    high = class_limit(y, margin=max(margin, other_margin), coverage=max(coverage, other_coverage))
    assert min(margin, other_margin) * np.exp(y.max()) * (1 - 1e-12) <= low <= high


@pytest.mark.parametrize("values", [floats(-3), floats(-3, -5)])
def test_a_spread_is_not_learned_from_fewer_than_three_stacks(values: Floats) -> None:
    assert class_limit(values, margin=1.25, coverage=0.99) == pytest.approx(1.25 * np.exp(-3))


def test_a_spread_is_learned_from_three_stacks() -> None:
    assert class_limit(floats(-3, -5, -4), margin=1.25, coverage=0.99) > np.exp(0)


def test_a_class_without_a_stack_has_no_limit() -> None:
    with pytest.raises(ValueError, match="without a stack"):
        class_limit(np.zeros(0), margin=1.25, coverage=0.95)


@pytest.mark.parametrize("coverage", [0.95, 0.99])
def test_the_limit_holds_the_promised_share_of_new_stacks(coverage: float) -> None:
    draws = np.random.default_rng(70).normal(-3, 0.2, (10_000, 7))
    held = sum(bool(np.exp(y[6]) <= class_limit(y[:6], margin=1.0, coverage=coverage)) for y in draws)
    assert stats.binom.ppf(1e-6, len(draws), coverage) <= held <= stats.binom.ppf(1 - 1e-6, len(draws), coverage)


# -- the ladder ------------------------------------------------------------------------------------------------

RUNGS = floats(2, 4, 6, 8)


@given(reals(-4, -0.1), reals(-1, 1), real_lists(2, 8, 1, 10))
@few
def test_on_a_straight_ladder_the_bits_are_exact(slope: float, intercept: float, bits: list[float]) -> None:
    found = effective_bits(intercept + slope * np.array(bits), RUNGS, intercept + slope * RUNGS)
    inside = np.isfinite(found)  # the ends may fall outside by rounding
    assert inside.sum() >= sum(2 < b < 8 for b in bits) - sum(min(abs(b - 2), abs(b - 8)) < 1e-9 for b in bits)
    np.testing.assert_allclose(found[inside], np.array(bits)[inside], atol=1e-6)


@given(st.lists(st.tuples(reals(1, 16), reals(-5, 1)), min_size=2, max_size=12), real_lists(-6, 2, 2, 12))
@few
def test_more_noise_is_never_more_bits(rungs: list[tuple[float, float]], noise: list[float]) -> None:
    bits, scales = np.array(rungs).T
    found = effective_bits(np.sort(np.array(noise)), bits, scales)
    known = found[np.isfinite(found)]
    assert (np.diff(known) <= 1e-9).all()
    assert ((known >= bits.min() - 1e-9) & (known <= bits.max() + 1e-9)).all()


@given(st.permutations(range(6)))
@few
def test_the_ladder_does_not_feel_the_order_of_its_rungs(order: list[int]) -> None:
    bits, scales = floats(2, 4, 4.5, 6, 8, 8.5), floats(0.5, -0.4, -0.1, -1.5, -2.5, -2.2)
    at = np.linspace(-2.3, 0.4, 9)
    expected = effective_bits(at, bits, scales)
    np.testing.assert_allclose(effective_bits(at, bits[order], scales[order]), expected)


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [0, 2, 1, 3], [3, 2, 1, 0]])
def test_formats_of_equal_width_are_one_rung_whatever_their_order(order: list[int]) -> None:
    bits, scales = floats(4, 8, 8, 16), floats(0.0, -1.0, -2.0, -4.0)
    found = effective_bits(floats(-1.25, -1.5, -3.0), bits[order], scales[order])
    np.testing.assert_allclose(found, effective_bits(floats(-1.25, -1.5, -3.0), floats(4, 8, 16), floats(0, -1.5, -4)))


def test_nothing_is_extrapolated() -> None:
    found = effective_bits(floats(-4.01, -4, 0, 0.01), floats(4, 8), floats(0, -4))
    np.testing.assert_array_equal(found, [NAN, 8, 4, NAN])


def test_a_rung_that_is_out_of_order_is_pooled_with_its_neighbour() -> None:
    found = effective_bits(floats(-0.5, -1, -1.5), floats(2, 4, 5, 8), floats(0, -1.2, -0.8, -2))
    # 4 and 5 bits share the level -1, in their middle.
    np.testing.assert_allclose(found, [(2 + 4.5) / 2, 4.5, (4.5 + 8) / 2])


@pytest.mark.parametrize("rungs", [0, 1])
def test_a_ladder_needs_two_variants(rungs: int) -> None:
    with pytest.raises(ValueError, match="two variants"):
        effective_bits(floats(-1), floats(*[4.0] * rungs), floats(*[-1.0] * rungs))


# -- Bayes factors ---------------------------------------------------------------------------------------------


def integrated(x: Floats, means: Floats, sd: float, between_sd: float, degrees: int) -> float:
    """The same evidence on a fine and wide grid of the stack's own mean."""
    offsets = np.linspace(-60, 60, 48_001) * between_sd
    prior = stats.t.pdf(offsets, degrees, scale=between_sd) * (offsets[1] - offsets[0])
    u = means[:, None] + offsets
    given_u = np.exp(normal_log_density(x[:, None, None], u, sd).sum(axis=0))
    return float(np.log((given_u * prior).sum(axis=1).mean()))


@given(real_lists(-3.2, -2.2, 1, 6), real_lists(-3, -2.4, 1, 3), reals(0.2, 0.6), reals(0.2, 0.4), st.integers(1, 9))
@few
def test_the_evidence_of_sizes_is_the_integral_over_the_stacks_own_mean(
    x: list[float], means: list[float], sd: float, between_sd: float, degrees: int
) -> None:
    found = log_scale_evidence(np.array(x), np.array(means), sd, between_sd, degrees)
    assert found == pytest.approx(integrated(np.array(x), np.array(means), sd, between_sd, degrees), abs=0.05)


@pytest.mark.parametrize("answers", [100, 240])
@pytest.mark.parametrize("offset", [0.0, 0.035, 0.07])
def test_the_evidence_of_a_whole_audit_is_that_integral_within_a_factor_of_two(offset: float, answers: int) -> None:
    # As wide as the embedded bundle's stacks in bfloat16 are; 100 answers are an audit's, 240 the whole pool.
    x = -2.7 + offset + 0.23 * stats.norm.ppf((np.arange(answers) + 0.5) / answers)
    expected = integrated(x, floats(-2.7), 0.23, 0.35, 8)
    assert log_scale_evidence(x, floats(-2.7), 0.23, 0.35, 8) == pytest.approx(expected, abs=np.log(2))


@pytest.mark.parametrize("seed", range(5))
def test_the_evidence_of_sizes_favours_the_mean_that_was_drawn_from(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(-3 + rng.normal(0, 0.1), 0.3, 30)
    ours = log_scale_evidence(x, floats(-3), 0.3, 0.1, 8)
    assert ours > log_scale_evidence(x, floats(-2), 0.3, 0.1, 8) + np.log(1000)
    assert ours > log_scale_evidence(x, floats(-4), 0.3, 0.1, 8) + np.log(1000)
    # A vaguer cause pays for its vagueness, and no more than its number of places.
    vague = log_scale_evidence(x, np.linspace(-5, -1, 9), 0.3, 0.1, 8)
    assert ours - np.log(9) - 1e-9 <= vague < ours


@given(real_lists(-1500, 1500, 2, 8), st.integers(1, 3), st.integers(1, 20))
@few
def test_the_tempered_ratio_is_no_more_than_one_on_average(values: list[float], stacks: int, pool: int) -> None:
    rng = np.random.default_rng(len(values))
    ratios = rng.choice(np.array(values), (stacks, pool))
    power = tempering(ratios)
    assert 0 <= power <= 1
    if power > 0:
        means = special.logsumexp(power * ratios, axis=1) - np.log(pool)
        assert (means <= 1e-9).all()
    if power < 1:
        # It is the largest such power, to its own resolution.
        assert (special.logsumexp((power + 0.01) * ratios, axis=1) - np.log(pool) > 0).any()


@given(st.lists(real_lists(-60, 0, 3, 3), min_size=1, max_size=4))
@few
def test_a_ratio_that_never_favours_the_cause_is_not_tempered(rows: list[list[float]]) -> None:
    assert tempering(np.array(rows)) == 1.0


def test_a_ratio_that_favours_the_cause_on_an_honest_stack_is_evidence_of_nothing() -> None:
    rng = np.random.default_rng(4)
    honest = rng.normal(-2, 0.5, (3, 50))
    assert tempering(honest) > 0
    honest[1] = 0.5
    assert tempering(honest) == 0.0


def test_a_ratio_that_was_computed_with_too_narrow_a_spread_is_tempered() -> None:
    # Log ratio of N(0.5, sd) against N(0, sd) with sd half of the true one: its right power is a quarter.
    x = np.random.default_rng(5).normal(0, 1, (2, 4000))
    ratios = normal_log_density(x, 0.5, 0.5) - normal_log_density(x, 0.0, 0.5)
    assert tempering(ratios) == pytest.approx(0.25, abs=0.06)


def test_the_normal_log_density_is_scipys() -> None:
    x = floats(-2, 0, 3)
    np.testing.assert_allclose(normal_log_density(x, 0.3, 0.7), stats.norm.logpdf(x, 0.3, 0.7))


# -- one number for each answer --------------------------------------------------------------------------------


def test_the_positions_of_a_text_are_averaged_and_unknown_ones_left_out() -> None:
    values = np.array([[1.0, 2.0, NAN, 7.0, NAN], [NAN, 3.0, 5.0, NAN, NAN]])
    found = mean_by_unit(values, np.array([0, 2, 2, 0, 1]), 4)
    np.testing.assert_array_equal(found, [[4.0, NAN, 2.0, NAN], [NAN, NAN, 4.0, NAN]])


@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 20))
@few
def test_averages_by_unit_feel_neither_the_order_of_rows_nor_leading_axes(seed: int, units: int, rows: int) -> None:
    rng = np.random.default_rng(seed)
    values, unit_of_row = rng.normal(size=(2, 3, rows)), rng.integers(0, units, rows)
    values[rng.random(values.shape) < 0.3] = NAN
    found = mean_by_unit(values, unit_of_row, units)
    assert found.shape == (2, 3, units)
    order = rng.permutation(rows)
    np.testing.assert_allclose(mean_by_unit(values[..., order], unit_of_row[order], units), found)
    for place in np.ndindex(2, 3):
        for unit in range(units):
            own = values[place][unit_of_row == unit]
            own = own[np.isfinite(own)]
            assert found[*place, unit] == pytest.approx(own.mean() if own.size else NAN, nan_ok=True)


@given(st.integers(0, 10_000), st.integers(4, 20), reals(0, 30))
@few
def test_transforms_of_cosines_are_bounded_and_odd_and_feel_no_order(seed: int, k: int, size: float) -> None:
    rng = np.random.default_rng(seed)
    residual, variant, reference = rng.normal(size=(3, k))
    residual = residual * size
    order = rng.permutation(k)
    pointing, sharpening = fisher_cosine(residual, variant, reference), shape_fisher(residual, reference)
    assert max(abs(pointing), abs(sharpening)) <= LARGEST_FISHER
    np.testing.assert_allclose(fisher_cosine(-residual, variant, reference), -pointing, atol=1e-9)
    np.testing.assert_allclose(shape_fisher(-residual, reference), -sharpening, atol=1e-9)
    shuffled = fisher_cosine(residual[order], variant[order], reference[order])
    np.testing.assert_allclose(shuffled, pointing, atol=1e-6)
    np.testing.assert_allclose(shape_fisher(residual[order], reference[order]), sharpening, atol=1e-6)


@given(st.integers(0, 10_000), reals(0.2, 5))
@few
def test_a_temperature_is_shape_alone(seed: int, temperature: float) -> None:
    assume(abs(temperature - 1) > 1e-3)
    rng = np.random.default_rng(seed)
    reference, variant = rng.normal(-5, 2, 20), rng.normal(size=20)
    tempered = reference / temperature
    residual = centred_difference(tempered - special.logsumexp(tempered), reference)
    assert shape_fisher(residual, reference) == pytest.approx(LARGEST_FISHER * (1 if temperature < 1 else -1))
    assert fisher_cosine(residual, variant, reference) == pytest.approx(0, abs=1e-6)


def test_a_residual_points_at_itself_as_far_as_is_counted() -> None:
    residual, reference = np.random.default_rng(6).normal(size=(2, 20))
    assert fisher_cosine(residual, residual, reference) == pytest.approx(LARGEST_FISHER)
    assert fisher_cosine(residual, -2 * residual, reference) == pytest.approx(-LARGEST_FISHER)


def test_transforms_of_cosines_need_four_known_tokens() -> None:
    residual, variant, reference = np.random.default_rng(7).normal(size=(3, 6))
    residual[:2] = NAN
    assert np.isfinite(fisher_cosine(residual, variant, reference))
    assert np.isfinite(shape_fisher(residual, reference))
    reference[2] = NAN
    assert np.isnan(fisher_cosine(residual, variant, reference))
    assert np.isnan(shape_fisher(residual, reference))


def test_no_residual_points_nowhere() -> None:
    variant, reference = np.random.default_rng(8).normal(size=(2, 6))
    assert fisher_cosine(np.zeros(6), variant, reference) == 0
    assert shape_fisher(np.zeros(6), reference) == 0
    assert shape_fisher(variant, np.full(6, -1.0)) == 0


# -- many draws at once ----------------------------------------------------------------------------------------


@given(st.integers(0, 10_000), st.sampled_from([1.0, 0.25]), st.integers(1, 30))
@few
def test_processes_of_many_draws_are_those_of_each_draw(seed: int, stake: float, asked: int) -> None:
    rng = np.random.default_rng(seed)
    scores, null = rng.exponential(1, (2, 4, asked)), rng.exponential(1, (3, 30))
    scores[rng.random(scores.shape) < 0.2] = NAN
    together = bounded_score_process(scores, null, cap=20.0, outlier_share=0.01, stake=stake)
    assert together.shape == scores.shape
    for place in np.ndindex(2, 4):
        alone = bounded_score_process(scores[place], null, cap=20.0, outlier_share=0.01, stake=stake)
        np.testing.assert_allclose(together[place], alone)
    weights = floats(3, 1)
    mixed = mixture(together, weights)
    assert mixed.shape == (4, asked)
    for draw in range(4):
        np.testing.assert_allclose(mixed[draw], mixture(together[:, draw], weights))


@pytest.mark.parametrize("stake", [1.0, 0.25])
def test_without_an_allowance_wealth_at_the_null_is_one_on_average(stake: float) -> None:
    rng = np.random.default_rng(9)
    null = rng.exponential(1, (1, 60))
    scores = null[0][np.argsort(rng.random((20_000, 60)), axis=1)]
    wealth = np.exp(bounded_score_process(scores[:, :12], null, cap=20.0, outlier_share=0.0, stake=stake))
    error = wealth.std(axis=0) / np.sqrt(len(wealth))
    assert (np.abs(wealth.mean(axis=0) - 1) < 5 * error).all()


# -- error rates on a small library ----------------------------------------------------------------------------

PROBES, LISTED, TOP = 150, 30, 20


def stack_record(
    name: str, arithmetic: str = "float32", departure: Cause | None = None, departure_class: str | None = None
) -> StackRecord:
    return StackRecord(
        id=name, description=name, departure=departure, departure_class=departure_class, family=f"none/{arithmetic}", pools=["small"],
        precision=Precision(weights="bfloat16", activations=arithmetic, kv_cache=arithmetic, logits=arithmetic), engine={},
    )  # fmt: skip


def small_bundle() -> Bundle:
    """Honest stacks with and without a grid, and two departures of the weights, over one list of tokens for each probe."""
    rng = np.random.default_rng(80)
    logits = 24 - np.sort(rng.exponential(2, (PROBES, LISTED)), axis=1)
    normaliser = special.logsumexp(logits, axis=1, keepdims=True) + 0.1

    def noisy(nats: float) -> Floats:
        # Some prompts are noisier than others.
        return np.asarray(logits + nats * rng.gamma(4, 0.25, (PROBES, 1)) * rng.normal(size=logits.shape))

    recorded = [
        (stack_record("reference"), logits),
        *((stack_record(f"plain-{n}"), noisy(nats)) for n, nats in enumerate((0.01, 0.02, 0.03))),
        *((stack_record(f"half-{n}", "bfloat16"), round_to_bfloat16(noisy(nats))) for n, nats in enumerate((0.03, 0.035, 0.04))),
        (stack_record("faint", departure="precision", departure_class="int8"), noisy(0.12)),
        (stack_record("coarse", departure="precision", departure_class="int4"), noisy(0.6)),
    ]  # fmt: skip
    manifest = Manifest(
        id="small", version=1, model="small", model_names=["small"], keeper="nobody", built_with="a test",
        weights=WeightsSource(source="none", precision="bfloat16", files={}), licence=None, vocabulary_sha256="0", template_sha256="0",
        pools=[PoolRecord(id="small", version=1, sha256="0", level="L3", probes=list(range(PROBES)))],
        probe_ids=[f"p-{n}" for n in range(PROBES)], top_k=LISTED, shard=PROBES, reference_stack="reference",
        stacks=[stack for stack, _ in recorded],
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
        logprobs_nats=np.stack([values - normaliser for _, values in recorded]).astype(np.float32),
        prompt_tokens=np.full((1, PROBES), 50, np.int32),
        vocabulary=tuple(bytes([65 + n]) for n in range(LISTED)),
    )


@pytest.fixture(scope="module")
def policy() -> Policy:
    return load_policy("strict")


@pytest.fixture(scope="module")
def library(policy: Policy) -> Library:
    return build_library(small_bundle(), policy, TOP)


@pytest.fixture(scope="module")
def order() -> NDArray[np.int64]:
    """The order of each of many draws without replacement."""
    return np.argsort(np.random.default_rng(81).random((DRAWS, PROBES)), axis=1)


def assert_alarms_are_rare(log_process: Floats) -> None:
    """Fail only where so many draws have a chance below one in a million at a rate of alpha."""
    peaks = log_process.max(axis=-1)
    for alpha in (0.05, 0.01, 0.001):
        hits = int((peaks >= np.log(1 / alpha)).sum())
        assert hits <= stats.binom.ppf(1 - 1e-6, peaks.size, alpha), f"{hits} of {peaks.size} at a rate of {alpha}"


def null_of(library: Library, grid: float) -> Null:
    null = library.null_for(grid)
    assert null is not None
    return null


GRIDS = pytest.mark.parametrize("grid", [0.0, 0.125])


def test_stacks_with_and_without_a_grid_are_held_apart(library: Library) -> None:
    names = {null.grid_nats: {library.honest[i].id for i in null.stacks} for null in library.nulls}
    assert names == {0.0: {"plain-0", "plain-1", "plain-2"}, 0.125: {"half-0", "half-1", "half-2"}}
    assert library.null_for(1.0) is None


def test_a_coarser_grid_widens_the_limit_by_its_own_noise_and_excludes_no_direction(library: Library) -> None:
    finer, coarser = null_of(library, 0.125), null_of(library, 0.25)
    assert coarser.limit_nats == pytest.approx(np.hypot(finer.limit_nats, 0.25 / np.sqrt(12)))
    np.testing.assert_allclose(coarser.log_scales - finer.log_scales, coarser.mean - finer.mean)
    assert np.isnan(coarser.farthest_fisher).all()


@GRIDS
def test_every_honest_stack_is_moved_up_to_the_limit(library: Library, policy: Policy, grid: float) -> None:
    null = null_of(library, grid)
    np.testing.assert_allclose(np.exp(null.log_scales.mean(axis=1)), null.limit_nats)
    assert null.limit_nats >= policy.null_scale_floor_nats
    assert null.limit_nats >= policy.stack_margin * np.exp(null.means.max())
    np.testing.assert_allclose(np.nanmean(null.fisher, axis=2), np.broadcast_to(null.fisher_mean[:, None], (2, 3)))
    assert (np.tanh(null.fisher_mean) >= policy.direction_floor_cosine - 1e-9).all()


@GRIDS
@pytest.mark.parametrize("stack", [0, 1, 2])
def test_a_stack_at_the_limit_of_size_is_rejected_as_rarely_as_promised(
    library: Library, policy: Policy, order: NDArray[np.int64], grid: float, stack: int
) -> None:
    null = null_of(library, grid)
    assert_alarms_are_rare(size_process(null, null.log_scales[stack][order], policy))


@GRIDS
@pytest.mark.parametrize("stack", [0, 1, 2])
def test_a_stack_at_the_limit_of_direction_is_rejected_as_rarely_as_promised(
    library: Library, policy: Policy, order: NDArray[np.int64], grid: float, stack: int
) -> None:
    null = null_of(library, grid)
    features = Features(null.log_scales[stack][order], null.fisher[:, stack][:, order], null.shape_fisher[stack][order])
    by_variant = direction_processes(null, features, policy, np.ones(len(library.variants), np.bool_))
    for process in by_variant:
        assert_alarms_are_rare(process)
    assert_alarms_are_rare(sampling_process(null, features, policy))
    size = size_process(null, features.log_scales, policy)
    assert_alarms_are_rare(mixture(np.array([size, mixture(by_variant)])))


@GRIDS
@pytest.mark.parametrize("stack", [0, 1, 2])
@pytest.mark.parametrize("variant", [0, 1])
def test_a_departure_that_is_served_at_its_least_is_excluded_as_rarely_as_promised(
    library: Library, policy: Policy, order: NDArray[np.int64], grid: float, stack: int, variant: int
) -> None:
    null = null_of(library, grid)
    least = library.variant_log_scales[variant] - np.log(policy.stack_margin)
    fisher = np.full((2, *order.shape), NAN)
    fisher[variant] = null.farthest_fisher[variant, stack][order]
    features = Features(least[order], fisher, np.zeros(order.shape))
    processes, excludable = exclusion_processes(library, null, features, policy)
    assert excludable[variant]
    assert_alarms_are_rare(processes[variant])


@GRIDS
@pytest.mark.parametrize("variant", [0, 1])
def test_a_departure_is_found_and_an_honest_stack_excludes_it(
    library: Library, policy: Policy, order: NDArray[np.int64], grid: float, variant: int
) -> None:
    null = null_of(library, grid)
    for stack in null.stacks.tolist():
        features = drawn(put_on(library, variant, stack), 100, np.random.default_rng(82))
        assert np.median(answers_to_differ(library, null, features, policy)) <= 30
    honest = Features(
        (null.log_scales[0] - null.log_scales[0].mean() + null.means[0])[order],
        np.random.default_rng(83).normal(0, 0.25, (2, *order.shape)),
        np.zeros(order.shape),
    )
    processes, _ = exclusion_processes(library, null, honest, policy)
    assert (processes[variant].max(axis=-1) >= np.log(policy.consistent_e_value)).mean() > 0.99


@GRIDS
def test_a_stack_half_as_noisy_again_as_the_limit_is_found(
    library: Library, policy: Policy, order: NDArray[np.int64], grid: float
) -> None:
    null = null_of(library, grid)
    process = size_process(null, null.log_scales[0][order] + np.log(1.5), policy)
    assert (process.max(axis=-1) >= np.log(policy.differs_e_value)).mean() > 0.99
