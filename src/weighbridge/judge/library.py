"""The honest library: what a bundle's stacks look like to an endpoint that returns k logprobs, under a policy."""

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from weighbridge.errors import BundleError
from weighbridge.records import LogprobLevel, Policy
from weighbridge.reference.bundle import OFFICIAL, Bundle, PoolRecord, StackRecord, unfit_to_judge
from weighbridge.stats.grid import fits_grid, grid_step, kind_of_grid, round_to_bfloat16, rounding_noise
from weighbridge.stats.honest import MIN_STACKS, class_limit
from weighbridge.stats.residuals import (
    centred_difference,
    fisher_cosine,
    log_scale,
    mean_by_unit,
    own_top,
    shape_fisher,
)

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
MIN_TOP_LOGPROBS = 5  # a shorter list cannot be compared
COARSEST_GRID_NATS = 0.5  # a coarser one hides every departure that is worth finding
QUIETER = 10.0  # a tenth of the least limit: below it a stack's noise is as good as none
FLOATS = ("float32", "bfloat16", "float16")


def travels(stack: StackRecord) -> bool:
    """Whether a departure leaves the same residual on another engine.

    Changed weights do; rounded activations and KV caches are rounded anew, by every engine's own noise.
    """
    precision = stack.precision
    return precision.activations in FLOATS and precision.kv_cache in FLOATS


@dataclass(frozen=True, eq=False)
class Null:
    """What counts as honest for an endpoint whose logprobs lie on one kind of grid.

    Attributes
    ----------
    grid_nats : float
        The grid of its stacks; 0 for none.
    stacks : int array, shape (B,)
        Rows of `Library.honest`.
    limit_nats : float
        ŝ that an unrecorded honest stack may have.
    log_scales : float array, shape (B, N)
        x of each stack on each probe, moved up to its numeric class's limit.
    mean, sd : float
        Of `log_scales` in the noisiest class: its mean, and the largest standard deviation.
    means : float array, shape (B,)
        Mean log s of each stack as recorded.
    centre, between_sd, degrees
        Mean log ŝ of the noisiest class as recorded, its spread from stack to stack, and the degrees of freedom of that spread.
    shape_fisher : float array, shape (B, N)
        Fisher transform of the cosine with the reference's own centred logprobs: what a temperature changes.
    fisher : float array, shape (V, B, N)
        Fisher transform of the cosine with each variant, moved up to the largest mean that counts as honest.
    fisher_mean, fisher_sd : float array, shape (V,)
        That mean, and the largest standard deviation.
    travelled_log_scales, travelled_fisher : float array, shape (V, B, N)
        Of a variant's residual with a stack's own noise added to it, as recorded: what the variant would look like on that
        engine. NaN for variants that do not travel.
    farthest_fisher : float array, shape (V, B, N)
        The same with the noise moved up to the limit: the least that the variant must show if it is served.
    """

    grid_nats: float
    stacks: Ints
    limit_nats: float
    log_scales: Floats
    mean: float
    sd: float
    means: Floats
    centre: float
    between_sd: float
    degrees: int
    shape_fisher: Floats
    fisher: Floats
    fisher_mean: Floats
    fisher_sd: Floats
    travelled_log_scales: Floats
    travelled_fisher: Floats
    farthest_fisher: Floats


@dataclass(frozen=True, eq=False)
class Library:
    """Residuals of every recorded stack over its own top-k, for the usable probes of a level's pool. R rows of N probes.

    Attributes
    ----------
    rendering : str
        Under which all of it was recorded.
    bfloat16_logprobs : bool
        Whether everything recorded was rounded to bfloat16, as the endpoint does.
    probe_ids : list of str
        The usable probes.
    rows, unit_of_row : int array, shape (R,)
        The bundle's row of each row here, and the probe (index into `probe_ids`) that it belongs to.
    honest, variants : list of StackRecord
        The stacks that the policy accepts (without the reference itself), and all others; H and V of them.
    reference_nats : float array, shape (R, top-K)
        The reference's logprobs.
    most_unlisted_nats : float array, shape (R,)
        The most that a token can have in the reference if it is not found there by its bytes: the list's smallest,
        or all that the list's tokens without bytes of their own (special tokens) have together.
    differences_nats : float array, shape (V, R, top-K)
        Each variant's logprobs less the reference's.
    honest_log_scales : float array, shape (H, N)
        x = log s of each honest stack against the reference, averaged over a probe's rows.
    variant_log_scales : float array, shape (V, N)
        The same of the variants.
    nulls : list of Null
        One for each kind of grid that an honest stack has.
    """

    bundle: Bundle
    policy: Policy
    level: LogprobLevel
    rendering: str
    top_k: int
    bfloat16_logprobs: bool
    probe_ids: list[str]
    rows: Ints
    unit_of_row: Ints
    honest: list[StackRecord]
    variants: list[StackRecord]
    reference_nats: Floats
    most_unlisted_nats: Floats
    differences_nats: Floats
    honest_log_scales: Floats
    variant_log_scales: Floats
    nulls: list[Null]

    @property
    def families(self) -> list[str]:
        """Engine and compute type of every honest stack, the reference's included."""
        stacks = [s for s in self.bundle.manifest.stacks if s.id == self.bundle.manifest.reference_stack]
        return sorted({stack.family for stack in (*stacks, *self.honest)})

    def null_for(self, grid_nats: float) -> Null | None:
        """The null for an endpoint's grid.

        Where no honest stack has such a one, that of the next finer grid, its limit widened by the noise that rounding to
        the endpoint's grid adds; then no direction is excluded, since more noise blurs it. None for a grid too coarse to compare.
        """
        fitting = next((null for null in self.nulls if fits_grid(grid_nats, null.grid_nats)), None)
        if fitting is not None or grid_nats > COARSEST_GRID_NATS:
            return fitting
        finer = max(
            (null for null in self.nulls if null.grid_nats <= grid_nats), key=lambda null: null.grid_nats, default=None
        )
        if finer is None:
            return None
        limit = float(np.hypot(finer.limit_nats, rounding_noise(grid_nats)))
        wider = float(np.log(limit / finer.limit_nats))
        return replace(
            finer, limit_nats=limit, log_scales=finer.log_scales + wider, mean=finer.mean + wider,
            farthest_fisher=np.full_like(finer.farthest_fisher, np.nan),
        )  # fmt: skip


def build_library(
    bundle: Bundle, policy: Policy, top_k: int, level: LogprobLevel = "L3", *, bfloat16_logprobs: bool = False
) -> Library:
    """Compute the library once per audit.

    Parameters
    ----------
    bundle : Bundle
    policy : Policy
    top_k : int
        How many logprobs the endpoint returns.
    level : str
        Which pool of the bundle is asked.
    bfloat16_logprobs : bool
        Whether the endpoint rounds its logprobs to bfloat16: then everything recorded is rounded likewise.

    Raises
    ------
    BundleError
        If the bundle cannot be judged against at this level.
    """
    return _built(bundle, policy.model_dump_json(by_alias=True), top_k, level, bfloat16_logprobs)


@lru_cache(maxsize=4)
def _built(bundle: Bundle, policy: str, top_k: int, level: LogprobLevel, bfloat16_logprobs: bool) -> Library:
    """The same library for every endpoint of a fleet that is judged alike."""
    return _build(bundle, Policy.model_validate_json(policy), top_k, level, bfloat16_logprobs, None, OFFICIAL)


@lru_cache(maxsize=20)
def build_rendered(official: Library, rendering: str) -> Library | None:
    """The library under another rendering of the prompts; None where too little was recorded under it.

    Fewer stacks are recorded there, so an honest one is allowed what the official library allows it: more, where those that
    are recorded are noisier under this rendering, and never less.
    """
    bundle, level = official.bundle, official.level
    if unfit_to_judge(bundle, level, rendering) is not None:
        return None
    return _build(bundle, official.policy, official.top_k, level, official.bfloat16_logprobs, official, rendering)


def _build(
    bundle: Bundle, policy: Policy, top_k: int, level: LogprobLevel, bfloat16_logprobs: bool, official: Library | None, rendering: str,
) -> Library:  # fmt: skip
    pool, problem = bundle.pool_at(level, rendering), unfit_to_judge(bundle, level, rendering)
    if problem is not None or pool is None:
        raise BundleError(
            f"the bundle {bundle.manifest.id} cannot be judged against: {problem}", "Record or merge what is missing"
        )
    probe_ids, rows, unit_of_row = _layout(bundle, pool)
    reference = bundle.stack_index[bundle.manifest.reference_stack]
    recorded = [s for s in bundle.manifest.stacks if s.id != bundle.manifest.reference_stack and pool.key in s.pools]
    others = [s for s in recorded if s.is_judged]
    honest = [s for s in others if s.departure is None or s.departure_class in policy.accepts]
    variants = [s for s in others if s not in honest]
    if not variants:
        raise BundleError(
            f"the policy {policy.id} accepts every departure that the bundle {bundle.manifest.id} records",
            "Choose a stricter policy, or record a departure that it does not accept",
        )

    def values_of(stack: int) -> Floats:
        values = bundle.logprobs_nats[stack].astype(np.float64)[rows]
        return round_to_bfloat16(values) if bfloat16_logprobs else values

    reference_rows = values_of(reference)
    differences = np.stack([values_of(bundle.stack_index[s.id]) for s in variants]) - reference_rows
    # An endpoint's list gives special tokens no names, so they are compared nowhere.
    named = np.zeros(reference_rows.shape, np.bool_)
    for i, row in enumerate(rows.tolist()):
        named[i, list(bundle.columns_of_row(row).values())] = True
    tops = [_Top.of(values_of(bundle.stack_index[s.id]), reference_rows, named, top_k) for s in honest]
    n = len(probe_ids)

    def scales(residual: Floats) -> Floats:
        return mean_by_unit(log_scale(residual), unit_of_row, n)

    honest_scales = np.stack([scales(top.residual) for top in tops])
    variant_scales = np.stack(
        [
            scales(_Top.of(values_of(bundle.stack_index[s.id]), reference_rows, named, top_k).residual)
            for s in variants
        ]
    )  # fmt: skip
    # Grids are those of the recorded values: what is rounded once more for this endpoint keeps its kind.
    grids = [
        kind_of_grid(
            grid_step(own_top(bundle.logprobs_nats[bundle.stack_index[s.id]].astype(np.float64)[rows], top_k)[1])
        )
        for s in honest
    ]
    kinds: list[float] = []
    for grid in sorted(grids, reverse=True):
        if not any(fits_grid(grid, kind) for kind in kinds):
            kinds.append(grid)
    return Library(
        bundle=bundle,
        policy=policy,
        level=level,
        rendering=rendering,
        top_k=top_k,
        bfloat16_logprobs=bfloat16_logprobs,
        probe_ids=probe_ids,
        rows=rows,
        unit_of_row=unit_of_row,
        honest=honest,
        variants=variants,
        reference_nats=reference_rows,
        most_unlisted_nats=np.array(
            [most_unlisted(bundle, row, values) for row, values in zip(rows.tolist(), reference_rows, strict=True)]
        ),
        differences_nats=differences,
        honest_log_scales=honest_scales,
        variant_log_scales=variant_scales,
        nulls=[
            _null(kind, [i for i, grid in enumerate(grids) if fits_grid(grid, kind)], honest, honest_scales, tops, variants,
                  differences, unit_of_row, n, policy, None if official is None else _Official.of(official, kind, honest, probe_ids))
            for kind in kinds
        ],
    )  # fmt: skip


@dataclass(frozen=True)
class _Official:
    """What the official library says of a kind of grid.

    ``null`` is its null; ``log_scales`` maps a stack to its mean x under the official rendering, on the probes that were
    recorded under the other one; ``fisher_mean`` maps a variant to the largest mean cosine that counts as honest.
    """

    null: Null
    log_scales: dict[str, float]
    fisher_mean: dict[str, float]

    @classmethod
    def of(cls, library: Library, grid_nats: float, honest: list[StackRecord], probe_ids: list[str]) -> "_Official":
        null = library.null_for(grid_nats) or library.nulls[0]
        there = {probe_id: i for i, probe_id in enumerate(library.probe_ids)}
        columns = [there[probe_id] for probe_id in probe_ids if probe_id in there]
        means = {
            s.id: float(np.nanmean(scales[columns]))
            for s, scales in zip(library.honest, library.honest_log_scales, strict=True)
            if s in honest
        }
        return cls(null, means, dict(zip((v.id for v in library.variants), null.fisher_mean.tolist(), strict=True)))


def _layout(bundle: Bundle, pool: PoolRecord) -> tuple[list[str], Ints, Ints]:
    recorded_ids = bundle.usable_probes(pool)
    index = [bundle.probe_index[probe_id] for probe_id in recorded_ids]
    probe_ids = [probe_id.split("@")[0] for probe_id in recorded_ids]
    place = {probe: i for i, probe in enumerate(index)}
    rows = np.flatnonzero(np.isin(bundle.row_probe, index))
    return probe_ids, rows.astype(np.int64), np.array([place[p] for p in bundle.row_probe[rows].tolist()], np.int64)


@dataclass(frozen=True)
class _Top:
    """A stack's own most likely tokens, row by row."""

    columns: Ints
    values: Floats
    reference: Floats
    residual: Floats

    @classmethod
    def of(cls, values: Floats, reference_rows: Floats, named: NDArray[np.bool_], top_k: int) -> "_Top":
        columns, own = own_top(values, top_k)
        own = np.where(np.take_along_axis(named, columns, axis=1), own, np.nan)
        reference = np.take_along_axis(reference_rows, columns, axis=1)
        return cls(columns, own, reference, centred_difference(own, reference))


def _null(
    grid: float, stacks: list[int], honest: list[StackRecord], honest_scales: Floats, tops: list[_Top], bank: list[StackRecord],
    differences: Floats, unit_of_row: Ints, n: int, policy: Policy, official: _Official | None,
) -> Null:  # fmt: skip
    """The stacks of one kind of grid, each moved up to the limit of its numeric class (its type of arithmetic)."""
    means = np.nanmean(honest_scales, axis=1)
    classes: dict[str, list[int]] = {}
    for i in stacks:
        # A departure that the policy accepts is a format of its own, not one more of a kind of arithmetic.
        name = honest[i].precision.activations if honest[i].departure is None else f"{honest[i].variant}"
        classes.setdefault(name, []).append(i)
    # How much quieter than this a stack is says nothing of how noisy another one may be.
    heard = np.maximum(means, np.log(policy.null_scale_floor_nats / QUIETER))
    limits = {
        name: class_limit(heard[members], margin=policy.stack_margin, coverage=policy.stack_coverage)
        for name, members in classes.items()
    }
    noisiest = max(limits, key=lambda name: limits[name])
    limits[noisiest] = max(limits[noisiest], policy.null_scale_floor_nats)
    if official is not None:
        noisier = max([0.0, *(means[i] - official.log_scales[honest[i].id] for i in stacks)])
        limits = dict.fromkeys(limits, official.null.limit_nats * float(np.exp(noisier)))
    class_of = {i: name for name, members in classes.items() for i in members}
    targets = np.log([limits[class_of[i]] for i in stacks])
    own = means[stacks]
    moved = honest_scales[stacks] - own[:, None] + targets[:, None]
    members = classes[noisiest]
    few = len(members) < MIN_STACKS

    fisher = np.full((len(bank), len(stacks), n), np.nan)
    travelled_x, travelled_z, farthest_z = fisher.copy(), fisher.copy(), fisher.copy()
    for b, i in enumerate(stacks):
        top = tops[i]
        at_top = np.take_along_axis(differences, np.broadcast_to(top.columns, (len(bank), *top.columns.shape)), axis=2)
        fisher[:, b] = mean_by_unit(fisher_cosine(top.residual[None], at_top, top.reference[None]), unit_of_row, n)
        for v, stack in enumerate(bank):
            if not travels(stack):
                continue
            for factor, x, z in (
                (1.0, travelled_x, travelled_z),
                (max(1.0, float(np.exp(targets[b] - own[b]))), None, farthest_z),
            ):
                residual = centred_difference(factor * top.residual + at_top[v], np.zeros_like(top.residual))
                z[v, b] = mean_by_unit(fisher_cosine(residual, at_top[v], top.reference), unit_of_row, n)
                if x is not None:
                    x[v, b] = mean_by_unit(log_scale(residual), unit_of_row, n)
    mean_z = np.nanmean(fisher, axis=2)
    at_most = np.arctanh(
        np.maximum(policy.direction_floor_cosine, np.tanh(mean_z.max(axis=1)) + policy.direction_margin_cosine)
    )
    centre, between_sd, degrees = float(means[members].mean()), policy.few_stacks_sd, max(1, len(members) - 1)
    if not few:
        between_sd = float(means[members].std(ddof=1) * np.sqrt(1 + 1 / len(members)))
    if official is not None:
        at_most = np.maximum(at_most, [official.fisher_mean.get(s.id, 0.0) for s in bank])
        centre, between_sd, degrees = official.null.centre + noisier, official.null.between_sd, official.null.degrees
    return Null(
        grid_nats=grid,
        stacks=np.array(stacks, np.int64),
        limit_nats=limits[noisiest],
        log_scales=moved,
        mean=float(np.log(limits[noisiest])),
        sd=float(max(np.nanstd(honest_scales[i]) for i in members)),
        means=means[stacks],
        centre=centre,
        between_sd=between_sd,
        degrees=degrees,
        shape_fisher=np.stack(
            [mean_by_unit(shape_fisher(tops[i].residual, tops[i].reference), unit_of_row, n) for i in stacks]
        ),
        fisher=fisher - mean_z[:, :, None] + at_most[:, None, None],
        fisher_mean=at_most,
        fisher_sd=np.nanstd(fisher, axis=2).max(axis=1),
        travelled_log_scales=travelled_x,
        travelled_fisher=travelled_z,
        farthest_fisher=farthest_z,
    )


def most_unlisted(bundle: Bundle, row: int, reference_row: Floats) -> float:
    """The most that a token can have in a reference row which is not found in its list by its bytes."""
    most = float(np.nanmin(reference_row))
    named = list(bundle.columns_of_row(row).values())
    nameless = float(np.exp(np.nan_to_num(np.delete(reference_row, named), nan=-np.inf)).sum())
    return max(most, float(np.log(nameless))) if nameless > 0 else most
