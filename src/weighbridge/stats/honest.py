"""How far from the reference an honest stack may stand that nobody has recorded."""

import numpy as np
from numpy.typing import NDArray
from scipy import special

Floats = NDArray[np.float64]
MIN_STACKS = 3  # a spread is not learned from fewer


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
