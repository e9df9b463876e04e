"""Evidence that may be looked at after every request: e-processes.

An e-process is a non-negative quantity that, under its null, starts at 1 and is not expected to grow, so that the
chance of ever reaching 1/α is at most α (Ville 1939). All of them are handled as natural logarithms.

The randomness that these use is ours: the order in which the pool's probes are drawn. Under the null, "some
recorded honest stack b satisfies E_pool h(x_served) ≤ E_pool h(x_b)", a score h with 0 ≤ h ≤ H divided by the
largest mean that a recorded stack has over the rest of the pool is an e-value, up to a share η of probes on which
anything may happen (docs/STATISTICS.md, "Size").
"""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def tilted_score(log_scales: Floats, null_mean: float, alternative_mean: float, sd: float, cap: float) -> Floats:
    """A monotone score of x = log s: the normal likelihood ratio of two means, capped.

    Increasing in x where the alternative's mean is the larger, decreasing where it is the smaller.

    Returns
    -------
    float array, same shape
        Between 0 and `cap`.
    """
    slope = (alternative_mean - null_mean) / sd**2
    exponent = slope * (log_scales - (alternative_mean + null_mean) / 2)
    return np.asarray(np.exp(np.minimum(exponent, np.log(cap))))


def bounded_score_process(
    scores: Floats, null_scores: Floats, drawn: NDArray[np.int64], *, cap: float, outlier_share: float, stake: float
) -> Floats:
    """Log wealth after each probe of betting that scores are larger than any null stack's.

    Parameters
    ----------
    scores : float array, shape (n,)
        The endpoint's scores, in the order of the draw; NaN where a probe has no answer, which moves nothing.
    null_scores : float array, shape (stacks, pool)
        The same score of every null stack on every probe of the pool.
    drawn : int array, shape (n,)
        Which probe each score belongs to; probes are drawn without replacement.
    cap : float
        The largest possible score, H.
    outlier_share : float
        η, the share of probes on which a null stack may reach H.
    stake : float
        The share of the wealth that is bet, in (0, 1]. Staking less survives runs of small scores, as a
        mixture of honest and other answers has them.

    Returns
    -------
    float array, shape (n,)
    """
    used = np.cumsum(null_scores[:, drawn], axis=1)
    before = np.concatenate([np.zeros((null_scores.shape[0], 1)), used[:, :-1]], axis=1)
    rest = null_scores.shape[1] - np.arange(drawn.size)
    means = np.maximum((null_scores.sum(axis=1, keepdims=True) - before) / rest, 0.0)
    expected = (1 - outlier_share) * means.max(axis=0) + outlier_share * cap
    factors = 1 - stake + stake * scores / expected
    return np.asarray(np.cumsum(np.where(np.isfinite(factors), np.log(np.maximum(factors, 1e-300)), 0.0)))


def bounded_mean_process(values: Floats, null_mean: float, stake: float) -> Floats:
    """Log wealth after each probe of betting that the mean of values in [-1, 1] is above `null_mean`.

    W_t = W_(t-1) (1 + λ (v_t - m)), the betting martingale of Waudby-Smith and Ramdas (2024, JRSS B 86), with a
    fixed λ; non-negative because λ < 1/(1 + m).

    Parameters
    ----------
    values : float array, shape (n,)
        NaN where a probe has no answer, which moves nothing.
    null_mean : float
        m, the largest mean under the null.
    stake : float
        λ (1 + m), the share of the largest admissible bet, in [0, 1).

    Returns
    -------
    float array, shape (n,)
    """
    bet = stake / (1 + null_mean)
    return np.asarray(np.cumsum(np.where(np.isfinite(values), np.log1p(bet * (values - null_mean)), 0.0)))


def mixture(log_processes: Floats, weights: Floats | None = None) -> Floats:
    """The log of a weighted mean of e-processes, which is again one.

    Parameters
    ----------
    log_processes : float array, shape (m, n)
    weights : float array, shape (m,), optional
        Positive; normalised here. Equal by default.
    """
    count = log_processes.shape[0]
    share = np.full(count, 1 / count) if weights is None else weights / weights.sum()
    top = log_processes.max(axis=0)
    return np.asarray(top + np.log(np.sum(share[:, None] * np.exp(log_processes - top), axis=0)))


def first_crossing(log_process: Floats, e_value: float) -> int | None:
    """The number of probes after which an e-process first reaches a level, or None."""
    reached = np.flatnonzero(log_process >= np.log(e_value))
    return int(reached[0]) + 1 if reached.size else None
