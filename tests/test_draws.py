"""Tokens held against the distribution that they are said to come from: exact small cases, and the error rates that are promised."""

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from weighbridge.judge.checks.sampling import CUTS, DROP_NATS, FLIP_SHARES, HONEST_FLIPS, OTHER_TEMPERATURES
from weighbridge.stats.draws import (
    OTHERS,
    at_temperature,
    cell_logprobs,
    cut_off,
    flip_log_e,
    log_likelihood,
    temperature_interval,
)

Floats = NDArray[np.float64]


def lists(n: int, k: int, seed: int, spread: float = 2.0, tail: float = 0.1) -> Floats:
    """Lists of logprobs that leave a share to what is not listed."""
    rng = np.random.default_rng(seed)
    logits = -np.sort(-rng.normal(0, spread, (n, k)), axis=1)
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return np.asarray(np.log(shares * (1 - tail)))


def draw_cells(cells: Floats, rng: np.random.Generator) -> NDArray[np.int64]:
    """One cell of each row."""
    below = np.exp(cells).cumsum(axis=1)
    return np.asarray((rng.random(len(cells))[:, None] > below[:, :-1]).sum(axis=1), np.int64)


# -- cells -----------------------------------------------------------------------------------------------------


def test_cells_are_a_distribution_and_the_last_one_is_what_is_not_listed() -> None:
    cells = cell_logprobs(np.log([[0.5, 0.25, 0.15], [0.9, 0.05, np.nan]]))
    np.testing.assert_allclose(np.exp(cells).sum(axis=1), 1)
    np.testing.assert_allclose(np.exp(cells), [[0.5, 0.25, 0.15, 0.1], [0.9, 0.05, 0, 0.05]], atol=1e-12)


def test_a_list_that_is_rounded_to_more_than_one_is_a_distribution() -> None:
    cells = cell_logprobs(np.log([[0.7, 0.3005]]))
    np.testing.assert_allclose(np.exp(cells).sum(axis=1), 1)
    assert cells[0, -1] < np.log(1e-9)


def test_the_same_temperature_changes_nothing() -> None:
    cells = cell_logprobs(lists(20, 5, 1))
    np.testing.assert_allclose(at_temperature(cells, 1.0), cells, atol=1e-12)


def test_a_temperature_is_that_of_the_tokens_and_not_of_the_cells() -> None:
    """What is not listed stands for many tokens, so a higher temperature makes more of it than of one token as likely."""
    listed, tail = np.log([0.5, 0.3]), 0.2
    whole = np.concatenate([listed, np.full(OTHERS, np.log(tail / OTHERS))])
    for temperature in (0.5, 2.0):
        exact = np.exp(whole / temperature) / np.exp(whole / temperature).sum()
        found = np.exp(at_temperature(cell_logprobs(listed[None]), temperature))[0]
        np.testing.assert_allclose(found, [exact[0], exact[1], exact[2:].sum()], rtol=1e-9)


@pytest.mark.parametrize("temperature", [0.05, 0.5, 1.4, 2.0])
def test_other_temperatures_are_distributions_and_change_nothing_in_place(temperature: float) -> None:
    cells = cell_logprobs(lists(20, 5, 2))
    before = cells.copy()
    np.testing.assert_allclose(np.exp(at_temperature(cells, temperature)).sum(axis=1), 1)
    np.testing.assert_array_equal(cells, before)


def test_what_is_cut_off_is_what_is_unlikely() -> None:
    cells = cell_logprobs(np.log([[0.5, 0.25, 0.02, 0.01]]))
    np.testing.assert_allclose(np.exp(cut_off(cells, least_of_likeliest=0.0, listed_only=False)), np.exp(cells))
    only = np.exp(cut_off(cells, least_of_likeliest=0.0, listed_only=True))[0]
    np.testing.assert_allclose(only, [*np.array([0.5, 0.25, 0.02, 0.01]) / 0.78, 0])
    cut = np.exp(cut_off(cells, least_of_likeliest=0.05, listed_only=False))[0]
    np.testing.assert_allclose(cut, [2 / 3, 1 / 3, 0, 0, 0])


def test_a_draw_that_cannot_be_counts_as_one_that_hardly_can() -> None:
    cells = cut_off(cell_logprobs(np.log([[0.5, 0.3]])), least_of_likeliest=0.0, listed_only=True)
    found = log_likelihood(np.repeat(cells, 2, axis=0), np.array([0, 2]))
    np.testing.assert_allclose(found, [np.log(0.5 / 0.8), np.log(1e-12)])


# -- e-values --------------------------------------------------------------------------------------------------


def log_e(cells: Floats, drawn: NDArray[np.int64]) -> Floats:
    """The bet on each other temperature, against the likeliest of the ways in which servers cut off; as the check places it."""
    own = max(
        float(log_likelihood(cut_off(cells, least_of_likeliest=least, listed_only=listed), drawn).sum())
        for least in CUTS
        for listed in (False, True)
    )
    return np.array([log_likelihood(at_temperature(cells, t), drawn).sum() - own for t in OTHER_TEMPERATURES])


@pytest.mark.parametrize("least", CUTS)
@pytest.mark.parametrize("listed_only", [False, True])
def test_the_likelihood_ratio_has_a_mean_of_at_most_one_whatever_the_server_cuts_off(
    least: float, listed_only: bool
) -> None:
    """By enumeration of every pair of draws from every pair of lists."""
    for seed in range(4):
        cells = cell_logprobs(lists(2, 4, seed, spread=3.0))
        null = np.exp(cut_off(cells, least_of_likeliest=least, listed_only=listed_only))
        np.testing.assert_allclose(null.sum(axis=1), 1)
        mean = np.zeros(len(OTHER_TEMPERATURES))
        for drawn in itertools.product(range(5), repeat=2):
            chance = null[0, drawn[0]] * null[1, drawn[1]]
            if chance > 0:
                mean += chance * np.exp(log_e(cells, np.array(drawn)))
        assert (mean <= 1 + 1e-9).all()


def test_honest_draws_seldom_reach_much_evidence() -> None:
    """Markov: e ≥ 20 in at most one of twenty runs, here of 400 over 40 tokens."""
    rng = np.random.default_rng(7)
    high = 0
    for seed in range(400):
        cells = cell_logprobs(lists(40, 8, seed))
        high += bool(np.exp(log_e(cells, draw_cells(cells, rng))).mean() >= 20)
    assert high <= 20


@pytest.mark.parametrize("temperature", [0.05, 0.5, 2.0])
def test_another_temperature_is_told_from_some_dozens_of_tokens(temperature: float) -> None:
    rng = np.random.default_rng(8)
    cells = cell_logprobs(lists(100, 8, 9))
    drawn = draw_cells(at_temperature(cells, temperature), rng)
    assert np.log(np.exp(log_e(cells, drawn)).mean()) > np.log(1000)


@pytest.mark.parametrize("draws", [1, 2, 10, 64])
@pytest.mark.parametrize("share", [0.0, HONEST_FLIPS / 2, HONEST_FLIPS])
def test_flips_are_an_e_value(draws: int, share: float) -> None:
    """Its mean over the binomial distribution is at most 1, and 1 at the largest honest share."""
    flips = np.arange(draws + 1)
    values = [np.exp(flip_log_e(int(n), draws, honest_share=HONEST_FLIPS, shares=FLIP_SHARES)) for n in flips]
    mean = float(stats.binom.pmf(flips, draws, share) @ np.array(values))
    assert mean <= 1 + 1e-9
    if share == HONEST_FLIPS:
        assert mean == pytest.approx(1)


def test_more_flips_are_more_evidence_and_none_is_none() -> None:
    values = [flip_log_e(n, 64, honest_share=HONEST_FLIPS, shares=FLIP_SHARES) for n in range(10)]
    assert values[0] < 0
    assert (np.diff(values) > 0).all()
    # Two flips of 64 are not enough for e ≥ 1000, and four are.
    assert values[2] < np.log(1000) < values[4]


# -- temperatures ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0, 1.5, 2.0])
def test_a_temperature_is_recovered(temperature: float) -> None:
    rng = np.random.default_rng(10)
    inside, estimates = 0, []
    for seed in range(60):
        cells = cell_logprobs(lists(60, 12, seed, tail=0.02))
        estimate, low, high = temperature_interval(
            cells, draw_cells(at_temperature(cells, temperature), rng), drop_nats=DROP_NATS
        )
        assert low <= estimate <= high
        inside += low <= temperature * 1.03 and high >= temperature / 1.03  # the grid's step is 5 %
        estimates.append(estimate)
    assert inside >= 58
    typical = float(np.exp(np.mean(np.log(estimates))))
    if temperature <= 1:
        assert typical == pytest.approx(temperature, rel=0.08)
    else:
        # How many tokens are not listed is not known, so the estimate is on the near side.
        assert 1 < typical <= temperature * 1.08


def test_only_the_likeliest_tokens_are_of_a_low_temperature() -> None:
    cells = cell_logprobs(lists(60, 12, 3))
    estimate, low, high = temperature_interval(cells, np.zeros(60, np.int64), drop_nats=DROP_NATS)
    assert estimate <= low * 1.5
    assert low == pytest.approx(0.02)
    assert high < 0.5


def test_draws_of_tokens_that_are_not_listed_speak_for_a_higher_temperature() -> None:
    rng = np.random.default_rng(11)
    cells = cell_logprobs(lists(60, 12, 4))
    drawn = np.minimum(draw_cells(cells, rng), 11)
    lows = []
    for unlisted in (0, 10, 30, 60):
        drawn[:unlisted] = 12
        estimate, low, high = temperature_interval(cells, drawn, drop_nats=DROP_NATS)
        assert low <= estimate <= high
        lows.append(low)
    assert lows == sorted(lows)
    assert lows[0] < 1 < lows[-1]
    assert high == pytest.approx(10.0)


def test_an_estimate_leaves_its_input_as_it_was() -> None:
    cells = cell_logprobs(lists(5, 4, 6))
    before = cells.copy()
    temperature_interval(cells, np.zeros(5, np.int64), drop_nats=DROP_NATS)
    np.testing.assert_array_equal(cells, before)
