"""Residuals between an endpoint's logprobs and the reference's, at one position.

The symbols are those of docs/STATISTICS.md: d is the difference over the endpoint's top-k tokens, centred, so that
the log-normaliser and any common offset cancel; s is its root mean square.
"""

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]
SMALLEST_SCALE_NATS = 1e-4  # below the resolution of float32 logprobs: smaller scales count as this one


def reference_at(columns: NDArray[np.int64], endpoint_nats: Floats, reference_row_nats: Floats) -> Floats:
    """The reference's logprobs of the endpoint's tokens, with what the reference's list lacks filled in.

    A token outside the reference's top-K has a reference logprob below the list's smallest. Where the endpoint's
    value is larger than that, the smallest stands in, which understates the difference; where it is not, nothing
    is known and the token is left out. Both err towards "no difference".

    Parameters
    ----------
    columns : int array, shape (k,)
        Column of each token in the reference row, -1 where it is not listed.
    endpoint_nats : float array, shape (k,)
    reference_row_nats : float array, shape (K,)
        May hold NaN.

    Returns
    -------
    float array, shape (k,)
        NaN where the token is to be left out.
    """
    listed = np.where(columns >= 0, reference_row_nats[columns], np.nan)
    floor = np.nanmin(reference_row_nats)
    return np.where((columns < 0) & (endpoint_nats > floor), floor, listed)


def centred_difference(endpoint_nats: Floats, reference_nats: Floats) -> Floats:
    """The residual r: endpoint minus reference, centred over the tokens where both are known.

    Returns
    -------
    float array, shape (k,)
        NaN where either is NaN; all NaN where fewer than three tokens are known.
    """
    difference = endpoint_nats - reference_nats
    known = np.isfinite(difference)
    if known.sum() < 3:
        return np.full_like(difference, np.nan)
    return np.asarray(difference - difference[known].mean())


def log_scale(residual_nats: Floats) -> float:
    """X = log s, the log of a residual's root mean square; NaN where no token is known."""
    known = residual_nats[np.isfinite(residual_nats)]
    if known.size == 0:
        return float("nan")
    return float(np.log(max(np.sqrt(np.mean(known**2)), SMALLEST_SCALE_NATS)))


def direction_cosine(residual_nats: Floats, variant_nats: Floats, reference_nats: Floats) -> float:
    """Cosine between a residual and a variant's residual, both freed of the reference's own shape.

    Anything that flattens or sharpens a distribution has a residual along the centred reference logprobs; two
    unrelated departures would look alike for that alone. So that direction is projected out of both.

    Parameters
    ----------
    residual_nats, variant_nats, reference_nats : float array, shape (k,)
        The endpoint's residual, the variant's residual at the same tokens, the reference's logprobs there.

    Returns
    -------
    float
        NaN where fewer than four tokens are known.
    """
    known = np.isfinite(residual_nats) & np.isfinite(variant_nats) & np.isfinite(reference_nats)
    if known.sum() < 4:
        return float("nan")
    shape = reference_nats[known] - reference_nats[known].mean()
    shape /= max(float(np.linalg.norm(shape)), 1e-12)
    freed = []
    for values in (residual_nats[known], variant_nats[known]):
        centred = values - values.mean()
        freed.append(centred - (centred @ shape) * shape)
    norms = float(np.linalg.norm(freed[0]) * np.linalg.norm(freed[1]))
    return float(freed[0] @ freed[1] / norms) if norms > 1e-12 else 0.0


def scale_interval(log_scales: Floats, confidence: float) -> tuple[float, float, float]:
    """Effective noise ŝ = exp(mean log s) in nats with a Student-t interval over prompts.

    Returns
    -------
    tuple of float
        Estimate, lower and upper limit; the limits are equal to the estimate for a single prompt.
    """
    mean = float(np.mean(log_scales))
    if log_scales.size < 2:
        return float(np.exp(mean)), float(np.exp(mean)), float(np.exp(mean))
    half = float(
        stats.t.ppf(0.5 + confidence / 2, log_scales.size - 1) * np.std(log_scales, ddof=1) / np.sqrt(log_scales.size)
    )
    return float(np.exp(mean)), float(np.exp(mean - half)), float(np.exp(mean + half))


def mean_interval(values: Floats, confidence: float) -> tuple[float, float, float]:
    """A mean with a Student-t interval over prompts."""
    estimate, low, high = scale_interval(np.asarray(values, np.float64), confidence)
    return float(np.log(estimate)), float(np.log(low)), float(np.log(high))


def share_upper_limit(found: int, asked: int, confidence: float) -> float:
    """The Clopper-Pearson upper limit of a share (Clopper and Pearson 1934, Biometrika 26)."""
    return 1.0 if found >= asked else float(stats.beta.ppf(confidence, found + 1, asked - found))
