"""The field's methods, from their published formulas, on one-token answers; each decides at one error rate.

Distributions are arrays of shape (probes, tokens): the reference's 128 likeliest tokens of each probe, and all others as one. Samples are
arrays of shape (audits, probes, samples) of indices into them. Every function returns the share of audits that it rejects.
"""

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Generator = np.random.Generator
NULL_DRAWS = 4000


def sample(probabilities: Floats, audits: int, each: int, generator: Generator) -> Ints:
    """Draw tokens; shape (audits, probes, each)."""
    cumulative = np.cumsum(probabilities, axis=1)
    cumulative /= cumulative[:, -1:]
    uniform = generator.random((audits, probabilities.shape[0], each))
    return np.stack([np.searchsorted(c, uniform[:, i]) for i, c in enumerate(cumulative)], axis=1).astype(np.int64)


def counts(samples: Ints, tokens: int) -> Ints:
    """How often each token stands in the samples of each probe; shape (audits, probes, tokens)."""
    audits, probes, _ = samples.shape
    place = (np.arange(audits)[:, None, None] * probes + np.arange(probes)[None, :, None]) * tokens + samples
    return np.bincount(place.ravel(), minlength=audits * probes * tokens).reshape(audits, probes, tokens)


def hamming_mmd(ours: Ints, theirs: Ints, tokens: int) -> Floats:
    """The Hamming-kernel MMD of Model Equality Testing (Gao et al. 2025, section 4) for answers of one token.

    `power.py` holds it against the authors' own package.
    """
    one, other = counts(ours, tokens).astype(np.float64), counts(theirs, tokens).astype(np.float64)
    n, m = ours.shape[2], theirs.shape[2]
    probes = ours.shape[1]
    # Their estimate leaves out a sample's comparison with itself, and pairs of different prompts altogether.
    within = (one * (one - 1)).sum(axis=(1, 2)) / (probes * n * n - probes * n) if n > 1 else np.zeros(len(one))
    within_other = (
        (other * (other - 1)).sum(axis=(1, 2)) / (probes * m * m - probes * m) if m > 1 else np.zeros(len(one))
    )
    between = (one * other).sum(axis=(1, 2)) / (probes * n * m)
    return np.asarray(within + within_other - 2 * between)


def model_equality_testing(
    reference: Floats, served: Floats, each: int, audits: int, alpha: float, generator: Generator
) -> float:
    """Power of the MMD test with its parametric bootstrap: both samples drawn from the reference."""
    tokens = reference.shape[1]

    def statistic(distribution: Floats, how_many: int) -> Floats:
        return hamming_mmd(
            sample(distribution, how_many, each, generator), sample(reference, how_many, each, generator), tokens
        )

    threshold = np.quantile(statistic(reference, NULL_DRAWS), 1 - alpha, method="higher")
    return float((statistic(served, audits) > threshold).mean())


def g_test(reference: Floats, served: Floats, each: int, audits: int, alpha: float, generator: Generator) -> float:
    """Power of the one-sample likelihood-ratio (G) test against the reference's distributions, simulated null."""
    tokens = reference.shape[1]
    expected = np.maximum(reference, 1e-12) * each

    def statistic(distribution: Floats, how_many: int) -> Floats:
        seen = counts(sample(distribution, how_many, each, generator), tokens).astype(np.float64)
        return np.asarray(2 * (seen * np.log(np.where(seen > 0, seen, 1.0) / expected)).sum(axis=(1, 2)))

    threshold = np.quantile(statistic(reference, NULL_DRAWS), 1 - alpha, method="higher")
    return float((statistic(served, audits) > threshold).mean())


def rank_uniformity(
    reference: Floats, served: Floats, audits: int, alpha: float, generator: Generator, references: int = 100
) -> float:
    """Power of the rank-based uniformity test (Zhu et al. 2026): randomised rank of the log rank, Cramér-von Mises."""
    rank = np.log1p(np.argsort(np.argsort(-reference, axis=1, kind="stable"), axis=1).astype(np.float64))
    probes = np.arange(reference.shape[0])
    rejected = 0
    for _ in range(audits):
        own = rank[probes, sample(served, 1, 1, generator)[0, :, 0]]
        theirs = rank[probes[:, None], sample(reference, 1, references, generator)[0]]
        uniform = generator.random(len(probes))
        r = ((own[:, None] > theirs).sum(axis=1) + uniform * (own[:, None] == theirs).sum(axis=1)) / references
        rejected += stats.cramervonmises(r, "uniform").pvalue < alpha
    return float(rejected / audits)


def greedy_margin(reference_nats: Floats, answers: Ints, clip: float = 0.5) -> Floats:
    """Token-DiFR's margin at temperature 0 (Karvonen et al. 2025): the reference's lead over the token that was answered."""
    lead = reference_nats.max(axis=1) - np.take_along_axis(reference_nats, answers[:, None], axis=1)[:, 0]
    return np.asarray(np.minimum(lead, clip))


def tracking_statistic(one: Floats, other: Floats) -> float:
    """Log-probability tracking (Chauvin et al. 2026): mean absolute difference of a token's mean logprob in two windows.

    Lists of shape (requests, tokens) of one prompt over the same tokens; what a list lacks counts as its smallest entry.
    """

    def filled(values: Floats) -> Floats:
        return np.where(np.isfinite(values), values, np.nanmin(values, axis=1, keepdims=True))

    return float(np.abs(filled(one).mean(axis=0) - filled(other).mean(axis=0)).mean())


def tracking_p_value(one: Floats, other: Floats, permutations: int, generator: Generator) -> float:
    """Its permutation test over the requests of both windows, with the + 1 that keeps a p-value above 0."""
    observed = tracking_statistic(one, other)
    both = np.concatenate([one, other])
    larger = 0
    for _ in range(permutations):
        order = generator.permutation(len(both))
        larger += tracking_statistic(both[order[: len(one)]], both[order[len(one) :]]) >= observed - 1e-12
    return (larger + 1) / (permutations + 1)
