"""The mathematics of change and of fleets: run lengths, dates and false discoveries, against simulation and by hand."""

import numpy as np
import pytest

from weighbridge.stats.changes import (
    change_began,
    conformal_p_values,
    shiryaev_roberts,
    small_p_log_e,
    summed,
)
from weighbridge.stats.discovery import e_bh


def test_shiryaev_roberts_is_its_recursion() -> None:
    e = np.array([0.5, 2.0, 4.0])
    expected = [0.5, (1 + 0.5) * 2.0, (1 + 3.0) * 4.0]
    assert np.exp(shiryaev_roberts(np.log(e))) == pytest.approx(expected)


def test_the_sum_is_n_times_the_average() -> None:
    e = np.array([0.5, 2.0, 4.0])
    assert np.exp(summed(np.log(e))) == pytest.approx([0.5, 2.5, 6.5])


@pytest.mark.parametrize("detector", [shiryaev_roberts, summed])
def test_an_alarm_is_no_sooner_than_said_while_nothing_changes(detector: object) -> None:
    """The chance of an alarm within n nights is at most n / A; e-values that are exactly 1 on average."""
    assert callable(detector)
    rng = np.random.default_rng(1)
    level, nights, years = 200.0, 40, 2000
    shift = 1.0
    alarms = sum(
        bool((detector(shift * rng.normal(size=nights) - shift**2 / 2) >= np.log(level)).any()) for _ in range(years)
    )
    assert alarms / years <= nights / level + 3 * np.sqrt(0.2 * 0.8 / years)


def test_a_change_is_dated_to_its_first_night() -> None:
    log_e = np.array([-1.0, -2.0, 0.3, -1.0, 4.0, 5.0])
    assert change_began(log_e, 5) == 4


def test_the_date_is_that_of_the_alarm_and_not_of_what_came_after() -> None:
    log_e = np.array([-1.0, 9.0, -3.0, 9.0, 9.0])
    assert change_began(log_e, 1) == 1


def test_conformal_p_values_are_uniform_and_independent_where_order_means_nothing() -> None:
    rng = np.random.default_rng(2)
    p = np.array([conformal_p_values(rng.integers(0, 6, 30).astype(float), rng.random(30)) for _ in range(3000)])
    for t in (0, 4, 29):
        assert np.histogram(p[:, t], 10, (0, 1))[0] == pytest.approx(300, abs=75)
    assert abs(np.corrcoef(p[:, 10], p[:, 11])[0, 1]) < 0.06


def test_a_bet_on_small_p_has_mean_one_and_grows_where_p_is_small() -> None:
    p = (np.arange(1_000_000) + 0.5) / 1_000_000
    assert np.exp(small_p_log_e(p)).mean() == pytest.approx(1, abs=0.1)
    assert small_p_log_e(np.array([0.001]))[0] > 2.5


def test_discoveries_by_hand() -> None:
    """K = 4 at 10 %: one needs 40, two need 20 each, three 13.3 each."""
    assert e_bh(np.log([39.0, 1, 1, 1]), 0.1).tolist() == [False] * 4
    assert e_bh(np.log([40.0, 1, 1, 1]), 0.1).tolist() == [True, False, False, False]
    assert e_bh(np.log([1.0, 20, 1, 21]), 0.1).tolist() == [False, True, False, True]
    assert e_bh(np.log([14.0, 14, 14, 1]), 0.1).tolist() == [True, True, True, False]


def test_false_discoveries_are_as_rare_as_said_however_they_hang_together() -> None:
    """All of a fleet share one draw: e-values that are large together."""
    rng = np.random.default_rng(3)
    wrong = 0.0
    trials, shift = 4000, 2.5
    for _ in range(trials):
        common = rng.normal()
        log_e = np.full(20, shift * common - shift**2 / 2)
        log_e[:2] += 30  # two that are altered
        named = e_bh(log_e, 0.1)
        wrong += named[2:].sum() / max(1, named.sum())
    assert wrong / trials <= 0.1


def test_nothing_is_discovered_in_an_empty_fleet() -> None:
    assert e_bh(np.array([]), 0.01).size == 0
