"""How large an endpoint's residuals are, which way they point, and what that is evidence for.

Everything here is a number or an array; `weighbridge.judge.checks.weights` puts it into words.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from weighbridge.judge.answers import Residuals
from weighbridge.judge.library import Library, Null, travels
from weighbridge.records import Policy
from weighbridge.stats.evidence import bounded_score_process, mixture, tilted_score
from weighbridge.stats.grid import grid_step
from weighbridge.stats.residuals import (
    SMALLEST_SCALE_NATS,
    centred_difference,
    fisher_cosine,
    log_scale,
    mean_by_unit,
    shape_fisher,
)

Floats = NDArray[np.float64]

# Multiples of the null's scale at which bets on size are placed, and shares of the wealth that are staked. The
# smaller stake survives answers that look honest, as a mixture of two models gives them.
SIZE_MULTIPLES = (1.35, 1.8, 3.0, 8.0)
STAKES = (1.0, 0.25)
STAKE_WEIGHTS = (0.8, 0.2)
# Cosines at which bets on direction are placed: a departure that another engine's noise has blurred, and one that it has not.
DIRECTION_COSINES = (0.5, 0.85)
# Bets on direction are placed for variants that size finds slowly, those below this multiple of the null's scale.
DIRECTION_UP_TO_MULTIPLE = 4.0
# An honest endpoint is expected at these multiples of the null's scale when a departure is to be excluded.
HONEST_MULTIPLES = (0.8, 0.3)
# A departure is excluded by its direction where its cosine, blurred by the noisiest honest stack, would still be so large.
EXCLUDABLE_COSINE = 0.45


@dataclass(frozen=True)
class Features:
    """One number of each kind for each answer; n answers, W things in the bank. Leading axes are kept.

    Attributes
    ----------
    log_scales : float array, shape (..., n)
        x = log s of each answer.
    fisher : float array, shape (W, ..., n)
        Fisher transform of the cosine of each answer's residual with each one's; NaN where unknown.
    shape : float array, shape (..., n)
        The same with the reference's own shape: what a temperature changes.
    """

    log_scales: Floats
    fisher: Floats
    shape: Floats


@dataclass(frozen=True)
class WeightEvidence:
    """The evidence on the weights after each answer; n answers, V variants.

    Attributes
    ----------
    features : Features
        What each answer comes to.
    null : Null
        What counts as honest for this endpoint's grid.
    grid_nats : float
        The grid that its logprobs lie on; 0 for none.
    log_size, log_direction, log_total : float array, shape (n,)
        Log e-processes against the honest library: by size, by direction, and their mean.
    log_by_variant : float array, shape (V, n)
        The part of `log_direction` that bets on each one; 0 where none is placed.
    log_exclusion : float array, shape (V, n)
        Log e-process against "this variant is served, or something at least as far from the reference".
    log_remainder : float array, shape (V, n)
        Log e-process by size of what is left once that residual is subtracted.
    slope : float
        Least-squares slope of the endpoint's centred logprobs on the reference's, over all answers. A temperature
        T that was divided by shows as 1/T.
    log_after_slope : float array, shape (n,)
        Log e-process by size of what is left once that slope is taken out.
    pool : int
        How many probes there are.
    asked, repeated : int
        How many probes were asked; those beyond n came back without usable logprobs, or repeated another answer.
    excludable : bool array, shape (V,)
        Whether this level can exclude the variant, by its size or its direction.
    """

    features: Features
    null: Null
    grid_nats: float
    log_size: Floats
    log_direction: Floats
    log_total: Floats
    log_by_variant: Floats
    log_exclusion: Floats
    log_remainder: Floats
    slope: float
    log_after_slope: Floats
    pool: int
    asked: int
    repeated: int
    excludable: NDArray[np.bool_]

    @property
    def answers(self) -> int:
        """How many answers count."""
        return int(self.features.log_scales.size)


def weigh(library: Library, residuals: Residuals, policy: Policy) -> WeightEvidence | None:
    """Compute the evidence of all answers so far; None where no honest stack has the endpoint's kind of grid."""
    grid = grid_step(residuals.endpoint_nats)
    null = library.null_for(grid)
    if null is None:
        return None
    features = features_of(residuals)
    centred = centred_difference(residuals.endpoint_nats, residuals.reference_nats)
    slope = _slope(centred, residuals.reference_nats)
    remainder = _scales(residuals, residuals.reference_nats[None] + residuals.bank_nats)
    tempered = _scales(residuals, slope * residuals.reference_nats)
    log_size, by_variant, log_direction = honest_processes(library, null, features, policy)
    exclusion, excludable = exclusion_processes(library, null, features, policy)
    return WeightEvidence(
        features=features,
        null=null,
        grid_nats=grid,
        log_size=log_size,
        log_direction=log_direction,
        log_total=mixture(np.array([log_size, log_direction])),
        log_by_variant=by_variant,
        log_exclusion=exclusion,
        log_remainder=size_process(null, remainder, policy),
        slope=slope,
        log_after_slope=size_process(null, tempered, policy),
        pool=len(library.probe_ids),
        asked=residuals.asked,
        repeated=residuals.repeated,
        excludable=excludable,
    )


def features_of(residuals: Residuals) -> Features:
    """What each answer comes to: its size, its cosines, and its cosine with the reference's own shape."""
    unit, n = residuals.answer_of_row, residuals.answers
    centred = centred_difference(residuals.endpoint_nats, residuals.reference_nats)
    fisher = fisher_cosine(centred[None], residuals.bank_nats, residuals.reference_nats[None])
    return Features(
        log_scales=_scales(residuals, residuals.reference_nats),
        fisher=mean_by_unit(fisher, unit, n),
        shape=mean_by_unit(shape_fisher(centred, residuals.reference_nats), unit, n),
    )


def _scales(residuals: Residuals, expected_nats: Floats) -> Floats:
    """Give x of each answer against what was expected; leading axes of `expected_nats` are kept."""
    x = log_scale(centred_difference(residuals.endpoint_nats, expected_nats))
    # Where hardly a token is known there is nothing to centre. That a token which the reference does not list is
    # likely is a difference all the same, at least as large as its distance from the list's end.
    by_unlisted = np.log(np.maximum(residuals.unlisted_nats, SMALLEST_SCALE_NATS))
    return mean_by_unit(np.where(np.isfinite(x), x, by_unlisted), residuals.answer_of_row, residuals.answers)


def honest_processes(library: Library, null: Null, features: Features, policy: Policy) -> tuple[Floats, Floats, Floats]:
    """Log e-processes against the honest stacks: by size, by the direction of each variant, by direction at all."""
    log_size = size_process(null, features.log_scales, policy)
    by_variant = direction_processes(null, features, policy, np.ones(len(library.variants), np.bool_))
    return log_size, by_variant, log_direction_of(by_variant, faint_variants(library, null))


def against_honest(library: Library, null: Null, features: Features, policy: Policy) -> Floats:
    """Log e-process against the honest stacks, by size and direction together."""
    log_size = size_process(null, features.log_scales, policy)
    faint = faint_variants(library, null)
    by_variant = direction_processes(null, features, policy, faint)
    return mixture(np.array([log_size, log_direction_of(by_variant, faint)]))


def log_direction_of(by_variant: Floats, faint: NDArray[np.bool_]) -> Floats:
    """The mean of the bets on direction that are placed before any departure is named."""
    return mixture(by_variant[faint]) if faint.any() else np.zeros(by_variant.shape[1:])


def faint_variants(library: Library, null: Null) -> NDArray[np.bool_]:
    """On which variants bets are placed before any is named: those that size finds slowly."""
    sizes = np.nanmean(library.variant_log_scales, axis=1)
    return np.asarray(sizes < null.mean + np.log(DIRECTION_UP_TO_MULTIPLE))


def _slope(residual_nats: Floats, reference_nats: Floats) -> float:
    """Slope of endpoint on reference: one more than that of the residual on the reference."""
    known = np.isfinite(residual_nats) & np.isfinite(reference_nats)
    count = np.maximum(known.sum(axis=1, keepdims=True), 1)
    shape = np.where(known, reference_nats, 0.0)
    shape = np.where(known, shape - shape.sum(axis=1, keepdims=True) / count, 0.0)
    spread = float((shape**2).sum())
    return 1.0 + (float((np.where(known, residual_nats, 0.0) * shape).sum()) / spread if spread > 0 else 0.0)


def size_process(
    null: Null,
    log_scales: Floats,
    policy: Policy,
    multiples: tuple[float, ...] = SIZE_MULTIPLES,
    stakes: tuple[float, ...] = STAKES,
) -> Floats:
    """Log e-process by size against the honest stacks; the last axis of `log_scales` is the order of the draw."""
    processes, weights = [], []
    for multiple in multiples:
        alternative = null.mean + float(np.log(multiple))
        scores = tilted_score(log_scales, null.mean, alternative, null.sd, policy.score_cap)
        honest = tilted_score(null.log_scales, null.mean, alternative, null.sd, policy.score_cap)
        for stake, weight in zip(stakes, STAKE_WEIGHTS, strict=False):
            processes.append(_bet(scores, honest, policy, stake))
            weights.append(weight)
    return mixture(np.array(processes), np.array(weights))


def direction_processes(null: Null, features: Features, policy: Policy, wanted: NDArray[np.bool_]) -> Floats:
    """Log e-process by direction for each variant; 0 for those that are not wanted."""
    out = np.zeros(features.fisher.shape)
    for w, fisher in enumerate(features.fisher):
        mean, sd = float(null.fisher_mean[w]), float(null.fisher_sd[w])
        if not wanted[w] or not np.isfinite(mean) or sd <= 0:
            continue
        bets = []
        for cosine in DIRECTION_COSINES:
            alternative = max(float(np.arctanh(cosine)), mean + sd)
            scores = tilted_score(fisher, mean, alternative, sd, policy.score_cap)
            honest = tilted_score(null.fisher[w], mean, alternative, sd, policy.score_cap)
            # A stack on which a probe's cosine is unknown may have had any.
            bets.append(_bet(scores, np.where(np.isfinite(honest), honest, policy.score_cap), policy, 1.0))
        out[w] = mixture(np.array(bets))
    return out


def sampling_process(null: Null, features: Features, policy: Policy) -> Floats:
    """Log e-process for a distribution that is sharpened or flattened as a whole."""
    means = np.nanmean(null.shape_fisher, axis=1)
    sd = float(np.nanstd(null.shape_fisher, axis=1).max())
    at_most = float(
        np.arctanh(max(policy.direction_floor_cosine, np.tanh(np.abs(means).max()) + policy.direction_margin_cosine))
    )
    alternative = max(float(np.arctanh(DIRECTION_COSINES[1])), at_most + sd)
    bets = []
    for sign in (1.0, -1.0):
        moved = sign * (null.shape_fisher - means[:, None]) + at_most
        honest = tilted_score(moved, at_most, alternative, sd, policy.score_cap)
        scores = tilted_score(sign * features.shape, at_most, alternative, sd, policy.score_cap)
        bets.append(_bet(scores, np.where(np.isfinite(honest), honest, policy.score_cap), policy, 1.0))
    return mixture(np.array(bets))


@dataclass(frozen=True)
class _Exclusion:
    """One bet that a departure is not what is served: on which feature, and the scores that the departure would have."""

    by_size: bool
    null_mean: float
    alternative: float
    sd: float
    scores: Floats


@lru_cache(maxsize=4)
def _exclusions(library: Library, null: Null, stack_margin: float, score_cap: float) -> list[list[_Exclusion]]:
    """The bets on each variant; the same for every audit against this null. None where nothing can speak of it."""
    out: list[list[_Exclusion]] = []
    for variant, recorded, least, spread in zip(
        library.variants, library.variant_log_scales, null.farthest_fisher, null.fisher_sd, strict=False
    ):
        bets = []
        if float(np.nanmean(recorded)) > null.mean:
            shifted = recorded - np.log(stack_margin)
            mean, sd = float(np.nanmean(shifted)), max(float(np.nanstd(shifted)), null.sd)
            for multiple in HONEST_MULTIPLES:
                nearer = min(null.mean + float(np.log(multiple)), mean - 0.1)
                served = tilted_score(shifted[None, :], mean, nearer, sd, score_cap)
                bets.append(_Exclusion(True, mean, nearer, sd, served))
        if travels(variant) and np.isfinite(least).any():
            lowest = float(np.nanmean(least, axis=1).min())
            if lowest >= np.arctanh(EXCLUDABLE_COSINE):
                sd = max(float(np.nanstd(least, axis=1).max()), float(spread))
                served = tilted_score(least, lowest, 0.0, sd, score_cap)
                # Where a probe's cosine is unknown it may be any.
                bets.append(_Exclusion(False, lowest, 0.0, sd, np.where(np.isfinite(served), served, score_cap)))
        out.append(bets)
    return out


def exclusion_processes(
    library: Library, null: Null, features: Features, policy: Policy
) -> tuple[Floats, NDArray[np.bool_]]:
    """For each variant: evidence that something nearer to the reference is served, and whether there can be any."""
    exclusions = _exclusions(library, null, policy.stack_margin, policy.score_cap)
    out = np.zeros((len(exclusions), *features.log_scales.shape))
    for v, bets in enumerate(exclusions):
        processes = []
        for bet in bets:
            values = features.log_scales if bet.by_size else features.fisher[v]
            scores = tilted_score(values, bet.null_mean, bet.alternative, bet.sd, policy.score_cap)
            processes.append(_bet(scores, bet.scores, policy, 1.0))
        if processes:
            out[v] = mixture(np.array(processes))
    return out, np.array([bool(bets) for bets in exclusions])


def _bet(scores: Floats, null_scores: Floats, policy: Policy, stake: float) -> Floats:
    return bounded_score_process(
        scores, null_scores, cap=policy.score_cap, outlier_share=policy.outlier_share, stake=stake
    )
