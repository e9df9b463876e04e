"""How strongly the logprobs speak for each cause: an e-value and a Bayes factor, both against the honest stacks, kept apart.

An e-value needs no model of the answers: if the endpoint is honest, it exceeds 1/α with a chance of at most α. A Bayes factor does
need one (`weighbridge.stats.bayes`) and says how much better a cause explains the answers than the honest stacks do. Neither is a
probability of guilt, and both are conditional on the list.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import special

from weighbridge.judge.library import Library, Null, travels
from weighbridge.judge.sizes import WeightEvidence, sampling_process, size_process
from weighbridge.records import Cause, Finite, Policy, Record
from weighbridge.reference.bundle import StackRecord
from weighbridge.stats.bayes import log_scale_evidence, normal_log_density, tempering
from weighbridge.stats.evidence import mixture

Floats = NDArray[np.float64]
LOG10 = float(np.log(10))

# How far ŝ of a recorded departure may be off on another engine (standard deviation of its logarithm): little where weights are
# changed; more where the engine's own noise decides how activations or a KV cache are rounded.
BETWEEN_SD_TRAVELS, BETWEEN_SD_OTHERWISE = 0.1, 0.35
BETWEEN_DEGREES = 8
MOST_NATS = 5.0  # beyond every wrong prompt that was measured
WIDE_POINTS = 25

LABELS: dict[str, str] = {
    "kv_cache": "8- or 4-bit KV cache", "fp8": "8-bit float weights", "int8": "8-bit integer weights", "int5-6": "5- to 6-bit weights",
    "int4": "4-bit weights", "int2-3": "weights of at most 3 bits", "other_model": "another model (of those recorded)",
    "template": "another chat template (of those recorded)", "sampling": "a temperature or truncation that sharpens or flattens",
    "hidden_prompt": "a prompt added to it (size alone)", "none_of_these": "none of these",
}  # fmt: skip
_GROUPS = {"int6": "int5-6", "int5": "int5-6", "int3": "int2-3", "int2": "int2-3"}


class CauseEvidence(Record):
    """One row: a cause, and what the answers say for it against the honest stacks."""

    cause: Cause
    key: str
    label: str
    recorded: list[str]
    log10_e_value: Finite
    log10_bayes_factor: Finite | None
    nearest: str | None = None


def group_of(stack: StackRecord) -> str:
    """The row that a recorded departure belongs to."""
    if stack.departure == "precision":
        name = stack.departure_class or "precision"
        return _GROUPS.get(name, name)
    return str(stack.departure)


def weigh_causes(library: Library, evidence: WeightEvidence, policy: Policy) -> list[CauseEvidence]:
    """Every cause that logprobs can speak for, strongest Bayes factor first; *none of these* last."""
    null, features = evidence.null, evidence.features
    honest = log_scale_evidence(features.log_scales, null.means, null.sd, null.between_sd, null.degrees)
    rows: dict[str, list[tuple[StackRecord, float, float]]] = {}
    for stack, log_e, log_bf in _of_variants(library, evidence, policy, honest):
        rows.setdefault(group_of(stack), []).append((stack, log_e, log_bf))
    out = []
    for key, members in rows.items():
        values = np.array([[log_e, log_bf] for _, log_e, log_bf in members])
        log_e, log_bf = special.logsumexp(values, axis=0) - np.log(len(members))
        out.append(
            CauseEvidence(
                cause=members[0][0].departure or "none_of_these", key=key, label=LABELS.get(key, key),
                recorded=list(dict.fromkeys(s.variant or s.id for s, _, _ in members)),
                log10_e_value=float(log_e / LOG10), log10_bayes_factor=float(log_bf / LOG10), nearest=members[int(np.argmax(values[:, 1]))][0].id,
            )
        )  # fmt: skip
    sampling = float(sampling_process(null, features, policy)[-1])
    wide = np.linspace(null.mean + np.log(1.2), np.log(MOST_NATS), WIDE_POINTS)
    log_wide = log_scale_evidence(features.log_scales, wide, null.sd, null.between_sd, null.degrees) - honest
    out += [
        _row("sampling", sampling, None),
        _row("hidden_prompt", float(evidence.log_size[-1]), log_wide),
    ]
    out.sort(key=lambda row: -(row.log10_bayes_factor if row.log10_bayes_factor is not None else row.log10_e_value))
    # Some recorded thing or an honest stack is served: the least of the e-values against each of them is one against all.
    none = float(min(evidence.log_total[-1], evidence.log_remainder[:, -1].min()))
    return [*out, _row("none_of_these", none, log_wide)]


def _row(cause: Cause, log_e: float, log_bf: float | None) -> CauseEvidence:
    return CauseEvidence(
        cause=cause, key=cause, label=LABELS[cause], recorded=[], log10_e_value=log_e / LOG10,
        log10_bayes_factor=None if log_bf is None else log_bf / LOG10,
    )  # fmt: skip


@dataclass(frozen=True)
class _Model:
    """What a recorded departure would show, and how far its likelihood ratio may be trusted."""

    mean: float
    sd: float
    between_sd: float
    fisher_mean: float | None  # None where its direction does not carry over to another engine
    fisher_sd: float
    power: float


@lru_cache(maxsize=4)
def _models(library: Library, null: Null) -> list[_Model]:
    """One for each variant; the same for every audit against this null."""
    out = []
    for w, stack in enumerate(library.variants):
        blurred = travels(stack) and bool(np.isfinite(null.travelled_log_scales[w]).any())
        sizes = null.travelled_log_scales[w] if blurred else library.variant_log_scales[w][None]
        mean, sd = float(np.nanmean(sizes)), max(float(np.nanstd(sizes)), null.sd)
        ratios = normal_log_density(null.log_scales, mean, sd) - normal_log_density(null.log_scales, null.mean, null.sd)
        z, z_sd = None, float("nan")
        if blurred:
            z = float(np.nanmean(null.travelled_fisher[w]))
            z_sd = max(float(np.nanstd(null.travelled_fisher[w])), float(null.fisher_sd[w]) / 2)
            ratios = ratios + np.nan_to_num(_ratio(null.fisher[w], z, z_sd, float(null.fisher_sd[w])))
        out.append(
            _Model(mean, sd, BETWEEN_SD_TRAVELS if blurred else BETWEEN_SD_OTHERWISE, z, z_sd, tempering(ratios))
        )
    return out


def _of_variants(
    library: Library, evidence: WeightEvidence, policy: Policy, honest: float
) -> Iterator[tuple[StackRecord, float, float]]:
    """Each recorded departure with its log e-value and tempered log Bayes factor."""
    null, features = evidence.null, evidence.features
    for w, (stack, model) in enumerate(zip(library.variants, _models(library, null), strict=True)):
        multiple = float(np.exp(model.mean - null.mean))
        parts = [np.zeros_like(evidence.log_size)]
        if multiple > 1:
            parts = [size_process(null, features.log_scales, policy, (multiple,), (1.0,))]
        means = np.array([model.mean])
        log_bf = log_scale_evidence(features.log_scales, means, model.sd, model.between_sd, BETWEEN_DEGREES) - honest
        if model.fisher_mean is not None:
            parts.append(evidence.log_by_variant[w])
            ratio = _ratio(features.fisher[w], model.fisher_mean, model.fisher_sd, float(null.fisher_sd[w]))
            log_bf += float(np.nansum(ratio))
        yield stack, float(mixture(np.array(parts))[-1]), model.power * log_bf


def _ratio(fisher: Floats, mean: float, sd: float, honest_sd: float) -> Floats:
    """Log density of a cosine's transform under a departure, less that under an honest stack, whose mean is 0."""
    return normal_log_density(fisher, mean, sd) - normal_log_density(fisher, 0.0, honest_sd)
