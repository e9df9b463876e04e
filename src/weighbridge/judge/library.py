"""The honest library: what a bundle's stacks look like to an endpoint that returns k logprobs, under a policy."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from weighbridge.errors import BundleError
from weighbridge.records import Observation, Policy
from weighbridge.reference.bundle import Bundle, StackRecord, unfit_to_judge
from weighbridge.stats.residuals import centred_difference, direction_cosine, log_scale, own_top, reference_at

Floats = NDArray[np.float64]
MIN_TOP_LOGPROBS = 5  # a shorter list cannot be compared


@dataclass(frozen=True)
class Library:
    """Residuals of every recorded stack over its own top-k, for the usable probes of a bundle.

    Attributes
    ----------
    probe_ids : list of str
        The usable probes; columns of the arrays below.
    honest, variants : list of StackRecord
        The stacks that the policy accepts (without the reference itself), and all others.
    reference_nats : float array, shape (probes, top-K)
        The reference's logprobs.
    most_unlisted_nats : float array, shape (probes,)
        The most that a token can have in the reference if it is not found there by its bytes: the list's smallest,
        or all that the list's tokens without bytes of their own (special tokens) have together.
    variant_differences_nats : float array, shape (variants, probes, top-K)
        Each variant's logprobs less the reference's.
    honest_log_scales, variant_log_scales : float array, shape (stacks, probes)
        x = log s of each stack against the reference.
    null_log_scales : float array, shape (honest stacks, probes)
        The honest ones moved up to the policy's floor, or by its margin, whichever is larger.
    null_mean, null_sd : float
        Largest mean and largest standard deviation of `null_log_scales`.
    null_cosines : dict
        For each variant the largest mean cosine that counts as honest.
    """

    bundle: Bundle
    top_k: int
    probe_ids: list[str]
    honest: list[StackRecord]
    variants: list[StackRecord]
    reference_nats: Floats
    most_unlisted_nats: Floats
    variant_differences_nats: Floats
    honest_log_scales: Floats
    variant_log_scales: Floats
    null_log_scales: Floats
    null_mean: float
    null_sd: float
    null_cosines: dict[str, float]

    @property
    def families(self) -> list[str]:
        """Engine and compute type of every honest stack, the reference's included."""
        stacks = [s for s in self.bundle.manifest.stacks if s.id == self.bundle.manifest.reference_stack]
        return sorted({stack.family for stack in (*stacks, *self.honest)})


def build_library(bundle: Bundle, policy: Policy, top_k: int) -> Library:
    """Compute the library once per audit."""
    pool, problem = bundle.pool_at("L3"), unfit_to_judge(bundle)
    if problem is not None or pool is None:
        raise BundleError(
            f"the bundle {bundle.manifest.id} cannot be judged against: {problem}", "Record or merge what is missing"
        )
    probe_ids = bundle.usable_probe_ids
    rows = np.array([bundle.row_index[p] for p in probe_ids], np.int64)
    reference = bundle.stack_index[bundle.manifest.reference_stack]
    others = [
        s
        for s in bundle.manifest.stacks
        if s.id != bundle.manifest.reference_stack and pool.id in s.pools and s.is_judged
    ]
    honest = [s for s in others if s.departure is None or s.departure_class in policy.accepts]
    variants = [s for s in others if s not in honest]
    if not variants:
        raise BundleError(
            f"the policy {policy.id} accepts every departure that the bundle {bundle.manifest.id} records",
            "Choose a stricter policy, or record a departure that it does not accept",
        )
    reference_rows = bundle.logprobs_nats[reference].astype(np.float64)[rows]

    def top_of(stack: StackRecord) -> tuple[NDArray[np.int64], Floats]:
        return own_top(bundle.logprobs_nats[bundle.stack_index[stack.id]].astype(np.float64)[rows], top_k)

    def log_scales(stacks: list[StackRecord]) -> Floats:
        out = np.empty((len(stacks), len(rows)))
        for i, stack in enumerate(stacks):
            columns, values = top_of(stack)
            out[i] = log_scale(centred_difference(values, np.take_along_axis(reference_rows, columns, axis=1)))
        return out

    honest_scales, variant_scales = log_scales(honest), log_scales(variants)
    means = np.nanmean(honest_scales, axis=1, keepdims=True)
    targets = np.maximum(means + np.log(policy.stack_margin), np.log(policy.null_scale_floor_nats))
    null = honest_scales - means + targets

    order = [bundle.stack_index[variant.id] for variant in variants]
    differences = bundle.logprobs_nats[order].astype(np.float64)[:, rows] - reference_rows
    cosines: dict[str, float] = {}
    for variant, recorded in zip(variants, differences, strict=True):
        worst = 0.0
        for stack in honest:
            columns, values = top_of(stack)
            reference_values = np.take_along_axis(reference_rows, columns, axis=1)
            found = direction_cosine(
                centred_difference(values, reference_values),
                np.take_along_axis(recorded, columns, axis=1),
                reference_values,
            )
            worst = max(worst, float(np.nanmean(found)))
        cosines[variant.id] = max(policy.direction_floor_cosine, worst + policy.direction_margin_cosine)
    return Library(
        bundle=bundle,
        top_k=top_k,
        probe_ids=probe_ids,
        honest=honest,
        variants=variants,
        reference_nats=reference_rows,
        most_unlisted_nats=_most_unlisted(bundle, rows, reference_rows),
        variant_differences_nats=differences,
        honest_log_scales=honest_scales,
        variant_log_scales=variant_scales,
        null_log_scales=null,
        null_mean=float(targets.max()),
        null_sd=float(np.nanstd(null, axis=1).max()),
        null_cosines=cosines,
    )


def _most_unlisted(bundle: Bundle, rows: NDArray[np.int64], reference_rows: Floats) -> Floats:
    out = np.asarray(np.nanmin(reference_rows, axis=1))
    for i, row in enumerate(rows.tolist()):
        named = list(bundle.columns_of_row(row).values())
        nameless = np.exp(np.nan_to_num(np.delete(reference_rows[i], named), nan=-np.inf)).sum()
        if nameless > 0:
            out[i] = max(out[i], float(np.log(nameless)))
    return out


@dataclass(frozen=True)
class Residuals:
    """An endpoint's residuals, one row for each probe whose tokens are known, in the order of the draw.

    Attributes
    ----------
    probe_columns : int array, shape (n,)
        Column of each probe in the library's arrays.
    endpoint_nats, reference_nats : float array, shape (n, k)
        NaN where a list is shorter than k or a token is to be left out.
    variant_nats : float array, shape (variants, n, k)
        Each variant's difference from the reference at the endpoint's tokens.
    unlisted_nats : float array, shape (n,)
        By how much the likeliest token that the reference does not list exceeds all that it can have there; 0 if
        it does not.
    listed_share : float array
        Share of the endpoint's tokens that stand in the reference's list, for every answer with logprobs.
    agrees : bool array, shape (n,)
        Whether the most likely token is the same.
    asked : int
        How many probes were asked, those without an answer or without logprobs included.
    """

    probe_columns: NDArray[np.int64]
    endpoint_nats: Floats
    reference_nats: Floats
    variant_nats: Floats
    unlisted_nats: Floats
    listed_share: Floats
    agrees: NDArray[np.bool_]
    asked: int


def residuals(library: Library, observations: list[Observation]) -> Residuals:
    """Line an endpoint's top-k lists up with the reference's."""
    bundle, k = library.bundle, library.top_k
    column_of = {probe_id: i for i, probe_id in enumerate(library.probe_ids)}
    usable = [
        o for o in observations if o.top is not None and len(o.top) >= MIN_TOP_LOGPROBS and o.probe_id in column_of
    ]
    n = len(usable)
    endpoint_nats = np.full((n, k), np.nan)
    reference_nats = np.full((n, k), np.nan)
    variant_nats = np.full((len(library.variants), n, k), np.nan)
    unlisted = np.zeros(n)
    listed = np.zeros(n)
    agrees = np.zeros(n, np.bool_)
    for i, observation in enumerate(usable):
        assert observation.top is not None
        row = column_of[observation.probe_id]
        top = observation.top[:k]
        columns_of_token = bundle.columns_of_row(bundle.row_index[observation.probe_id])
        columns = np.array([columns_of_token.get(t.bytes_hex, -1) for t in top], np.int64)
        values = np.array([t.logprob_nats for t in top], np.float64)
        # A name that was guessed from the text may be misspelt: that it is unknown then says nothing.
        most = np.inf if "bytes_absent" in observation.quirks else float(library.most_unlisted_nats[row])
        stands = columns >= 0
        endpoint_nats[i, : len(top)] = values
        reference_nats[i, : len(top)] = reference_at(columns, values, library.reference_nats[row], most)
        variant_nats[:, i, : len(top)] = np.where(stands, library.variant_differences_nats[:, row, columns], np.nan)
        listed[i] = stands.mean()
        if not stands.all() and np.isfinite(most):
            unlisted[i] = max(0.0, float(values[~stands].max() - most))
        # A reference row is ordered: its most likely token stands first.
        agrees[i] = columns[0] == 0
    # An answer of which too little is known has no residual; it counts for nothing but `listed_share`.
    known = np.isfinite(centred_difference(endpoint_nats, reference_nats)).any(axis=1) | (unlisted > 0)
    return Residuals(
        probe_columns=np.array([column_of[o.probe_id] for o in usable], np.int64)[known],
        endpoint_nats=endpoint_nats[known],
        reference_nats=reference_nats[known],
        variant_nats=variant_nats[:, known],
        unlisted_nats=unlisted[known],
        listed_share=listed,
        agrees=agrees[known],
        asked=len(observations),
    )
