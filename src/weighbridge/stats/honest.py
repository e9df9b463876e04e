"""How far from the reference an honest stack may stand that nobody has recorded."""

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

Floats = NDArray[np.float64]
MIN_STACKS = 3  # a spread is not learned from fewer
TAIL_SHARE = 0.01  # of the values: the largest, from which what is larger still is extrapolated
LEAST_SHAPE = 0.1  # of the tail: 0 is exponential, and a few hundred values may seem so by chance


def class_limit(mean_log_scales: Floats, *, margin: float, coverage: float) -> float:
    """The upper prediction limit of ŝ for one more stack of a numeric class, in nats.

    exp(ȳ + t_(n-1, coverage) · sd · √(1 + 1/n)) over the log noises y of the class's stacks, which are taken to be normal; never
    less than the noisiest of them times `margin`, and just that where fewer than three are recorded.

    Parameters
    ----------
    mean_log_scales : float array, shape (n,)
        Mean log s of each recorded stack of the class.
    margin : float
        At least 1.
    coverage : float
        One-sided, such as 0.95.

    Raises
    ------
    ValueError
        If no stack is given.
    """
    if mean_log_scales.size == 0:
        raise ValueError("a class without a stack has no limit")
    least = float(mean_log_scales.max()) + float(np.log(margin))
    n = mean_log_scales.size
    if n < MIN_STACKS:
        return float(np.exp(least))
    spread = float(special.stdtrit(n - 1, coverage) * mean_log_scales.std(ddof=1) * np.sqrt(1 + 1 / n))
    return float(np.exp(max(least, float(mean_log_scales.mean()) + spread)))


def tail_chance(values: Floats, at: Floats) -> Floats:
    """The chance that one more value is at least so large: the share of the known ones, and beyond most of these a Pareto tail.

    Peaks over a threshold follow a generalised Pareto distribution, whatever the values' own (Balkema and de Haan 1974, Ann. Probab. 2; Pickands
    1975, Ann. Statist. 3); its shape and scale by maximum likelihood over the largest hundredth, the shape at least 0.1.

    Parameters
    ----------
    values : float array, shape (n,)
        At least 0.
    at : float array

    Returns
    -------
    float array, shape of `at`
    """
    ranked = np.sort(values)
    threshold = float(ranked[int((1 - TAIL_SHARE) * ranked.size)])
    over = ranked[ranked > threshold] - threshold
    share = (ranked.size - np.searchsorted(ranked, at)) / ranked.size
    if over.size < MIN_STACKS:
        return np.asarray(np.maximum(share, 1 / ranked.size))
    shape, _, scale = stats.genpareto.fit(over, floc=0)
    if shape < LEAST_SHAPE:
        shape, _, scale = stats.genpareto.fit(over, f0=LEAST_SHAPE, floc=0)
    beyond = over.size / ranked.size * stats.genpareto.sf(np.asarray(at) - threshold, shape, scale=scale)
    return np.asarray(np.where(np.asarray(at) > threshold, beyond, share))
