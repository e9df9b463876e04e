"""Evidence that may be looked at after every request: e-processes.

An e-process is a non-negative quantity that, under its null, starts at 1 and is not expected to grow, so that the
chance of ever reaching 1/α is at most α (Ville 1939). All of them are handled as natural logarithms.

The randomness that these use is ours: the order in which the pool's probes are drawn, without replacement. A null
that bounds the mean over the whole pool therefore bounds, after some probes, the mean over those that are left: what
is still allowed is the bound less what has been seen, spread over the rest (Waudby-Smith and Ramdas 2020, NeurIPS,
"Confidence sequences for sampling without replacement").

Every process bets with a bounded score of one number for each probe: the log of a residual's size, or the Fisher transform of
its cosine with a recorded departure.
"""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def tilted_score(values: Floats, null_mean: float, alternative_mean: float, sd: float, cap: float) -> Floats:
    """A monotone score of one number for each probe: the normal likelihood ratio of two means, capped.

    Increasing in x where the alternative's mean is the larger, decreasing where it is the smaller.

    Returns
    -------
    float array, same shape
        Between 0 and `cap`.
    """
    slope = (alternative_mean - null_mean) / sd**2
    exponent = slope * (values - (alternative_mean + null_mean) / 2)
    return np.asarray(np.exp(np.minimum(exponent, np.log(cap))))


def bounded_score_process(
    scores: Floats, null_scores: Floats, *, cap: float, outlier_share: float, stake: float
) -> Floats:
    """Log wealth after each probe of betting that scores are larger than any null stack's.

    The null is that the mean score over the pool is at most that of some recorded stack, up to a share of probes on
    which anything may happen: mean h(x) <= (1 - η) max_b mean h(x_b) + η H.

    Parameters
    ----------
    scores : float array, shape (..., n)
        The endpoint's scores in [0, cap], in the order of the draw (of several draws at once, where there are leading axes);
        NaN where a probe has no answer, which moves nothing.
    null_scores : float array, shape (stacks, pool)
        The same score of every null stack on every probe of the pool.
    cap : float
        The largest possible score, H.
    outlier_share : float
        η, the share of probes on which a null stack may reach H; also keeps the bets bounded.
    stake : float
        The share of the wealth that is bet, in (0, 1]. Staking less survives runs of small scores, as a
        mixture of honest and other answers has them.

    Returns
    -------
    float array, shape (..., n)
    """
    limit = (1 - outlier_share) * float(null_scores.mean(axis=1).max()) + outlier_share * cap
    expected = np.maximum(_mean_left(limit, np.nan_to_num(scores, nan=0.0), null_scores.shape[1]), outlier_share * cap)
    factors = 1 - stake + stake * scores / np.maximum(expected, 1e-12)
    return np.asarray(np.cumsum(np.where(np.isfinite(factors), np.log(np.maximum(factors, 1e-300)), 0.0), axis=-1))


def exceptions_process(
    scores: Floats, usual_scores: Floats, *, usual_total: float, pool: int, exceptions: float | Floats
) -> Floats:
    """Log wealth after each probe of betting that more probes are exceptions than a null stack may have.

    The null is that each probe of the pool has the score that is usual for it, but for some, which ones is left open, that together raise
    the sum of all by `exceptions` at most, or, where that is given for each draw, that of those that are left by then. Probes are drawn without replacement, so the next one's score is expected to be at most what is
    left of the usual sum, and of the exceptions, over the number of probes that are left: a score over that is a factor.

    Parameters
    ----------
    scores : float array, shape (..., n)
        At least 0, in the order of the draw (of several draws at once, where there are leading axes).
    usual_scores : float array, shape (..., n)
        What is usual for the same probes; NaN where the bet says nothing of a probe, which moves nothing.
    usual_total : float
        Sum of the usual scores over the pool's probes of which the bet says something, `pool` in number.
    exceptions : float, or float array of shape (..., n)
        The most that exceptions among the probes that are left before each draw can add; one number takes all of them as left throughout.

    Returns
    -------
    float array, shape (..., n)
    """
    known = np.isfinite(usual_scores)
    usual = np.where(known, usual_scores, 0.0)
    seen, count = usual.cumsum(axis=-1) - usual, known.cumsum(axis=-1) - known
    expected = (usual_total - seen + exceptions) / np.maximum(pool - count, 1)
    factors = np.where(known, scores / np.maximum(expected, 1e-12), 1.0)
    return np.asarray(np.log(np.maximum(factors, 1e-300)).cumsum(axis=-1))


def _mean_left(pool_mean: float, values: Floats, pool: int) -> Floats:
    """The mean that the probes not yet drawn have before each draw, if the whole pool's is `pool_mean`."""
    seen = np.cumsum(values, axis=-1) - values
    return np.asarray((pool * pool_mean - seen) / (pool - np.arange(values.shape[-1])))


def mixture(log_processes: Floats, weights: Floats | None = None) -> Floats:
    """The log of a weighted mean of e-processes, which is again one.

    Parameters
    ----------
    log_processes : float array, shape (m, ...)
    weights : float array, shape (m,), optional
        Positive; normalised here. Equal by default.
    """
    count = log_processes.shape[0]
    share = np.full(count, 1 / count) if weights is None else weights / weights.sum()
    top = log_processes.max(axis=0)
    shares = share.reshape(-1, *([1] * (log_processes.ndim - 1)))
    return np.asarray(top + np.log(np.sum(shares * np.exp(log_processes - top), axis=0)))


def first_crossing(log_process: Floats, e_value: float) -> int | None:
    """The number of probes after which an e-process first reaches a level, or None."""
    reached = np.flatnonzero(log_process >= np.log(e_value))
    return int(reached[0]) + 1 if reached.size else None
