"""Bayes factors against the honest stacks, with the stack's own noise integrated out once for a whole audit.

These are statements under a model, beside the e-values, which need none: answers are taken to be independent given the stack,
log s to be normal around the stack's mean, and the Fisher transform of the cosine with a departure to be normal.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import special

Floats = NDArray[np.float64]
GRID_POINTS = 61
BISECTIONS = 7
TAIL = 1e-4  # of the prior, left out on either side


def normal_log_density(values: Floats, mean: Floats | float, sd: Floats | float) -> Floats:
    """Log density of a normal distribution."""
    return np.asarray(-0.5 * ((values - mean) / sd) ** 2 - np.log(sd) - 0.5 * np.log(2 * np.pi))


def log_scale_evidence(log_scales: Floats, means: Floats, sd: float, between_sd: float, degrees: int) -> float:
    """Log of ∫ Π_j N(x_j; u, sd) dπ(u): the evidence of all answers for sizes of one kind.

    Parameters
    ----------
    log_scales : float array, shape (n,)
        x = log s of every answer.
    means : float array, shape (m,)
        The stack's own mean u is taken to be near one of these, each as likely as the others: Student-t around it.
    sd : float
        Of x within a stack.
    between_sd, degrees
        Scale and degrees of freedom of u around its centre.
    """
    n, mean = log_scales.size, float(log_scales.mean())
    # Fine where the answers put u, and wide enough for the whole prior.
    fine = mean + sd / np.sqrt(n) * np.linspace(-8, 8, GRID_POINTS)
    u = np.unique(np.concatenate([fine, (means[:, None] + between_sd * _quantiles(degrees)).ravel()]))
    standard = (u[None, :] - means[:, None]) / between_sd
    density = _log_t_constant(degrees) - (degrees + 1) / 2 * np.log1p(standard**2 / degrees) - np.log(between_sd)
    log_prior = np.logaddexp.reduce(density, axis=0) - np.log(means.size)
    # Σ (x - u)² = n (x̄ - u)² + Σ (x - x̄)²
    within = float(((log_scales - mean) ** 2).sum())
    given = -0.5 * (n * (mean - u) ** 2 + within) / sd**2 - n * (np.log(sd) + 0.5 * np.log(2 * np.pi))
    steps = np.diff(u)
    widths = np.concatenate([[steps[0]], steps[1:] + steps[:-1], [steps[-1]]]) / 2  # of the trapezoidal rule
    return float(np.logaddexp.reduce(given + log_prior + np.log(widths)))


@lru_cache
def _quantiles(degrees: int) -> Floats:
    return np.asarray(special.stdtrit(degrees, np.linspace(TAIL, 1 - TAIL, GRID_POINTS)))


@lru_cache
def _log_t_constant(degrees: int) -> float:
    """Log of what makes Student's density integrate to 1."""
    return float(special.gammaln((degrees + 1) / 2) - special.gammaln(degrees / 2) - 0.5 * np.log(degrees * np.pi))


def tempering(null_log_ratios: Floats) -> float:
    """The largest power ζ ≤ 1 at which no honest stack's mean likelihood ratio over the pool exceeds 1.

    Parameters
    ----------
    null_log_ratios : float array, shape (stacks, pool)
        Log likelihood ratio of a cause against honest, of every honest stack on every probe.

    Returns
    -------
    float
        0 where even the smallest power does not do: such a ratio is evidence of nothing.
    """

    def too_much(power: float) -> bool:
        return bool(np.logaddexp.reduce(power * null_log_ratios, axis=1).max() > np.log(null_log_ratios.shape[1]))

    if not too_much(1.0):
        return 1.0
    # The mean is a convex function of the power and 1 at power 0, so what is below 1 lies in one piece beside 0.
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if too_much(middle) else (middle, high)
    return low
