"""Choosing the probes of a pool from a recorded set of candidates: those that carry most evidence per token.

What was chosen on which data is written beside the pool, so that figures can be reported on stacks and variants that
the choice did not see.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from weighbridge.errors import ConfigurationError
from weighbridge.probes import Level
from weighbridge.records import BundleIdentity, Record
from weighbridge.reference.bundle import OFFICIAL, Bundle
from weighbridge.stats.residuals import centred_difference, log_scale, own_top

Floats = NDArray[np.float64]
TOP_K = 20
LIKENESS_LIMIT = 0.5  # two probes whose residuals point the same way carry the same evidence twice
# The band of top-2 gaps for text at temperature 0, in units of √2 times the noise that an unseen honest stack may have
# (docs/STATISTICS.md, Pools): nearer, an honest stack may flip; further, no quantization does.
BAND = (2.5, 5.0)
STACK_MARGIN = 1.25
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


def likeness(candidates: Candidates) -> Floats:
    """How alike the residuals of two probes are: the mean over variants of their cosine over common tokens.

    Returns
    -------
    float array, shape (probes, probes)
    """
    probes = len(candidates.probe_ids)
    tokens, inverse = np.unique(candidates.token_ids[:, :TOP_K], return_inverse=True)
    inverse = inverse.reshape(probes, -1)
    total = np.zeros((probes, probes))
    for values in candidates.variant_nats:
        residual = np.nan_to_num(centred_difference(values[:, :TOP_K], candidates.reference_nats[:, :TOP_K]))
        spread = np.zeros((probes, len(tokens)), np.float32)
        np.put_along_axis(spread, inverse, residual.astype(np.float32), axis=1)
        spread /= np.maximum(np.linalg.norm(spread, axis=1, keepdims=True), 1e-9)
        total += spread @ spread.T
    return np.asarray(total / len(candidates.variant_nats))


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
        fits, evidence = value > 0, value / found.prompt_tokens
    elif level == "L4":
        value, fits, gain = _banded(found)
        rule = f"top-2 gap within {BAND[0]:g} to {BAND[1]:g} × √2 × {STACK_MARGIN} × the noisiest honest stack's gap noise, kept by every honest stack; most flips expected, per prompt token"
        evidence = gain / found.prompt_tokens
    elif level == "L5":
        value, fits, gain = _short_answers(found)
        rule = f"{ANSWERS[0]:g} to {ANSWERS[1]:g} effective answers; largest mean divergence of the variants less the largest of the honest stacks, per prompt token"
        evidence = gain / found.prompt_tokens
    else:
        raise ConfigurationError(f"there is no rule for choosing probes of level {level}", "Choose L3, L4 or L5")
    alike = likeness(found)
    kept: list[int] = []
    for i in np.argsort(-evidence, kind="stable").tolist():
        if len(kept) < count and fits[i] and (not kept or alike[i, kept].max() < LIKENESS_LIMIT):
            kept.append(i)
    if not kept:
        raise ConfigurationError(
            f"none of {len(found.probe_ids)} candidates fits level {level}", "Record more candidates"
        )
    pools = [p for p in bundle.manifest.pools if set(p.probes) & {bundle.probe_index[i] for i in found.probe_ids}]
    return Selection(
        level=level,
        rule=f"{rule}; likeness to those chosen before below {LIKENESS_LIMIT}",
        candidates=bundle.identity,
        candidate_pools={pool.id: pool.sha256 for pool in pools},
        candidates_considered=len(found.probe_ids),
        honest_stacks_seen=found.honest,
        variants_seen=found.variants,
        effective_sample_size=effective_sample_size(alike[np.ix_(kept, kept)]),
        chosen=[
            Chosen(id=found.probe_ids[i], prompt_tokens=int(found.prompt_tokens[i]), evidence_per_token=float(evidence[i]), value=float(value[i]))
            for i in sorted(kept, key=lambda i: found.probe_ids[i])
        ],
    )  # fmt: skip


def _gap_noise(found: Candidates) -> float:
    """The noisiest honest stack's noise of one logprob, from the gaps between the reference's two likeliest tokens."""
    gaps = found.honest_nats[:, :, 0] - found.honest_nats[:, :, 1]
    change = gaps - (found.reference_nats[:, 0] - found.reference_nats[:, 1])
    return float(np.sqrt(np.nanmean(change**2, axis=1) / 2).max())


def _banded(found: Candidates) -> tuple[Floats, NDArray[np.bool_], Floats]:
    from scipy.special import ndtr

    gap = found.reference_nats[:, 0] - found.reference_nats[:, 1]
    unit = np.sqrt(2) * STACK_MARGIN * _gap_noise(found)
    keeps = np.all(np.nan_to_num(found.honest_nats, nan=-np.inf).argmax(axis=2) == 0, axis=0)
    fits = (gap >= BAND[0] * unit) & (gap <= BAND[1] * unit) & keeps
    noise = np.exp(np.nanmean(log_scales(found.variant_nats, found.reference_nats), axis=1))
    return gap, fits, np.asarray(ndtr(-gap[None, :] / (np.sqrt(2) * noise[:, None])).mean(axis=0))


def _short_answers(found: Candidates) -> tuple[Floats, NDArray[np.bool_], Floats]:
    p = np.exp(found.reference_nats)
    answers = np.exp(-(p * found.reference_nats).sum(axis=1))

    def divergence(stacks: Floats) -> Floats:
        return np.asarray(np.nansum(p * (found.reference_nats - stacks), axis=2))

    gain = divergence(found.variant_nats).mean(axis=0) - divergence(found.honest_nats).max(axis=0)
    return answers, (answers >= ANSWERS[0]) & (answers <= ANSWERS[1]), np.maximum(gain, 0.0)
