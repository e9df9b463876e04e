"""When something changed: e-detectors over the nights of one endpoint.

An e-detector is a non-negative process M with E[M_τ] ≤ E[τ] at every stopping time τ while nothing has changed. An alarm at the
first M ≥ A is therefore expected no sooner than after A nights: its average run length is at least A (Shin, Ramdas and Rinaldo 2024,
NEJSDS 2, "E-detectors"). Everything is handled as natural logarithms.
"""

from bisect import bisect_left, bisect_right, insort

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def shiryaev_roberts(log_e_values: Floats) -> Floats:
    """Log M, M_t = (1 + M_{t−1}) e_t: the sum over all nights on which a change may have come (Shin et al. 2024, section 2.3).

    Valid where each night's e-value is one whatever the nights before it brought: fresh draws.

    Parameters
    ----------
    log_e_values : float array, shape (n,)

    Returns
    -------
    float array, shape (n,)
    """
    out = np.zeros(log_e_values.size)
    last = -np.inf
    for t, log_e in enumerate(log_e_values):
        last = float(np.logaddexp(0.0, last) + log_e)
        out[t] = last
    return out


def summed(log_e_values: Floats) -> Floats:
    """Log M, M_t = e_1 + … + e_t: n times their average, an e-detector that multiplies nothing.

    For nights whose probes may have been foreseen, as public ones may: what was won on one night is not staked on the next. An e-detector
    where each night's draw is made anew, so that its e-value is one whatever the nights before it brought.
    """
    return np.asarray(np.logaddexp.accumulate(log_e_values))


def change_began(log_e_values: Floats, alarm: int) -> int:
    """The likeliest first night of what an alarm ends: where the product of e-values up to it is the largest."""
    from_here_on = np.cumsum(log_e_values[: alarm + 1][::-1])[::-1]
    return int(np.argmax(from_here_on))


def conformal_p_values(scores: Floats, ties: Floats) -> Floats:
    """How extreme each score is among those before it: independent and uniform while their order means nothing.

    Parameters
    ----------
    scores : float array, shape (n,)
        In the order of time; the larger, the stranger.
    ties : float array, shape (n,)
        Uniform on (0, 1), from a seed: where a score's rank falls among its equals (Vovk, Gammerman and Shafer 2022,
        "Algorithmic Learning in a Random World", section 2.2).

    Returns
    -------
    float array, shape (n,)
    """
    out = np.ones(scores.size)
    seen: list[float] = []
    for t, score in enumerate(scores.tolist()):
        insort(seen, score)
        below, not_above = bisect_left(seen, score), bisect_right(seen, score)
        out[t] = (t + 1 - not_above + ties[t] * (not_above - below)) / (t + 1)
    return out


def small_p_log_e(p_values: Floats) -> Floats:
    """Log e-value of betting on small p: the mean of κ p^(κ−1) over κ in (0, 1) (Vovk and Wang 2021, Ann. Stat. 49, section 2)."""
    p = np.clip(p_values, 1e-12, 1 - 1e-9)
    log_p = np.log(p)
    return np.asarray(np.log((1 - p + p * log_p) / (p * log_p**2)))
