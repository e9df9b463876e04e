"""The precision ladder: to how many bits a weight an amount of noise corresponds, on one model."""

import numpy as np
from numpy.typing import NDArray
from scipy import optimize

Floats = NDArray[np.float64]


def effective_bits(log_scales: Floats, ladder_bits: Floats, ladder_log_scales: Floats) -> Floats:
    """Bits a weight whose rounding makes that much noise, interpolated between measured variants of the model.

    Variants of equal width are averaged and the points made monotone (isotonic regression, least squares), since formats differ;
    between neighbouring points log s falls linearly with the bits. Nothing is extrapolated.

    Parameters
    ----------
    log_scales : float array, shape (m,)
        Mean log s to be placed.
    ladder_bits, ladder_log_scales : float array, shape (n,)
        Bits that a weight of each measured variant holds on average, and its mean log s.

    Returns
    -------
    float array, shape (m,)
        NaN outside the ladder: fewer bits, or more, than any measured variant has.

    Raises
    ------
    ValueError
        If fewer than two variants are given.
    """
    if ladder_bits.size < 2:
        raise ValueError("a ladder needs two variants")
    bits, rung = np.unique(ladder_bits, return_inverse=True)
    times = np.bincount(rung)
    at_bits = np.bincount(rung, weights=ladder_log_scales) / times
    fitted = np.asarray(optimize.isotonic_regression(at_bits, weights=times, increasing=False).x)
    # One point for each level of the fit: in the middle of the bits that share it.
    levels = np.unique(fitted)
    middles = np.array([bits[fitted == level].mean() for level in levels])
    return np.asarray(np.interp(log_scales, levels, middles, left=np.nan, right=np.nan))
