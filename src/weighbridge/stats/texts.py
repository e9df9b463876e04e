"""What one generated token says where no logprobs come with it.

A context has listed tokens and, last, all others together. Under a recorded stack each has a probability, at any temperature and
truncation. What comes back is a text, which may be that of several tokens. An engine's own noise at temperature 0 is taken for a very small
temperature (`noise_temperature`).
"""

import numpy as np
from numpy.typing import NDArray
from scipy import special

from weighbridge.stats.draws import at_temperature

Floats = NDArray[np.float64]
# Neighbours are so near that what lies between them is likelier by less than a nat in a hundred answers.
TEMPERATURES: tuple[float, ...] = tuple(np.geomspace(0.1, 2.0, 28).round(3).tolist())
# Ways in which servers leave out what is unlikely: nothing, by a share of the likeliest one's probability, by number, by mass.
TRUNCATIONS: tuple[tuple[str, float], ...] = (
    ("none", 0.0), ("min_p", 0.05), ("min_p", 0.1), ("top_k", 20), ("top_p", 0.95), ("top_p", 0.9),
)  # fmt: skip

_LEAST = 1e-12
_LARGEST = 600.0  # whose exponential is still finite


def noise_temperature(noise_nats: float) -> float:
    """The temperature at which a draw's noise has the standard deviation that noise of a logprob has at temperature 0.

    The difference of two Gumbel variables of scale β is logistic with the standard deviation βπ/√3; that of two logprobs with noise σ is
    √2 σ. So β = √6 σ / π. Beyond twice that deviation the logistic's tail is the heavier one.
    """
    return float(np.sqrt(6) / np.pi * noise_nats)


def flip_probability(lead_nats: Floats, noise_nats: float) -> Floats:
    """The chance that noise of each logprob lifts the second likeliest token above the likeliest.

    Parameters
    ----------
    lead_nats : float array
        Of the likeliest over the second.
    noise_nats : float
        Standard deviation of one logprob's noise, taken to be normal.
    """
    if noise_nats == 0:
        return np.where(np.asarray(lead_nats) == 0, 0.5, 0.0)
    return np.asarray(special.ndtr(-lead_nats / (np.sqrt(2) * noise_nats)))


def kept_tokens(tokens_nats: Floats) -> NDArray[np.bool_]:
    """Which tokens each of `TRUNCATIONS` keeps.

    Parameters
    ----------
    tokens_nats : float array, shape (stacks, tokens)
        At temperature 1; the last one is all that is not listed, which only ``none`` keeps.

    Returns
    -------
    bool array, shape (truncations, stacks, tokens)
    """
    order = np.argsort(-tokens_nats[:, :-1], axis=1, kind="stable")
    ranked = np.take_along_axis(tokens_nats[:, :-1], order, axis=1)
    before = np.cumsum(np.exp(ranked), axis=1) - np.exp(ranked)
    kept = np.zeros((len(TRUNCATIONS), *tokens_nats.shape), np.bool_)
    for i, (kind, value) in enumerate(TRUNCATIONS):
        if kind == "none":
            kept[i] = True
            continue
        if kind == "min_p":
            own = ranked >= ranked[:, :1] + np.log(value)
        elif kind == "top_k":
            own = np.broadcast_to(np.arange(ranked.shape[1]) < value, ranked.shape)
        else:
            own = before < value
        np.put_along_axis(kept[i, :, :-1], order, own, axis=1)
    return kept


def answer_log_likelihood(
    tokens_nats: Floats, members: NDArray[np.bool_], temperatures: tuple[float, ...], *, outlier_share: float
) -> Floats:
    """Logprob of one answer under every stack, temperature and truncation.

    Parameters
    ----------
    tokens_nats : float array, shape (stacks, tokens)
        The last one is all that is not listed.
    members : bool array, shape (tokens,)
        The tokens that the answer can have been.
    temperatures : tuple of float
    outlier_share : float
        With which the answer is one of temperature 1 with nothing left out, whatever else is supposed: so that no single answer rules
        anything out.

    Returns
    -------
    float array, shape (stacks, temperatures, truncations)
    """
    kept = kept_tokens(tokens_nats).astype(np.float64)
    out = np.empty((tokens_nats.shape[0], len(temperatures), len(TRUNCATIONS)))
    for t, temperature in enumerate(temperatures):
        scaled = at_temperature(tokens_nats.copy(), temperature)
        # Relative to the likeliest listed token: at a low temperature what is not listed may be all but everything.
        weights = np.exp(np.minimum(scaled - scaled[:, :-1].max(axis=1, keepdims=True), _LARGEST))
        total = np.einsum("rsk,sk->sr", kept, weights)
        own = np.einsum("rsk,sk->sr", kept[:, :, members], weights[:, members])
        out[:, t] = own / np.maximum(total, _LEAST)
    plain = np.exp(tokens_nats[:, members]).sum(axis=1)[:, None, None]
    mixed = (1 - outlier_share) * out + outlier_share * plain
    return np.asarray(np.log(np.maximum(mixed, _LEAST)), np.float32)
