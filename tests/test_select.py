"""The choice of probes for text alone: by what one answer tells of each variant."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weighbridge.reference.select import (
    BAND,
    FLIPS_ALLOWED,
    LIKENESS_LIMIT,
    STACK_MARGIN,
    Candidates,
    _flips,
    _greedy,
    likeness,
)

NOISE_NATS = 0.06  # change of the lead under the honest stack
UNIT = STACK_MARGIN * NOISE_NATS


def candidates(leads: list[float], variants: list[list[float]], honest: list[float] | None = None) -> Candidates:
    """Probes of five tokens with these leads of the first one, under the reference and under each variant."""

    def lists(values: list[float]) -> list[list[float]]:
        return [[-1.0, -1.0 - lead, -6.0, -7.0, -8.0] for lead in values]

    if honest is None:
        honest = [lead + NOISE_NATS * (-1) ** i for i, lead in enumerate(leads)]
    return Candidates(
        probe_ids=[f"p-{i}" for i in range(len(leads))], prompt_tokens=np.full(len(leads), 50),
        reference_nats=np.array(lists(leads)), token_ids=np.tile(np.arange(5, dtype=np.int32), (len(leads), 1)),
        honest_nats=np.array([lists(honest)]), variant_nats=np.array([lists(v) for v in variants]),
        honest=["honest"], variants=[f"v{i}" for i in range(len(variants))],
    )  # fmt: skip


def test_what_a_variant_answers_otherwise_tells_of_it_and_what_it_keeps_does_not() -> None:
    lead, gains = _flips(candidates([3 * UNIT] * 4, [[-3 * UNIT, 3 * UNIT, 0.0, np.nan]]))
    assert np.allclose(lead, 3 * UNIT)
    surely, never, half, unasked = gains[0]
    assert surely == pytest.approx(np.log(1 / FLIPS_ALLOWED), rel=0.02)
    assert never == unasked == 0
    assert 0 < half < surely


@pytest.mark.parametrize("units", [BAND[0] - 0.1, BAND[1] + 0.1])
def test_leads_outside_the_band_are_not_chosen(units: float) -> None:
    inside = (BAND[0] + BAND[1]) / 2
    _, gains = _flips(candidates([units * UNIT, inside * UNIT], [[-UNIT, -UNIT]]))
    assert gains[0, 0] == 0 < gains[0, 1]


def test_where_an_honest_stack_loses_half_its_lead_nothing_is_chosen() -> None:
    leads = [4 * UNIT] * 50
    honest = [4 * UNIT + NOISE_NATS * (-1) ** i for i in range(50)]
    honest[7] = 1.9 * UNIT
    _, gains = _flips(candidates(leads, [[-UNIT] * 50], honest))
    assert np.flatnonzero(gains[0] == 0).tolist() == [7]


def test_the_variant_told_least_of_is_served_first() -> None:
    # Two probes tell of the first variant, four of the second; none of both.
    gains = np.array([[2.0, 1.5, 0, 0, 0, 0], [0, 0, 1.0, 0.9, 0.8, 0.7]])
    kept = _greedy(gains, np.eye(6), 4)
    totals = gains[:, kept].sum(axis=1)
    assert kept[0] == 0
    assert set(kept) == {0, 2, 3, 4}, totals


def test_one_probe_that_tells_of_all_is_taken_before_one_that_tells_of_one() -> None:
    gains = np.array([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]])
    assert _greedy(gains, np.eye(3), 1) == [1]


@given(st.integers(1, 12), st.integers(0, 2**31 - 1))
def test_chosen_probes_are_few_gain_something_and_are_little_alike(count: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    gains = np.maximum(generator.normal(size=(3, 20)), 0)
    alike = np.abs(generator.uniform(size=(20, 20)))
    alike = np.triu(alike, 1) + np.triu(alike, 1).T + np.eye(20)
    kept = _greedy(gains, alike, count)
    assert len(kept) == len(set(kept)) <= count
    assert (gains[:, kept].max(axis=0) > 0).all()
    among = alike[np.ix_(kept, kept)] - np.eye(len(kept))
    assert (among < LIKENESS_LIMIT).all()


def test_a_variant_that_was_not_asked_leaves_likeness_to_the_others() -> None:
    one = candidates([0.3, 0.3], [[0.1, 0.1]])
    both = candidates([0.3, 0.3], [[0.1, 0.1], [np.nan, np.nan]])
    places = np.array([0, 1])
    assert np.allclose(likeness(one, places), likeness(both, places))
    assert np.allclose(np.diag(likeness(one, places)), 1)
