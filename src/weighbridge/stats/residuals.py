"""Residuals between an endpoint's logprobs and the reference's, at one position.

The symbols are those of docs/STATISTICS.md: d is the difference over the endpoint's top-k tokens, centred, so that
the log-normaliser and any common offset cancel; s is its root mean square.
"""

import numpy as np
from numpy.typing import NDArray
from scipy import special

Floats = NDArray[np.float64]
_TINY = 1e-12
SMALLEST_SCALE_NATS = 1e-4  # below the resolution of float32 logprobs: smaller scales count as this one


def reference_at(
    columns: NDArray[np.int64], endpoint_nats: Floats, reference_row_nats: Floats, most_unlisted_nats: float
) -> Floats:
    """The reference's logprobs of the endpoint's tokens, with what the reference's list lacks filled in.

    Of a token that is not found in the reference's list it is known how much it can have there at most. Where the
    endpoint's value is larger than that, the most stands in, which understates the difference; where it is not,
    nothing is known and the token is left out. Both err towards "no difference".

    Parameters
    ----------
    columns : int array, shape (k,)
        Column of each token in the reference row, -1 where it is not listed.
    endpoint_nats : float array, shape (k,)
    reference_row_nats : float array, shape (K,)
        May hold NaN.
    most_unlisted_nats : float
        The most that a token can have in the reference which is not found in its list.

    Returns
    -------
    float array, shape (k,)
        NaN where the token is to be left out.
    """
    listed = np.where(columns >= 0, reference_row_nats[columns], np.nan)
    return np.where((columns < 0) & (endpoint_nats > most_unlisted_nats), most_unlisted_nats, listed)


def centred_difference(endpoint_nats: Floats, reference_nats: Floats) -> Floats:
    """The residual r: endpoint minus reference, centred over the tokens where both are known.

    Parameters
    ----------
    endpoint_nats, reference_nats : float array, shape (..., k)

    Returns
    -------
    float array, shape (..., k)
        NaN where either is NaN; a position with fewer than three known tokens is all NaN.
    """
    difference = endpoint_nats - reference_nats
    known = np.isfinite(difference)
    count = known.sum(axis=-1, keepdims=True)
    mean = np.where(known, difference, 0.0).sum(axis=-1, keepdims=True) / np.maximum(count, 1)
    return np.where(known & (count >= 3), difference - mean, np.nan)


def log_scale(residual_nats: Floats) -> Floats:
    """Give x = log s, the log of each residual's root mean square.

    Parameters
    ----------
    residual_nats : float array, shape (..., k)

    Returns
    -------
    float array, shape (...)
        NaN where no token is known.
    """
    known = np.isfinite(residual_nats)
    count = known.sum(axis=-1)
    square = np.where(known, residual_nats**2, 0.0).sum(axis=-1) / np.maximum(count, 1)
    scale = np.log(np.maximum(np.sqrt(square), SMALLEST_SCALE_NATS))
    return np.asarray(np.where(count > 0, scale, np.nan))


def own_top(values_nats: Floats, k: int) -> tuple[NDArray[np.int64], Floats]:
    """The k most likely tokens of each row, most likely first.

    Parameters
    ----------
    values_nats : float array, shape (rows, K)
        May hold NaN, which counts as least likely.

    Returns
    -------
    tuple of array
        Columns and values, both of shape (rows, k).
    """
    columns = np.argsort(-np.nan_to_num(values_nats, nan=-np.inf), axis=-1, kind="stable")[..., :k]
    return columns, np.take_along_axis(values_nats, columns, axis=-1)


def direction_cosine(residual_nats: Floats, variant_nats: Floats, reference_nats: Floats) -> Floats:
    """Cosine between a residual and a variant's residual, both freed of the reference's own shape.

    Anything that flattens or sharpens a distribution has a residual along the centred reference logprobs; two
    unrelated departures would look alike for that alone. So that direction is projected out of both.

    Parameters
    ----------
    residual_nats, variant_nats, reference_nats : float array, shape (..., k)
        The endpoint's residual, the variant's residual at the same tokens, the reference's logprobs there.

    Returns
    -------
    float array, shape (...)
        NaN where fewer than four tokens are known; 0 where nothing is left of either residual.
    """
    known = np.isfinite(residual_nats) & np.isfinite(variant_nats) & np.isfinite(reference_nats)
    count = known.sum(axis=-1)

    def centred(values: Floats) -> Floats:
        zeroed = np.where(known, values, 0.0)
        mean = zeroed.sum(axis=-1, keepdims=True) / np.maximum(count, 1)[..., None]
        return np.where(known, zeroed - mean, 0.0)

    shape = centred(reference_nats)
    shape = shape / np.maximum(np.linalg.norm(shape, axis=-1, keepdims=True), _TINY)

    def freed(values: Floats) -> Floats:
        plain = centred(values)
        return np.asarray(plain - (plain * shape).sum(axis=-1, keepdims=True) * shape)

    one, other = freed(residual_nats), freed(variant_nats)
    norms = np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1)
    cosine = np.where(norms > _TINY, (one * other).sum(axis=-1) / np.maximum(norms, _TINY), 0.0)
    return np.asarray(np.where(count >= 4, np.clip(cosine, -1.0, 1.0), np.nan))


_LARGEST_COSINE = 0.995  # beyond it the transform says more than a few tokens can


def fisher_cosine(residual_nats: Floats, variant_nats: Floats, reference_nats: Floats) -> Floats:
    """The Fisher transform artanh(c) of `direction_cosine`, nearly normal with a spread that does not depend on its mean.

    (Fisher 1915, Biometrika 10.) Bounded at c = ±0.995.
    """
    cosine = direction_cosine(residual_nats, variant_nats, reference_nats)
    return np.asarray(np.arctanh(np.clip(cosine, -_LARGEST_COSINE, _LARGEST_COSINE)))


def shape_fisher(residual_nats: Floats, reference_nats: Floats) -> Floats:
    """Fisher transform of the cosine of a residual with the reference's own centred logprobs.

    Positive where a distribution is sharper than the reference's, as at a lower temperature; negative where it is flatter.
    """
    known = np.isfinite(residual_nats) & np.isfinite(reference_nats)
    count = known.sum(axis=-1)

    def centred(values: Floats) -> Floats:
        zeroed = np.where(known, values, 0.0)
        return np.where(known, zeroed - zeroed.sum(axis=-1, keepdims=True) / np.maximum(count, 1)[..., None], 0.0)

    one, other = centred(residual_nats), centred(reference_nats)
    norms = np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1)
    cosine = (one * other).sum(axis=-1) / np.maximum(norms, _TINY)
    fisher = np.arctanh(np.clip(cosine, -_LARGEST_COSINE, _LARGEST_COSINE))
    return np.asarray(np.where(count >= 4, np.where(norms > _TINY, fisher, 0.0), np.nan))


def mean_by_unit(values: Floats, unit_of_row: NDArray[np.int64], units: int) -> Floats:
    """Average rows that belong to one unit: several positions of one text are one observation.

    Parameters
    ----------
    values : float array, shape (..., rows)
        May hold NaN, which is left out.
    unit_of_row : int array, shape (rows,)
    units : int

    Returns
    -------
    float array, shape (..., units)
        NaN where a unit has no known row.
    """
    if unit_of_row.size == units and np.array_equal(unit_of_row, np.arange(units)):
        return values
    belongs = (unit_of_row[:, None] == np.arange(units)).astype(np.float64)
    known = np.isfinite(values)
    count = known.astype(np.float64) @ belongs
    total = np.where(known, values, 0.0) @ belongs
    return np.asarray(np.where(count > 0, total / np.maximum(count, 1), np.nan))


def scale_interval(log_scales: Floats, confidence: float) -> tuple[float, float, float]:
    """Effective noise ŝ = exp(mean log s) in nats with a Student-t interval over prompts.

    Returns
    -------
    tuple of float
        Estimate, lower and upper limit; the limits are equal to the estimate for a single prompt.
    """
    mean, low, high = np.exp(mean_interval(log_scales, confidence))
    return float(mean), float(low), float(high)


def mean_interval(values: Floats, confidence: float) -> tuple[float, float, float]:
    """A mean with a Student-t interval over prompts; the limits are equal to it for a single one."""
    mean = float(np.mean(values))
    if values.size < 2:
        return mean, mean, mean
    quantile = float(special.stdtrit(values.size - 1, 0.5 + confidence / 2))
    half = quantile * float(np.std(values, ddof=1)) / float(np.sqrt(values.size))
    return mean, mean - half, mean + half


def share_upper_limit(found: int, asked: int, confidence: float) -> float:
    """The Clopper-Pearson upper limit of a share (Clopper and Pearson 1934, Biometrika 26)."""
    return 1.0 if found >= asked else float(special.betaincinv(found + 1, asked - found, confidence))
