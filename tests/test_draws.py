"""Tokens held against the distribution that they are said to come from: exact small cases, and the error rates that are promised."""

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from weighbridge.judge.checks.sampling import DROP_NATS, FLIP_SHARES, HONEST_FLIPS, MOST_CUT, OTHER_TEMPERATURES
from weighbridge.stats.draws import (
    OTHERS,
    at_temperature,
    cell_logprobs,
    flip_log_e,
    log_likelihood,
    tells,
    temperature_interval,
    truncated_log_likelihood,
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


def test_a_listed_token_is_worth_most_where_nothing_else_is_kept() -> None:
    cells = cell_logprobs(np.log([[0.5, 0.25, 0.02, 0.01]]))
    found = [float(truncated_log_likelihood(cells, np.array([j]), most_cut=0.1)[0]) for j in range(5)]
    # The third has 4 % of the likeliest one's share, so it was not cut off, nor was what is likelier; others may have been.
    listed = np.log([0.5 / 0.75, 0.25 / 0.75, 0.02 / 0.77, 0.01 / 0.78])
    np.testing.assert_allclose(found, [*listed, np.log(0.22)])


def test_one_cut_holds_for_all_draws() -> None:
    cells = np.repeat(cell_logprobs(np.log([[0.5, 0.25, 0.02, 0.01]])), 2, axis=0)
    np.testing.assert_allclose(
        truncated_log_likelihood(cells, np.array([0, 2]), most_cut=0.1), np.log([0.5 / 0.77, 0.02 / 0.77])
    )


def truncated(cells: Floats, least: float, keeps: Floats) -> Floats:
    """The distribution of a server that leaves out listed tokens below a share of the likeliest, and keeps some of what is not listed."""
    likeliest = cells[:, :-1].max(axis=1, keepdims=True)
    kept = np.where(cells[:, :-1] >= likeliest + np.log(max(least, 1e-12)), np.exp(cells[:, :-1]), 0.0)
    lowest = cells[:, :-1].min(axis=1)
    rest = np.where(lowest >= likeliest[:, 0] + np.log(max(least, 1e-12)), keeps * np.exp(cells[:, -1]), 0.0)
    out = np.concatenate([kept, rest[:, None]], axis=1)
    return np.asarray(out / out.sum(axis=1, keepdims=True))


@pytest.mark.parametrize("least", [0.0, 0.01, 0.03, 0.05, MOST_CUT])
def test_no_truncation_gives_draws_a_larger_likelihood(least: float) -> None:
    rng = np.random.default_rng(5)
    for seed in range(30):
        cells = cell_logprobs(lists(20, 6, seed, spread=rng.uniform(0.3, 3), tail=rng.uniform(0.01, 0.8)))
        null = truncated(cells, least, rng.random(20))
        drawn = draw_cells(np.log(np.maximum(null, 1e-300)), rng)
        own = np.log(null[np.arange(20), drawn]).sum()
        assert truncated_log_likelihood(cells, drawn, most_cut=MOST_CUT).sum() >= own - 1e-9


def test_much_that_is_not_listed_tells_nothing_of_a_somewhat_lower_temperature() -> None:
    peaked, flat = (
        cell_logprobs(lists(30, 8, 1, spread=3.0, tail=0.001)),
        cell_logprobs(lists(30, 8, 1, spread=0.3, tail=0.6)),
    )
    assert tells(peaked, at_temperature(peaked, 0.5), most_cut=MOST_CUT).mean() > 0.5
    assert not tells(flat, at_temperature(flat, 0.7), most_cut=MOST_CUT).any()


# -- e-values --------------------------------------------------------------------------------------------------


def log_e(cells: Floats, drawn: NDArray[np.int64]) -> Floats:
    """The bet on each other temperature, against the likeliest of the ways in which servers cut off; as the check places it."""
    out = []
    for temperature in OTHER_TEMPERATURES:
        other = at_temperature(cells, temperature)
        bet = tells(cells, other, most_cut=MOST_CUT)
        own = truncated_log_likelihood(cells[bet], drawn[bet], most_cut=MOST_CUT).sum()
        out.append(log_likelihood(other[bet], drawn[bet]).sum() - own)
    return np.array(out)


@pytest.mark.parametrize("least", [0.0, 0.01, 0.03, 0.05, MOST_CUT])
@pytest.mark.parametrize("keeps", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("tail", [0.02, 0.6])
def test_the_likelihood_ratio_has_a_mean_of_at_most_one_whatever_the_server_cuts_off(
    least: float, keeps: float, tail: float
) -> None:
    """By enumeration of every pair of draws from every pair of lists."""
    for seed in range(4):
        cells = cell_logprobs(lists(2, 4, seed, spread=3.0 if tail < 0.1 else 0.7, tail=tail))
        null = truncated(cells, least, np.full(2, keeps))
        np.testing.assert_allclose(null.sum(axis=1), 1)
        mean = np.zeros(len(OTHER_TEMPERATURES))
        for drawn in itertools.product(range(5), repeat=2):
            chance = null[0, drawn[0]] * null[1, drawn[1]]
            if chance > 0:
                mean += chance * np.exp(log_e(cells, np.array(drawn)))
        assert (mean <= 1 + 1e-9).all()


@pytest.mark.parametrize("least", [0.03, 0.05])
def test_many_first_tokens_of_flat_lists_do_not_look_colder_where_the_server_cuts_off(least: float) -> None:
    """As of llama.cpp, whose ``min_p`` of 0.05 is on unless a request says otherwise, over more tokens than an audit asks for."""
    rng = np.random.default_rng(12)
    cells = cell_logprobs(lists(240, 20, 13, spread=1.0, tail=0.35))
    drawn = draw_cells(np.log(np.maximum(truncated(cells, least, np.full(240, 0.3)), 1e-300)), rng)
    assert np.exp(log_e(cells, drawn)).mean() < 10


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
