"""Tokens that were drawn, held against the distribution that they are said to be drawn from.

A list of logprobs divides the vocabulary into its tokens and all others together; what was drawn is one of these cells. Under the
list's own distribution the likelihood ratio of any other distribution over the cells has mean 1, so products over draws are
e-processes (Ville 1939; Grünwald, de Heide and Koolen 2024, JRSS B 86).
"""

import numpy as np
from numpy.typing import NDArray
from scipy import special

Floats = NDArray[np.float64]
OTHERS = 1000  # tokens among which the share of what is not listed is divided, where a temperature is put on it
_LEAST = 1e-12


def cell_logprobs(listed_nats: Floats) -> Floats:
    """Logprobs of the listed tokens and, last, of all others together.

    Parameters
    ----------
    listed_nats : float array, shape (n, k)
        NaN where a list is shorter than k.

    Returns
    -------
    float array, shape (n, k + 1)
    """
    listed = np.where(np.isfinite(listed_nats), listed_nats, -np.inf)
    rest = np.log(np.maximum(1 - np.exp(listed).sum(axis=1), _LEAST))
    cells = np.concatenate([listed, rest[:, None]], axis=1)
    return np.asarray(cells - special.logsumexp(cells, axis=1, keepdims=True))


def at_temperature(cells_nats: Floats, temperature: float) -> Floats:
    """The same distribution at another temperature; what is not listed is taken to be `OTHERS` equal tokens.

    Parameters
    ----------
    cells_nats : float array, shape (n, k + 1)
        From `cell_logprobs`.
    temperature : float
        Greater than 0.
    """
    scaled = cells_nats / temperature
    scaled[:, -1] = (cells_nats[:, -1] - np.log(OTHERS)) / temperature + np.log(OTHERS)
    return np.asarray(scaled - special.logsumexp(scaled, axis=1, keepdims=True))


def cut_off(cells_nats: Floats, *, least_of_likeliest: float, listed_only: bool) -> Floats:
    """The same distribution without what is unlikely.

    Parameters
    ----------
    cells_nats : float array, shape (n, k + 1)
        From `cell_logprobs`.
    least_of_likeliest : float
        Tokens with a smaller share of the likeliest one's probability are left out, as ``min_p`` does; 0 for none.
    listed_only : bool
        Whether what is not listed is left out, as a ``top_k`` of about the list's length does.
    """
    kept = cells_nats >= cells_nats.max(axis=1, keepdims=True) + np.log(max(least_of_likeliest, _LEAST))
    # What is not listed is many tokens, each less likely than the listed ones.
    kept[:, -1] = not listed_only and least_of_likeliest == 0
    cut = np.where(kept, cells_nats, -np.inf)
    return np.asarray(cut - special.logsumexp(cut, axis=1, keepdims=True))


def log_likelihood(cells_nats: Floats, drawn: NDArray[np.int64]) -> Floats:
    """Logprob of each draw; shape (n,). `drawn` holds cells, the last one for a token that is not listed."""
    return np.asarray(np.maximum(np.take_along_axis(cells_nats, drawn[:, None], axis=1)[:, 0], np.log(_LEAST)))


def temperature_interval(
    cells_nats: Floats, drawn: NDArray[np.int64], *, drop_nats: float
) -> tuple[float, float, float]:
    """The temperature, relative to the list's, under which the draws are likeliest, and those less likely by at most `drop_nats`.

    Only draws of listed tokens are used, given that one was: how many others there are is not known.

    Returns
    -------
    tuple of float
        Estimate, lower and upper limit, on a grid from 0.02 to 10.
    """
    grid = np.geomspace(0.02, 10.0, 125)
    listed = drawn < cells_nats.shape[1] - 1
    cells_nats, drawn = cells_nats[listed].copy(), drawn[listed]
    cells_nats[:, -1] = -np.inf
    values = np.array([log_likelihood(at_temperature(cells_nats, float(t)), drawn).sum() for t in grid])
    near = grid[values >= values.max() - drop_nats]
    return float(grid[int(values.argmax())]), float(near.min()), float(near.max())


def flip_log_e(flips: int, draws: int, *, honest_share: float, shares: tuple[float, ...]) -> float:
    """Log e-value against "at most `honest_share` of the draws are not the likeliest token", a mean over larger shares."""
    logs = [
        flips * np.log(share / honest_share) + (draws - flips) * np.log((1 - share) / (1 - honest_share))
        for share in shares
    ]
    return float(special.logsumexp(logs) - np.log(len(logs)))
