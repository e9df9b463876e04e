"""The share of diverted requests: cases by hand, coverage by enumeration and simulation, promises of e-processes."""

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike, NDArray
from scipy import integrate, stats

from weighbridge.stats.mixtures import (
    PRIOR,
    SHARES,
    Rates,
    _log_bet_on_more,
    anytime_share_interval,
    diversion_shown,
    measured_rates,
    share_interval,
    share_process,
    stand_out_process,
    universal_share_interval,
)

Floats = NDArray[np.float64]
few = settings(derandomize=True, deadline=None, max_examples=60)
SURE = Rates(0.0, 1.0)  # stands out if and only if diverted
Interval = Callable[..., tuple[float, float]]
INTERVALS: list[Interval] = [share_interval, anytime_share_interval]
NAN = float("nan")


def counted(found: int, asked: int) -> NDArray[np.bool_]:
    return np.arange(asked) < found


def honest_draws(rng: np.random.Generator, size: int | tuple[int, ...]) -> Floats:
    return -8 + rng.standard_t(4, size)


def variant_draws(rng: np.random.Generator, size: int | tuple[int, ...]) -> Floats:
    return 12 + 3 * rng.standard_t(4, size)


# -- at a fixed number of responses --------------------------------------------------------------------------------


def test_one_response_by_hand() -> None:
    assert share_interval([0], SURE) == pytest.approx((0, 0.975))
    assert share_interval([1], SURE) == pytest.approx((0.025, 1))


def test_one_of_two_by_hand() -> None:
    """1 − (1 − q)² = 0.025 and 1 − q² = 0.025."""
    assert share_interval([False, True], SURE) == pytest.approx((1 - np.sqrt(0.975), np.sqrt(0.975)))


def test_all_stand_out() -> None:
    assert share_interval(np.ones(5), SURE) == pytest.approx((0.025**0.2, 1))


@pytest.mark.parametrize("asked", [1, 10, 59, 299])
def test_none_of_n_is_exactly_the_bound_that_it_is(asked: int) -> None:
    none = counted(0, asked)
    assert share_interval(none, SURE) == pytest.approx((0, 1 - 0.025 ** (1 / asked)), rel=1e-12)
    expected = (1 - 0.05 ** (1 / asked)) / 0.9
    assert share_interval(none, Rates(0.01, 0.9), tails="upper") == pytest.approx((0, min(expected, 1)), rel=1e-12)


@pytest.mark.parametrize(("asked", "excluded"), [(59, 0.05), (299, 0.01)])
def test_the_rule_of_three(asked: int, excluded: float) -> None:
    assert share_interval(counted(0, asked), SURE, tails="upper")[1] < excluded
    assert share_interval(counted(0, asked - 1), SURE, tails="upper")[1] > excluded


@pytest.mark.parametrize("interval", INTERVALS)
def test_the_rates_by_hand(interval: Interval) -> None:
    """Lower: (q − c₀) / (t − c₀) with the most of t; upper: q / t with the least."""
    lower, upper = interval(counted(30, 100), SURE)
    found = interval(counted(30, 100), Rates(0.02, 0.8, 0.9))
    assert found == pytest.approx(((lower - 0.02) / 0.88, upper / 0.8))


@pytest.mark.parametrize("interval", INTERVALS)
def test_what_the_rates_may_err_is_taken_off_the_count(interval: Interval) -> None:
    erring = interval(counted(3, 50), Rates(0.0, 1.0, error=0.02), confidence=0.95)
    assert erring == pytest.approx(interval(counted(3, 50), SURE, confidence=0.97))


@pytest.mark.parametrize("interval", INTERVALS)
def test_an_unknown_power_gives_a_lower_end_alone_and_that_has_all_of_the_error(interval: Interval) -> None:
    lower, upper = interval(counted(20, 100), Rates(0.01))
    assert upper == 1
    assert lower == interval(counted(20, 100), Rates(0.01, 0.9), tails="lower")[0]
    assert lower > interval(counted(20, 100), Rates(0.01, 0.9))[0] > 0


@pytest.mark.parametrize("interval", INTERVALS)
def test_no_more_than_honest_responses_may_show_shows_nothing(interval: Interval) -> None:
    assert interval(counted(1, 100), Rates(0.01, 0.9))[0] == 0
    assert interval(counted(100, 100), Rates(1.0, 0.9)) == (0, 1)  # every honest response may stand out
    assert interval(counted(100, 100), Rates(0.5, 0.1, 0.4)) == (
        0,
        1,
    )  # a variant that stands out less often than honest


@pytest.mark.parametrize("asked", [1, 4, 17, 60])
@pytest.mark.parametrize(("false", "true"), [(0.0, 1.0), (0.02, 0.9)])
def test_exact_coverage_by_summing_over_all_counts(asked: int, false: float, true: float) -> None:
    """Whatever rates within the limits hold, and whatever ε, 0 and 1 included."""
    counts = np.arange(asked + 1)
    found = np.array([share_interval(counted(int(k), asked), Rates(false, true)) for k in counts])
    for share in np.concatenate([[0.0, 1.0], np.linspace(0.003, 0.97, 60)]):
        for f, t in product((0.0, false), (true, 1.0)):
            chances = stats.binom.pmf(counts, asked, share * t + (1 - share) * f)
            covered = (found[:, 0] <= share) & (share <= found[:, 1])
            assert chances[covered].sum() >= 0.95 - 1e-9


@pytest.mark.parametrize(("share", "width"), [(0.0, 0.015), (0.01, 0.03), (0.05, 0.06), (0.2, 0.105)])
def test_coverage_and_width_with_measured_rates(share: float, width: float) -> None:
    rng = np.random.default_rng(1)
    trials, asked = 300, 300
    covered, total = 0, 0.0
    for _ in range(trials):
        cut, rates = measured_rates(honest_draws(rng, 5000), variant_draws(rng, 2000), cut_nats=2.0)
        ratios = np.where(rng.random(asked) < share, variant_draws(rng, asked), honest_draws(rng, asked))
        lower, upper = share_interval(ratios > cut, rates)
        covered += lower <= share <= upper
        total += upper - lower
    assert covered / trials >= 0.95 - 2 * np.sqrt(0.05 * 0.95 / trials)
    assert total / trials <= width


@given(st.integers(1, 80), st.data())
@few
def test_more_that_stand_out_never_lower_either_end(asked: int, data: st.DataObject) -> None:
    found = data.draw(st.integers(0, asked - 1))
    false, true = data.draw(st.floats(0, 0.5)), data.draw(st.floats(0.5, 1))
    rates = Rates(false, true)
    for interval in INTERVALS:
        fewer, more = interval(counted(found, asked), rates), interval(counted(found + 1, asked), rates)
        assert 0 <= fewer[0] <= fewer[1] <= 1
        assert fewer[0] <= more[0] + 1e-12
        assert fewer[1] <= more[1] + 1e-12
        looser = interval(counted(found, asked), Rates(min(false + 0.1, 0.9), true * 0.9))
        assert looser[0] <= fewer[0] + 1e-12
        assert fewer[1] <= looser[1] + 1e-12


@given(st.integers(1, 200), st.data())
@few
def test_looking_at_any_time_costs_width(asked: int, data: st.DataObject) -> None:
    flags = counted(data.draw(st.integers(0, asked)), asked)
    lower, upper = share_interval(flags, SURE)
    early, late = anytime_share_interval(flags, SURE)
    assert early <= lower + 1e-12
    assert upper <= late + 1e-12


# -- rates ---------------------------------------------------------------------------------------------------------


def test_rates_by_hand() -> None:
    """1 of 100 honest and 3 of 4 of the variant's draws are above 0; the limits may err with 0.01, 0.005 and 0.005."""
    honest, variant = np.full(100, -5.0), np.array([-1.0, 1, 2, 3])
    honest[7] = 0.5
    cut, rates = measured_rates(honest, variant, cut_nats=0.0, error=0.02)
    assert cut == 0
    assert rates.error == 0.02
    assert stats.binom.cdf(1, 100, rates.false_positive) == pytest.approx(0.01)
    assert stats.binom.sf(2, 4, rates.true_positive) == pytest.approx(0.005)
    assert stats.binom.cdf(3, 4, rates.most_true_positive) == pytest.approx(0.005)


def test_a_cut_that_is_not_given_is_the_largest_honest_draw_but_for_the_spared() -> None:
    honest = np.array([3.0, -1.0, 2.0, 0.0])
    cut, rates = measured_rates(honest, error=0.05)
    assert cut == 3
    assert rates == pytest.approx((1 - 0.05**0.25, 0, 1, 0.05))
    cut, rates = measured_rates(honest, spared=1, error=0.05)
    assert cut == 2
    assert stats.binom.cdf(1, 4, rates.false_positive) == pytest.approx(0.05)


@pytest.mark.parametrize("spared", [0, 3])
@pytest.mark.parametrize("lattice", [False, True])
def test_the_limit_at_a_cut_taken_from_the_draws_holds_as_often_as_said(spared: int, lattice: bool) -> None:
    """Uniform draws, so that the chance of exceeding a cut is known; on a lattice there are ties."""
    rng = np.random.default_rng(2)
    trials, wrong = 2000, 0
    for _ in range(trials):
        draws = rng.random(200)
        cut, rates = measured_rates(np.ceil(draws * 20) / 20 if lattice else draws, spared=spared, error=0.1)
        wrong += rates.false_positive < 1 - cut
    assert wrong / trials <= 0.1 + 3 * np.sqrt(0.1 * 0.9 / trials)
    assert lattice or wrong / trials >= 0.1 - 3 * np.sqrt(0.1 * 0.9 / trials)


# -- at every number of responses ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("found", "asked"), [(0, 1), (1, 1), (1, 12), (5, 40), (40, 40)])
@pytest.mark.parametrize("q", [0.003, 0.1, 0.7])
def test_the_closed_form_of_the_bet_is_its_integral(found: int, asked: int, q: float) -> None:
    def staked(u: float) -> float:
        v = max(u, q)
        return float((v / q) ** found * ((1 - v) / (1 - q)) ** (asked - found) * stats.beta.pdf(u, *PRIOR))

    below, above = integrate.quad(staked, 0, q)[0], integrate.quad(staked, q, 1, points=[(found + 1) / (asked + 2)])[0]
    assert np.exp(_log_bet_on_more(q, found, asked, PRIOR)) == pytest.approx(below + above, rel=1e-5)


@pytest.mark.parametrize("q", [0.004, 0.05, 0.5])
def test_the_bet_has_mean_one_under_its_null_and_less_below_it(q: float) -> None:
    counts = np.arange(31)
    bets = np.exp([_log_bet_on_more(q, int(k), 30, PRIOR) for k in counts])
    assert stats.binom.pmf(counts, 30, q) @ bets == pytest.approx(1)
    assert stats.binom.pmf(counts, 30, 0.8 * q) @ bets < 1


@pytest.mark.parametrize("share", [0.0, 0.05, 0.3])
def test_all_the_anytime_intervals_of_a_run_cover_together(share: float) -> None:
    """Rates at their limits, where it is hardest: at 0 and 0.3 too many stand out, else too few."""
    rng = np.random.default_rng(3)
    rates = Rates(0.02, 0.9)
    chance = share + (1 - share) * rates.false_positive if share in (0.0, 0.3) else share * rates.true_positive
    trials, asked = 400, 120
    found: dict[tuple[int, int], bool] = {}

    def covers(count: int, n: int) -> bool:
        if (count, n) not in found:
            lower, upper = anytime_share_interval(counted(count, n), rates)
            found[count, n] = lower <= share <= upper
        return found[count, n]

    counts = np.cumsum(rng.random((trials, asked)) < chance, axis=1)
    looks = [*range(10), *range(11, asked, 4)]
    missed = sum(not all(covers(int(row[n]), n + 1) for n in looks) for row in counts)
    assert missed / trials <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / trials)


def test_anytime_widths() -> None:
    """Mean over the counts at n = 300, with rates as they come out of 5,000 and 2,000 draws."""
    counts = np.arange(301)
    rates = Rates(0.0018, 0.977, 0.994, 0.002)
    for share, width in ((0.0, 0.02), (0.05, 0.095), (0.2, 0.18)):
        chances = stats.binom.pmf(counts, 300, share * 0.986)
        likely = counts[chances > 1e-6]
        widths = [np.diff(anytime_share_interval(counted(int(k), 300), rates))[0] for k in likely]
        assert chances[likely] @ widths <= width


@given(st.lists(st.sampled_from([0, 1]), min_size=1, max_size=60))
@few
def test_the_order_of_responses_means_nothing_to_an_interval(flags: list[int]) -> None:
    for interval in INTERVALS:
        assert interval(flags, SURE) == interval(flags[::-1], SURE)


# -- from the ratios themselves ------------------------------------------------------------------------------------

HONEST, VARIANT = np.array([0.7, 0.2, 0.1]), np.array([0.1, 0.2, 0.7])  # what a response can be, in the small world
SMALL = np.log(VARIANT / HONEST)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.6, 1.0])
def test_universal_coverage_by_enumeration(share: float) -> None:
    """All 3⁵ runs of five responses in a world of three, at a confidence low enough for some of them to exclude ε."""
    chances = (1 - share) * HONEST + share * VARIANT
    missed = 0.0
    found: dict[tuple[int, ...], bool] = {}  # the order means nothing

    def covers(seen: tuple[int, ...]) -> bool:
        if seen not in found:
            lower, upper = universal_share_interval(SMALL[list(seen)], confidence=0.6)
            found[seen] = lower <= share <= upper
        return found[seen]

    for run in product(range(3), repeat=5):
        if not all(covers(tuple(sorted(run[:n]))) for n in range(1, 6)):
            missed += float(np.prod(chances[list(run)]))
    assert missed <= 0.4


def test_universal_intervals_by_hand() -> None:
    """Λ = 0 says nothing; one sure response excludes what the prior's mean share, 0.104, is twenty times of."""
    assert universal_share_interval(np.zeros(10)) == (0, 1)
    lower, upper = universal_share_interval(np.array([np.inf]))
    assert (lower, upper) == pytest.approx((0.05 * 0.35 / 3.35, 1), rel=0.01)
    assert universal_share_interval(np.full(40, 600.0))[0] > 0.6
    lower, upper = universal_share_interval(np.full(300, -np.inf))
    assert lower == 0
    assert upper < 0.02


def test_universal_width_and_coverage_where_the_ratio_is_exact() -> None:
    """N(μ, 2μ) against N(−μ, 2μ), μ = 10: their own log-likelihood ratio."""
    rng = np.random.default_rng(4)
    trials, covered, total = 60, 0, 0.0
    for _ in range(trials):
        ratios = np.where(rng.random(300) < 0.05, 10.0, -10.0) + np.sqrt(20) * rng.normal(size=300)
        lower, upper = universal_share_interval(ratios)
        covered += lower <= 0.05 <= upper
        total += upper - lower
    assert covered >= 0.95 * trials
    assert total / trials <= 0.1


@given(st.lists(st.floats(-50, 50), min_size=1, max_size=40))
@few
def test_more_confidence_widens_and_one_more_honest_response_lowers(ratios: list[float]) -> None:
    lower, upper = universal_share_interval(np.array(ratios))
    assert 0 <= lower <= upper <= 1
    wider = universal_share_interval(np.array(ratios), confidence=0.99)
    assert wider[0] <= lower + 1e-9
    assert upper <= wider[1] + 1e-9
    honest = universal_share_interval(np.append(ratios, -50.0))
    assert honest[0] <= lower + 1e-9


# -- e-processes ---------------------------------------------------------------------------------------------------


def test_the_process_by_hand() -> None:
    found = stand_out_process([0, 1], false_positive=0.1, shares=(0.5,))
    np.testing.assert_allclose(np.exp(found), [0.5, 0.5 * (0.5 + 0.5 * 10)])
    # B = 10, C = 0.9 + 0.1 · 10 = 1.9
    capped = share_process(np.log([5.0, 1e6]), contamination=0.1, shares=(0.5,))
    np.testing.assert_allclose(np.exp(capped), [0.5 + 2.5 / 1.9, (0.5 + 2.5 / 1.9) * (0.5 + 5 / 1.9)])
    mixed = stand_out_process([1], false_positive=0.1)
    np.testing.assert_allclose(np.exp(mixed), [np.mean([1 - share + 10 * share for share in SHARES])])


def test_a_sure_ratio_counts_as_the_cap_and_an_impossible_one_as_nothing() -> None:
    cap = float(np.log(500))
    sure, capped = (share_process(np.array([top]), contamination=0.002) for top in (np.inf, cap))
    np.testing.assert_allclose(sure, capped)
    assert np.isfinite(share_process(np.full(300, -np.inf), contamination=0.002)).all()


def test_the_mean_is_at_most_one_by_enumeration() -> None:
    """Honest but for a share of c₀ that is always the most extreme there is; a world of three kinds and a fourth."""
    c0 = 0.05
    chances = np.append((1 - c0) * HONEST, c0)
    ratios = np.append(SMALL, np.inf)
    for cap in (None, 1.0, 3.0, 1e4):
        total = sum(
            float(np.prod(chances[list(run)]) * np.exp(share_process(ratios[list(run)], contamination=c0, cap=cap)[-1]))
            for run in product(range(4), repeat=3)
        )
        assert total <= 1 + 1e-12
    assert total > 0.9  # where everything counts in full, nearly all that is allowed is used
    flags = [list(run) for run in product((0, 1), repeat=4)]
    mean = sum(
        0.1 ** sum(run) * 0.9 ** (4 - sum(run)) * np.exp(stand_out_process(run, false_positive=0.1)[-1])
        for run in flags
    )
    assert mean == pytest.approx(1)


def best_mean(process: Callable[[list[int]], Floats], pool: int, drawn: tuple[int, ...] = ()) -> float:
    """The mean at the best moment to stop, by looking ahead over all orders in which the rest of a pool can come."""
    now = float(np.exp(process(list(drawn))[-1])) if drawn else 1.0
    left = [probe for probe in range(pool) if probe not in drawn]
    return max(now, float(np.mean([best_mean(process, pool, (*drawn, probe)) for probe in left]))) if left else now


def test_without_replacement_no_moment_to_stop_has_a_mean_above_one() -> None:
    """Five whose answers are always the same: one stands out, which c₀ = 0.2 allows; ratios likewise, up to C."""
    flags = np.array([1, 0, 0, 0, 0])
    # B = 5, C = 0.8 + 0.2 · 5 = 1.8, the pool's mean of min(LR, B)
    ratios = np.log([5.0, 2.0, 1.0, 0.6, 0.4])
    assert np.exp(ratios).mean() == pytest.approx(1.8)
    assert best_mean(lambda drawn: stand_out_process(flags[drawn], false_positive=0.2, pool=5), 5) <= 1 + 1e-9
    assert best_mean(lambda drawn: share_process(ratios[drawn], contamination=0.2, pool=5), 5) <= 1 + 1e-9
    # What the pool is for: as if drawn with replacement, what has not yet come is underestimated.
    assert best_mean(lambda drawn: stand_out_process(flags[drawn], false_positive=0.2), 5) > 1.05


def test_false_alarms_under_optional_stopping_are_as_rare_as_said() -> None:
    """Stopped at the first moment that it reaches 20, or at 200; c₀ of the responses as extreme as can be."""
    rng = np.random.default_rng(5)
    c0, runs = 0.02, 4000
    kind = rng.random((runs, 200))
    honest = SMALL[np.searchsorted(np.cumsum(HONEST), rng.random((runs, 200)))]
    by_ratios = share_process(np.where(kind < c0, np.inf, honest), contamination=c0)
    by_flags = stand_out_process(kind < c0, false_positive=c0)
    for process in (by_ratios, by_flags):
        reached = process >= np.log(20)
        stopped = np.where(reached.any(axis=1), reached.argmax(axis=1), 199)
        assert reached.any(axis=1).mean() <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / runs)
        at_stop = np.exp(process[np.arange(runs), stopped])
        assert at_stop.mean() <= 1 + 3 * at_stop.std() / np.sqrt(runs)


def test_a_twentieth_diverted_is_found() -> None:
    rng = np.random.default_rng(6)
    diverted = rng.random((400, 400)) < 0.05
    ratios = np.where(diverted, variant_draws(rng, (400, 400)), honest_draws(rng, (400, 400)))
    process = share_process(ratios, contamination=0.0006)
    after = [diversion_shown(row, flags > 2, e_value=1000) or 400 for row, flags in zip(process, ratios, strict=True)]
    assert np.median(after) <= 80


@given(st.lists(st.floats(-20, 20), min_size=1, max_size=30), st.integers(0, 29), st.floats(0, 10))
@few
def test_a_larger_ratio_never_lowers_the_process(ratios: list[float], at: int, more: float) -> None:
    larger = np.array(ratios)
    larger[at % len(ratios)] += more
    for pool in (None, 40):
        smaller = share_process(np.array(ratios), contamination=0.01, pool=pool)
        assert (share_process(larger, contamination=0.01, pool=pool) >= smaller - 1e-9).all()


def test_one_run_of_several_is_as_if_it_were_alone() -> None:
    runs = np.random.default_rng(7).normal(size=(2, 3, 6)) * 5
    together = share_process(runs, contamination=0.01)
    assert together.shape == runs.shape
    np.testing.assert_allclose(together[1, 2], share_process(runs[1, 2], contamination=0.01))


# -- what may be said ----------------------------------------------------------------------------------------------


def test_one_response_never_shows_a_diversion() -> None:
    flags = counted(1, 50)
    process = stand_out_process(flags, false_positive=1e-9)
    assert process.max() > np.log(1e6)
    assert diversion_shown(process, flags, e_value=1000) is None
    assert diversion_shown(share_process(np.array([np.inf]), contamination=1e-9), [1], e_value=1000) is None


def test_a_diversion_is_shown_when_two_stand_out_and_the_process_is_there() -> None:
    flags = [1, 0, 1, 0]
    assert diversion_shown(np.log([5000.0, 4000, 9e6, 8e6]), flags, e_value=1000) == 3
    assert diversion_shown(np.log([5.0, 4, 900, 1000]), flags, e_value=1000) == 4
    assert diversion_shown(np.log([5000.0, 4000, 900, 800]), flags, e_value=1000) is None
    assert diversion_shown(np.log([5000.0, 4000, 9e6, 8e6]), flags, e_value=1000, least=3) is None
    assert diversion_shown(np.array([]), [], e_value=1000) is None


# -- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interval", INTERVALS)
@pytest.mark.parametrize(
    ("flags", "rates", "more", "words"),
    [
        pytest.param([], SURE, {}, "there are no responses", id="nothing"),
        pytest.param([0, 2], SURE, {}, "only 0 and 1", id="count"),
        pytest.param([0, NAN], SURE, {}, "only 0 and 1", id="nan"),
        pytest.param([[0, 1]], SURE, {}, "one row", id="shape"),
        pytest.param([0], Rates(1.1), {}, "false positives", id="false-over-one"),
        pytest.param([0], Rates(NAN), {}, "false positives", id="false-nan"),
        pytest.param([0], Rates(0.0, 0.9, 0.8), {}, "in order", id="order"),
        pytest.param([0], Rates(0.0, 0.9, 1.2), {}, "in order", id="over-one"),
        pytest.param([0], SURE, {"confidence": 1.0}, "confidence", id="certain"),
        pytest.param([0], Rates(0.0, 1.0, error=0.05), {}, "leave nothing", id="error"),
        pytest.param([0], Rates(0.0, 1.0, error=-0.1), {}, "leave nothing", id="negative-error"),
        pytest.param([0], SURE, {"tails": "none"}, "tails", id="tails"),
    ],
)
def test_an_interval_of_nonsense(
    interval: Interval, flags: ArrayLike, rates: Rates, more: dict[str, object], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        interval(flags, rates, **more)


def test_ratios_that_are_nonsense() -> None:
    for nonsense, words in ((np.array([]), "there are no responses"), (np.array([0, NAN]), "not a number")):
        with pytest.raises(ValueError, match=words):
            universal_share_interval(nonsense)
    with pytest.raises(ValueError, match="confidence"):
        universal_share_interval(np.zeros(2), confidence=0.0)
    with pytest.raises(ValueError, match="not a number"):
        share_process(np.array([NAN]), contamination=0.1)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"contamination": 0.0}, "contamination"),
        ({"contamination": 1.0}, "contamination"),
        ({"contamination": 0.1, "cap": 0.5}, "cap"),
        ({"contamination": 0.1, "cap": np.inf}, "cap"),
        ({"contamination": 0.1, "shares": ()}, "shares"),
        ({"contamination": 0.1, "shares": (0.1, 1.0)}, "shares"),
        ({"contamination": 0.1, "pool": 2}, "3 responses were not drawn"),
    ],
)
def test_a_process_of_nonsense(more: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        share_process(np.zeros(3), **more)  # type: ignore[arg-type]


def test_a_process_of_flags_that_are_nonsense() -> None:
    with pytest.raises(ValueError, match="false positives"):
        stand_out_process([0], false_positive=0.0)
    with pytest.raises(ValueError, match="only 0 and 1"):
        stand_out_process([0.5], false_positive=0.1)


def test_rates_of_nonsense() -> None:
    with pytest.raises(ValueError, match="no honest draws"):
        measured_rates(np.array([]))
    with pytest.raises(ValueError, match="no draws of the variant"):
        measured_rates(np.zeros(3), np.array([]))
    with pytest.raises(ValueError, match="error of the rates"):
        measured_rates(np.zeros(3), error=0.0)
    with pytest.raises(ValueError, match="cannot be spared"):
        measured_rates(np.zeros(3), spared=3)
    with pytest.raises(ValueError, match="cut is not a number"):
        measured_rates(np.zeros(3), cut_nats=NAN)


def test_showing_of_nonsense() -> None:
    with pytest.raises(ValueError, match="2 responses and a process"):
        diversion_shown(np.zeros(3), [0, 1], e_value=1000)
    with pytest.raises(ValueError, match="level"):
        diversion_shown(np.zeros(1), [0], e_value=1.0)
    with pytest.raises(ValueError, match="never shows"):
        diversion_shown(np.zeros(1), [0], e_value=1000, least=1)
