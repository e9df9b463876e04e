"""Choosing the probes of a pool from a recorded set of candidates: those that carry most evidence per token.

What was chosen on which data is written beside the pool, so that figures can be reported on stacks and variants that
the choice did not see.
"""

import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy.special import ndtr, rel_entr

from weighbridge.errors import ConfigurationError
from weighbridge.probes import Level
from weighbridge.records import BundleIdentity, Record
from weighbridge.reference.bundle import OFFICIAL, Bundle
from weighbridge.stats.residuals import centred_difference, log_scale, own_top

Floats = NDArray[np.float64]
TOP_K = 20
LIKENESS_LIMIT = 0.5  # two probes whose residuals point the same way carry the same evidence twice
# The band of leads for text at temperature 0, in units of √2 times the noise that an unseen honest stack may have (docs/STATISTICS.md, Pools).
# Its lower edge is above that of an audit's band, since an audit knows noisier honest stacks than a choice has seen.
BAND = (2.5, 8.0)
STACK_MARGIN = 1.25
KEPT_LEAD = (
    0.5  # of its lead the reference's token keeps under every honest stack: where one moves so far, another may flip
)
FLIPS_ALLOWED = 0.01  # that an audit cannot rule out of an honest stack, however far the lead
ANSWERS = (2.0, 32.0)  # effective number of answers of a short-answer context: a small model keeps to no short list


class Chosen(Record):
    """One chosen probe."""

    id: str
    prompt_tokens: int
    evidence_per_token: float
    value: float = Field(description="log ratio of scales (L3, long), top-2 gap in nats (L4), effective answers (L5)")


class Selection(Record):
    """What was chosen, from what, and on which data; stands beside a pool as selection.json."""

    schema_: Literal["weighbridge/selection/1"] = Field(default="weighbridge/selection/1", alias="schema")
    level: Level
    rule: str
    candidates: BundleIdentity
    candidate_pools: dict[str, str] = Field(description="SHA-256 of each candidate pool")
    candidates_considered: int
    honest_stacks_seen: list[str]
    variants_seen: list[str]
    effective_sample_size: float = Field(description="of the chosen probes, from the likeness of their residuals")
    chosen: list[Chosen]

    model_config = Record.model_config | {"populate_by_name": True}


@dataclass(frozen=True)
class Candidates:
    """What a choice looks at; P one-token probes, B honest stacks, V variants, top-K tokens."""

    probe_ids: list[str]
    prompt_tokens: NDArray[np.int64]
    reference_nats: Floats
    token_ids: NDArray[np.int32]
    honest_nats: Floats
    variant_nats: Floats
    honest: list[str]
    variants: list[str]


def candidates_of(bundle: Bundle, levels: tuple[Level, ...], exclude: frozenset[str] = frozenset()) -> Candidates:
    """Read the candidates of the given levels from a bundle, without those that another pool holds already."""
    pools = [p for p in bundle.manifest.pools if p.level in levels and p.rendering == OFFICIAL]
    ids = [bundle.manifest.probe_ids[i] for pool in pools for i in pool.probes]
    ids = [probe_id for probe_id in ids if probe_id not in exclude]
    stacks = [
        (row, s) for row, s in enumerate(bundle.manifest.stacks)
        if s.id != bundle.manifest.reference_stack and all(p.id in s.pools for p in pools)
    ]  # fmt: skip
    honest = [(row, s.id) for row, s in stacks if s.departure is None]
    variants = [(row, s.id) for row, s in stacks if s.departure is not None]
    if not pools or not ids or not honest or not variants:
        raise ConfigurationError(
            f"the bundle {bundle.manifest.id} has no candidates for {'/'.join(levels)}, or no honest stack or variant beside the reference",
            "Record the candidates on at least one of each",
        )
    rows = np.array([bundle.row_index[i] for i in ids], np.int64)
    values = bundle.logprobs_nats[:, rows].astype(np.float64)
    return Candidates(
        probe_ids=ids,
        prompt_tokens=bundle.prompt_tokens[0, [bundle.probe_index[i] for i in ids]].astype(np.int64),
        reference_nats=values[bundle.stack_index[bundle.manifest.reference_stack]],
        token_ids=bundle.token_ids[rows],
        honest_nats=values[[row for row, _ in honest]],
        variant_nats=values[[row for row, _ in variants]],
        honest=[name for _, name in honest],
        variants=[name for _, name in variants],
    )


def log_scales(stack_nats: Floats, reference_nats: Floats) -> Floats:
    """X = log s of every stack on every probe, over the stack's own most likely tokens.

    Parameters
    ----------
    stack_nats : float array, shape (stacks, probes, K)
    reference_nats : float array, shape (probes, K)

    Returns
    -------
    float array, shape (stacks, probes)
    """
    columns, own = own_top(stack_nats, TOP_K)
    base = np.take_along_axis(np.broadcast_to(reference_nats, stack_nats.shape), columns, axis=-1)
    return log_scale(centred_difference(own, base))


def size_evidence(candidates: Candidates) -> Floats:
    """Evidence of each probe by size: the mean variant's log scale above the noisiest honest stack's, at least 0."""
    honest = log_scales(candidates.honest_nats, candidates.reference_nats).max(axis=0)
    variants = log_scales(candidates.variant_nats, candidates.reference_nats)
    return np.asarray(np.nan_to_num(np.maximum(variants - honest, 0.0).mean(axis=0)))


def likeness(candidates: Candidates, places: NDArray[np.int64]) -> Floats:
    """How alike the residuals of two probes are: the mean over variants of their cosine over common tokens.

    Parameters
    ----------
    candidates : Candidates
    places : int array, shape (n,)
        Of the probes that are compared.

    Returns
    -------
    float array, shape (n, n)
    """
    tokens, inverse = np.unique(candidates.token_ids[places, :TOP_K], return_inverse=True)
    inverse = inverse.reshape(len(places), -1)
    total = np.zeros((len(places), len(places)))
    known = np.zeros_like(total)
    for values in candidates.variant_nats[:, places]:
        residual = np.nan_to_num(centred_difference(values[:, :TOP_K], candidates.reference_nats[places, :TOP_K]))
        spread = np.zeros((len(places), len(tokens)), np.float32)
        np.put_along_axis(spread, inverse, residual.astype(np.float32), axis=1)
        norm = np.linalg.norm(spread, axis=1, keepdims=True)
        spread /= np.maximum(norm, 1e-9)
        total += spread @ spread.T
        known += (norm > 0) & (norm > 0).T
    return np.asarray(total / np.maximum(known, 1))


def effective_sample_size(alike: Floats) -> float:
    """n² / Σ ρ²: how many independent probes carry what these carry; scales are squares, so ρ stands squared.

    Parameters
    ----------
    alike : float array, shape (n, n)
        Correlations with 1 on the diagonal.
    """
    return float(alike.shape[0] ** 2 / np.square(alike).sum())


def select(bundle: Bundle, level: Level, count: int, exclude: frozenset[str] = frozenset()) -> Selection:
    """Choose the probes of one pool.

    Parameters
    ----------
    bundle : Bundle
        Candidates, recorded on at least one honest stack and one variant beside the reference.
    level : {"L3", "L4", "L5"}
    count : int
        How many at most.
    exclude : frozenset of str
        Probes that another pool holds already.

    Raises
    ------
    ConfigurationError
        If nothing fits the rule.
    """
    found = candidates_of(bundle, ("L5",) if level == "L5" else ("L3",), exclude)
    if level == "L3":
        rule = "largest log ratio of the mean variant's scale to the noisiest honest stack's, per prompt token"
        value = size_evidence(found)
        gains = (value / found.prompt_tokens)[None]
    elif level == "L4":
        rule = f"lead within {BAND[0]:g} to {BAND[1]:g} × √2 × {STACK_MARGIN} × the noisiest honest stack's noise, of which every honest stack leaves {KEPT_LEAD:.0%}; each is what tells most, in one request, for the variant that those before it tell least of"
        value, gains = _flips(found)
    elif level == "L5":
        rule = f"{ANSWERS[0]:g} to {ANSWERS[1]:g} effective answers; largest mean divergence of the variants less the largest of the honest stacks, per prompt token"
        value, gain = _short_answers(found)
        gains = (gain / found.prompt_tokens)[None]
    else:
        raise ConfigurationError(f"there is no rule for choosing probes of level {level}", "Choose L3, L4 or L5")
    fits = np.flatnonzero((gains > 0).any(axis=0))
    if not fits.size:
        raise ConfigurationError(
            f"none of {len(found.probe_ids)} candidates fits level {level}", "Record more candidates"
        )
    alike = likeness(found, fits)
    places = _greedy(gains[:, fits], alike, count)
    kept = fits[places].tolist()
    evidence = gains.mean(axis=0) / (found.prompt_tokens if level == "L4" else 1)
    pools = [p for p in bundle.manifest.pools if set(p.probes) & {bundle.probe_index[i] for i in found.probe_ids}]
    return Selection(
        level=level,
        rule=f"{rule}; likeness to those chosen before below {LIKENESS_LIMIT}",
        candidates=bundle.identity,
        candidate_pools={pool.id: pool.sha256 for pool in pools},
        candidates_considered=len(found.probe_ids),
        honest_stacks_seen=found.honest,
        variants_seen=found.variants,
        effective_sample_size=effective_sample_size(alike[np.ix_(places, places)]),
        chosen=[
            Chosen(id=found.probe_ids[i], prompt_tokens=int(found.prompt_tokens[i]), evidence_per_token=float(evidence[i]), value=float(value[i]))
            for i in sorted(kept, key=lambda i: found.probe_ids[i])
        ],
    )  # fmt: skip


def _greedy(gains: Floats, alike: Floats, count: int) -> list[int]:
    """Choose one after another what gains most for the variant that has least so far, little alike those before; shape of gains (variants, probes)."""
    kept: list[int] = []
    total, open_ = np.zeros(gains.shape[0]), np.ones(gains.shape[1], np.bool_)
    able = gains.max(axis=1) > 0
    while len(kept) < count and able.any():
        needy = int(np.where(able, total, np.inf).argmin())
        own = np.where(open_, gains[needy], 0.0)
        if own.max() <= 0:
            able[needy] = False
            continue
        # What tells of the others too is taken first among equals.
        best = int((own + np.where(own > 0, gains.mean(axis=0), 0.0)).argmax())
        kept.append(best)
        total += gains[:, best]
        open_ &= alike[best] < LIKENESS_LIMIT
        open_[best] = False
    return kept


def _leads(stacks_nats: Floats) -> Floats:
    """By how much the reference's likeliest token leads the likeliest other one, below 0 where it does not."""
    return np.asarray(stacks_nats[..., 0] - np.nanmax(stacks_nats[..., 1:], axis=-1))


def _flips(found: Candidates) -> tuple[Floats, Floats]:
    """The reference's lead at each probe, and the evidence that one answer is expected to be against honest stacks, of each variant.

    That is the divergence of two Bernoulli variables: whether a server of the variant, of the honest stacks' noise, gives another token,
    and whether an honest one does.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a stack that was not asked at a probe
        lead, honest, variants = (_leads(v) for v in (found.reference_nats, found.honest_nats, found.variant_nats))
        unit = STACK_MARGIN * float(np.sqrt(np.nanmean((honest - lead) ** 2, axis=1)).max())
    fits = (lead >= BAND[0] * unit) & (lead <= BAND[1] * unit)
    fits &= np.all(np.nan_to_num(honest, nan=-np.inf) >= KEPT_LEAD * lead, axis=0)
    allowed = np.maximum(FLIPS_ALLOWED, ndtr(-lead / unit))
    flips = ndtr(-np.nan_to_num(variants, nan=np.inf) / unit)
    divergence = rel_entr(flips, allowed) + rel_entr(1 - flips, 1 - allowed)
    return lead, np.asarray(np.where(fits & (flips > allowed), divergence, 0.0))


def _short_answers(found: Candidates) -> tuple[Floats, Floats]:
    p = np.exp(found.reference_nats)
    answers = np.exp(-(p * found.reference_nats).sum(axis=1))

    def divergence(stacks: Floats) -> Floats:
        return np.asarray(np.nansum(p * (found.reference_nats - stacks), axis=2))

    gain = divergence(found.variant_nats).mean(axis=0) - divergence(found.honest_nats).max(axis=0)
    return answers, np.where((answers >= ANSWERS[0]) & (answers <= ANSWERS[1]), np.maximum(gain, 0.0), 0.0)
