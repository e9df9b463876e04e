"""How large an endpoint's residuals are, which way they point, and what that is evidence for (level L3).

Everything here is a number or an array; `weighbridge.judge.weights` puts it into words.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from weighbridge.judge.library import Library, Residuals
from weighbridge.records import Policy
from weighbridge.stats.evidence import bounded_mean_process, bounded_score_process, mixture, tilted_score
from weighbridge.stats.residuals import SMALLEST_SCALE_NATS, centred_difference, direction_cosine, log_scale

Floats = NDArray[np.float64]

# Multiples of the null's scale at which bets on size are placed, and shares of the wealth that are staked. The
# smaller stake survives answers that look honest, as a mixture of two models gives them.
SIZE_MULTIPLES = (1.35, 1.8, 3.0, 8.0)
STAKES = (1.0, 0.25)
# Bets on direction are placed for variants that size finds slowly, those below this multiple of the null's scale.
DIRECTION_UP_TO_MULTIPLE = 4.0
DIRECTION_STAKE = 0.96
# An honest endpoint is expected at these multiples of the null's scale when a departure is to be excluded.
HONEST_MULTIPLES = (0.8, 0.3)


@dataclass(frozen=True)
class WeightEvidence:
    """The evidence on the weights after each answer; n answers, V variants.

    Attributes
    ----------
    log_scales : float array, shape (n,)
        x = log s of each answer.
    log_size, log_direction, log_total : float array, shape (n,)
        Log e-processes against the honest library: by size, by direction, and their mean.
    log_exclusion : float array, shape (V, n)
        Log e-process against "what is served is at least as far from the reference as this variant".
    cosines : float array, shape (V, n)
        Cosine of each answer's residual with each variant's.
    log_remainder : float array, shape (V, n)
        Log e-process by size of what is left once the variant's residual is subtracted.
    slope : float
        Least-squares slope of the endpoint's centred logprobs on the reference's, over all answers. A temperature
        T that was divided by shows as 1/T.
    log_after_slope : float array, shape (n,)
        Log e-process by size of what is left once that slope is taken out.
    asked : int
        How many probes were asked; those beyond n came back without usable logprobs.
    excludable : bool array, shape (V,)
        Whether the variant stands clear of the null's floor, so that size can exclude it.
    variant_scales_nats : float array, shape (V,)
        ŝ of each variant over the pool.
    """

    log_scales: Floats
    log_size: Floats
    log_direction: Floats
    log_total: Floats
    log_exclusion: Floats
    cosines: Floats
    log_remainder: Floats
    slope: float
    log_after_slope: Floats
    asked: int
    excludable: NDArray[np.bool_]
    variant_scales_nats: Floats


def weigh(library: Library, residuals: Residuals, policy: Policy) -> WeightEvidence:
    """Compute the evidence of all answers so far."""
    n, variants = residuals.endpoint_nats.shape[0], len(library.variants)
    centred = centred_difference(residuals.endpoint_nats, residuals.reference_nats)
    # Where hardly a token is known there is nothing to centre. That a token which the reference does not list is
    # likely is a difference all the same, at least as large as its distance from the list's end.
    by_unlisted = np.log(np.maximum(residuals.unlisted_nats, SMALLEST_SCALE_NATS))
    log_scales = log_scale(centred)
    log_scales = np.where(np.isfinite(log_scales), log_scales, by_unlisted)
    log_size = _size_process(library, log_scales, policy)
    cosines = direction_cosine(centred[None], residuals.variant_nats, residuals.reference_nats[None])
    left = log_scale(
        centred_difference(residuals.endpoint_nats[None], residuals.reference_nats[None] + residuals.variant_nats)
    )
    left = np.where(np.isfinite(left), left, by_unlisted)
    log_remainder = np.array([_size_process(library, row, policy) for row in left])
    log_remainder = log_remainder.reshape(variants, n)

    slope = _slope(centred, residuals.reference_nats)
    tempered = log_scale(centred_difference(residuals.endpoint_nats, slope * residuals.reference_nats))
    tempered = np.where(np.isfinite(tempered), tempered, by_unlisted)

    pool_scales = np.exp(np.nanmean(library.variant_log_scales, axis=1)) if variants else np.zeros(0)
    null_scale = float(np.exp(library.null_mean))
    faint = [v for v in range(variants) if pool_scales[v] < DIRECTION_UP_TO_MULTIPLE * null_scale]
    pool = len(library.probe_ids)
    if faint:
        bets = [
            bounded_mean_process(cosines[v], library.null_cosines[library.variants[v].id], DIRECTION_STAKE, pool=pool)
            for v in faint
        ]
        log_direction = mixture(np.array(bets))
    else:
        log_direction = np.zeros(n)
    return WeightEvidence(
        log_scales=log_scales,
        log_size=log_size,
        log_direction=log_direction,
        log_total=mixture(np.array([log_size, log_direction])),
        log_exclusion=_exclusion(library, log_scales, policy),
        cosines=cosines,
        log_remainder=log_remainder,
        slope=slope,
        log_after_slope=_size_process(library, tempered, policy),
        asked=residuals.asked,
        excludable=pool_scales > null_scale,
        variant_scales_nats=pool_scales,
    )


def _slope(residual_nats: Floats, reference_nats: Floats) -> float:
    """Slope of endpoint on reference: one more than that of the residual on the reference."""
    known = np.isfinite(residual_nats) & np.isfinite(reference_nats)
    count = np.maximum(known.sum(axis=1, keepdims=True), 1)
    shape = np.where(known, reference_nats, 0.0)
    shape = np.where(known, shape - shape.sum(axis=1, keepdims=True) / count, 0.0)
    spread = float((shape**2).sum())
    return 1.0 + (float((np.where(known, residual_nats, 0.0) * shape).sum()) / spread if spread > 0 else 0.0)


def _size_process(library: Library, log_scales: Floats, policy: Policy) -> Floats:
    processes = []
    for multiple in SIZE_MULTIPLES:
        alternative = library.null_mean + float(np.log(multiple))
        scores = tilted_score(log_scales, library.null_mean, alternative, library.null_sd, policy.score_cap)
        null = tilted_score(library.null_log_scales, library.null_mean, alternative, library.null_sd, policy.score_cap)
        processes += [
            bounded_score_process(scores, null, cap=policy.score_cap, outlier_share=policy.outlier_share, stake=stake)
            for stake in STAKES
        ]
    return mixture(np.array(processes))


def _exclusion(library: Library, log_scales: Floats, policy: Policy) -> Floats:
    """For each variant: evidence that what is served is nearer to the reference than the variant is."""
    out = np.zeros((len(library.variants), log_scales.size))
    for v, scales in enumerate(library.variant_log_scales):
        shifted = scales - np.log(policy.stack_margin)
        mean = float(np.nanmean(shifted))
        sd = max(float(np.nanstd(shifted)), library.null_sd)
        processes = []
        for multiple in HONEST_MULTIPLES:
            alternative = min(library.null_mean + float(np.log(multiple)), mean - 0.1)
            scores = tilted_score(log_scales, mean, alternative, sd, policy.score_cap)
            null = tilted_score(shifted[None, :], mean, alternative, sd, policy.score_cap)
            processes.append(
                bounded_score_process(scores, null, cap=policy.score_cap, outlier_share=policy.outlier_share, stake=1.0)
            )
        out[v] = mixture(np.array(processes))
    return out
